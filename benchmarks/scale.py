"""Scaling of training, prediction and serving with the number of workers.

Also measures the costs per image of the parts of a job that run once, whatever the number of workers.
"""

import functools
import logging
import re
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import train
from benchmarks.load import measure_peak
from benchmarks.photos import Photos
from benchmarks.photos import write as write_photos
from benchmarks.predict import BATCH, steady_rate, write_random_bundle
from benchmarks.projection import Costs
from benchmarks.serve import make_photo, run_service
from cnnray.cluster import Resources
from cnnray.images import manifest as manifests
from cnnray.images import storage, stream
from cnnray.images.ranges import split_rows
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle
from cnnray.prediction import pipeline
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.parts import Collector, Parts
from cnnray.prediction.plan import plan_on_cluster
from cnnray.prediction.summary import Tally
from cnnray.prediction.worker import select_columns
from cnnray.training import epoch

log = logging.getLogger(__name__)

Rates = list[tuple[str, int, float]]
"""For increasing numbers of workers: a label, the number of workers, and their images/s or requests/s."""

_STEPS, _BATCH_PER_WORKER = 12, 32
_MANIFEST, _ROWS = "manifest.parquet", 1_000_000
"""File name and number of rows of the manifest whose cost is measured."""
_TASKS, _ROWS_PER_TASK = 400, 512


def doublings(largest: int) -> list[int]:
    """1, 2, 4, ... up to `largest`, which is always included."""
    return sorted({2**power for power in range(largest.bit_length())} | {largest}) if largest > 0 else []


def table(heading: str, rates: Rates, unit: str = "images/s") -> str:
    """Rates at increasing numbers of workers as a Markdown table.

    Args:
        heading: heading of the first column.
        rates: one entry per row.
        unit: unit of the rates.
    """
    lines = [f"| {heading} | {unit} | of one's times as many | this step costs |", "|---|---|---|---|"]
    single = rates[0][2] / rates[0][1]
    previous = single
    for name, workers, rate in rates:
        per_worker = rate / workers
        cost = "" if workers == rates[0][1] else f"{1 - per_worker / previous:.1%}"
        lines.append(f"| {name} | {rate:.0f} | {per_worker / single:.1%} | {cost} |")
        previous = per_worker
    return "\n".join(lines)


def measure_training(photos: Photos, resources: Resources) -> Rates:
    """Measure the training speed of `vgg_bn` at 64x64 from memory, in images/s.

    Each worker has 1 CPU (or 1 GPU) and 32 images per step. With several nodes, each number of workers is measured on
    as few nodes as possible and on as many as possible.
    """
    gpus = 1.0 if resources.gpus >= 1 else 0.0
    rates: Rates = []
    for workers in doublings(int(resources.gpus if gpus else resources.cpus)):
        config = train.make_config(workers, batch_size=_BATCH_PER_WORKER * workers, gpus_per_worker=gpus)
        for spread in (False, True)[: 1 + (workers > 1 and len(resources.nodes) > 1)]:
            measured = train.run_on_workers(config, photos.folder, _STEPS, cpus=1.0, spread=spread)
            name = f"{workers} on {measured['nodes']} node(s)"
            rates.append((name, workers, measured["memory"]))
            log.info("training, %s: %.1f images/s", *rates[-1][::2])
    return rates


def measure_prediction(photos: Photos, resources: Resources, images: int = 1000) -> Rates:
    """Measure prediction from files to rows, in images/s, with 1 CPU and `images` images per worker."""
    bundle = Bundle.load(write_random_bundle(photos.folder))
    rates: Rates = []
    for workers in doublings(int(resources.cpus)):
        manifest = select_columns(photos.manifest(images * workers))
        options = PredictOptions(
            engine="auto", min_workers=workers, max_workers=workers, cpus_per_worker=1.0, gpus_per_worker=0.0,
            decoding="workers",
        )  # fmt: skip
        planned = plan_on_cluster(bundle, options, resources)
        dataset = pipeline.predict(manifest, planned, split_rows(manifest["uri"], 128))
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        rates.append((str(workers), workers, steady_rate(map(len, batches), len(manifest))))
        log.info("prediction, %s workers: %.0f images/s", *rates[-1][::2])
    return rates


def measure_serving(folder: Path, largest: int) -> Rates:
    """Measure serving on this machine, in requests/s at 16 connections, with up to `largest` replicas."""
    photo = folder / "photo.jpg"
    photo.write_bytes(make_photo())
    bundle = write_random_bundle(folder)
    engine = engines.choose(Bundle.load(bundle), gpus=False, batch_size=BATCH)
    rates: Rates = []
    for replicas in doublings(largest):
        with run_service("ours", folder, bundle, engine, Path(), replicas) as address:
            peak = measure_peak(f"{address}/predict", photo, folder, connections=16, seconds=6)
        rates.append((str(replicas), replicas, peak.rate))
        log.info("serving, %s replicas: %.0f requests/s", *rates[-1][::2])
    return rates


def costs_table(costs: Costs) -> str:
    """The costs as a Markdown table."""
    in_seconds = ("listing", "manifest", "order", "row", "task", "image", "step")
    lines = ["| cost | |", "|---|---|"]
    for name, value in vars(costs).items():
        lines.append(f"| {name} | {f'{1e6 * value:,.2f} microseconds' if name in in_seconds else f'{value:,.0f}'} |")
    return "\n".join(lines)


# -- costs of the parts that run once -------------------------------------------------------------------------


def measure_costs(photos: Photos, training: Rates, prediction: Rates) -> Costs:
    """Measure the parts of a job that do not grow with the cluster.

    Args:
        photos: names the folder that files are written to.
        training: from `measure_training`.
        prediction: from `measure_prediction`.
    """
    folder = photos.folder / "costs"
    photo_folder = write_photos(photos.folder / "photos", 1000)
    with get_context("spawn").Pool(1) as process:  # a new process, without other threads or memory use
        manifest_seconds, manifest_bytes = process.apply(_measure_manifest, (str(folder),))
        listing_seconds, order_seconds = process.apply(_measure_listing_and_order, (str(photo_folder),))
    manifest = manifests.read(str(folder / _MANIFEST))
    files = storage.files(str(photo_folder))
    rows = _make_rows(manifest)
    parts = Parts(str(folder / "parts"), "parquet", [(i, i + 4096) for i in range(0, len(rows), 4096)])
    collect_seconds = _cpu_seconds(lambda: _collect(parts, rows))
    reconcile_seconds = _cpu_seconds(lambda: _reconcile(parts, rows))
    task_seconds = _cpu_seconds(lambda: _run_empty_tasks(manifest))
    startup.load_tensorflow(gpus=False)
    return Costs(
        listing=listing_seconds / len(files),
        manifest=manifest_seconds / _ROWS,
        manifest_bytes=manifest_bytes / _ROWS,
        order=order_seconds / _ROWS,
        row=(collect_seconds + reconcile_seconds) / len(rows),
        row_bytes=sum(Path(parts.uri(part)).stat().st_size for part in range(len(parts.ranges))) / len(rows),
        task=task_seconds / _TASKS,
        task_images=_ROWS_PER_TASK,
        image=1 / prediction[0][2],
        image_bytes=sum(Path(file.uri).stat().st_size for file in files) / len(files),
        step=_BATCH_PER_WORKER / training[0][2],
        step_images=_BATCH_PER_WORKER,
        weights=4.0 * Bundle.load(write_random_bundle(photos.folder)).model.count_params(),
    )


def _measure_manifest(folder: str) -> tuple[float, float]:
    """CPU seconds and bytes of memory that the driver's manifest takes."""
    before = _peak_memory()
    uris = [f"s3://a-bucket-of-photos/some/prefix/class-{i % 1000:04d}/image-{i:012d}.jpg" for i in range(_ROWS)]
    start = time.process_time()
    manifest = manifests.manifest_from_uris(uris)
    del uris
    split_rows(manifest["uri"], _ROWS_PER_TASK)
    manifests.write(manifest, storage.join(folder, _MANIFEST))
    return time.process_time() - start, _peak_memory() - before


def _peak_memory() -> int:
    """Peak memory of this process in bytes. `getrusage` would start with the peak of the parent process."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def _measure_listing_and_order(folder: str) -> tuple[float, float]:
    """CPU seconds to list a folder, and to compute the order of an epoch of `_ROWS` images."""
    storage.files(folder)  # warm-up: imports libraries
    return _cpu_seconds(lambda: storage.files(folder)), _cpu_seconds(lambda: epoch.order(0, 0, _ROWS))


def _cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds that this process spends on some work. Other processes on the machine do not change them."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _make_rows(manifest: pa.Table) -> pa.Table:
    """Prediction rows like those that workers return."""
    count = 100 * 4096
    passed_through = select_columns(manifest.slice(0, count))
    scores = np.random.default_rng(0).random((count, 5), np.float32)
    offsets = pa.array(np.arange(0, scores.size + 1, 5, dtype=np.int32))
    names = pa.array([f"class{number}" for number in range(5)] * count)
    columns = {
        "status": pa.array(["ok"] * count), "error": pa.nulls(count, pa.string()),
        "prediction": pa.array(["class0"] * count), "confidence": pa.array(scores[:, 0]),
        "top_k_labels": pa.ListArray.from_arrays(offsets, names),
        "top_k_scores": pa.ListArray.from_arrays(offsets, pa.array(scores.ravel())),
        "model": pa.array(["0123456789abcdef"] * count),
    }  # fmt: skip
    return functools.reduce(lambda table, name: table.append_column(name, columns[name]), columns, passed_through)


def _collect(parts: Parts, rows: pa.Table) -> None:
    collector = Collector(parts, rows["id"].to_numpy())
    for start in range(0, len(rows), _ROWS_PER_TASK):
        collector.add(rows.slice(start, _ROWS_PER_TASK))


def _reconcile(parts: Parts, rows: pa.Table) -> None:
    """Read back and compare all parts, as the job does at its end."""
    ids, tally = rows["id"].to_numpy(), Tally(0.5)
    for part in range(len(parts.ranges)):
        part_rows = parts.read(part)
        assert not parts.problem(part, part_rows, ids)
        tally.add(part_rows)


def _run_empty_tasks(manifest: pa.Table) -> None:
    """Pass rows through Ray Data tasks that do nothing, and back to the driver."""
    ranges = [(i * _ROWS_PER_TASK, (i + 1) * _ROWS_PER_TASK) for i in range(_TASKS)]
    dataset = stream.from_ranges(manifest, ranges).map_batches(
        _identity, batch_size=None, batch_format="pyarrow", num_cpus=0.5
    )
    assert sum(map(len, dataset.iter_batches(batch_size=None, batch_format="pyarrow"))) == _TASKS * _ROWS_PER_TASK


def _identity(rows: pa.Table) -> pa.Table:
    return rows
