"""A training as a list of phases, each with its learning rate, its epochs, and what of the network it trains."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a training; the optimizer and the schedule begin anew with it."""

    name: str
    """Name of the phase in progress lines and history."""
    epochs: int | None = None
    """Passes over the training images; null: --epochs."""
    learning_rate: float | None = None
    """Step size of the optimizer; null: --learning-rate."""
    trainable: float = 1.0
    """Share of the backbone's layers that are trained, those nearest to the head; 0: the head alone. The others keep
    their weights, and their batch norms their statistics."""
    sparsity: float = 0.0
    """Share of each kernel's weights that become zero, the smallest ones, over the first half of the phase, while the
    others go on learning. Zeros of earlier phases stay."""

    @property
    def passes(self) -> int:
        """The epochs of a phase of `DecidedConfig.resolved_phases`, where they are never null."""
        assert self.epochs is not None
        return self.epochs

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence.
        """
        if not self.name:
            raise ValueError("--phases: each needs a name.")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"--phases: {self.name} has {self.epochs} epochs; at least 1 is needed.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(
                f"--phases: {self.name} has the learning rate {self.learning_rate}; more than 0 is needed."
            )
        if not 0 <= self.trainable <= 1:
            raise ValueError(f"--phases: trainable of {self.name} must be 0 to 1, not {self.trainable}.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"--phases: sparsity of {self.name} must be at least 0 and less than 1.")


Preset = Literal["head-first", "article", "prune"]
PRESETS: dict[str, tuple[Phase, ...]] = {
    # Kumar et al. 2022: a random head's first gradients would distort the backbone.
    "head-first": (
        Phase(name="head", learning_rate=3e-3, trainable=0.0),
        Phase(name="all", learning_rate=1e-3),
    ),
    "article": (
        Phase(name="head", learning_rate=1e-3, trainable=0.0),
        Phase(name="top 20 %", learning_rate=1e-4, trainable=0.2),
        Phase(name="top 50 %", learning_rate=1e-5, trainable=0.5),
    ),
    "prune": (
        Phase(name="dense"),
        Phase(name="prune to 50 %", sparsity=0.5),
        Phase(name="prune to 80 %", sparsity=0.8),
    ),
}


def sparsity_at(step: int, steps: int, before: float, target: float) -> float:
    """The share of zeros after some steps of a phase: cubic until half of them (Zhu and Gupta 2017).

    Args:
        step: steps of the phase so far.
        steps: of the phase.
        before: the share at its beginning.
        target: the share at its half, and from there on.
    """
    left = max(0.0, 1 - step / max(1, steps // 2))
    return target + (before - target) * left**3


def prunes_at(step: int, steps: int) -> bool:
    """Whether to choose the zeros again before this step: about twenty times until half of the phase, and at half."""
    half = max(1, steps // 2)
    return step == half or (step < half and step % max(1, half // 20) == 0)
