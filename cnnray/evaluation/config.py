"""What an evaluation is told: every field is a flag of jobs/evaluate.py and a key of its YAML."""

from dataclasses import dataclass
from typing import Literal

from cnnray import flags
from cnnray.images import storage
from cnnray.models import engines
from cnnray.prediction.config import PredictConfig

Split = Literal["auto", "all", "train", "validation", "test"]

PREDICTIONS = "predictions"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a bundle on labelled images, and write a report; or, with --check-data, look for what is wrong with the
    images."""

    data: str
    """Labelled images: a folder or s3:// prefix of class folders (or of train, validation and test with class folders
    in each), a CSV, JSONL or Parquet table with the columns uri and label, or the manifest.parquet of a training."""
    bundle: str | None = None
    """Folder or s3:// prefix of the bundle; not needed with --check-data."""
    output: str | None = None
    """Folder or s3:// prefix for the report; not needed with --check-data. An evaluation that was interrupted goes on
    when it is given the same output."""
    split: Split = "auto"
    """Which images, where the data have splits: train, validation, test or all; auto: test, or where there are none
    validation (with --calibrate validation first)."""
    engine: str = "auto"
    """What runs the network (see jobs/predict.py)."""
    batch_size: int = engines.BATCH_SIZE
    """Images that the network is given at once, at most."""
    max_workers: int | None = None
    """Workers; null: what fits the cluster."""
    cpus_per_worker: float | None = None
    """CPUs, and so threads, of each worker; null: 1, or with GPUs the node's share."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; null: 1 where the cluster has GPUs and the engine is keras, else 0."""
    wait_minutes: float | None = None
    """Minutes that the job waits for nodes that the cluster lacks; null: none at its start, and 10 where nodes are
    lost while it works."""
    calibrate: bool = False
    """Write the temperature that fits these images into the bundle: its confidences are then as often right as they
    say. To be done with images that the network was not trained on; the engine is then keras, or one of float32."""
    wanted_accuracy: float = 0.99
    """The report names the confidence from which on answers are so often right."""
    samples: int = 16
    """Images in each of the report's grids, at most 100."""
    data_checks: bool = True
    """Whether the report says what is wrong with the data (see --check-data); of at most 50,000 images."""
    retry_errors: bool = False
    """Run again those parts of an earlier evaluation in which images could not be read."""
    compare: str | None = None
    """The metrics.json of another evaluation of the same images, to compare with."""
    max_drop: float = 0.0
    """With --compare: by how much accuracy may be lower than there; where it is lower still, the exit code is 1."""
    check_data: bool = False
    """Only look for images in two splits or under two labels, unreadable ones, odd sizes and small classes."""
    overwrite: bool = False
    """Whether another evaluation in the output is replaced."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        if not 1 <= self.samples <= 100:
            raise ValueError(f"--samples must be 1 to 100, not {self.samples}.")
        flags.check_share(self, "wanted_accuracy", "max_drop")
        flags.make_absolute(self, "data", "bundle", "output", "compare")
        if not self.check_data:
            for flag in ("bundle", "output"):
                if getattr(self, flag) is None:
                    raise ValueError(f"--{flag} is needed, unless with --check-data.")
            if f"{self.output}/".startswith(f"{self.data}/"):
                raise ValueError(f"--output {self.output} lies in --data {self.data}, and would be taken for data.")
            if self.output == self.bundle:
                raise ValueError("--output is the bundle itself: give another folder.")
            _ = self.predicting("")  # which checks the flags that it shares
            rounded = [name for name, runner in engines.RUNNERS.items() if runner.tolerance is None]
            if self.calibrate and self.engine in rounded:
                raise ValueError(f"--calibrate needs finer probabilities than those of --engine {self.engine}.")

    def predicting(self, manifest: str) -> PredictConfig:
        """The prediction run over a manifest that gives this evaluation its answers."""
        assert self.bundle is not None
        assert self.output is not None
        return PredictConfig(
            bundle=self.bundle,
            input=manifest or self.data,
            output=storage.join(self.output, PREDICTIONS),
            # int8's probabilities are too coarse to fit a temperature to.
            engine=engines.KERAS if self.calibrate and self.engine == "auto" else self.engine,
            probabilities=True,
            batch_size=self.batch_size,
            max_workers=self.max_workers,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
            wait_minutes=self.wait_minutes,
            max_error_fraction=1.0,
            retry_errors=self.retry_errors,
            overwrite=self.overwrite,
        )
