"""Grad-CAM finds the part of an image that decides its class."""

import functools

import numpy as np
import pytest

from cnnray.models import bundle as bundles
from cnnray.models import grad_cam
from cnnray.models.bundle import Bundle, BundleError, BundleInfo
from cnnray.models.heat_maps import HeatMapProcess, overlay
from tests.networks import GEOMETRY, coloured_noise, fitted, save_cut

SIZE = 32


def _with_patch(count, seed=0):
    """Grey noise images with a coloured patch in a corner, their targets, and the corners: (row, column), 0 or 1."""
    generator = np.random.default_rng(seed)
    images = generator.integers(90, 110, (count, SIZE, SIZE, 3)).astype(np.uint8)
    corners, targets = generator.integers(0, 2, (count, 2)), np.arange(count) % 3
    for image, (row, column), target in zip(images, corners * 16, targets, strict=True):
        image[row + 3 : row + 13, column + 3 : column + 13, target] = 255
    return images, targets, corners


@pytest.mark.parametrize("architecture", ["small_cnn", "resnet9_small", "mobilenetv2"])
def test_heat_is_highest_at_the_patch_that_decides_the_class(architecture, tmp_path):
    images, targets, _ = _with_patch(60)
    bundles.save(
        fitted(architecture, SIZE, images, targets),
        BundleInfo(class_names=["r", "g", "b"], image_size=SIZE),
        tmp_path,
    )
    bundle = Bundle.load(str(tmp_path))
    images, targets, corners = _with_patch(24, seed=1)
    heat = grad_cam.heat_maps(bundle, images, targets)
    assert (heat.shape, heat.dtype) == ((24, SIZE, SIZE), np.float32)
    assert heat.min() >= 0
    assert heat.max() == pytest.approx(1)
    if architecture == "small_cnn":
        with HeatMapProcess(bundle) as heat_maps:
            np.testing.assert_allclose(heat_maps(images[:3], targets[:3]), heat[:3], atol=1e-5)
            heat_maps._process.kill()
            with pytest.raises(BundleError, match="the process that computes heat maps has ended"):
                heat_maps(images, targets)
        inside = [
            heat_map[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].mean() / heat_map.mean()
            for heat_map, (row, column) in zip(heat, corners, strict=True)
            if heat_map.any()  # all 0 if only the biases support the class
        ]
        assert len(inside) > 12
        assert np.median(inside) > 1.3


def test_a_network_without_convolutions_is_refused(tmp_path):
    import keras

    pixels = keras.Input((8, 8, 3), dtype="uint8", name="image")
    logits = keras.layers.Dense(2, name="logits")(keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(pixels)))
    model = keras.Model(pixels, keras.layers.Softmax(name="probabilities")(logits))
    bundles.save(model, BundleInfo(class_names=["a", "b"], image_size=8), tmp_path)
    bundle = Bundle.load(str(tmp_path))
    with HeatMapProcess(bundle) as in_process:
        for heat_maps in (functools.partial(grad_cam.heat_maps, bundle), in_process):
            with pytest.raises(BundleError, match="no convolutional features"):
                heat_maps(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64))


def test_images_that_are_cut_to_a_rectangle_have_heat_maps_of_its_shape(tmp_path):
    save_cut(tmp_path)
    height, width = GEOMETRY.image_size
    images, targets = coloured_noise(6, GEOMETRY.image_size, seed=1)
    heat = grad_cam.heat_maps(Bundle.load(str(tmp_path)), images, targets)
    assert heat.shape == (6, height, width)
    assert overlay(np.zeros((80, 120, 3), np.uint8), heat[0]).shape == (80, 120, 3)
