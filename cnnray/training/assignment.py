"""What the driver tells the workers."""

from dataclasses import dataclass
from typing import Any

from cnnray.models.bundle import BundleInfo
from cnnray.training.config import TrainConfig

TENSORBOARD, HISTORY = "tensorboard", "history.csv"
"""What the workers themselves write below the output."""
CONFIG = "config.yaml"
"""In the output: the resolved flags."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One run, as its workers are told of it."""

    config: TrainConfig
    info: BundleInfo
    """Of the bundle to come, without metrics."""
    manifest: str
    """Where the manifest is."""
    weights: str | None
    """File of weights that the backbone begins with."""
    threads: int
    """TensorFlow threads of a worker."""
    decode_cpus: float
    """CPUs of a decoding task."""
    stream_bytes: int
    """Object store that one worker's stream may fill."""
    cached: dict[str, list[Any]]
    """By split: references to decoded blocks; empty where images are streamed."""
    started: float
    """When the job began, in seconds since the epoch."""
