"""What a training run is told: every field is a flag of jobs/train.py and a key of its YAML."""

import itertools
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from cnnray import flags
from cnnray.images.decode import ResizeRule
from cnnray.models import architectures
from cnnray.models.architectures import Head
from cnnray.models.augment import Augmentations, Strength, check_alternatives
from cnnray.training.phases import PRESETS, Phase, Preset

LARGEST_IMAGE_SIZE = 4096

SIXTEENTHS = 16
"""Shares of a CPU or GPU that Ray's sums of floating-point numbers hold without rounding."""

Precision = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine", "plateau"]
ClassWeights = Literal["none", "balanced"]
Cache = Literal["auto", "memory", "none"]

# What null stands for, by measurement (README, "Recipes, measured"): of the article's networks, and of backbones.
_DEFAULTS = {"learning_rate": (0.003, 0.001), "dropout": (0.1, 0.5)}
_ADAMW_WEIGHT_DECAY = 0.01

# Another value of these gives another way of running the same training, not another training.
_FREE_ON_RESUME = {
    "epochs",
    "workers",
    "wait_minutes",
    "cpus_per_worker",
    "gpus_per_worker",
    "decode_cpus",
    "data_checks",
    "cache",
    "max_bad_fraction",
    "max_failures",
    "overwrite",
    "output",
    "preview_augmentations",
    "mlflow",
    "mlflow_experiment",
    "mlflow_model",
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
    """What the network's backbone begins with: none, imagenet (as keras.applications publishes them), or a path or s3://
    of a bundle, a .keras file, or a .weights.h5 or .h5 file (of keras.applications' networks without the
    classification layers). The head always begins anew."""
    head: Head = "dense"
    """Behind the backbone: dense (512 and 256 units for those of keras.applications, the article's own for its
    networks), or linear."""
    image_size: int = 64
    """Height and width in pixels that images are brought to."""
    resize: ResizeRule = "stretch"
    """How: stretch to the square, crop its centre, or pad with black."""
    dropout: float | None = None
    """Share of units dropped in front of the last layer, or behind the first of a head's two; after each block of
    vgg_bn and small_cnn half of it. null: 0.1 for these two, 0.5 for the heads of others."""
    synchronized_batch_norm: bool = False
    """Whether batch norm takes its statistics over all workers' images; else each worker's own, averaged over
    the workers at every checkpoint."""
    augment: Strength = "light"
    """How much training images are changed at random: none, light (turned, shifted, zoomed a little), standard (for
    photographs: also mirrored), strong (also mixed)."""
    augmentations: Augmentations = field(default_factory=Augmentations)
    """Single switches on top of that."""
    preview_augmentations: int | None = None
    """Write a picture of as many training images beside their changed versions into the output, and stop."""
    epochs: int = 10
    """Passes over the training images, of each phase that does not state its own."""
    phases: Preset | list[Phase] | None = None
    """article (the head, then the top 20 % of the backbone, then the top 50 %), prune (all, then zeros in 50 %, then
    in 80 % of each kernel), or a list in the YAML; null: one phase that trains all."""
    batch_size: int = 64
    """Images a step over all workers together. An epoch is cut into equal steps of at most as many."""
    accumulate: int = 1
    """Steps whose gradients are averaged for one update."""
    learning_rate: float | None = None
    """Step size of the optimizer, at its highest; null: 0.003 for vgg_bn and small_cnn, 0.001 for others."""
    schedule: Schedule = "cosine"
    """How the learning rate goes: constant; cosine (up from zero, then down to zero, over each phase); or plateau
    (halved where the validation loss no longer falls, down to 1e-7)."""
    warmup_epochs: float | None = None
    """Of cosine, the way up; null: a tenth of the phase, at most 5 epochs."""
    warmup_steps: int | None = None
    """The same in steps."""
    decay_epochs: float | None = None
    """Of cosine, the way down; null: all the rest."""
    decay_steps: int | None = None
    """The same in steps."""
    plateau_patience: int = 5
    """Of plateau: epochs without a lower validation loss before the learning rate is halved."""
    optimizer: Optimizer = "adamw"
    """The optimizer; sgd has a momentum of 0.9."""
    weight_decay: float | None = None
    """By how much of the learning rate kernels shrink at each update; null: 0.01 with adamw, else 0."""
    clip_norm: float | None = None
    """Longest gradient, over all weights together; null: any."""
    average: float = 0.0
    """The bundle holds the moving average of the weights with this momentum, such as 0.99; 0: the weights."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    class_weights: ClassWeights = "none"
    """balanced: images of rare classes weigh more in the loss, so that all classes weigh the same."""
    teacher: str | None = None
    """A bundle of the same classes and image size from whose answers the network learns too (distillation)."""
    distillation: float = 0.5
    """Share of the loss that is the teacher's."""
    distillation_temperature: float = 3.0
    """Logits of both are divided by it; higher: more of what the teacher thinks of the wrong classes."""
    precision: Precision = "float32"
    """Type that the network computes in; weights, statistics and the bundle stay float32."""
    early_stopping_patience: int | None = None
    """End a phase after as many epochs without a lower validation loss; null: never."""
    seed: int = 0
    """Seed of the split, the initial weights, the order of the images, and all that is random in training."""
    workers: str | int = 2
    """Processes that train side by side; or MIN:MAX, such as 1:4: as many as the cluster has room for, fewer where a
    node is lost, and more when one comes."""
    wait_minutes: float | None = None
    """Minutes that the job waits for nodes that the cluster lacks; null: none at its start, and 10 where nodes are
    lost while it trains."""
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
    """Share of all images that may be unreadable before the run fails; they are skipped and listed."""
    max_failures: int = 3
    """Lost workers that a run survives, each from the last checkpoint."""
    mlflow: str | None = None
    """MLflow server that is told of flags, epochs and the bundle, such as http://HOST:5000; null: none."""
    mlflow_experiment: str = "cnnray"
    """Experiment that the run belongs to there; it is made where it is missing."""
    mlflow_model: str | None = None
    """Name that the bundle is registered under there; null: that of the experiment."""
    overwrite: bool = False
    """Whether a finished run in the output, or one with other flags, is replaced; one that was interrupted goes on
    in any case."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        # As YAML and JSON give them.
        if isinstance(self.augmentations, dict):
            object.__setattr__(self, "augmentations", Augmentations(**self.augmentations))
        if isinstance(self.phases, list):
            stated = [Phase(**phase) if isinstance(phase, dict) else phase for phase in self.phases]
            object.__setattr__(self, "phases", stated)
        self._check_workers()
        flags.check_at_least_one(
            self, "epochs", "batch_size", "checkpoint_every_steps", "early_stopping_patience",
            "plateau_patience", "accumulate", "preview_augmentations",
        )  # fmt: skip
        flags.check_choices(
            self, augment=Strength, optimizer=Optimizer, schedule=Schedule, class_weights=ClassWeights, head=Head,
            precision=Precision, cache=Cache, resize=ResizeRule,
        )  # fmt: skip
        check_alternatives(self.augment, self.augmentations)
        if isinstance(self.phases, str) and self.phases not in PRESETS:
            raise ValueError(f"--phases {self.phases!r} is not known; there are {', '.join(PRESETS)}, or a list.")
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
        if self.weights == "imagenet" and self.architecture not in architectures.BACKBONES:
            raise ValueError(f"--weights imagenet: there are none of {self.architecture}.")
        flags.check_more_than_zero(
            self, "learning_rate", "cpus_per_worker", "decode_cpus", "clip_norm", "distillation_temperature"
        )
        self._check_schedule()
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError("--weight-decay: adam with it is --optimizer adamw.")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"--weight-decay must not be negative, but is {self.weight_decay}.")
        if isinstance(self.phases, list) and not self.phases:
            raise ValueError("--phases is empty.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be at least 0 and less than 2**32, not {self.seed}.")
        for flag in ("validation_fraction", "dropout", "max_bad_fraction", "average", "label_smoothing"):
            value = getattr(self, flag)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{flags.spelt(flag)} must be at least 0 and less than 1, not {value}.")
        flags.check_share(self, "distillation")
        if self.validation_fraction == 0 and self.validation is None:
            raise ValueError("--validation-fraction must be more than 0 where --validation is not given.")
        if not 0 <= self.gpus_per_worker <= 1:
            raise ValueError(
                f"--gpus-per-worker must be 0 to 1, not {self.gpus_per_worker}: for more GPUs take more --workers."
            )
        if self.batch_size < self.most_workers:
            raise ValueError(
                f"--batch-size {self.batch_size} is over all workers: it must be at least --workers "
                f"{self.most_workers}."
            )
        flags.check_not_negative(self, "wait_minutes")
        if self.mlflow == "" or not self.mlflow_experiment or self.mlflow_model == "":
            raise ValueError("--mlflow, --mlflow-experiment and --mlflow-model must not be empty.")
        if self.mlflow and "@" in urlsplit(self.mlflow).netloc:
            raise ValueError(
                "--mlflow must hold no password, as flags are written into the output: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
            )
        if self.max_failures < 0:
            raise ValueError(f"--max-failures must not be negative, but is {self.max_failures}.")
        if self.weights not in ("none", "imagenet"):
            flags.make_absolute(self, "weights")
        flags.make_absolute(self, "data", "output", "validation", "teacher")
        if f"{self.output}/".startswith(f"{self.data}/"):
            raise ValueError(
                f"--output {self.output} lies in --data {self.data}, where its folders would be taken for classes."
            )

    def _check_workers(self) -> None:
        if isinstance(self.workers, str):  # a number comes so from the command line
            least, colon, most = self.workers.partition(":")
            numbers = [int(part) for part in ((least, most) if colon else (least,)) if part.strip().isdecimal()]
            if len(numbers) != 1 + len(colon):
                raise ValueError(f"--workers {self.workers!r}: expected a number, or MIN:MAX such as 1:4.")
            if numbers[0] > numbers[-1]:
                raise ValueError(f"--workers {self.workers}: the first number is more than the second.")
            fixed = numbers[0] == numbers[-1]
            object.__setattr__(self, "workers", numbers[0] if fixed else f"{numbers[0]}:{numbers[1]}")
        if self.fewest_workers < 1:
            raise ValueError(f"--workers must be at least 1, not {self.fewest_workers}.")
        for flag in ("cpus_per_worker", "gpus_per_worker") if self.is_elastic else ():
            share = getattr(self, flag)
            if share is not None and share * SIXTEENTHS % 1:
                raise ValueError(
                    f"{flags.spelt(flag)} {share} with --workers {self.workers}: expected sixteenths, such as "
                    f"{max(1, round(share * SIXTEENTHS)) / SIXTEENTHS:g}, in which Ray counts without rounding."
                )

    def _check_schedule(self) -> None:
        for what in ("warmup", "decay"):
            given = [name for name in (f"{what}_epochs", f"{what}_steps") if getattr(self, name) is not None]
            if given and self.schedule != "cosine":
                raise ValueError(f"{flags.spelt(given[0])} is of --schedule cosine, not of {self.schedule}.")
            if len(given) > 1:
                raise ValueError(
                    f"{flags.spelt(given[0])} and {flags.spelt(given[1])} say the same: give one of them."
                )
            if given and getattr(self, given[0]) < 0:
                raise ValueError(f"{flags.spelt(given[0])} must not be negative, but is {getattr(self, given[0])}.")

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change on the way."""
        return isinstance(self.workers, str)

    @property
    def fewest_workers(self) -> int:
        """The least number of workers."""
        return int(str(self.workers).partition(":")[0])

    @property
    def most_workers(self) -> int:
        """The greatest number of workers."""
        return int(str(self.workers).rpartition(":")[2])

    @property
    def plan(self) -> tuple[Phase, ...]:
        """The phases, each with its epochs, its learning rate, and at least the zeros of the one before."""
        learning_rate = self.decided("learning_rate")
        stated: list[Phase] | tuple[Phase, ...]
        if self.phases is None:
            stated = (Phase(name="all"),)
        else:
            stated = PRESETS[self.phases] if isinstance(self.phases, str) else self.phases
        sparsities = itertools.accumulate((phase.sparsity for phase in stated), max)
        return tuple(
            replace(
                phase,
                epochs=phase.epochs or self.epochs,
                learning_rate=phase.learning_rate or learning_rate,
                sparsity=sparsity,
            )
            for phase, sparsity in zip(stated, sparsities, strict=True)
        )

    def decided(self, flag: Literal["learning_rate", "dropout", "weight_decay"]) -> float:
        """The value of a flag, or what its null stands for."""
        value: float | None = getattr(self, flag)
        if value is not None:
            return value
        if flag == "weight_decay":
            return _ADAMW_WEIGHT_DECAY if self.optimizer == "adamw" else 0.0
        return _DEFAULTS[flag][self.architecture in architectures.BACKBONES]

    @property
    def all_epochs(self) -> int:
        """Of all phases together."""
        return sum(phase.passes for phase in self.plan)

    def as_dict(self) -> dict[str, Any]:
        """The config as plain values, for YAML and JSON."""
        return asdict(self)

    def with_changes(self, **changes: Any) -> "TrainConfig":
        """This config with other values for some fields."""
        return replace(self, **changes)

    def differs_from(self, earlier: dict[str, Any]) -> list[str]:
        """The flags in which this config asks for another training than `earlier` (an `as_dict`) did."""
        free = set(_FREE_ON_RESUME)
        stated = [(self.warmup_epochs, self.warmup_steps), (self.decay_epochs, self.decay_steps)]
        derived = any(lengths == (None, None) for lengths in stated)
        if self.phases is not None or (self.schedule == "cosine" and derived):
            # The learning rate of each step, or what it trains, depends on how many there are.
            free.remove("epochs")
        return flags.differences(self, earlier, free)
