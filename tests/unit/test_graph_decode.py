"""The decoder of a SavedModel against the decoder of everything else."""

import numpy as np
import pytest
import tensorflow as tf

from cnnray.images.decode import RESIZE_RULES, decode
from cnnray.models import graph_decode
from tests.awkward import awkward_images, bad_images

SIZE = 32
IMAGES = awkward_images()
HEADS = (b"\xff\xd8\xff", b"\x89PNG")


@pytest.fixture(scope="module", params=RESIZE_RULES)
def decoder(request):
    """Of a resize rule: as TensorFlow operations, and ours."""

    def run(data):
        return graph_decode.decode(data, SIZE, request.param)

    compiled = tf.function(run, [tf.TensorSpec((), tf.string)], autograph=False)
    return compiled, lambda data: decode(data, SIZE, request.param), request.param


@pytest.mark.parametrize("name", [name for name, data in IMAGES.items() if data.startswith(HEADS)])
def test_the_same_pixels(name, decoder):
    run, ours, rule = decoder
    if (name, rule) == ("thin.png", "pad"):
        pytest.skip("of 2x300 pixels Pillow leaves none beside the padding, TensorFlow one")
    found, expected = run(IMAGES[name]).numpy().astype(int), ours(IMAGES[name]).astype(int)
    if name == "rgb_transparent.png":  # its one transparent colour is a few pixels in a corner
        found, expected = found[8:, 8:], expected[8:, 8:]
    assert np.abs(found - expected).max() <= 1


OTHERS = {name: data for name, data in IMAGES.items() if not data.startswith(HEADS)}
OTHERS |= {name: data for name, (data, reason) in bad_images().items() if reason != "too many pixels"}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_neither_jpeg_nor_png_or_damaged_is_refused(name, decoder):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decoder[0](OTHERS[name])
