"""Training steps of two workers against one process's `Model.fit`, and fed from files against from memory."""

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
from benchmarks.report import BenchmarkError, Comparison, bare_loops
from cnnray.cluster import Resources
from cnnray.models import startup
from cnnray.training import epoch
from cnnray.training.config import TrainConfig
from cnnray.training.plan import share_out

log = logging.getLogger(__name__)

SIZE, BATCH, CLASSES = 64, 64, 10


def train(photos: Photos, found: Resources, *, steps: int = 12, rounds: int = 3) -> list[Comparison]:
    """Measure `vgg_bn` at 64x64 with a global batch of 64.

    Args:
        photos: the images.
        found: the cluster; two workers share the cores that the one process has.
        steps: steps in each measurement.
        rounds: how often each is measured, in turns.

    Raises:
        BenchmarkError: there are too few images.
    """
    manifest = photos.manifest(steps * BATCH)
    steps = min(steps, len(manifest) // BATCH)
    if steps < 2:
        raise BenchmarkError(f"{len(manifest)} images are too few to measure training with: {2 * BATCH} at least.")
    threads = bare_loops(found).processes
    config = config_of(2, cpus_per_worker=None if len(found.nodes) == 1 else threads / 2)
    shares = share_out(config, found)
    fit, memory, files = [], [], []
    for _ in range(rounds):
        fit.append(_model_fit(threads, steps))
        measured = on_workers(
            config, photos.folder, steps, cpus=shares.cpus_per_worker, decode_cpus=shares.decode_cpus,
            manifest=manifest.slice(0, steps * BATCH),
        )  # fmt: skip
        memory.append(measured["memory"])
        files.append(measured["files"])
        log.info("fit %.1f, two workers %.1f, from files %.1f images/s", fit[-1], memory[-1], files[-1])
    return [
        Comparison("vgg_bn 64x64, two workers", memory, "one process, Model.fit", fit, 0.95),
        Comparison("the same, fed from files", files, "from memory", memory, 0.90),
    ]


def config_of(workers: int, **flags: Any) -> TrainConfig:
    """As the peer trains: Adam at a constant rate, and nothing else."""
    return TrainConfig(
        data="/none", output="/nowhere", max_workers=workers, augment="none", optimizer="adam", schedule="constant",
        **flags,
    )  # fmt: skip


def _model_fit(threads: int, steps: int) -> float:
    program = f"from benchmarks import train; train.fit_in_this_process({threads}, {steps})"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def fit_in_this_process(threads: int, steps: int) -> None:
    """Print the images/s of `Model.fit` after its first epoch."""
    startup.load_tensorflow(gpus=False)
    import keras
    import tensorflow as tf

    from cnnray.models import architectures

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    model = architectures.build("vgg_bn", SIZE, CLASSES)
    model.compile(optimizer=keras.optimizers.Adam(), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    images, targets = _random_batches(steps * BATCH)
    model.fit(images[: 2 * BATCH], targets[: 2 * BATCH], batch_size=BATCH, verbose=0)
    start = time.perf_counter()
    model.fit(images, targets, batch_size=BATCH, verbose=0)
    sys.stdout.write(f"{len(images) / (time.perf_counter() - start)}\n")


def _random_batches(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return images, generator.integers(0, CLASSES, count)


def on_workers(
    config: TrainConfig,
    folder: Path,
    steps: int,
    *,
    cpus: float,
    decode_cpus: float = 0.0,
    manifest: pa.Table | None = None,
    spread: bool = False,
) -> dict[str, Any]:
    """Run steps on Ray Train's workers.

    Args:
        config: of the training; each worker has `batch_size / workers` images of each step.
        folder: for Ray Train's files; on several nodes one that all of them see.
        steps: in each measurement.
        cpus: of each worker.
        decode_cpus: of each decoding task.
        manifest: of `steps * batch_size` images, to measure steps that are fed from files as well.
        spread: whether workers go to as many nodes as there are, not to as few as hold them.

    Returns:
        `memory` and, with a manifest, `files`: images/s; and `nodes`, how many the workers were on.
    """
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from cnnray.training.backend import MultiWorkerConfig

    threads = max(1, math.ceil(cpus))
    resources = {"CPU": cpus} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    with tempfile.TemporaryDirectory(dir=folder) as storage_path:
        done = DataParallelTrainer(
            functools.partial(_measure, config, threads, decode_cpus, steps, manifest),
            backend_config=MultiWorkerConfig(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.max_workers,
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker=resources,
                placement_strategy="SPREAD" if spread else "PACK",
            ),
            run_config=ray.train.RunConfig(
                storage_path=storage_path, logging_config=ray.train.LoggingConfig(log_level="WARNING")
            ),
        ).fit()
    measured: dict[str, Any] = done.return_value
    return measured


def _measure(
    config: TrainConfig, threads: int, decode_cpus: float, steps: int, manifest: pa.Table | None
) -> dict[str, Any]:
    """On each worker: steps from memory, and from files."""
    startup.load_tensorflow(gpus=config.gpus_per_worker > 0)
    import ray.train
    import tensorflow as tf

    from cnnray.images import stream
    from cnnray.training.data import StreamedSource
    from cnnray.training.step import Steps

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    stream.be_quiet()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        trained = Steps(config, CLASSES)
        trained.begin(config.resolved_phases[0], steps)
    images, targets = _random_batches(config.batch_size // world)
    trained.train(images, targets)
    ways: dict[str, Any] = {"memory": iter([{"image": images, "target": targets}] * steps)}
    if manifest is not None:
        manifest = manifest.append_column("target", pa.array(np.arange(len(manifest)) % CLASSES))
        source = StreamedSource(
            manifest=manifest,
            image_size=SIZE,
            resize="stretch",
            cpus_per_task=decode_cpus,
            memory_bytes=2**28,
        )
        bounds = epoch.step_bounds(len(manifest), config.batch_size)
        rows, sizes = epoch.rank_rows(epoch.order(0, 0, len(manifest)), bounds, 0, rank, world)
        list(source.batches(rows[: sum(sizes[:2])], sizes[:2]))  # the tasks' processes are started
        ways["files"] = source.batches(rows, sizes)
    rates: dict[str, Any] = {}
    for name, batches in ways.items():
        # From the end of the first step on: a stream takes a second or two to its first batch, once an epoch.
        ends = []
        for batch in batches:
            trained.train(batch["image"], batch["target"])
            ends.append(time.perf_counter())
        rates[name] = (steps - 1) * config.batch_size / (ends[-1] - ends[0])
    on_node = np.eye(world, dtype=np.int64)[context.get_node_rank()]
    return rates | {"nodes": int(np.count_nonzero(trained.reduce(on_node)))}
