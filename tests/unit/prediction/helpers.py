"""What several of these tests need: rows, parts, manifests, and a worker without a network."""

from types import SimpleNamespace

import pyarrow as pa

from cnnray.cluster import Node, Resources
from cnnray.images import shards
from cnnray.images.inputs import VERSION
from cnnray.images.shards import Range
from cnnray.prediction import parts
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.parts import Part
from cnnray.prediction.ranges import Output, RangeWorker
from cnnray.prediction.tally import Tally


def make_cluster(*nodes):
    return Resources(tuple(Node(cpus=cpus, gpus=gpus) for cpus, gpus in nodes))


def make_rows(ids):
    """The rows of a part; every image whose id is a multiple of three has an error."""
    errors = ['corrupt: a, "b"\r\nc\rd' if number % 3 == 0 else None for number in ids]
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "uri": [f"/Ü, x/{number}.png" for number in ids],
            "status": ["error" if error else "ok" for error in errors],
            "error": pa.array(errors, pa.string()),
            "prediction": pa.array([None if error else "null" for error in errors], pa.string()),
            "confidence": pa.array([None if error else 0.25 for error in errors], pa.float32()),
            "top_k_labels": pa.array(
                [None if error else ["null", '"a", b'] for error in errors], pa.list_(pa.string())
            ),
            "top_k_scores": pa.array([None if error else [0.25, 0.125] for error in errors], pa.list_(pa.float32())),
        }
    )


def write_part(folder, ids, *, generation=0, attempt=0, incomplete=False, format_="parquet", first=None):
    part = Part(ids[0] if first is None else first, generation, attempt, incomplete, format_)
    assert parts.write(str(folder), part, make_rows(list(ids)), Tally.of(make_rows(list(ids)), 0.5))
    return part


class Classifier:
    """Stands in for a worker, and writes down which images it has read."""

    def __init__(self, plan):
        self.read, self.trouble = [], set()

    def __call__(self, rows):
        ids = rows["id"].to_pylist()
        self.read += ids
        errors = ["unavailable: S3 asks for fewer requests." if number in self.trouble else None for number in ids]
        errors = ["corrupt: x" if number % 10 == 3 else error for number, error in zip(ids, errors, strict=True)]
        good = [error is None for error in errors]
        columns = {
            "status": ["ok" if is_good else "error" for is_good in good],
            "error": pa.array(errors, pa.string()),
            "prediction": pa.array(["cat" if is_good else None for is_good in good], pa.string()),
            "confidence": pa.array([0.75 if is_good else None for is_good in good], pa.float32()),
        }
        for start in range(0, len(rows), 4):  # blocks
            block = rows.slice(start, 4)
            for name, values in columns.items():
                block = block.append_column(name, pa.array(values).slice(start, 4))
            yield block


def write_manifest(folder, rows, rows_per_range=10, **columns):
    """Write the shards of a manifest, and give its ranges."""
    table = pa.table({"uri": [f"/{number:04d}.png" for number in range(rows)], **columns})
    table = table.append_column(VERSION, pa.array(["1"] * rows, pa.string()))
    return list(shards.write(str(folder), [table], rows_per_range=rows_per_range, generation=0))


def range_worker(tmp_path, **options):
    """A worker for ranges of the manifest in a folder, and the `Classifier` inside it."""
    options = {"format": "parquet", "threshold": 0.5, "skip_unreadable": False} | options
    output = Output(folder=str(tmp_path / "out"), manifest=str(tmp_path / "manifest"), **options)
    (tmp_path / "out").mkdir(exist_ok=True)
    plan = SimpleNamespace(pool=SimpleNamespace(decode_cpus=0))
    worker = RangeWorker(plan, output, Classifier)
    return worker, worker._worker


def make_config(tmp_path, **changes):
    return PredictConfig(bundle="/b", input="/in", output=str(tmp_path / "out"), **changes)


def make_ranges(count):
    return [Range(10 * number, 10 * number + 9, 10, 0, number, 0) for number in range(count)]
