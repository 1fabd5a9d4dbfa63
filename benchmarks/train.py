"""Training steps: two workers against `Model.fit` in one process, and input from files against input from memory."""

import functools
import logging
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.photos import Photos
from benchmarks.report import BenchmarkError, Comparison, plan_bare_loops
from cnnray.cluster import Resources
from cnnray.images.geometry import Size
from cnnray.models import startup
from cnnray.training import decisions, epoch, plan
from cnnray.training.config import TrainConfig
from cnnray.training.decided import PlannedConfig

log = logging.getLogger(__name__)

BATCH, CLASSES = 64, 10
_HEAVY, _LIGHT = ("vgg_bn", 64), ("small_cnn", 32)
"""Networks and the sizes of their images. A light one shows what a step costs besides the network."""
_LIGHT_STEPS = 60


def measure(photos: Photos, resources: Resources, *, steps: int = 12, rounds: int = 3) -> list[Comparison]:
    """Measure `vgg_bn` at 64x64 and `small_cnn` at 32x32, with a global batch of 64.

    Args:
        photos: the images.
        resources: the cluster; on one node, two workers share the cores that the one process has.
        steps: steps of each measurement of `vgg_bn`.
        rounds: number of rounds; each measures every method once.

    Raises:
        BenchmarkError: there are too few images.
    """
    manifest = photos.manifest(steps * BATCH)
    steps = min(steps, len(manifest) // BATCH)
    if steps < 2:
        raise BenchmarkError(
            f"{len(manifest)} images are too few to measure training: at least {2 * BATCH} are needed."
        )
    threads = plan_bare_loops(resources).processes
    cpus = None if len(resources.nodes) == 1 else threads / 2
    heavy, light = (make_config(2, network, cpus_per_worker=cpus) for network in (_HEAVY, _LIGHT))
    shares = plan.share_out(heavy, resources)
    rates: dict[str, list[float]] = {name: [] for name in ("fit", "memory", "files", "light fit", "light memory")}
    for _ in range(rounds):
        rates["fit"].append(_measure_model_fit(_HEAVY, threads, steps))
        measured = run_on_workers(
            heavy, photos.folder, steps, cpus=shares.cpus_per_worker, decoders=shares.decoders_per_worker,
            manifest=manifest.slice(0, steps * BATCH),
        )  # fmt: skip
        rates["memory"].append(measured["memory"])
        rates["files"].append(measured["files"])
        rates["light fit"].append(_measure_model_fit(_LIGHT, threads, _LIGHT_STEPS))
        measured = run_on_workers(light, photos.folder, _LIGHT_STEPS, cpus=shares.cpus_per_worker)
        rates["light memory"].append(measured["memory"])
        log.info("%s", ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items()))
    peer = "one process, Model.fit"
    return [
        Comparison("vgg_bn 64x64, two workers", rates["memory"], peer, rates["fit"], 0.95),
        Comparison("the same, fed from files", rates["files"], "from memory", rates["memory"], 0.90),
        Comparison("small_cnn 32x32, two workers", rates["light memory"], peer, rates["light fit"], 0.95),
    ]


def make_config(workers: int, network: tuple[str, int] = _HEAVY, **flags: Any) -> PlannedConfig:
    """The config of a training like the peer's: Adam at a constant rate, without augmentation."""
    architecture, size = network
    defaults: dict[str, Any] = {
        "data": "/none", "output": "/nowhere", "architecture": architecture, "image_size": size, "batch_size": BATCH,
        "max_workers": workers, "augment": "none", "optimizer": "adam", "schedule": "constant",
    }  # fmt: skip
    facts = decisions.DataFacts(images=BATCH, classes=CLASSES, side=size)
    return plan.planned(decisions.decide(TrainConfig(**defaults | flags), facts)[0])


def _measure_model_fit(network: tuple[str, int], threads: int, steps: int) -> float:
    program = f"from benchmarks import train; train.run_model_fit({network}, {threads}, {steps})"
    completed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return float(completed.stdout.splitlines()[-1])


def run_model_fit(network: tuple[str, int], threads: int, steps: int) -> None:
    """Print the images/s of `Model.fit` after a warm-up of two steps."""
    startup.load_tensorflow(gpus=False)
    import keras
    import tensorflow as tf

    from cnnray.models import architectures

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    architecture, size = network
    model = architectures.build(architecture, size, CLASSES)
    model.compile(optimizer=keras.optimizers.Adam(), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    images, targets = _random_batches(steps * BATCH, Size.of(size))
    model.fit(images[: 2 * BATCH], targets[: 2 * BATCH], batch_size=BATCH, verbose=0)
    start = time.perf_counter()
    model.fit(images, targets, batch_size=BATCH, verbose=0)
    sys.stdout.write(f"{len(images) / (time.perf_counter() - start)}\n")


def _random_batches(count: int, size: Size) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, *size.shape), np.uint8)
    return images, generator.integers(0, CLASSES, count)


def run_on_workers(
    config: PlannedConfig,
    folder: Path,
    steps: int,
    *,
    cpus: float,
    decoders: int = 1,
    manifest: pa.Table | None = None,
    spread: bool = False,
) -> dict[str, Any]:
    """Run training steps on Ray Train workers.

    Args:
        config: of the training; each worker has `batch_size / workers` images of each step.
        folder: for Ray Train's files; with several nodes, a shared one.
        steps: steps of each measurement.
        cpus: CPUs per worker.
        decoders: processes that decode for each worker.
        manifest: `steps * batch_size` images; with it, steps with input from files are measured, too.
        spread: place the workers on as many nodes as possible instead of as few as possible.

    Returns:
        `memory` and, with a manifest, `files`: images/s; `nodes`: number of nodes with workers.
    """
    import ray.train

    from cnnray.training.backend import MultiWorkerConfig, Trainer

    threads = max(1, math.ceil(cpus))
    resources = {"CPU": cpus} | ({"GPU": config.gpus} if config.gpus else {})
    with tempfile.TemporaryDirectory(dir=folder) as storage_path:
        result = Trainer(
            functools.partial(_measure_on_worker, config, threads, decoders, steps, manifest),
            backend_config=MultiWorkerConfig(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.max_workers,
                use_gpu=config.gpus > 0,
                resources_per_worker=resources,
                placement_strategy="SPREAD" if spread else "PACK",
            ),
            run_config=ray.train.RunConfig(
                storage_path=storage_path, logging_config=ray.train.LoggingConfig(log_level="WARNING")
            ),
        ).fit()
    measured: dict[str, Any] = result.return_value
    return measured


def _measure_on_worker(
    config: PlannedConfig, threads: int, decoders: int, steps: int, manifest: pa.Table | None
) -> dict[str, Any]:
    """Measure steps with input from memory and from files. Runs on each worker."""
    startup.load_tensorflow(gpus=config.gpus > 0)
    import ray.train
    import tensorflow as tf

    from cnnray.images.decoders import Decoders
    from cnnray.training.data import StreamedSource
    from cnnray.training.step import Steps

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        training = Steps(config, CLASSES)
        training.begin(config.resolved_phases[0], steps)
    images, targets = _random_batches(config.batch_size // world, config.geometry.image_size)
    training.start(images, targets).result()
    inputs: dict[str, Any] = {"memory": iter([{"image": images, "target": targets}] * steps)}
    if manifest is not None:
        manifest = manifest.append_column("target", pa.array(np.arange(len(manifest)) % CLASSES))
        source = StreamedSource(manifest, Decoders(decoders, config.geometry, largest_batch=len(images)))
        ordered = epoch.Epoch(0, 0, len(manifest), config.batch_size)
        rows = functools.partial(ordered.rows, rank=rank, world=world)
        list(source.batches(rows, 2))  # warm-up: the processes start
        inputs["files"] = source.batches(rows, ordered.steps)
    rates: dict[str, Any] = {}
    for name, batches in inputs.items():
        # Time starts after the first step, because the first batch of a stream takes a second or two, once per epoch.
        ends = []
        for batch in batches:
            training.start(batch["image"], batch["target"]).result()
            ends.append(time.perf_counter())
        rates[name] = (steps - 1) * config.batch_size / (ends[-1] - ends[0])
    on_node = np.eye(world, dtype=np.int64)[context.get_node_rank()]
    return rates | {"nodes": int(np.count_nonzero(training.reduce(on_node)))}
