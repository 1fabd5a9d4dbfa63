"""Training steps of two workers against one process's `Model.fit`, and fed from files against from memory."""

import functools
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cnnray.benchmarks.report import Comparison, write_photos
from cnnray.cluster import Resources
from cnnray.images.manifest import manifest_of
from cnnray.models import startup
from cnnray.training import epoch
from cnnray.training.budget import budget_of
from cnnray.training.config import TrainConfig

log = logging.getLogger(__name__)

SIZE, BATCH, CLASSES = 64, 64, 10


def train(folder: Path, found: Resources, *, steps: int = 16, rounds: int = 3) -> list[Comparison]:
    """Measure `vgg_bn` at 64x64 with a global batch of 64.

    Args:
        folder: where the photos are written.
        found: the cluster; its cores are shared by two workers, and all given to the one process.
        steps: steps in each measurement.
        rounds: how often each is measured, in turns.
    """
    config = TrainConfig(
        data=str(write_photos(folder / "photos_of_steps", steps * BATCH)),
        output=str(folder / "out"),
        # As the peer.
        augment="none",
        optimizer="adam",
        schedule="constant",
    )
    fit, two, memory, files = [], [], [], []
    for _ in range(rounds):
        fit.append(_model_fit(int(found.cpus), steps))
        measured = _two_workers(config, found, steps)
        two.append(measured["memory"][0])
        memory += measured["memory"]
        files += measured["files"]
        log.info("fit %.1f, two workers %.1f, from files %.1f images/s", fit[-1], two[-1], files[-1])
    return [
        Comparison("vgg_bn 64x64, two workers", two, "one process, Model.fit", fit, 0.95),
        Comparison("the same, fed from JPEG files", files, "from memory", memory, 0.90),
    ]


def _model_fit(threads: int, steps: int) -> float:
    program = f"from cnnray.benchmarks import train; train.fit_in_this_process({threads}, {steps})"
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


def _two_workers(config: TrainConfig, found: Resources, steps: int) -> dict[str, list[float]]:
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from cnnray.training.backend import MultiWorkerConfig

    shares = budget_of(config, found)
    with tempfile.TemporaryDirectory() as folder:
        DataParallelTrainer(
            functools.partial(_measure, config, shares.threads_per_worker, shares.decode_cpus, steps, folder),
            backend_config=MultiWorkerConfig(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=2, resources_per_worker={"CPU": shares.cpus_per_worker}
            ),
            run_config=ray.train.RunConfig(
                storage_path=folder, logging_config=ray.train.LoggingConfig(log_level="WARNING")
            ),
        ).fit()
        measured: dict[str, list[float]] = json.loads(Path(folder, "rates.json").read_text())
        return measured


def _measure(config: TrainConfig, threads: int, decode_cpus: float, steps: int, folder: str) -> None:
    """On each worker: a round from memory, and one from files."""
    startup.load_tensorflow(gpus=False)
    import ray.train
    import tensorflow as tf

    from cnnray.images import stream
    from cnnray.training.source import StreamedSource
    from cnnray.training.step import Steps

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    stream.be_quiet()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        trained = Steps(config, CLASSES)
        trained.begin(config.plan[0], steps)
    manifest = manifest_of(config.data, labelled=True)
    manifest = manifest.append_column("target", pa.array(np.arange(len(manifest)) % CLASSES))
    source = StreamedSource(
        manifest=manifest,
        image_size=SIZE,
        resize="stretch",
        cpus_per_task=decode_cpus,
        memory_bytes=2**28,
    )
    bounds = epoch.step_bounds(len(manifest), BATCH)
    rows, sizes = epoch.rank_rows(epoch.order(0, 0, len(manifest)), bounds, 0, rank, world)
    images, targets = _random_batches(BATCH // world)

    in_memory = [{"image": images, "target": targets}] * steps
    trained.train(images, targets)
    list(source.batches(rows[: sum(sizes[:2])], sizes[:2]))  # the tasks' processes are started
    rates: dict[str, list[float]] = {"memory": [], "files": []}
    for name, batches in (("memory", iter(in_memory)), ("files", source.batches(rows, sizes))):
        # From the end of the first step on: a stream takes a second or two to its first batch, once an epoch.
        ends = []
        for batch in batches:
            trained.train(batch["image"], batch["target"])
            ends.append(time.perf_counter())
        rates[name].append((steps - 1) * BATCH / (ends[-1] - ends[0]))
    if rank == 0:
        Path(folder, "rates.json").write_text(json.dumps(rates))
