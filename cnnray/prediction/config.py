"""What a prediction run is told: every field is a flag of jobs/predict.py and a key of its YAML."""

from dataclasses import dataclass, field
from typing import Literal

from cnnray import configs, flags
from cnnray.configs import rules
from cnnray.images import storage
from cnnray.models import engines

Format = Literal["parquet", "csv", "jsonl"]
Decoding = Literal["auto", "workers", "tasks"]


@configs.group(resumable=True)
@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What is asked of a network, and on how many workers."""

    engine: str = "auto"
    """What runs the network: keras, onnx, onnx-int8, litert, litert-float16, litert-int8, openvino-bfloat16 or
    openvino-int8 (the bundle must have been exported to it); auto: on a GPU keras, else the fastest that export has
    proven."""
    top_k: int = field(default=5, metadata=rules(resumable=False))
    """Labels and scores of each row, highest first."""
    probabilities: bool = field(default=False, metadata=rules(resumable=False))
    """Whether each row has the probabilities of all classes."""
    embeddings: bool = field(default=False, metadata=rules(resumable=False))
    """Whether each row has what the last layer decides on; for the engine keras."""
    batch_size: int = engines.BATCH_SIZE
    """Images that the network is given at once, at most."""
    min_workers: int | None = None
    """Workers that the pool shrinks to while there is little to do; null: 1."""
    max_workers: int | None = None
    """Workers that the pool grows to, also beyond what the cluster has where that grows with it; null: what fits."""
    cpus_per_worker: float | None = None
    """CPUs, and so threads, of each worker; null: 1, or with GPUs the node's share."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; null: 1 where the cluster has GPUs and the engine is keras, else 0."""
    wait_minutes: float | None = None
    """Minutes that the job waits for nodes that the cluster lacks; null: none at its start, and 10 where nodes are
    lost while it works."""
    decoding: Decoding = "auto"
    """Where images are read and decoded: in the workers themselves, or in tasks beside them; auto: in tasks where
    workers have GPUs and the cluster has nodes without."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        if self.engine not in ("auto", *engines.ENGINES):
            raise ValueError(f"--engine {self.engine!r}: expected auto, {', '.join(engines.ENGINES)}.")
        if self.embeddings and self.engine not in ("auto", engines.KERAS):
            raise ValueError(f"--embeddings can only be had with --engine keras, not {self.engine}.")
        flags.check_at_least_one(self, "top_k", "min_workers", "max_workers", "batch_size")
        flags.check_more_than_zero(self, "cpus_per_worker")
        flags.check_share(self, "gpus_per_worker")
        flags.check_not_negative(self, "wait_minutes")
        if self.min_workers and self.max_workers and self.min_workers > self.max_workers:
            raise ValueError(f"--min-workers {self.min_workers} is more than --max-workers {self.max_workers}.")


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class PredictConfig(PredictOptions):
    """Classify images with a bundle: one row out for each image in, a prediction or the reason why there is none."""

    bundle: str = field(metadata=rules(resumable=True))
    """Folder or s3:// prefix of the bundle."""
    input: str
    """Images: a folder or s3:// prefix, a glob, a CSV, JSONL or Parquet table with the column uri, Parquet files or
    WebDataset tar shards that hold the images."""
    output: str = field(metadata=rules(resumable=True))
    """Folder or s3:// prefix for the rows and the summary. A run that was interrupted goes on when it is given the
    same output."""
    format: Format = "parquet"
    """Of the rows: parquet, csv or jsonl."""
    limit: int | None = None
    """Only the first so many images."""
    rows_per_part: int = 4096
    """Rows of one file of the output. A run that is killed loses the parts that were being made."""
    shards: int = 1
    """Split the images over as many runs, perhaps on other clusters; each writes OUTPUT/shard-I-of-N."""
    shard: int = 0
    """Which of them this run is, from 0."""
    threshold: float = field(default=0.5, metadata=rules(resumable=True))
    """The summary tells the share of answers whose confidence is below it."""
    max_error_fraction: float = field(default=0.5, metadata=rules(resumable=True))
    """Stop where a larger share of the images has no prediction, looked at from the first thousand on."""
    retry_errors: bool = field(default=False, metadata=rules(resumable=True))
    """Run again those parts of the output in which images could not be read (missing, access denied, throttled,
    unreadable)."""
    overwrite: bool = field(default=False, metadata=rules(resumable=True))
    """Whether a finished run in the output, or one with other flags, is replaced; one that was interrupted goes on in
    any case."""
    dry_run: bool = field(default=False, metadata=rules(resumable=True))
    """Say what would be read and how long that would take, and stop."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        super().__post_init__()
        flags.check_at_least_one(self, "limit", "rows_per_part", "shards")
        flags.check_share(self, "threshold", "max_error_fraction")
        if not 0 <= self.shard < self.shards:
            raise ValueError(f"--shard must be 0 to {self.shards - 1}, one less than --shards, not {self.shard}.")
        flags.make_absolute(self, "bundle", "input", "output")
        if f"{self.output}/".startswith(f"{self.input}/"):
            raise ValueError(f"--output {self.output} lies in --input {self.input}, and would be taken for input.")

    @property
    def folder(self) -> str:
        """Where this run writes: the output, or its shard's folder in it."""
        if self.shards == 1:
            return self.output
        return storage.join(self.output, f"shard-{self.shard}-of-{self.shards}")
