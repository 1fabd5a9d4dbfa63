"""JPEG files to predictions: against bare loops with the same engine, Ray's documented pattern, and tf.data."""

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from cnnray.benchmarks.report import Comparison, write_photos
from cnnray.cluster import Resources
from cnnray.images import stream
from cnnray.images.decode import decode
from cnnray.images.manifest import manifest_of
from cnnray.models import bundle as bundles
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.prediction import pipeline
from cnnray.prediction.config import PredictOptions

log = logging.getLogger(__name__)

SIZE, BATCH, CLASSES = 64, 64, 10
_FLOAT32, _AUTO = "onnx", "auto"


def predict(folder: Path, found: Resources, *, images: int = 4000, rounds: int = 3) -> list[Comparison]:
    """Measure `vgg_bn` at 64x64 on JPEGs of 500x375, on a cluster of this machine's cores, at steady state.

    Args:
        folder: where photos and bundle are written.
        found: the cluster.
        images: number of JPEGs.
        rounds: how often each way is measured, in turns.
    """
    manifest = pipeline.passed_through(
        manifest_of(str(write_photos(folder / "photos_to_predict", images)), labelled=False)
    )
    paths = manifest["uri"].to_pylist()
    bundle = Bundle.load(random_bundle(folder / "bundle_to_predict", folder / "photos_to_predict"))
    processes = max(1, int(found.cpus))

    def ours(engine: str) -> Callable[[], float]:
        planned = pipeline.plan(bundle, PredictOptions(engine=engine), found)

        def run() -> float:
            dataset = pipeline.predicted(manifest, planned, stream.pieces(paths, 128))
            return _steady_rate(
                (len(rows) for rows in dataset.iter_batches(batch_size=None, batch_format="pyarrow")), images
            )

        return run

    def bare(engine: str) -> Callable[[], float]:
        def run() -> float:
            shares = [(bundle.uri, engine, paths[share::processes]) for share in range(processes)]
            with get_context("spawn").Pool(processes) as pool:
                return sum(pool.starmap(_bare_loop, shares, chunksize=1))

        return run

    def documented() -> float:
        dataset = ray.data.read_images(paths, size=(SIZE, SIZE), mode="RGB").map_batches(
            _KerasPredict,
            fn_constructor_args=[bundle.uri],
            batch_size=BATCH,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, processes - 1)),
        )
        return _steady_rate((len(rows["answer"]) for rows in dataset.iter_batches(batch_size=BATCH)), images)

    def tf_data() -> float:
        program = f"from cnnray.benchmarks import predict; predict.with_tf_data({bundle.uri!r}, {str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        return float(done.stdout.splitlines()[-1])

    fastest = engines.choose(bundle, gpus=False, batch_size=BATCH)
    ways = {
        "auto": ours(_AUTO), "float32": ours(_FLOAT32), "bare auto": bare(fastest), "bare float32": bare(_FLOAT32),
        "documented": documented, "tf.data": tf_data,
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
        log.info("%s", ", ".join(f"{name} {found[-1]:.0f}" for name, found in rates.items()))
    files = "vgg_bn 64x64 on JPEG 500x375"
    return [
        Comparison(f"{files}, {ours}", rates[ours.split()[0]], theirs, rates[key], aim)
        for ours, theirs, key, aim in (
            (f"auto ({fastest})", f"a bare loop in {processes} processes, {fastest}", "bare auto", 0.9),
            ("float32 (onnx)", f"a bare loop in {processes} processes, onnx", "bare float32", 0.9),
            (f"auto ({fastest})", "read_images, then model.predict in an actor", "documented", 4.0),
            ("float32 (onnx)", "read_images, then model.predict in an actor", "documented", 1.3),
            (f"auto ({fastest})", "tf.data and model.predict in one process", "tf.data", 1.0),
            ("float32 (onnx)", "tf.data and model.predict in one process", "tf.data", 1.0),
        )
    ]


def random_bundle(folder: Path, photos: Path) -> str:
    """A network of random weights, which is as fast as any, in ONNX float32 and int8."""
    program = f"from cnnray.benchmarks import predict; predict.write_bundle({str(folder)!r}, {str(photos)!r})"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return str(folder)


def write_bundle(folder: str, photos: str) -> None:
    """Write it (in a process of its own, so that TensorFlow's threads end with it)."""
    startup.load_tensorflow(gpus=False)
    from cnnray.models import architectures
    from cnnray.models.export import ExportConfig, export

    names = [f"class{number}" for number in range(CLASSES)]
    info = BundleInfo(class_names=names, image_size=SIZE, architecture="vgg_bn")
    bundles.save(architectures.build("vgg_bn", SIZE, CLASSES), info, Path(folder))
    export(
        ExportConfig(
            bundle=folder, calibration=photos, formats="onnx,onnx-int8", max_accuracy_drop=1.0,
            verification_images=200,
        )
    )  # fmt: skip


def _steady_rate(counts: Iterable[int], images: int) -> float:
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
        batch = np.stack([decode(Path(path).read_bytes(), SIZE) for path in paths[start : start + BATCH]])
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


def with_tf_data(uri: str, folder: str) -> None:
    """Print the images/s of `model.predict` on a tf.data pipeline over the same files."""
    startup.load_tensorflow(gpus=False)
    import tensorflow as tf

    model = Bundle.load(uri).model
    paths = [str(path) for path in sorted(Path(folder, "photos_to_predict").rglob("*.jpg"))]

    def pixels(path: Any) -> Any:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return tf.cast(tf.image.resize(image, (SIZE, SIZE), antialias=True), tf.uint8)

    def over(some: list[str]) -> Any:
        return tf.data.Dataset.from_tensor_slices(some).map(pixels, tf.data.AUTOTUNE).batch(BATCH).prefetch(2)

    model.predict(over(paths[: 4 * BATCH]), verbose=0)
    start = time.perf_counter()
    count = len(model.predict(over(paths), verbose=0))
    sys.stdout.write(f"{count / (time.perf_counter() - start)}\n")
