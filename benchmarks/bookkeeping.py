"""What a prediction run of any size costs besides reading and classifying images.

A table of addresses goes through a whole job: manifest, ranges, receipts, parts, summary. A stand-in answers in place
of decoder and network.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from cnnray.prediction.config import PredictConfig
from cnnray.prediction.plan import Plan
from cnnray.prediction.worker import Sources, Worker

ROWS = (10_000_000, 100_000_000)
"""Of the runs that are measured."""
_ROWS_AT_ONCE = 2**20
_TOP = 5


@dataclass(frozen=True, kw_only=True)
class Bookkeeping:
    """The measured costs of a run."""

    rows: int
    seconds: float
    """From its start to its end, on this machine."""
    driver_seconds: float
    """CPU time of the driver."""
    driver_bytes: int
    """Peak memory of the driver."""
    manifest_bytes: float
    """Size of the manifest's shards, for each row."""
    part_bytes: float
    """Size of the parts, for each row."""


class StandIn(Worker):
    """Gives each row the same answer without reading its image."""

    def __init__(self, plan: Plan) -> None:
        self._info, self._model = plan.bundle.info, plan.bundle.version

    def __call__(self, rows: pa.Table, sources: Sources = None) -> Iterator[pa.Table]:
        """Yield the rows with made-up predictions."""
        count, names = len(rows), self._info.class_names
        scores = pa.array(np.tile(np.linspace(0.9, 0.1, _TOP, dtype=np.float32), count))
        offsets = pa.array(np.arange(0, count * _TOP + 1, _TOP, dtype=np.int32))
        labels = pa.array((names * _TOP)[:_TOP] * count, pa.string())
        ids = rows["id"].to_numpy()
        columns = {
            "status": pa.repeat("ok", count),
            "error": pa.nulls(count, pa.string()),
            "prediction": pa.array(names, pa.string()).take(pa.array(ids % len(names))),
            "confidence": pa.array(((ids % 1000) / 1000).astype(np.float32)),
            "top_k_labels": pa.ListArray.from_arrays(offsets, labels),
            "top_k_scores": pa.ListArray.from_arrays(offsets, scores),
            "model": pa.repeat(self._model, count),
        }
        for name, values in columns.items():
            rows = rows.append_column(name, values)
        yield rows


def measure(folder: Path, bundle: str, rows: int) -> Bookkeeping:
    """Run a table of `rows` addresses through a prediction job.

    Args:
        folder: the table and the output are written here, and deleted at the end.
        bundle: exported to ONNX.
        rows: of the table.
    """
    with get_context("spawn").Pool(1) as process:  # a new process: peak memory and CPU time are its own
        return process.apply(_measure, (str(folder), bundle, rows))


def table(measured: list[Bookkeeping]) -> str:
    """The costs as a Markdown table."""
    lines = [
        "| rows | seconds | rows/s in the driver | driver's peak memory | manifest, a row | parts, a row |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {run.rows:,} | {run.seconds:,.0f} | {run.rows / run.driver_seconds:,.0f} "
        f"| {run.driver_bytes / 2**30:.2f} GiB | {run.manifest_bytes:.0f} bytes | {run.part_bytes:.0f} bytes |"
        for run in measured
    ]
    return "\n".join(lines)


def _measure(folder: str, bundle: str, rows: int) -> Bookkeeping:
    import shutil
    import tempfile

    from cnnray.prediction import dispatch, job

    dispatch.Worker = StandIn  # type: ignore[misc]  # a class takes the place of another
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        table = Path(temporary, "addresses.parquet")
        _write_addresses(table, rows)
        output = Path(temporary, "output")
        config = PredictConfig(bundle=bundle, input=str(table), output=str(output), engine="onnx", max_workers=2)
        wall, cpu = time.monotonic(), time.process_time()
        job.run(config)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        parts = sum(path.stat().st_size for path in output.glob("part-*"))
        manifest = sum(path.stat().st_size for path in (output / "manifest").rglob("rows-*"))
        peak = _peak_memory()
        shutil.rmtree(output)
    return Bookkeeping(
        rows=rows, seconds=wall, driver_seconds=cpu, driver_bytes=peak, manifest_bytes=manifest / rows,
        part_bytes=parts / rows,
    )  # fmt: skip


def _write_addresses(path: Path, rows: int) -> None:
    with pyarrow.parquet.ParquetWriter(path, pa.schema([("uri", pa.string())]), use_dictionary=False) as writer:
        for start in range(0, rows, _ROWS_AT_ONCE):
            numbers = range(start, min(start + _ROWS_AT_ONCE, rows))
            uris = [f"s3://a-bucket-of-photos/some/prefix/class-{i % 1000:04d}/image-{i:012d}.jpg" for i in numbers]
            writer.write_table(pa.table({"uri": uris}))


def _peak_memory() -> int:
    """Peak memory of this process in bytes. `getrusage` would start with the peak of the parent process."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024
