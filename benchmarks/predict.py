"""Prediction from JPEG files, against bare loops with the same engine, Ray's documented pattern, and tf.data."""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from benchmarks.photos import Photos
from benchmarks.photos import write as write_photos
from benchmarks.report import BenchmarkError, Comparison, plan_bare_loops
from cnnray.cluster import Resources
from cnnray.images import shards, storage
from cnnray.images.decode import decode
from cnnray.images.inputs import VERSION
from cnnray.models import bundle as bundles
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.prediction.config import PredictConfig, PredictOptions
from cnnray.prediction.dispatch import Dispatcher
from cnnray.prediction.listed import ListedTasks
from cnnray.prediction.manifest import rows_per_range
from cnnray.prediction.plan import Plan, plan_on_cluster
from cnnray.prediction.ranges import Output, Task

log = logging.getLogger(__name__)

SIZE, BATCH, CLASSES = 64, 64, 10
_FLOAT32, _AUTO = "onnx", "auto"
LIGHT_SIZE, LIGHT_ENGINE = 32, "litert-int8"
"""Of `small_cnn`, a network that costs little: what the framework adds shows."""
_REPETITIONS, _LIGHT_REPETITIONS = 8, 100
"""How often the fastest engine, and a light network, go through the images: a single pass is too short to measure."""


def measure(photos: Photos, resources: Resources, *, images: int = 1500, rounds: int = 3) -> list[Comparison]:
    """Measure `vgg_bn` at 64x64, and `small_cnn` at 32x32, in the steady state.

    Args:
        photos: the images; the bundle and lists are written into their folder.
        resources: the cluster.
        images: default number of images.
        rounds: number of rounds; each measures every method once.

    Raises:
        BenchmarkError: there are too few images.
    """
    paths = photos.manifest(images)["uri"].to_pylist()
    count = len(paths)
    bundle = Bundle.load(write_random_bundle(photos.folder))
    light = Bundle.load(
        write_random_bundle(photos.folder, architecture="small_cnn", size=LIGHT_SIZE, formats=(LIGHT_ENGINE,))
    )
    bare_loops = plan_bare_loops(resources)
    if count < (least := 4 * BATCH * bare_loops.processes):
        raise BenchmarkError(f"{count} images are too few to measure prediction: at least {least} are needed.")

    def ours(bundle: Bundle, engine: str, repetitions: int = 1) -> Callable[[], float]:
        planned = plan_on_cluster(bundle, PredictOptions(engine=engine), resources)
        # A single pass is too short for the ranges of a run: their ends are what its rate is measured by.
        rows = 128 if repetitions == 1 else rows_per_range(repetitions * count, PredictConfig.rows_per_part)
        return lambda: ranges_rate(planned, paths * repetitions, photos.folder, rows)

    def bare(bundle: Bundle, engine: str, repetitions: int = 1) -> Callable[[], float]:
        def run() -> float:
            repeated, processes = paths * repetitions, bare_loops.processes
            shares = [(bundle.uri, engine, repeated[first::processes]) for first in range(processes)]
            with get_context("spawn").Pool(processes) as pool:
                return bare_loops.scale * sum(pool.starmap(bare_loop, shares, chunksize=1))

        return run

    def documented() -> float:
        dataset = ray.data.read_images(paths, size=(SIZE, SIZE), mode="RGB").map_batches(
            _KerasPredict,
            fn_constructor_args=[bundle.uri],
            batch_size=BATCH,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, int(resources.cpus) - 1)),
        )
        return steady_rate((len(rows["answer"]) for rows in dataset.iter_batches(batch_size=BATCH)), count)

    def tf_data() -> float:
        path_list = photos.folder / "listed.txt"
        path_list.write_text("\n".join(paths))
        program = f"from benchmarks import predict; predict.run_tf_data({bundle.uri!r}, {str(path_list)!r})"
        completed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        return float(completed.stdout.splitlines()[-1])

    fastest = engines.choose(bundle, gpus=False, batch_size=BATCH)
    methods = {
        "light": ours(light, LIGHT_ENGINE, _LIGHT_REPETITIONS),
        "bare light": bare(light, LIGHT_ENGINE, _LIGHT_REPETITIONS),
        "auto": ours(bundle, _AUTO, _REPETITIONS), "bare auto": bare(bundle, fastest, _REPETITIONS),
        "float32": ours(bundle, _FLOAT32), "bare float32": bare(bundle, _FLOAT32),
        "documented": documented, "tf.data": tf_data,
    }  # fmt: skip
    if not storage.is_local(paths[0]):
        methods.pop("tf.data")  # cannot read buckets without another package
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            rates[name].append(method())
        log.info("%s", ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()))
    loops = f"a bare loop in {bare_loops.processes} processes"
    lighter = f"`small_cnn` {LIGHT_SIZE}x{LIGHT_SIZE} on {photos.name}, {LIGHT_ENGINE}, steady"
    theirs = bare_loops.label(f"{loops}, {LIGHT_ENGINE}")
    files = f"vgg_bn 64x64 on {photos.name}"
    return [Comparison(lighter, rates["light"], theirs, rates["bare light"], 0.95)] + [
        Comparison(f"{files}, {ours}", rates[ours.split()[0]], theirs, rates[key], aim)
        for ours, theirs, key, aim in (
            (f"auto ({fastest})", bare_loops.label(f"{loops}, {fastest}"), "bare auto", 0.9),
            ("float32 (onnx)", bare_loops.label(f"{loops}, onnx"), "bare float32", 0.9),
            (f"auto ({fastest})", "read_images, then model.predict in an actor", "documented", 4.0),
            ("float32 (onnx)", "read_images, then model.predict in an actor", "documented", 1.3),
            (f"auto ({fastest})", "tf.data and model.predict in one process", "tf.data", 1.0),
            ("float32 (onnx)", "tf.data and model.predict in one process", "tf.data", 1.0),
        )
        if key in rates
    ]


def ranges_rate(plan: Plan, uris: list[str], folder: Path, rows: int = 128) -> float:
    """The images/s of a plan's workers from images to committed parts, in the steady state.

    Args:
        plan: the engine and the workers.
        uris: of the images.
        folder: manifest and parts are written here, and deleted.
        rows: of each range.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        table = pa.table({"uri": uris, VERSION: pa.nulls(len(uris), pa.string())})
        ranges = shards.write(f"{temporary}/manifest", [table], rows_per_range=rows, generation=0)
        tasks = ListedTasks(ranges, lambda range_: Task(range=range_))
        output = Output(
            folder=f"{temporary}/rows", manifest=f"{temporary}/manifest", format="parquet", threshold=0.5,
            skip_unreadable=False,
        )  # fmt: skip
        tasks.start()
        try:
            receipts = Dispatcher(plan, output).run(tasks)
            return steady_rate((receipt.range.rows for receipt in receipts if receipt), len(uris))
        finally:
            tasks.stop()


def write_random_bundle(
    folder: Path,
    *,
    architecture: str = "vgg_bn",
    size: int = SIZE,
    formats: tuple[str, ...] = ("onnx", "onnx-int8"),
) -> str:
    """Write a network with random weights, and export it, unless `folder` has it.

    Random weights are as fast as trained ones.

    Returns:
        The bundle's path.
    """
    target = folder / f"{architecture}-{size}"
    if not target.exists():
        calibration = write_photos(folder / "calibration", 200)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            bundle = str(Path(temporary, "bundle"))
            arguments = (bundle, architecture, size, str(calibration), formats)
            program = f"from benchmarks import predict; predict.write_and_export(*{arguments!r})"
            # In another process, so that TensorFlow's threads end with it.
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            Path(bundle).rename(target)
    return str(target)


def write_and_export(folder: str, architecture: str, size: int, calibration: str, formats: tuple[str, ...]) -> None:
    """Write a bundle with random weights, and export it."""
    startup.load_tensorflow(gpus=False)
    from cnnray.models import architectures
    from cnnray.models.export import ExportConfig, export

    names = [f"class{number}" for number in range(CLASSES)]
    info = BundleInfo(class_names=names, image_size=size, architecture=architecture)
    bundles.save(architectures.build(architecture, size, CLASSES), info, Path(folder))
    export(
        ExportConfig(
            bundle=folder, calibration=calibration, formats=list(formats), max_accuracy_drop=1.0,
            verification_images=200,
        )
    )  # fmt: skip


def steady_rate(counts: Iterable[int], images: int) -> float:
    """The images/s between a quarter and nine tenths of the images.

    Args:
        counts: yields the number of images in each batch when it is complete.
        images: number of images in all.
    """
    total, first, last = 0, (0, 0.0), (0, 0.0)
    for count in counts:
        total += count
        if total < images / 4:
            first = (total, time.perf_counter())
        if total < images * 0.9:
            last = (total, time.perf_counter())
    return (last[0] - first[0]) / (last[1] - first[1])


def bare_loop(uri: str, engine: str, paths: list[str]) -> float:
    """Measure the images/s of one process with one thread."""
    bundle = Bundle.load(uri)
    predictor, geometry = Predictor(bundle, engine=engine, threads=1, batch_size=BATCH), bundle.info.geometry
    ends = []
    for start in range(0, len(paths), BATCH):
        batch = np.stack([decode(storage.read_bytes(path), geometry) for path in paths[start : start + BATCH]])
        assert len(predictor.probabilities(batch)) == len(batch)
        ends.append(time.perf_counter())
    return (len(ends) - 2) * BATCH / (ends[-2] - ends[0])


class _KerasPredict:
    """The actor class of Ray's documentation of batch inference."""

    def __init__(self, uri: str) -> None:
        startup.load_tensorflow(gpus=False)
        self._model = Bundle.load(uri).model

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"answer": self._model.predict(batch["image"], verbose=0).argmax(1)}


def run_tf_data(uri: str, path_list: str) -> None:
    """Print the images/s of `model.predict` on a tf.data pipeline over the files named in `path_list`."""
    startup.load_tensorflow(gpus=False)
    import tensorflow as tf

    model = Bundle.load(uri).model
    paths = Path(path_list).read_text().splitlines()

    def decode_file(path: Any) -> Any:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.cast(tf.image.resize(image, (SIZE, SIZE), antialias=True), tf.uint8)

    def build_dataset(paths: list[str]) -> Any:
        return tf.data.Dataset.from_tensor_slices(paths).map(decode_file, tf.data.AUTOTUNE).batch(BATCH).prefetch(2)

    model.predict(build_dataset(paths[: 4 * BATCH]), verbose=0)
    start = time.perf_counter()
    count = len(model.predict(build_dataset(paths), verbose=0))
    sys.stdout.write(f"{count / (time.perf_counter() - start)}\n")
