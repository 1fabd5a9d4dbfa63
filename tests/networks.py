"""Networks that tell classes apart without training: a linear classifier provides the weights of the last layer."""

import keras
import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from cnnray.images.geometry import Geometry, Size
from cnnray.models import architectures, verification
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.export import ExportConfig, export

CLASSES = 3
GEOMETRY = Geometry.of("24x36", "crop", "28x40")
"""Neither square nor whole: what answers by it answers by any other."""


def coloured_noise(count, size, seed=0):
    """Noise images of a size, uint8, with one stronger colour, and its index, int64 (count,)."""
    generator = np.random.default_rng(seed)
    targets = np.arange(count) % CLASSES
    images = generator.integers(0, 20, (count, *Size.of(size).shape))
    images[np.arange(count), :, :, targets] += 135
    return images.astype(np.uint8), targets


def fitted(architecture, size, images, targets):
    """A network with random weights, except for the logits layer, which is fitted to the targets."""
    keras.utils.set_random_seed(0)
    model = architectures.build(architecture, size, CLASSES)
    logits = model.get_layer("logits")
    network = keras.Model(model.inputs, logits.input)
    convolutions = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Conv2D)]
    for _ in range(6):
        # With random weights the signal fades (MobileNetV2: to 1e-13), too small for int8, so it is rescaled.
        features = np.asarray(network(images, training=False))
        for layer in convolutions:
            layer.kernel.assign(layer.kernel * features.std() ** (-1 / len(convolutions)))
    classifier = RidgeClassifier(alpha=1.0).fit(np.asarray(network(images, training=False)), targets)
    logits.set_weights([4 * classifier.coef_.T, 4 * classifier.intercept_])
    return model


def save_unlike(folder, size, seed, **info):
    """Write a bundle of red, green and blue with random weights; it is sure of few images of noise."""
    keras.utils.set_random_seed(seed)
    model = architectures.build("small_cnn", size, CLASSES)
    generator, logits = np.random.default_rng(seed), model.get_layer("logits")
    noise = generator.integers(0, 256, (64, *Size.of(size).shape), np.uint8)
    features = np.asarray(keras.Model(model.inputs, logits.input)(noise, training=False))
    weights = generator.normal(size=(features.shape[1], CLASSES))
    weights *= 1.5 / (features @ weights).std(0)
    logits.set_weights([weights, -(features @ weights).mean(0)])
    bundles.save(model, BundleInfo(**{"class_names": ["red", "green", "blue"], "image_size": size} | info), folder)
    return Bundle.load(str(folder))


def save_cut(folder):
    """Write a bundle that tells red, green and blue apart, with `GEOMETRY`."""
    size = GEOMETRY.image_size
    info = BundleInfo(
        class_names=["red", "green", "blue"], image_size=size.stated, resize=GEOMETRY.resize,
        decode_size=GEOMETRY.decode_size.stated,
    )  # fmt: skip
    bundles.save(fitted("small_cnn", size, *coloured_noise(48, size)), info, folder)


def write_onnx_bundle(folder, architecture, size, calibration):
    """Write a bundle that tells red, green and blue apart, exported to ONNX with the shortest speed measurement."""
    counts = {"red": 10, "green": 10, "blue": 10}
    info = BundleInfo(class_names=list(counts), image_size=size, class_counts=counts)
    bundles.save(fitted(architecture, size, *coloured_noise(48, size)), info, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_SECONDS_PER_ROUND", 0.0)
        export(ExportConfig(bundle=str(folder), calibration=calibration, formats=["onnx"]))
    return str(folder)
