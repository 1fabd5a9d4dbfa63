"""Speed of the engines against Keras on this machine, and every architecture in every format, trained on digits."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.report import Comparison
from cnnray.models import bundle as bundles
from cnnray.models import startup
from cnnray.models.bundle import Bundle, BundleInfo

log = logging.getLogger(__name__)

ARCHITECTURES = {
    # name: (epochs, learning rate), from random weights
    "resnet9_small": (12, 1e-3),
    "resnet9": (8, 1e-3),
    "vgg_bn": (10, 1e-3),
    "small_cnn": (12, 1e-3),
    "resnet50": (10, 1e-3),
    "efficientnetb0": (16, 1e-3),
    "vgg16": (10, 1e-4),
    "mobilenetv2": (16, 1e-3),
}
SIZE = 32
_BATCH = 32

Images = npt.NDArray[np.uint8]


def measure_formats(folder: Path) -> str:
    """Train and export all architectures at 32x32, which takes about 20 minutes on 2 cores.

    Args:
        folder: digits and bundles are written here.

    Returns:
        Markdown tables of export's measurements, one per architecture.
    """
    startup.load_tensorflow(gpus=False)
    images, targets = _write_digits(folder / "digits")
    lines: list[str] = []
    for architecture in ARCHITECTURES:
        bundle = _train_bundle(architecture, images, targets, folder / architecture)
        lines += _export_table(architecture, bundle, folder / "digits")
    return "\n".join(lines)


def _write_digits(folder: Path) -> tuple[Images, npt.NDArray[np.int64]]:
    """Write scikit-learn's digits into the folders `train` and `validation`.

    Returns:
        The images to train on, uint8 (N, SIZE, SIZE, 3), and their targets, int64 (N,).
    """
    digits = load_digits()
    pixels = np.kron((digits.images * 255 / 16).round(), np.ones((SIZE // 8, SIZE // 8))).astype(np.uint8)
    train, test, targets, test_targets = train_test_split(
        np.repeat(pixels[..., None], 3, -1), digits.target, test_size=0.3, random_state=0, stratify=digits.target
    )
    for split, images, labels in (("train", train, targets), ("validation", test, test_targets)):
        for index, (image, target) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / str(target) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return train, targets.astype(np.int64)


def _train_bundle(architecture: str, images: Images, targets: npt.NDArray[np.int64], folder: Path) -> str:
    import keras

    from cnnray.models import architectures

    epochs, learning_rate = ARCHITECTURES[architecture]
    keras.utils.set_random_seed(0)
    model = architectures.build(architecture, SIZE, 10, head="linear")
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # 0.99 averages over more steps than there are
    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(images, targets, batch_size=_BATCH, epochs=epochs, verbose=0)
    log.info("%s: training accuracy %.4f", architecture, history.history["accuracy"][-1])
    names = [str(digit) for digit in range(10)]
    bundles.save(model, BundleInfo(class_names=names, image_size=SIZE, architecture=architecture), folder)
    return str(folder)


def _export(bundle: str, data: Path, **options: Any) -> None:
    """Export a bundle. Refused formats are logged."""
    from cnnray.models.export import ExportConfig, ExportError, export

    try:
        export(ExportConfig(bundle=bundle, calibration=str(data), **options))
    except ExportError as error:
        log.info("%s", error)


def _export_table(architecture: str, bundle: str, digits: Path) -> list[str]:
    """Export a bundle, and return the lines of its table below the architecture's name."""
    _export(bundle, digits)
    head, rule, *rows = Path(bundle, "export.md").read_text().splitlines()
    return [f"**{architecture}**", "", head, rule, *rows, ""]


def measure(folder: Path, *, rounds: int = 5) -> list[Comparison]:
    """Measure engines against `model.predict`, and int8 against float32 ONNX, on `vgg_bn` at 64x64.

    Args:
        folder: digits and a bundle are written here.
        rounds: number of rounds; each measures every engine once.
    """
    startup.load_tensorflow(gpus=False)
    from cnnray.models import architectures, engines, verification

    _write_digits(folder / "digits")
    info = BundleInfo(class_names=[str(digit) for digit in range(10)], image_size=64, architecture="vgg_bn")
    bundle_folder = folder / "bundle_to_export"
    bundles.save(architectures.build("vgg_bn", 64, 10), info, bundle_folder)
    # Random weights are as fast as trained ones. Their answers are noise in every format, so none is refused for
    # them.
    formats = ["onnx", "onnx-int8", "litert", "litert-int8"]
    _export(str(bundle_folder), folder / "digits", formats=formats, max_accuracy_drop=1.0)
    bundle = Bundle.load(str(bundle_folder))
    images = np.random.default_rng(0).integers(0, 256, (_BATCH, 64, 64, 3), np.uint8)
    model = bundle.model

    def predict(batch: Images) -> Any:
        return model.predict(batch, batch_size=_BATCH, verbose=0)

    methods: dict[str, Any] = {"predict": predict}
    methods |= {name: engines.load_engine(bundle, name) for name in (engines.KERAS, *bundle.info.exports)}
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, method in methods.items():
            for size, rate in verification.measure_speeds(method, images).items():
                rates.setdefault((name, size), []).append(rate)
    return [
        Comparison(f"vgg_bn 64x64, {ours}, batch {size}", rates[ours, size], theirs, rates[theirs, size], aim)
        for ours, theirs, size, aim in (
            ("onnx-int8", "predict", "32", 3.0),
            ("litert-int8", "predict", "32", 3.0),
            ("openvino-int8", "predict", "32", 3.0),
            ("onnx-int8", "onnx", "32", 2.0),
            ("openvino-bfloat16", "onnx", "32", 1.5),
            ("onnx-int8", "predict", "1", 3.0),
            ("keras", "predict", "1", 1.0),
        )
        if ours in methods
    ]
