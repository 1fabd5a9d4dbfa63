"""What a training worker needs for the manifest of many images: time until it has the first batch, and memory."""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

ROWS = (10_000_000, 100_000_000)
"""Of the manifests that are measured."""
_ROWS_OF_A_GROUP = 2**18
_CLASSES, _BATCH, _STEPS = 1000, 64, 2000
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class ManifestRows:
    """The measured costs."""

    rows: int
    first_batch: float
    """Seconds from the start of the process."""
    batch: float
    """Seconds for the rows of a batch of 64 images, in the order of an epoch."""
    private_bytes: int
    """Peak memory of the process, without libraries that are no part of it, such as TensorFlow."""
    file_bytes: int
    """Of the files that all workers of a machine share."""


def measure(folder: Path, rows: int) -> ManifestRows:
    """Let a process read batches of a manifest as a worker does.

    Args:
        folder: the manifest and the files are written here, and deleted at the end.
        rows: of the manifest.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        manifest = Path(temporary, "manifest.parquet")
        _write(manifest, rows)
        program = f"import tempfile; tempfile.tempdir = {temporary!r}\n" + (
            f"from benchmarks import manifest_rows; manifest_rows.read({str(manifest)!r})"
        )
        started, peak = time.monotonic(), 0
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                peak = max(peak, _private_memory(process.pid))
                time.sleep(_SAMPLE_SECONDS)
            assert process.stdout is not None
            result = json.loads(process.stdout.read())
    return ManifestRows(
        rows=rows, first_batch=result["first_batch"] - started, batch=result["batch"], private_bytes=peak,
        file_bytes=result["file_bytes"],
    )  # fmt: skip


def read(manifest: str) -> None:
    """Print, as JSON, when the first batch was there (on the monotonic clock), and the seconds for each batch."""
    from cnnray.training.epoch import Epoch
    from cnnray.training.rows import open_rows

    with open_rows(manifest, [f"{number:04d}" for number in range(_CLASSES)], "") as splits:
        train = splits["train"]
        order = Epoch(0, 0, len(train), _BATCH)
        train.take(order.rows(0))
        first = time.monotonic()
        for step in range(1, _STEPS):
            train.take(order.rows(step))
        batch = (time.monotonic() - first) / (_STEPS - 1)
        files = Path(tempfile.gettempdir()).glob("cnnray-rows-*/*/*")
        size = sum(file.stat().st_size for file in files)
    sys.stdout.write(json.dumps({"first_batch": first, "batch": batch, "file_bytes": size}))


def _private_memory(process: int) -> int:
    """Bytes of memory that a process shares with no file; 0 once it has ended."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def table(measured: list[ManifestRows]) -> str:
    """The costs as a Markdown table."""
    lines = [
        "| rows of the manifest | first batch | a batch of 64 | memory of a worker | files of a machine |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {run.rows:,} | after {run.first_batch:.1f} s | {1000 * run.batch:.2f} ms "
        f"| {run.private_bytes / 2**30:.2f} GiB | {run.file_bytes / 2**30:.2f} GiB |"
        for run in measured
    ]
    return "\n".join(lines)


def _write(path: Path, rows: int) -> None:
    """A manifest of a run, a twentieth of whose images validate."""
    schema = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in ("uri", "label", "split"))])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _ROWS_OF_A_GROUP):
            ids = np.arange(start, min(start + _ROWS_OF_A_GROUP, rows))
            labels = pc.utf8_lpad(pa.array(ids % _CLASSES).cast(pa.string()), 4, "0")
            numbers = pc.utf8_lpad(pa.array(ids).cast(pa.string()), 12, "0")
            uris = pc.binary_join_element_wise(
                "s3://a-bucket-of-photos/class-", labels, "/image-", numbers, ".jpg", ""
            )
            splits = pa.array(np.where(ids % 20 == 0, "validation", "train"))
            writer.write_table(pa.table([pa.array(ids), uris, labels, splits], schema=schema))
