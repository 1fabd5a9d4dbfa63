"""Scaling of training, prediction and serving with the number of workers.

Also measures the costs per image of the parts of a job that run once, whatever the number of workers.
"""

import logging
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import train
from benchmarks.bookkeeping import Bookkeeping
from benchmarks.load import measure_peak
from benchmarks.photos import Photos
from benchmarks.photos import write as write_photos
from benchmarks.predict import BATCH, ranges_rate, write_random_bundle
from benchmarks.projection import Costs
from benchmarks.serve import make_photo, run_service
from cnnray.cluster import Resources
from cnnray.images import storage
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.plan import plan_on_cluster
from cnnray.training import epoch

log = logging.getLogger(__name__)

Rates = list[tuple[str, int, float]]
"""For increasing numbers of workers: a label, the number of workers, and their images/s or requests/s."""

_STEPS, _BATCH_PER_WORKER = 12, 32
_ROWS = 1_000_000
"""Images of the epoch whose order is measured."""


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
    lines = [f"| {heading} | {unit} | efficiency | lost by the doubling |", "|---|---|---|---|"]
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
        uris = photos.manifest(images * workers)["uri"].to_pylist()
        options = PredictOptions(
            engine="auto", min_workers=workers, max_workers=workers, cpus_per_worker=1.0, gpus_per_worker=0.0,
            decoding="workers",
        )  # fmt: skip
        planned = plan_on_cluster(bundle, options, resources)
        rates.append((str(workers), workers, ranges_rate(planned, uris, photos.folder)))
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
    in_seconds = ("listing", "order", "row", "image", "step")
    lines = ["| cost | |", "|---|---|"]
    for name, value in vars(costs).items():
        lines.append(f"| {name} | {f'{1e6 * value:,.2f} microseconds' if name in in_seconds else f'{value:,.0f}'} |")
    return "\n".join(lines)


# -- costs of the parts that run once -------------------------------------------------------------------------


def measure_costs(photos: Photos, training: Rates, prediction: Rates, kept: Bookkeeping) -> Costs:
    """Measure the parts of a job that do not grow with the cluster.

    Args:
        photos: names the folder that files are written to.
        training: from `measure_training`.
        prediction: from `measure_prediction`.
        kept: from `bookkeeping.measure`.
    """
    photo_folder = write_photos(photos.folder / "photos", 1000)
    with get_context("spawn").Pool(1) as process:  # a new process, without other threads
        listing_seconds, order_seconds = process.apply(_measure_listing_and_order, (str(photo_folder),))
    files = storage.files(str(photo_folder))
    startup.load_tensorflow(gpus=False)
    return Costs(
        listing=listing_seconds / len(files),
        row=kept.driver_seconds / kept.rows,
        driver_bytes=kept.driver_bytes,
        row_bytes=kept.part_bytes,
        order=order_seconds / _ROWS,
        image=1 / prediction[0][2],
        image_bytes=sum(Path(file.uri).stat().st_size for file in files) / len(files),
        step=_BATCH_PER_WORKER / training[0][2],
        step_images=_BATCH_PER_WORKER,
        weights=4.0 * Bundle.load(write_random_bundle(photos.folder)).model.count_params(),
    )


def _measure_listing_and_order(folder: str) -> tuple[float, float]:
    """CPU seconds to list a folder, and to compute the order of `_ROWS` images of an epoch of a billion."""
    storage.files(folder)  # warm-up: imports libraries
    ordered = epoch.Epoch(seed=0, number=0, images=10**9, batch_size=_BATCH_PER_WORKER)

    def order() -> None:
        for step in range(_ROWS // _BATCH_PER_WORKER):
            ordered.rows(step)

    return _cpu_seconds(lambda: storage.files(folder)), _cpu_seconds(order)


def _cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds that this process spends on some work. Other processes on the machine do not change them."""
    start = time.process_time()
    work()
    return time.process_time() - start
