"""The configs of a run whose flags are decided: first by its images, then by the cluster that it runs on."""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cnnray import configs
from cnnray.configs import rules
from cnnray.images.geometry import Geometry
from cnnray.models.architectures import Head
from cnnray.models.augment import Strength
from cnnray.training.config import TrainConfig
from cnnray.training.phases import PRESETS, Phase
from cnnray.training.recipe_config import Precision, Selection


@dataclass(frozen=True, kw_only=True)
class DecidedConfig(TrainConfig):
    """A config whose network and recipe are decided (see `decisions.decide`)."""

    multi_label: bool
    architecture: str
    head: Head
    image_size: int | str
    dropout: float
    augment: Strength
    epochs: int = field(metadata=rules(resumable=True))
    batch_size: int
    learning_rate: float
    weight_decay: float
    average: float
    label_smoothing: float
    select: Selection

    @property
    def geometry(self) -> Geometry:
        """How images become pixels for validation; training has other cuts, too."""
        return Geometry.of(self.image_size, self.resize, self.decode_size)

    @property
    def resolved_phases(self) -> tuple[Phase, ...]:
        """The phases, each with its epochs, its learning rate, and at least the zeros of the one before."""
        phases: list[Phase] | tuple[Phase, ...]
        if self.phases is None:
            phases = (Phase(name="all"),)
        else:
            phases = PRESETS[self.phases] if isinstance(self.phases, str) else self.phases
        sparsities = itertools.accumulate((phase.sparsity for phase in phases), max)
        return tuple(
            replace(
                phase,
                epochs=phase.epochs or self.epochs,
                learning_rate=phase.learning_rate or self.learning_rate,
                sparsity=sparsity,
            )
            for phase, sparsity in zip(phases, sparsities, strict=True)
        )

    @property
    def all_epochs(self) -> int:
        """The epochs of all phases together."""
        return sum(phase.passes for phase in self.resolved_phases)


@dataclass(frozen=True, kw_only=True)
class PlannedConfig(DecidedConfig):
    """A config in which nothing is left to be decided (see `plan.planned`): what a run is trained with."""

    max_workers: int = field(metadata=rules(resumable=True))
    gpus_per_worker: float = field(metadata=rules(resumable=True))
    precision: Precision


DECIDED: tuple[str, ...] = tuple(DecidedConfig.__annotations__)
"""The fields that are decided by the images where they are null."""
PLANNED: tuple[str, ...] = tuple(PlannedConfig.__annotations__)
"""The fields that are decided by the cluster where they are null."""


_BEFORE = {"multi_label": False, "select": "val_accuracy"}
"""What runs of versions without these fields did."""


def differences(config: TrainConfig, earlier: Mapping[str, Any], fixed: Collection[str] = ()) -> list[str]:
    """The flags in which a config asks for another training than an earlier run did.

    A flag that is null and would be decided takes the earlier run's value.

    Args:
        config: of the new run.
        earlier: of the earlier run, by field (see `configs.load`).
        fixed: fields that may not differ although they are resumable.
    """
    stated = [(config.warmup_epochs, config.warmup_steps), (config.decay_epochs, config.decay_steps)]
    derived = any(lengths == (None, None) for lengths in stated)
    if config.phases is not None or (config.schedule == "cosine" and derived):
        # The learning rate of each step, or what it trains, depends on how many there are.
        fixed = {"epochs", *fixed}
    earlier = _BEFORE | dict(earlier)
    undecided = {name: None for name in DECIDED + PLANNED if getattr(config, name) is None}
    return configs.differences(config, {**earlier, **undecided}, fixed)
