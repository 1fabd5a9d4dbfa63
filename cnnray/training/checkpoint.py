"""Checkpoints: what a run needs to go on, in a folder that `ray.train.report` keeps.

    bundle/               a bundle with the weights of this moment
    state.npz             the optimizer's variables, and the weights where the bundle has their mean
    progress.json         `TrainingState`
    bad_images-R.jsonl    images that worker R could not read, where there were any

Random seeds and the order of the images need no state: they are functions of (seed, epoch, step, worker).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnray.models import bundle
from cnnray.models.bundle import BundleInfo
from cnnray.training.epoch import Sums

if TYPE_CHECKING:
    from cnnray.training.step import Steps

BUNDLE = "bundle"
_STATE = "state.npz"
PROGRESS = "progress.json"

BadImages = dict[int, dict[str, Any]]
"""By id: `id`, `uri` and `error` of images that could not be read."""


@dataclass(kw_only=True)
class TrainingState:
    """How far a run is. Everything is the same on all workers, but for `seen`, which rank 0 restores."""

    phase: int = 0
    """Index of the current phase."""
    phase_epoch: int = 0
    """Index of the current epoch in its phase."""
    epoch: int = 0
    """Index of the current epoch over all phases; equal to the number of finished ones."""
    step: int = 0
    """The next step of the epoch."""
    sums: Sums = field(default_factory=Sums)
    """Over the steps of this epoch so far."""
    order: int = 1
    """See `epoch.Epoch`. Versions up to 0.2 did not state it."""
    lanes: int = 1
    """See `epoch.LanesEpoch`."""
    seen: list[int] = field(default_factory=lambda: [0, 0, 0])
    """`epoch.tally` of the ids of this epoch so far, over all workers."""
    epoch_seconds: float = 0.0
    """Spent on the steps of this epoch so far."""
    images: float = 0.0
    """Trained on since the run began, without each process's first step."""
    seconds: float = 0.0
    """The time that these took."""
    seconds_to_first_step: float = 0.0
    """From the start of the job to the end of the first step."""
    stopped: bool = False
    """Whether a callback ended the last phase."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """The logs of each finished epoch."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    """State of the callbacks."""

    @property
    def begins_phase(self) -> bool:
        """Whether nothing of the phase is done."""
        return self.phase_epoch == 0 and self.step == 0


def write(folder: Path, steps: "Steps", info: BundleInfo, progress: TrainingState) -> None:
    """Write a checkpoint's folder, but for the bad images."""
    bundle.save(steps.inference, info, folder / BUNDLE)
    state: dict[str, Any] = steps.state()
    np.savez(folder / _STATE, **state)
    (folder / PROGRESS).write_text(json.dumps(asdict(progress)))


def write_bad_images(folder: Path, rank: int, bad_images: BadImages) -> None:
    """Write the images that a worker could not read."""
    lines = [json.dumps(row) + "\n" for row in bad_images.values()]
    (folder / f"bad_images-{rank}.jsonl").write_text("".join(lines))


def read_bad_images(lines_of_files: Iterable[bytes]) -> BadImages:
    """The union of several workers' files."""
    rows = [json.loads(line) for lines in lines_of_files for line in lines.splitlines()]
    return {row["id"]: row for row in rows}


def read_progress(folder: Path) -> TrainingState:
    """How far a checkpoint is."""
    values = json.loads((folder / PROGRESS).read_text())
    return TrainingState(**values | {"sums": Sums(**values["sums"])})


def restore(folder: Path, steps: "Steps", progress: TrainingState) -> None:
    """Load a checkpoint's weights, and its optimizer where the phase that has begun is that of the checkpoint."""
    with np.load(folder / _STATE, allow_pickle=False) as state:
        steps.load(str(folder / BUNDLE / "model.keras"), dict(state), optimizer=not progress.begins_phase)
