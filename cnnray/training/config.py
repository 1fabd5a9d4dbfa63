"""The config of a training: every field is a flag of jobs/train.py and a key of its YAML.

Five groups of fields (data, model, recipe, cluster, tracking) that `TrainConfig` inherits, so that a function can ask
for the group that it needs. What a resume may change, a search may vary and a tracker receives stands in the groups
(see `cnnray.configs`).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cnnray import configs, flags
from cnnray.configs import rules
from cnnray.images.geometry import ResizeRule, Size
from cnnray.models import architectures, own_network
from cnnray.models.architectures import Head
from cnnray.models.augment import Augmentations, Strength, check_alternatives
from cnnray.tracking.config import TrackingConfig
from cnnray.training.phases import PRESETS, Phase, Preset

LARGEST_IMAGE_SIZE = 4096
LARGEST_CUT = 2
"""Most times that --decode-size is --image-size: crops of the whole are resampled without anti-aliasing."""

DEFAULT_AUGMENT: Strength = "light"
"""What null stands for; it mirrors nothing."""

SIXTEENTHS = 16
"""Ray adds up shares of a CPU as floating-point numbers; sixteenths add up without rounding."""

Precision = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine", "plateau"]
Effort = Literal["quick", "default", "accurate"]
ClassWeights = Literal["none", "balanced"]
Sampling = Literal["all", "balanced"]
Selection = Literal["val_accuracy", "val_loss", "macro_f1", "auroc"]
Cache = Literal["auto", "memory", "none"]


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The labelled images, and where the run leaves its results."""

    data: str
    """Labelled images: a folder (or s3:// prefix) with one sub-folder a class, perhaps below train/ and
    validation/, or a CSV, JSONL or Parquet table with the columns uri and label, or Parquet with the images in it."""
    output: str = field(metadata=rules(resumable=True, searchable=False))
    """Folder or s3:// prefix for the bundle and all else that the run leaves. A run that was interrupted goes on
    when it is given the same output."""
    validation: str | None = None
    """Labelled images to validate on, in the same forms as --data; of a data set with splits, those of validation.
    They take the place of the validation images in --data."""
    validation_fraction: float = 0.2
    """Share of each class that is kept for validation where the data brings no validation images."""
    group: str | None = None
    """Column of --data whose values keep together, such as the patient or the product on the images: all images of a
    value train, or all validate. With it, --validation-fraction 0.2 is one of five equal parts."""
    folds: int | None = None
    """Divide the images into so many parts for cross-validation, of which one validates, in place of
    --validation-fraction."""
    fold: int = 0
    """The part of --folds that validates, from 0 on."""
    data_checks: bool = field(default=True, metadata=rules(resumable=True))
    """Look first for images in two splits or under two labels, unreadable ones, odd sizes and small classes, and warn
    of them; where there are at most 50,000 (jobs/evaluate.py --check-data looks at more)."""
    max_bad_fraction: float = field(default=0.01, metadata=rules(resumable=True))
    """Share of all images that may be unreadable before the run fails; they are skipped and listed."""
    skip_unreadable: bool = field(default=False, metadata=rules(resumable=True))
    """Also skip images whose storage is in trouble after several attempts (throttled, not reachable, credentials that
    do not work). Otherwise the run ends, and the same command continues it."""
    overwrite: bool = field(default=False, metadata=rules(resumable=True, searchable=False, tracked=False))
    """Whether a finished run in the output, or one with other flags, is replaced; one that was interrupted goes on
    in any case."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        flags.check_below_one(self, "validation_fraction", "max_bad_fraction")
        if self.validation_fraction == 0 and self.validation is None:
            raise ValueError("--validation-fraction must be more than 0 where --validation is not given.")
        if self.folds is not None and not self.folds >= 2:
            raise ValueError(f"--folds must be at least 2, not {self.folds}.")
        if not 0 <= self.fold < (self.folds or 1):
            of = "needs --folds" if self.folds is None else f"must be 0 to {self.folds - 1}"
            raise ValueError(f"--fold {of}, and is {self.fold}.")
        if self.group is not None and self.folds is None and self.validation_fraction > 0.5:
            raise ValueError(f"--validation-fraction with --group is at most 0.5, not {self.validation_fraction}.")
        if self.validation is not None and (self.folds or self.group):
            raise ValueError("--folds and --group divide --data, and do not go with --validation.")
        flags.make_absolute(self, "data", "output", "validation")
        if f"{self.output}/".startswith(f"{self.data}/"):
            raise ValueError(
                f"--output {self.output} lies in --data {self.data}, where its folders would be taken for classes."
            )


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    architecture: str | None = None
    """resnet9, resnet9_small, resnet9_large, vgg_bn, small_cnn, or a backbone of keras.applications in lower case,
    such as resnet50; or a function of your own that gives a Keras model, as package.module:function; null: that of
    --weights, or one of the first three, by --preset."""
    weights: str = "none"
    """Initial weights of the backbone: none, imagenet (as keras.applications publishes them), or a path or s3://
    of a bundle, a .keras file, or a .weights.h5 or .h5 file (of keras.applications' networks without the
    classification layers). The head begins anew, unless --keep-head says otherwise."""
    keep_head: bool = False
    """Begin also with the head of the bundle that --weights names: classes that it knows, by their names, keep their
    weights, and new ones begin anew."""
    head: Head | None = None
    """Layers between the pooled features and the logits: linear (none), or dense (512 and 256 units; for vgg_bn and
    small_cnn one layer, as in the article); null: linear for the resnet9 networks, dense for the others."""
    image_size: int | str | None = None
    """What the network takes, in pixels: 224 for squares, or 224x320 (height x width); null: 32 where the shorter
    side of the images is at most 48, else 64, or the smallest that the network takes."""
    decode_size: int | str | None = None
    """Size to which images are resized first, in the same form, such as 256 before --image-size 224: the crops of
    --augment are taken from it, and for validation and prediction the centre; null: --image-size."""
    resize: ResizeRule = "stretch"
    """How images of other shapes are resized: stretch them, crop what is too long, or pad with black."""
    dropout: float | None = None
    """Share of units dropped in front of the last layer, or behind the first of a head's two; after each block of
    vgg_bn and small_cnn half of it. null: 0.5 for backbones of keras.applications, 0.1 for vgg_bn and small_cnn, else
    0."""
    synchronized_batch_norm: bool = False
    """Compute the statistics of batch norm over the images of all workers; otherwise over each worker's own, averaged
    over the workers at every checkpoint."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        flags.check_choices(self, head=Head, resize=ResizeRule)
        if own_network.is_own(self.architecture):
            for name, own in (("head", "linear"), ("dropout", 0)):  # what stands for its own
                if getattr(self, name) not in (None, own):
                    raise ValueError(f"{flags.flag_name(name)} is for cnnray's networks: yours has its own layers.")
        elif self.architecture not in (None, *architectures.NAMES):
            raise ValueError(
                f"--architecture {self.architecture!r} is not known; there are {', '.join(architectures.NAMES)}, and "
                "functions of your own as package.module:function."
            )
        self._check_sizes()
        flags.check_below_one(self, "dropout")
        if self.weights == "imagenet" and self.architecture not in architectures.BACKBONES:
            missing = f"there are none of {self.architecture}" if self.architecture else "give --architecture, too"
            raise ValueError(f"--weights imagenet: {missing}.")
        if self.weights not in ("none", "imagenet"):
            flags.make_absolute(self, "weights")
        elif self.keep_head:
            raise ValueError(f"--keep-head needs a bundle for --weights, which is {self.weights}.")

    def _check_sizes(self) -> None:
        """Check the sizes, and write a square one as a number."""
        for name in ("image_size", "decode_size"):
            if (value := getattr(self, name)) is not None:
                try:
                    object.__setattr__(self, name, Size.of(value).stated)
                except ValueError as error:
                    raise ValueError(f"{flags.flag_name(name)}: {error}.") from None
        if self.image_size is None:
            return
        size = Size.of(self.image_size)
        smallest = architectures.smallest_image_size(self.architecture) if self.architecture else 1
        if not smallest <= min(size) <= max(size) <= LARGEST_IMAGE_SIZE:
            of_network = f" for {self.architecture}" if self.architecture else ""
            raise ValueError(
                f"--image-size must be {smallest} to {LARGEST_IMAGE_SIZE} pixels{of_network}, not {self.image_size}."
            )
        if self.decode_size is not None:
            decoded = Size.of(self.decode_size)
            if any(not side <= larger <= LARGEST_CUT * side for side, larger in zip(size, decoded, strict=True)):
                raise ValueError(
                    f"--decode-size must be one to {LARGEST_CUT} times --image-size {self.image_size}, not "
                    f"{self.decode_size}."
                )


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How the network is trained."""

    preset: Effort = "default"
    """How long to train for the sake of accuracy: quick, default or accurate; it decides the epochs and the network
    where they are null."""
    augment: Strength | None = None
    """How much training images are changed at random: none, light (turned, shifted, zoomed a little), standard (for
    photographs: also mirrored), strong (also mixed); null: light."""
    augmentations: Augmentations = field(default_factory=Augmentations)
    """Single switches on top of that."""
    preview_augmentations: int | None = field(
        default=None, metadata=rules(resumable=True, searchable=False, tracked=False)
    )
    """Write a picture of as many training images beside their changed versions into the output, and stop."""
    sanity: bool = field(default=False, metadata=rules(resumable=True, searchable=False, tracked=False))
    """Check in seconds that the network can learn the first 64 images by heart, and stop."""
    find_learning_rate: bool = field(default=False, metadata=rules(resumable=True, searchable=False, tracked=False))
    """Train a few steps with a learning rate that rises until the loss grows, write a plot into the output, and
    stop."""
    epochs: int | None = field(default=None, metadata=rules(resumable=True))
    """Passes over the training images, of each phase that does not state its own; null: by the number of images, the
    fewer the more."""
    phases: Preset | list[Phase] | None = None
    """head-first (the head, then all), article (the head, then the top 20 % of the backbone, then the top 50 %),
    prune (all, then zeros in 50 %, then in 80 % of each kernel), or a list in the YAML; null: one phase that trains
    all."""
    batch_size: int | None = None
    """Images of a step, over all workers together. An epoch is cut into equal steps of at most as many. null: 64, or
    one for each worker."""
    accumulate: int = 1
    """Steps whose gradients are averaged for one update."""
    learning_rate: float | None = None
    """Highest step size of the optimizer; null: 0.001 for backbones of keras.applications, else 0.003."""
    schedule: Schedule = "cosine"
    """How the learning rate changes: constant; cosine (up from zero, then down to zero, over each phase); or plateau
    (halved where the validation loss no longer falls, down to 1e-7)."""
    warmup_epochs: float | None = None
    """Epochs in which cosine rises; null: a tenth of the phase, at most 5 epochs."""
    warmup_steps: int | None = None
    """The same in steps."""
    decay_epochs: float | None = None
    """Epochs in which cosine falls; null: all the rest."""
    decay_steps: int | None = None
    """The same in steps."""
    plateau_patience: int = 5
    """Epochs without a lower validation loss before plateau halves the learning rate."""
    optimizer: Optimizer = "adamw"
    """The optimizer; sgd has a momentum of 0.9."""
    weight_decay: float | None = None
    """Share of the learning rate by which kernels shrink at each update; null: 0.01 with adamw, else 0."""
    clip_norm: float | None = None
    """Largest norm of the gradient, over all weights together; null: any."""
    average: float | None = None
    """The bundle holds the moving average of the weights with this momentum, such as 0.99; 0: the weights; null:
    0."""
    label_smoothing: float | None = None
    """Share of each label that is spread over all classes; null: 0."""
    class_weights: ClassWeights = "none"
    """balanced: images of rare classes weigh more in the loss, so that all classes weigh the same."""
    sampling: Sampling = "all"
    """Images of an epoch: all, each once; or balanced: as many in all, but of each class the same number, so that
    those of rare classes come several times, and of frequent ones not all."""
    teacher: str | None = None
    """A bundle of the same classes and image size whose answers the network learns, too (distillation)."""
    distillation: float = 0.5
    """Share of the teacher's answers in the loss."""
    distillation_temperature: float = 3.0
    """Divisor of the logits of both networks; higher: more weight on the teacher's scores of the wrong classes."""
    precision: Precision | None = None
    """Type that the network computes in; weights, statistics, losses and the bundle stay float32. null: bfloat16 on
    GPUs that compute in it (such as A100, L4 and H100), else float32."""
    select: Selection = "val_accuracy"
    """Metric of the validation images that chooses the best epoch: val_accuracy, val_loss, macro_f1 (the mean F1 of
    the classes, in which rare ones count as much), or auroc (the mean area under their ROC curves)."""
    early_stopping_patience: int | None = None
    """End a phase after as many epochs without a lower validation loss; null: never."""
    seed: int = 0
    """Seed of the split, the initial weights, the order of the images, and all that is random in training."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        # As YAML and JSON give them.
        if isinstance(self.augmentations, dict):
            object.__setattr__(self, "augmentations", Augmentations(**self.augmentations))
        if isinstance(self.phases, list):
            phases = [Phase(**phase) if isinstance(phase, dict) else phase for phase in self.phases]
            object.__setattr__(self, "phases", phases)
        flags.check_at_least_one(
            self, "epochs", "batch_size", "early_stopping_patience", "plateau_patience", "accumulate",
            "preview_augmentations",
        )  # fmt: skip
        flags.check_choices(
            self, preset=Effort, augment=Strength, optimizer=Optimizer, schedule=Schedule, class_weights=ClassWeights,
            precision=Precision, sampling=Sampling, select=Selection,
        )  # fmt: skip
        flags.check_more_than_zero(self, "learning_rate", "clip_norm", "distillation_temperature")
        flags.check_not_negative(self, "weight_decay", "warmup_epochs", "warmup_steps", "decay_epochs", "decay_steps")
        flags.check_below_one(self, "average", "label_smoothing")
        flags.check_share(self, "distillation")
        check_alternatives(self.augment or DEFAULT_AUGMENT, self.augmentations)
        if isinstance(self.phases, str) and self.phases not in PRESETS:
            raise ValueError(f"--phases {self.phases!r} is not known; there are {', '.join(PRESETS)}, or a list.")
        if isinstance(self.phases, list) and not self.phases:
            raise ValueError("--phases is empty.")
        if self.sampling == "balanced" and self.class_weights == "balanced":
            raise ValueError("--sampling balanced and --class-weights balanced do the same: give one of them.")
        self._check_schedule()
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError("--weight-decay: adam with it is --optimizer adamw.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be at least 0 and less than 2**32, not {self.seed}.")
        flags.make_absolute(self, "teacher")

    def _check_schedule(self) -> None:
        for part in ("warmup", "decay"):
            given = [name for name in (f"{part}_epochs", f"{part}_steps") if getattr(self, name) is not None]
            if given and self.schedule != "cosine":
                raise ValueError(f"{flags.flag_name(given[0])} is of --schedule cosine, not of {self.schedule}.")
            if len(given) > 1:
                raise ValueError(
                    f"{flags.flag_name(given[0])} and {flags.flag_name(given[1])} say the same: give one of them."
                )


@configs.group(resumable=True)
@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The workers, and their share of the cluster."""

    min_workers: int | None = None
    """Worker processes that are needed at least: training goes on with fewer than --max-workers where a node is lost,
    and with more when one is added. null: as many as --max-workers."""
    max_workers: int | None = None
    """Worker processes that train side by side, at most. null: one for each GPU; without GPUs one for each node, but
    for nodes so small that the others would wait for them. A run that goes on keeps its number."""
    wait_minutes: float | None = None
    """Minutes that the job waits for nodes that the cluster lacks; null: none at its start, and 10 where nodes are
    lost while it trains."""
    cpus_per_worker: float | None = None
    """CPUs of one worker, rounded up also its TensorFlow threads; null: three quarters of the cluster's CPUs
    shared by the workers, or 1 where they have GPUs."""
    gpus_per_worker: float | None = None
    """1 or 0: whether a worker has a GPU of its own. null: 1 where the cluster has one for each worker."""
    images_per_worker: int | None = None
    """Most images that a worker takes at once. Of a larger part of a step it takes several micro-batches, and sums
    their gradients; batch norm, dropout and augmentation see each for itself. null: the whole part, or, after it has
    run out of memory, half as many, as often as that is needed."""
    decode_cpus: float | None = None
    """CPUs that Ray reserves for a task that checks images or decodes them into memory; null: 1, or less where few
    are left. Images that are streamed are decoded by processes beside the workers."""
    cache: Cache = "auto"
    """Keep the decoded images in Ray's object store: memory, none (read them anew each epoch), or auto (memory
    where they take less than a fifth of it)."""
    # A checkpoint averages the statistics of batch norm over the workers: another interval gives other weights.
    checkpoint_every_steps: int | None = field(default=None, metadata=rules(resumable=False))
    """Steps between checkpoints inside an epoch; null: at the end of each epoch only."""
    max_failures: int = 3
    """Lost workers that a run survives, each from the last checkpoint."""
    dashboard: bool = field(default=False, metadata=rules(searchable=False, tracked=False))
    """Start Ray's dashboard where the job starts a Ray of its own, and log its address."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        flags.check_at_least_one(self, "min_workers", "max_workers", "images_per_worker", "checkpoint_every_steps")
        flags.check_more_than_zero(self, "cpus_per_worker", "decode_cpus")
        flags.check_not_negative(self, "wait_minutes", "max_failures")
        flags.check_choices(self, cache=Cache)
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"--min-workers {self.min_workers} is more than --max-workers {self.max_workers}.")
        if self.gpus_per_worker not in (None, 0, 1):
            raise ValueError(
                f"--gpus-per-worker must be 0 or 1, not {self.gpus_per_worker:g}: workers cannot share a GPU (NCCL "
                "refuses it), and more GPUs take more workers (--max-workers)."
            )
        cpus = self.cpus_per_worker
        if self.is_elastic and cpus is not None and cpus * SIXTEENTHS % 1:
            raise ValueError(
                f"--cpus-per-worker {cpus} with --min-workers: expected sixteenths, such as "
                f"{max(1, round(cpus * SIXTEENTHS)) / SIXTEENTHS:g}, in which Ray counts without rounding."
            )

    @property
    def fewest_workers(self) -> int:
        """The number of workers that training needs."""
        return self.most_workers if self.min_workers is None else self.min_workers

    @property
    def most_workers(self) -> int:
        """`max_workers`; the fewest that it may become as long as it is not decided."""
        return self.max_workers or (1 if self.min_workers is None else max(2, self.min_workers))

    @property
    def gpus(self) -> float:
        """`gpus_per_worker`; 0 as long as it is not decided."""
        return self.gpus_per_worker or 0.0

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.fewest_workers < self.most_workers


def _range_of_workers(value: Any) -> dict[str, Any]:
    """Today's fields for --workers, a number or MIN:MAX.

    Raises:
        ValueError: it is neither.
    """
    least, colon, most = str(value).partition(":")
    try:
        return {"min_workers": int(least) if colon else None, "max_workers": int(most if colon else least)}
    except ValueError:
        raise ValueError(f"--workers {value!r}: expected a number, or MIN:MAX such as 1:4.") from None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrackingConfig, ClusterConfig, RecipeConfig, ModelConfig, DataConfig):
    """Train a classifier on labelled images and leave a bundle."""

    RENAMED: ClassVar[configs.Renamed] = {"workers": _range_of_workers}

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        for group in (DataConfig, ModelConfig, RecipeConfig, ClusterConfig, TrackingConfig):
            group.__post_init__(self)
        if self.batch_size is not None and self.batch_size < self.most_workers:
            raise ValueError(
                f"--batch-size {self.batch_size} is over all workers: it must be at least --max-workers "
                f"{self.max_workers}."
            )

    def tracked(self) -> dict[str, str]:
        """The flags for an experiment tracker, as text; nested ones with a dot."""
        values: dict[str, Any] = {}
        for name, value in configs.as_dict(self).items():
            if isinstance(value, dict):
                values |= {f"{name}.{inner}": item for inner, item in value.items()}
            elif name in configs.names(type(self), tracked=True):
                values[name] = value
        return {name: "null" if value is None else str(value) for name, value in values.items()}
