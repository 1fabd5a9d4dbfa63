"""JPEG files to predictions: against bare loops with the same engine, Ray's documented pattern, and tf.data."""

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

from benchmarks import photos
from benchmarks.photos import Photos
from benchmarks.report import BenchmarkError, Comparison, bare_loops
from cnnray.cluster import Resources
from cnnray.images import storage, stream
from cnnray.images.decode import decode
from cnnray.models import bundle as bundles
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.prediction import pipeline
from cnnray.prediction.config import PredictOptions

log = logging.getLogger(__name__)

SIZE, BATCH, CLASSES = 64, 64, 10
_FLOAT32, _AUTO = "onnx", "auto"
_TIMES = 3
"""That the fastest engine goes through the images, which it is soon through with."""


def predict(given: Photos, found: Resources, *, images: int = 1500, rounds: int = 3) -> list[Comparison]:
    """Measure `vgg_bn` at 64x64, at steady state.

    Args:
        given: the images; bundle and lists are written beside them.
        found: the cluster.
        images: how many, where `given` does not say.
        rounds: how often each way is measured, in turns.

    Raises:
        BenchmarkError: there are too few images.
    """
    manifest = pipeline.select_columns(given.manifest(images))
    paths, count = manifest["uri"].to_pylist(), len(manifest)
    bundle = Bundle.load(random_bundle(given.folder))
    limit = bare_loops(found)
    if count < (least := 4 * BATCH * limit.processes):
        raise BenchmarkError(f"{count} images are too few to measure prediction with: {least} at least.")

    def ours(engine: str, times: int = 1) -> Callable[[], float]:
        planned = pipeline.plan(bundle, PredictOptions(engine=engine), found)
        repeated = pa.concat_tables([manifest] * times)

        def run() -> float:
            dataset = pipeline.predict(repeated, planned, stream.pieces(paths * times, 128))
            return steady_rate(
                (len(rows) for rows in dataset.iter_batches(batch_size=None, batch_format="pyarrow")), count * times
            )

        return run

    def bare(engine: str, times: int = 1) -> Callable[[], float]:
        def run() -> float:
            repeated = paths * times
            shares = [(bundle.uri, engine, repeated[share :: limit.processes]) for share in range(limit.processes)]
            with get_context("spawn").Pool(limit.processes) as pool:
                return limit.times * sum(pool.starmap(_bare_loop, shares, chunksize=1))

        return run

    def documented() -> float:
        dataset = ray.data.read_images(paths, size=(SIZE, SIZE), mode="RGB").map_batches(
            _KerasPredict,
            fn_constructor_args=[bundle.uri],
            batch_size=BATCH,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, int(found.cpus) - 1)),
        )
        return steady_rate((len(rows["answer"]) for rows in dataset.iter_batches(batch_size=BATCH)), count)

    def tf_data() -> float:
        listed = given.folder / "listed.txt"
        listed.write_text("\n".join(paths))
        program = f"from benchmarks import predict; predict.with_tf_data({bundle.uri!r}, {str(listed)!r})"
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        return float(done.stdout.splitlines()[-1])

    fastest = engines.choose(bundle, gpus=False, batch_size=BATCH)
    ways = {
        "auto": ours(_AUTO, _TIMES), "float32": ours(_FLOAT32), "bare auto": bare(fastest, _TIMES),
        "bare float32": bare(_FLOAT32), "documented": documented, "tf.data": tf_data,
    }  # fmt: skip
    if not storage.is_local(paths[0]):
        ways.pop("tf.data")  # which reads no bucket without a package of its own
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
        log.info("%s", ", ".join(f"{name} {found[-1]:.0f}" for name, found in rates.items()))
    files, loops = f"vgg_bn 64x64 on {given.name}", f"a bare loop in {limit.processes} processes"
    return [
        Comparison(f"{files}, {ours}", rates[ours.split()[0]], theirs, rates[key], aim)
        for ours, theirs, key, aim in (
            (f"auto ({fastest})", limit.named(f"{loops}, {fastest}"), "bare auto", 0.9),
            ("float32 (onnx)", limit.named(f"{loops}, onnx"), "bare float32", 0.9),
            (f"auto ({fastest})", "read_images, then model.predict in an actor", "documented", 4.0),
            ("float32 (onnx)", "read_images, then model.predict in an actor", "documented", 1.3),
            (f"auto ({fastest})", "tf.data and model.predict in one process", "tf.data", 1.0),
            ("float32 (onnx)", "tf.data and model.predict in one process", "tf.data", 1.0),
        )
        if key in rates
    ]


def random_bundle(folder: Path) -> str:
    """A network of random weights, which is as fast as any, in ONNX float32 and int8, in `folder/bundle`; where it is
    there already, that one."""
    target = folder / "bundle"
    if not target.exists():
        calibration = photos.write(folder / "calibration", 200)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            made = str(Path(part, "bundle"))
            program = f"from benchmarks import predict; predict.write_bundle({made!r}, {str(calibration)!r})"
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            Path(made).rename(target)
    return str(target)


def write_bundle(folder: str, calibration: str) -> None:
    """Write it (in a process of its own, so that TensorFlow's threads end with it)."""
    startup.load_tensorflow(gpus=False)
    from cnnray.models import architectures
    from cnnray.models.export import ExportConfig, export

    names = [f"class{number}" for number in range(CLASSES)]
    info = BundleInfo(class_names=names, image_size=SIZE, architecture="vgg_bn")
    bundles.save(architectures.build("vgg_bn", SIZE, CLASSES), info, Path(folder))
    export(
        ExportConfig(
            bundle=folder, calibration=calibration, formats="onnx,onnx-int8", max_accuracy_drop=1.0,
            verification_images=200,
        )
    )  # fmt: skip


def steady_rate(counts: Iterable[int], images: int) -> float:
    """Images/s between a quarter and nine tenths of the images."""
    arrived, first, last = 0, (0, 0.0), (0, 0.0)
    for count in counts:
        arrived += count
        if arrived < images / 4:
            first = (arrived, time.perf_counter())
        if arrived < images * 0.9:
            last = (arrived, time.perf_counter())
    return (last[0] - first[0]) / (last[1] - first[1])


def _bare_loop(uri: str, engine: str, paths: list[str]) -> float:
    """Images/s of one process with one thread."""
    predictor = Predictor(Bundle.load(uri), engine=engine, threads=1, batch_size=BATCH)
    ends = []
    for start in range(0, len(paths), BATCH):
        batch = np.stack([decode(storage.read_bytes(path), SIZE) for path in paths[start : start + BATCH]])
        assert len(predictor.probabilities(batch)) == len(batch)
        ends.append(time.perf_counter())
    return (len(ends) - 2) * BATCH / (ends[-2] - ends[0])


class _KerasPredict:
    """As in Ray's documentation of batch inference."""

    def __init__(self, uri: str) -> None:
        startup.load_tensorflow(gpus=False)
        self._model = Bundle.load(uri).model

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"answer": self._model.predict(batch["image"], verbose=0).argmax(1)}


def with_tf_data(uri: str, listed: str) -> None:
    """Print the images/s of `model.predict` on a tf.data pipeline over the same files."""
    startup.load_tensorflow(gpus=False)
    import tensorflow as tf

    model = Bundle.load(uri).model
    paths = Path(listed).read_text().splitlines()

    def pixels(path: Any) -> Any:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.cast(tf.image.resize(image, (SIZE, SIZE), antialias=True), tf.uint8)

    def over(some: list[str]) -> Any:
        return tf.data.Dataset.from_tensor_slices(some).map(pixels, tf.data.AUTOTUNE).batch(BATCH).prefetch(2)

    model.predict(over(paths[: 4 * BATCH]), verbose=0)
    start = time.perf_counter()
    count = len(model.predict(over(paths), verbose=0))
    sys.stdout.write(f"{count / (time.perf_counter() - start)}\n")
