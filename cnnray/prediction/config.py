"""The config of a prediction run: every field is a flag of jobs/predict.py and a key of its YAML.

`InferenceOptions` is the group that jobs/evaluate.py shares (see `cnnray.configs` for groups).
"""

import importlib.util
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cnnray import configs, flags
from cnnray.configs import rules
from cnnray.errors import BadInputError
from cnnray.images import storage
from cnnray.models import averaging, engines
from cnnray.models.bundle import Bundle

Format = Literal["parquet", "csv", "jsonl", "delta"]
FileFormat = Literal["parquet", "csv", "jsonl"]
Decoding = Literal["auto", "workers", "tasks"]

DELTA_FOLDER = "table"
"""In the output of `--format delta`: the Delta table, whose files are the parts."""


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class AveragingOptions:
    """Whether the probabilities of several networks, or of several views of an image, are averaged."""

    ensemble: list[str] = field(default_factory=list)
    """Other bundles, whose probabilities are averaged with those of --bundle: addresses with commas between them. All
    have the same classes and image sizes. jobs/export.py --merge makes one bundle of them, for faster engines."""
    tta: averaging.Views | None = None
    """Test-time augmentation: average the probabilities of an image and of other views of it. flips: mirrored left to
    right; crops: the four corners, each 7/8 of the height and width, enlarged."""

    @property
    def averages(self) -> bool:
        """Whether anything is averaged."""
        return bool(self.ensemble) or self.tta is not None

    def check_averaging(self, bundle: str | None, engine: str) -> None:
        """Check the flags, and make the addresses absolute.

        Raises:
            ValueError, OSError: an invalid value; the message is one sentence that names the flag.
        """
        object.__setattr__(self, "ensemble", averaging.split_uris("ensemble", bundle, self.ensemble))
        if self.averages and engine not in ("auto", engines.KERAS):
            raise ValueError(
                f"--engine {engine} has no file of what --ensemble and --tta average: make one by jobs/export.py "
                "--merge or --tta, or leave out --engine."
            )

    def averaged_bundle(self, bundle: Bundle, output: str) -> Bundle:
        """The bundle that runs: `bundle`, or the mean that the flags ask for, which `averaging.write` writes.

        Args:
            bundle: of the flag --bundle.
            output: of the job; the mean gets a folder in it.

        Raises:
            BundleError, OSError: see `averaging.plan`.
        """
        if not self.averages:
            return bundle
        folder = storage.join(output, averaging.FOLDER)
        planned = averaging.plan(bundle, self.ensemble, self.tta, folder)
        return Bundle(storage.join(folder, planned.version), planned.info)


@configs.group(resumable=True)
@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """The engine that runs the network, and the workers that it runs on."""

    engine: str = "auto"
    """Engine that runs the network: keras, keras-bfloat16, onnx, onnx-int8, litert, litert-float16, litert-int8,
    openvino-bfloat16 or openvino-int8 (but for keras, export must have verified it for the bundle); auto: keras or
    keras-bfloat16 on a GPU, otherwise the fastest engine that export has verified; of a bundle with thresholds one
    that has one."""
    batch_size: int = engines.BATCH_SIZE
    """Largest number of images in one call of the network."""
    max_workers: int | None = None
    """Largest number of workers; may exceed the present cluster where it autoscales. null: what fits the cluster."""
    cpus_per_worker: float | None = None
    """CPUs, and so threads, of each worker; null: 1, or with GPUs an even share of the node's CPUs."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; null: 1 where the cluster has GPUs and the engine is keras, else 0."""
    wait_minutes: float | None = None
    """Minutes that the job waits for nodes that the cluster lacks, or for room that other jobs hold; null: 10, and
    none for nodes that are missing at its start."""
    skip_unreadable: bool = False
    """Give images whose storage is in trouble after several attempts (throttled, not reachable, credentials that do
    not work) a row with an error. Otherwise they have no row, and the same command goes on with them."""
    dashboard: bool = False
    """Start Ray's dashboard where the job starts a Ray of its own, and log its address."""

    @property
    def asks_for_workers(self) -> bool:
        """Whether a flag says how many workers there are, what they get, or what they do."""
        return any((self.max_workers, self.cpus_per_worker, self.gpus_per_worker))

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an invalid value; the message is one sentence that names the flag.
        """
        if self.engine not in ("auto", *engines.ENGINES):
            raise ValueError(f"--engine {self.engine!r}: expected auto, {', '.join(engines.ENGINES)}.")
        flags.check_at_least_one(self, "max_workers", "batch_size")
        flags.check_more_than_zero(self, "cpus_per_worker")
        flags.check_share(self, "gpus_per_worker")
        flags.check_not_negative(self, "wait_minutes")


@configs.group(resumable=True)
@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions):
    """The columns of a prediction, the size of the worker pool, and where images are decoded."""

    top_k: int = field(default=5, metadata=rules(resumable=False))
    """Number of labels and scores in each row, highest score first."""
    probabilities: bool = field(default=False, metadata=rules(resumable=False))
    """Add a column with the probabilities of all classes."""
    embeddings: bool = field(default=False, metadata=rules(resumable=False))
    """Add a column with the input of the last layer; needs the engine keras."""
    min_workers: int | None = None
    """Number of workers that are started at least, also if there is no room for them yet; null: 1."""
    decoding: Decoding = "auto"
    """Where images are read and decoded: in the workers, or in separate tasks; auto: in tasks where workers have GPUs
    and the cluster has nodes without."""

    @property
    def asks_for_workers(self) -> bool:
        """See `InferenceOptions`."""
        return super().asks_for_workers or self.min_workers is not None or self.decoding != "auto"

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an invalid value; the message is one sentence that names the flag.
        """
        super().__post_init__()
        if self.embeddings and self.engine not in ("auto", engines.KERAS):
            raise ValueError(f"--embeddings needs --engine keras, not {self.engine}.")
        flags.check_at_least_one(self, "top_k", "min_workers")
        if self.min_workers and self.max_workers and self.min_workers > self.max_workers:
            raise ValueError(f"--min-workers {self.min_workers} is more than --max-workers {self.max_workers}.")


class RemovedFlagError(BadInputError, ValueError):
    """A flag of an earlier version that has no successor."""


def _without_shards(shards: object) -> dict[str, object]:
    if str(shards) != "1":
        raise RemovedFlagError(
            "--shards and --shard are gone: one run classifies any number of images on all nodes of a cluster."
        )
    return {}


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class PredictConfig(PredictOptions, AveragingOptions):
    """Classify images with a bundle. Each image gives one output row: a prediction, or an error with its reason."""

    bundle: str = field(metadata=rules(resumable=True))
    """Folder or s3:// prefix of the bundle."""
    bundle_version: str | None = field(default=None, metadata=rules(resumable=True))
    """Version that the bundle must have, as a service names it; null: any."""
    input: str
    """Images: a folder or s3:// prefix, a glob, a CSV, JSONL or Parquet table with the column uri, Parquet files or
    WebDataset tar shards that hold the images."""
    output: str = field(metadata=rules(resumable=True))
    """Folder or s3:// prefix for the rows and the summary. An interrupted run resumes when it is started again with
    the same output."""
    format: Format = "parquet"
    """Format of the rows: parquet, csv, jsonl, or delta, a Delta Lake table in the folder table of the output, with a
    commit for each run (needs the extra delta)."""
    limit: int | None = None
    """Classify only the first N images."""
    rows_per_part: int = 4096
    """Most rows of an output file; up to 262,144 images get smaller files, so that many workers have some. A run that
    is killed loses only the files that were not complete."""
    threshold: float = field(default=0.5, metadata=rules(resumable=True))
    """The summary gives the share of predictions whose confidence is below this threshold."""
    max_error_fraction: float = field(default=0.5, metadata=rules(resumable=True))
    """Stop the run when a larger share of its images has errors; checked from the first thousand images on."""
    retry_errors: bool = field(default=False, metadata=rules(resumable=True))
    """Classify the images again that could not be read (missing, access denied, unreadable, unavailable, crashed)."""
    update: bool = field(default=False, metadata=rules(resumable=True))
    """List the input again, and classify what is new or has changed since the earlier run (a file's size and time, or
    its ETag; a row of a table); rows of images that are gone go, too."""
    verify: bool = field(default=False, metadata=rules(resumable=True))
    """At the end, read all output files, and compare their ids with those of the manifest."""
    overwrite: bool = field(default=False, metadata=rules(resumable=True))
    """Replace a finished run in the output, or one with other flags. An interrupted run with the same flags resumes
    in any case."""
    dry_run: bool = field(default=False, metadata=rules(resumable=True))
    """Report what would be read and how long it would take, then stop."""

    RENAMED: ClassVar[configs.Renamed] = {"shards": _without_shards, "shard": lambda _: {}}

    @property
    def file_format(self) -> FileFormat:
        """Of the parts."""
        return "parquet" if self.format == "delta" else self.format

    @property
    def parts_folder(self) -> str:
        """Folder of the parts."""
        return storage.join(self.output, DELTA_FOLDER) if self.format == "delta" else self.output

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an invalid value; the message is one sentence that names the flag.
        """
        super().__post_init__()
        flags.check_at_least_one(self, "limit", "rows_per_part")
        flags.check_share(self, "threshold", "max_error_fraction")
        flags.make_absolute(self, "bundle", "input", "output")
        self.check_averaging(self.bundle, self.engine)
        if self.format == "delta" and "\\" in self.output:
            raise ValueError(f"--output {self.output}: the path of a Delta table has no backslash.")
        if self.format == "delta" and importlib.util.find_spec("deltalake") is None:
            raise ValueError("--format delta needs the extra delta: pip install 'cnnray[delta]'.")
        if f"{self.output}/".startswith(f"{self.input}/"):
            raise ValueError(f"--output {self.output} lies in --input {self.input}: it would be read as input.")
