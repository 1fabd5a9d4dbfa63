"""What a training run is told: every field is a flag of jobs/train.py and a key of its YAML."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cnnray import flags
from cnnray.images.decode import ResizeRule
from cnnray.models import architectures

LARGEST_IMAGE_SIZE = 4096

Precision = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adam", "sgd"]
Cache = Literal["auto", "memory", "none"]

# Another value of these gives another way of running the same training, not another training.
_FREE_ON_RESUME = {
    "epochs",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "decode_cpus",
    "data_checks",
    "cache",
    "max_bad_fraction",
    "max_failures",
    "overwrite",
    "output",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a classifier on labelled images and leave a bundle."""

    data: str
    """Labelled images: a folder (or s3:// prefix) with one sub-folder a class, perhaps below train/ and
    validation/, or a CSV, JSONL or Parquet table with the columns uri and label, or Parquet with the images in it."""
    output: str
    """Folder or s3:// prefix for the bundle and all else that the run leaves. A run that was interrupted goes on
    when it is given the same output."""
    validation: str | None = None
    """Labelled images to validate on, in the same forms as --data."""
    validation_fraction: float = 0.2
    """Share of each class that is kept for validation where the data brings no validation images."""
    architecture: str = "vgg_bn"
    """vgg_bn, small_cnn, or a backbone of keras.applications in lower case, such as resnet50."""
    weights: str = "none"
    """none, or a file (or s3://) of keras.applications weights without the classification layers (notop)."""
    image_size: int = 64
    """Height and width in pixels that images are brought to."""
    resize: ResizeRule = "stretch"
    """How: stretch to the square, crop its centre, or pad with black."""
    dropout: float = 0.5
    """Share of units dropped in front of the last layer; after each block of vgg_bn and small_cnn half of it."""
    synchronized_batch_norm: bool = False
    """Whether batch norm takes its statistics over all workers' images; else each worker's own, averaged over
    the workers at every checkpoint."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step over all workers together. An epoch is cut into equal steps of at most as many."""
    learning_rate: float = 0.001
    """Step size of the optimizer."""
    optimizer: Optimizer = "adam"
    """The optimizer; sgd has a momentum of 0.9."""
    precision: Precision = "float32"
    """Type that the network computes in; weights, statistics and the bundle stay float32."""
    early_stopping_patience: int | None = None
    """Stop after as many epochs without a lower validation loss; null: never."""
    reduce_on_plateau_patience: int | None = None
    """Halve the learning rate after as many epochs without a lower validation loss; null: never."""
    seed: int = 0
    """Seed of the split, the initial weights, the order of the images and the dropout."""
    workers: int = 2
    """Processes that train side by side."""
    cpus_per_worker: float | None = None
    """CPUs of one worker, rounded up also its TensorFlow threads; null: three quarters of the cluster's CPUs
    shared by the workers, or 1 where they have GPUs."""
    gpus_per_worker: float = 0.0
    """GPUs of one worker."""
    decode_cpus: float | None = None
    """CPUs that Ray reserves for one reading and decoding task; null: 1, or less where few are left."""
    cache: Cache = "auto"
    """Keep the decoded images in Ray's object store: memory, none (read them anew each epoch), or auto (memory
    where they take less than a fifth of it)."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints inside an epoch; null: at the end of each epoch only."""
    data_checks: bool = True
    """Look first for images in two splits or under two labels, unreadable ones, odd sizes and small classes, and warn
    of them; where there are at most 50,000 (jobs/evaluate.py --check-data looks at more)."""
    max_bad_fraction: float = 0.01
    """Share of images that may be unreadable before the run fails; they are skipped and listed."""
    max_failures: int = 3
    """Lost workers that a run survives, each from the last checkpoint."""
    overwrite: bool = False
    """Whether a finished run in the output, or one with other flags, is replaced; one that was interrupted goes on
    in any case."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        flags.check_at_least_one(
            self, "epochs", "batch_size", "workers", "checkpoint_every_steps", "early_stopping_patience",
            "reduce_on_plateau_patience",
        )  # fmt: skip
        if self.architecture not in architectures.NAMES:
            raise ValueError(
                f"--architecture {self.architecture!r} is not known; there are {', '.join(architectures.NAMES)}."
            )
        smallest = architectures.smallest_image_size(self.architecture)
        if not smallest <= self.image_size <= LARGEST_IMAGE_SIZE:
            raise ValueError(
                f"--image-size must be {smallest} to {LARGEST_IMAGE_SIZE} pixels for {self.architecture}, "
                f"not {self.image_size}."
            )
        if self.weights == "imagenet":
            raise ValueError(
                f"--weights imagenet: fetch the notop weights of {self.architecture} from the Keras project's "
                "keras-applications storage yourself and give their path, or use --weights none."
            )
        flags.check_more_than_zero(self, "learning_rate", "cpus_per_worker", "decode_cpus")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be at least 0 and less than 2**32, not {self.seed}.")
        for flag in ("validation_fraction", "dropout", "max_bad_fraction"):
            value = getattr(self, flag)
            if not 0 <= value < 1:
                raise ValueError(f"{flags.spelt(flag)} must be at least 0 and less than 1, not {value}.")
        if self.validation_fraction == 0 and self.validation is None:
            raise ValueError("--validation-fraction must be more than 0 where --validation is not given.")
        if not 0 <= self.gpus_per_worker <= 1:
            raise ValueError(
                f"--gpus-per-worker must be 0 to 1, not {self.gpus_per_worker}: for more GPUs take more --workers."
            )
        if self.batch_size < self.workers:
            raise ValueError(
                f"--batch-size {self.batch_size} is over all workers: it must be at least --workers {self.workers}."
            )
        if self.max_failures < 0:
            raise ValueError(f"--max-failures must not be negative, but is {self.max_failures}.")
        if self.weights not in ("none", "imagenet"):
            flags.make_absolute(self, "weights")
        flags.make_absolute(self, "data", "output", "validation")

    def as_dict(self) -> dict[str, Any]:
        """The config as plain values, for YAML and JSON."""
        return asdict(self)

    def with_changes(self, **changes: Any) -> "TrainConfig":
        """This config with other values for some fields."""
        return replace(self, **changes)

    def differs_from(self, earlier: dict[str, Any]) -> list[str]:
        """The flags in which this config asks for another training than `earlier` (an `as_dict`) did."""
        return flags.differences(self, earlier, _FREE_ON_RESUME)
