"""The config of a training: every field is a flag of jobs/train.py and a key of its YAML.

Five groups of fields (data, model, recipe, cluster, tracking) that `TrainConfig` inherits, so that a function can ask
for the group that it needs. What a resume may change, a search may vary and a tracker receives stands in the groups
(see `cnnray.configs`).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cnnray import configs, flags
from cnnray.configs import rules
from cnnray.images import labels
from cnnray.images.geometry import Geometry, ResizeRule, Size
from cnnray.models import architectures, own_network
from cnnray.models.architectures import Head
from cnnray.tracking.config import TrackingConfig
from cnnray.training.recipe_config import RecipeConfig

LARGEST_IMAGE_SIZE = 4096

SIXTEENTHS = 16
"""Ray adds up shares of a CPU as floating-point numbers; sixteenths add up without rounding."""

Cache = Literal["auto", "memory", "none"]


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The labelled images, and where the run leaves its results."""

    data: str
    """Labelled images: a folder (or s3:// prefix) with one sub-folder a class, perhaps below train/ and
    validation/, or a CSV, JSONL or Parquet table with the columns uri and label, or Parquet with the images in it.
    Where label is a list, an image may have several labels, or none."""
    multi_label: bool | None = None
    """Whether an image may have several labels: files of the same name in several class folders are then one image.
    null: only where label is a list, or --label-separator is given."""
    label_separator: str | None = None
    """What stands between the labels of an image in a column of text, such as |; an empty one then has no label."""
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
        labels.check_flags(self.multi_label, self.label_separator)
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
    """Size to which images are resized first, in the same form, at most twice --image-size, such as 256 before 224:
    the crops of --augment are taken from it, and for validation and prediction the centre; null: --image-size."""
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
        """Check the sizes, and write each as briefly as it can be."""
        for name in ("image_size", "decode_size"):
            if (value := getattr(self, name)) is not None:
                try:
                    object.__setattr__(self, name, Size.of(value).stated)
                except ValueError as error:
                    raise ValueError(f"{flags.flag_name(name)}: {error}.") from None
        if self.image_size is None:
            if self.decode_size is not None:
                raise ValueError("--decode-size needs --image-size.")
            return
        size = Size.of(self.image_size)
        smallest = architectures.smallest_image_size(self.architecture) if self.architecture else 1
        if not smallest <= min(size) <= max(size) <= LARGEST_IMAGE_SIZE:
            of_network = f" for {self.architecture}" if self.architecture else ""
            raise ValueError(
                f"--image-size must be {smallest} to {LARGEST_IMAGE_SIZE} pixels{of_network}, not {self.image_size}."
            )
        try:
            geometry = Geometry.of(size, self.resize, self.decode_size)
        except ValueError as error:
            raise ValueError(f"--decode-size: {error}.") from None
        if not geometry.is_cut:
            object.__setattr__(self, "decode_size", None)


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
    """Minutes that the job waits for nodes that the cluster lacks, or for room that other jobs hold; null: 10, and
    none for nodes that are missing at its start."""
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
