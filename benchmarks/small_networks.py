"""Smaller networks: with zeros, with fewer weights, taught by a larger one; each in float32 and int8."""

import gzip
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.data_sets import SIZE, Labelled, load_small_mnist, split
from benchmarks.trainer import make_config, train_network
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.training.phases import Phase

log = logging.getLogger(__name__)


def measure(folder: Path) -> str:
    """Compare pruned networks, a small one, and a small one distilled from a large one, each in float32 and int8.

    Args:
        folder: bundles are written here.

    Returns:
        A Markdown table.
    """
    from cnnray.models.export import ExportConfig, export

    train, held_out = split(load_small_mnist(), 0)
    calibration = _write_images(train.subset(slice(0, 500)), folder / "calibration")
    dense = Phase(name="dense", epochs=5)
    half = Phase(name="50 % zeros", epochs=3, learning_rate=3e-4, sparsity=0.5)
    sparse = replace(half, name="80 % zeros", sparsity=0.8)

    def train_on_mnist(phases: list[Phase], architecture: str = "small_cnn", teacher: Any = None) -> Any:
        return train_network(
            make_config(architecture=architecture, phases=phases), train, held_out, teacher=teacher
        ).model

    large = train_on_mnist([dense], "vgg_bn")
    networks: dict[str, Callable[[], Any]] = {
        "vgg_bn": lambda: large,
        "vgg_bn, 50 % zeros": lambda: train_on_mnist([dense, half], "vgg_bn"),
        "vgg_bn, 80 % zeros": lambda: train_on_mnist([dense, half, sparse], "vgg_bn"),
        "small_cnn": lambda: train_on_mnist([dense]),
        "small_cnn, taught by vgg_bn": lambda: train_on_mnist([dense], teacher=large),
    }
    lines = ["| MNIST | file | gzipped bytes | held-out accuracy | images/s |", "|---|---|---|---|---|"]
    base: int | None = None
    for name, train_variant in networks.items():
        model = train_variant()
        target = folder / name.replace(" ", "_")
        bundles.save(model, BundleInfo(class_names=list("0123456789"), image_size=SIZE), target)
        export(ExportConfig(bundle=str(target), calibration=str(calibration), formats=["onnx", "onnx-int8"]))
        reports = Bundle.load(str(target)).info.exports
        for format_, file in (("onnx", "model.onnx"), ("onnx-int8", "model.int8.onnx")):
            size = len(gzip.compress((target / file).read_bytes()))
            base = base or size
            accuracy = _engine_accuracy(str(target), format_, held_out)
            rate = reports[format_]["images_per_second"]["32"]
            lines.append(
                f"| {name} | {file} | {size:,} ({base / size:.1f} times less) | {accuracy:.4f} | {rate:.0f} |"
            )
            log.info("%s", lines[-1])
    return "\n".join(lines)


def _engine_accuracy(bundle: str, engine: str, data: Labelled) -> float:
    from cnnray.models.predictor import Predictor

    probabilities = Predictor(Bundle.load(bundle), engine=engine).probabilities(data.images)
    return float((probabilities.argmax(-1) == data.targets).mean())


def _write_images(data: Labelled, folder: Path) -> Path:
    for index, (image, target) in enumerate(zip(data.images, data.targets, strict=True)):
        path = folder / str(target) / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
