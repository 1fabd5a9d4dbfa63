"""One worker, two, four, ...: what each doubling costs, in training, prediction and serving; and what an image costs
those parts of a job of which there is only one, however many workers there are."""

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
from benchmarks.load import peak
from benchmarks.photos import Photos, write
from benchmarks.predict import BATCH, random_bundle, steady_rate
from benchmarks.projection import Costs
from benchmarks.serve import photo_of_68_kb, service
from cnnray.cluster import Resources
from cnnray.images import manifest as manifests
from cnnray.images import storage, stream
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle
from cnnray.prediction import pipeline
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.parts import Collector, Parts
from cnnray.prediction.summary import Tally
from cnnray.training import epoch

log = logging.getLogger(__name__)

Rates = list[tuple[str, int, float]]
"""Of more and more workers: what they are called, how many they are, and what they do in a second."""

_STEPS, _BATCH_OF_ONE = 12, 32
_MANIFEST, _ROWS = "manifest.parquet", 1_000_000
"""Of the manifest whose cost is measured."""
_TASKS, _ROWS_PER_TASK = 400, 512


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and that."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most}) if most > 0 else []


def table(what: str, rates: Rates, unit: str = "images/s") -> str:
    """Rates of more and more workers as a Markdown table.

    Args:
        what: the column's head.
        rates: of each row its name, the number of workers, and their rate.
        unit: of the rate.
    """
    lines = [f"| {what} | {unit} | of one's times as many | this step costs |", "|---|---|---|---|"]
    single = rates[0][2] / rates[0][1]
    before = single
    for name, workers, rate in rates:
        each = rate / workers
        cost = "" if workers == rates[0][1] else f"{1 - each / before:.1%}"
        lines.append(f"| {name} | {rate:.0f} | {each / single:.1%} | {cost} |")
        before = each
    return "\n".join(lines)


def training(photos: Photos, found: Resources) -> Rates:
    """Images/s of `vgg_bn` at 64x64 from memory, 32 images a worker and step, a CPU (or a GPU) each; where there are
    several nodes, on as few and on as many of them as there are."""
    gpus = 1.0 if found.gpus >= 1 else 0.0
    rates: Rates = []
    for workers in doublings(int(found.gpus if gpus else found.cpus)):
        config = train.config_of(workers, batch_size=_BATCH_OF_ONE * workers, gpus_per_worker=gpus)
        for spread in (False, True)[: 1 + (workers > 1 and len(found.nodes) > 1)]:
            measured = train.on_workers(config, photos.folder, _STEPS, cpus=1.0, spread=spread)
            name = f"{workers} on {measured['nodes']} node(s)"
            rates.append((name, workers, measured["memory"]))
            log.info("training, %s: %.1f images/s", *rates[-1][::2])
    return rates


def prediction(photos: Photos, found: Resources, images: int = 1000) -> Rates:
    """Images/s from files to rows, a CPU for each worker, and so many images for each."""
    bundle = Bundle.load(random_bundle(photos.folder))
    rates: Rates = []
    for workers in doublings(int(found.cpus)):
        manifest = pipeline.select_columns(photos.manifest(images * workers))
        options = PredictOptions(
            engine="auto", min_workers=workers, max_workers=workers, cpus_per_worker=1.0, gpus_per_worker=0.0,
            decoding="workers",
        )  # fmt: skip
        planned = pipeline.plan(bundle, options, found)
        dataset = pipeline.predict(manifest, planned, stream.pieces(manifest["uri"].to_pylist(), 128))
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        rates.append((str(workers), workers, steady_rate(map(len, batches), len(manifest))))
        log.info("prediction, %s workers: %.0f images/s", *rates[-1][::2])
    return rates


def serving(folder: Path, most: int) -> Rates:
    """Requests/s at 16 connections, on this machine alone."""
    photo = folder / "photo.jpg"
    photo.write_bytes(photo_of_68_kb())
    bundle = random_bundle(folder)
    engine = engines.choose(Bundle.load(bundle), gpus=False, batch_size=BATCH)
    rates: Rates = []
    for replicas in doublings(most):
        with service("ours", folder, bundle, engine, Path(), replicas) as address:
            found = peak(f"{address}/predict", photo, folder, connections=16, seconds=6)
        rates.append((str(replicas), replicas, found.rate))
        log.info("serving, %s replicas: %.0f requests/s", *rates[-1][::2])
    return rates


def costs_table(found: Costs) -> str:
    """As Markdown."""
    seconds = ("listing", "manifest", "order", "row", "task", "image", "step")
    lines = ["| cost | |", "|---|---|"]
    for name, value in vars(found).items():
        lines.append(f"| {name} | {f'{1e6 * value:,.2f} microseconds' if name in seconds else f'{value:,.0f}'} |")
    return "\n".join(lines)


# -- what there is one of -----------------------------------------------------------------------------------------


def costs(photos: Photos, trained: Rates, predicted: Rates) -> Costs:
    """Measure the parts that do not grow with the cluster.

    Args:
        photos: where files are written.
        trained: what `training` gave.
        predicted: what `prediction` gave.
    """
    folder = photos.folder / "costs"
    made = write(photos.folder / "photos", 1000)
    with get_context("spawn").Pool(1) as alone:  # where no other thread works, and nothing else has used memory
        of_manifest, at_most = alone.apply(_manifest_costs, (str(folder),))
        walked, ordered = alone.apply(_listing_and_order_costs, (str(made),))
    manifest = manifests.read(str(folder / _MANIFEST))
    stored = storage.files(str(made))
    rows = _rows(manifest)
    parts = Parts(str(folder / "parts"), "parquet", [(i, i + 4096) for i in range(0, len(rows), 4096)])
    _, collected = _timed(lambda: _collect(parts, rows))
    _, reconciled = _timed(lambda: _reconcile(parts, rows))
    _, tasks = _timed(lambda: _tasks(manifest))
    startup.load_tensorflow(gpus=False)
    return Costs(
        listing=walked / len(stored),
        manifest=of_manifest / _ROWS,
        manifest_bytes=at_most / _ROWS,
        order=ordered / _ROWS,
        row=(collected + reconciled) / len(rows),
        row_bytes=sum(Path(parts.uri(part)).stat().st_size for part in range(len(parts.ranges))) / len(rows),
        task=tasks / _TASKS,
        task_images=_ROWS_PER_TASK,
        image=1 / predicted[0][2],
        image_bytes=sum(Path(file.uri).stat().st_size for file in stored) / len(stored),
        step=_BATCH_OF_ONE / trained[0][2],
        step_images=_BATCH_OF_ONE,
        weights=4.0 * Bundle.load(random_bundle(photos.folder)).model.count_params(),
    )


def _manifest_costs(folder: str) -> tuple[float, float]:
    """Seconds and bytes of memory that the driver's manifest takes."""
    before = _most_memory()
    uris = [f"s3://a-bucket-of-photos/some/prefix/class-{i % 1000:04d}/image-{i:012d}.jpg" for i in range(_ROWS)]
    start = time.process_time()
    manifest = manifests.manifest_of_uris(uris)
    del uris
    stream.pieces(manifest["uri"].to_pylist(), _ROWS_PER_TASK)
    manifests.write(manifest, storage.join(folder, _MANIFEST))
    return time.process_time() - start, _most_memory() - before


def _most_memory() -> int:
    """That this process has had at a time, in bytes. (`getrusage` begins with what its parent had.)"""
    [found] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) * 1024


def _listing_and_order_costs(folder: str) -> tuple[float, float]:
    """Seconds to list a folder, and to order an epoch of `_ROWS` images."""
    storage.files(folder)  # loads what is needed
    _, walked = _timed(lambda: storage.files(folder))
    _, ordered = _timed(lambda: epoch.order(0, 0, _ROWS))
    return walked, ordered


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What comes of some work, and the seconds of a processor that this process took for it: there is one of it,
    whoever else is busy meanwhile."""
    start = time.process_time()
    return work(), time.process_time() - start


def _rows(manifest: pa.Table) -> pa.Table:
    """Rows as workers give them back."""
    count = 100 * 4096
    some = pipeline.select_columns(manifest.slice(0, count))
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
    return functools.reduce(lambda table, name: table.append_column(name, columns[name]), columns, some)


def _collect(parts: Parts, rows: pa.Table) -> None:
    collector = Collector(parts, rows["id"].to_numpy())
    for start in range(0, len(rows), _ROWS_PER_TASK):
        collector.add(rows.slice(start, _ROWS_PER_TASK))


def _reconcile(parts: Parts, rows: pa.Table) -> None:
    """As the job does at its end."""
    ids, tally = rows["id"].to_numpy(), Tally(0.5)
    for part in range(len(parts.ranges)):
        found = parts.read(part)
        assert not parts.problem(part, found, ids)
        tally.add(found)


def _tasks(manifest: pa.Table) -> None:
    """Tasks that do nothing, through Ray Data and back to the driver."""
    ranges = [(i * _ROWS_PER_TASK, (i + 1) * _ROWS_PER_TASK) for i in range(_TASKS)]
    dataset = stream.tasks(manifest, ranges).map_batches(_same, batch_size=None, batch_format="pyarrow", num_cpus=0.5)
    assert sum(map(len, dataset.iter_batches(batch_size=None, batch_format="pyarrow"))) == _TASKS * _ROWS_PER_TASK


def _same(rows: pa.Table) -> pa.Table:
    return rows
