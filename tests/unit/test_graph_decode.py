"""The SavedModel's decoder gives the same pixels as `images.decode`."""

import numpy as np
import pytest
import tensorflow as tf

from cnnray.images.decode import decode
from cnnray.images.geometry import RESIZE_RULES, Geometry
from cnnray.models import graph_decode
from tests.awkward import awkward_images, bad_images

IMAGES = awkward_images()
HEADS = (b"\xff\xd8\xff", b"\x89PNG")


GEOMETRIES = [(32, None), ("33x49", None), ("49x30", "56x36")]


@pytest.fixture(
    scope="module",
    params=[Geometry.of(size, rule, cut) for rule in RESIZE_RULES for size, cut in GEOMETRIES],
    ids=str,
)
def decoder(request):
    """For a geometry: the TensorFlow decoder, `images.decode`, and the resize rule."""

    def run(data):
        return graph_decode.decode(data, request.param)

    graph = tf.function(run, [tf.TensorSpec((), tf.string)], autograph=False)
    return graph, lambda data: decode(data, request.param), request.param.resize


@pytest.mark.parametrize("name", [name for name, data in IMAGES.items() if data.startswith(HEADS)])
def test_the_same_pixels(name, decoder):
    decode_in_graph, decode_bytes, rule = decoder
    if (name, rule) == ("thin.png", "pad"):
        pytest.skip("resizing 2x300 pixels, Pillow keeps none beside the padding and TensorFlow one")
    pixels, expected = decode_in_graph(IMAGES[name]).numpy().astype(int), decode_bytes(IMAGES[name]).astype(int)
    if name == "rgb_transparent.png":  # its one transparent colour is a few pixels in a corner
        pixels, expected = pixels[8:, 8:], expected[8:, 8:]
    assert np.abs(pixels - expected).max() <= 1


OTHERS = {name: data for name, data in IMAGES.items() if not data.startswith(HEADS)}
OTHERS |= {name: data for name, (data, reason) in bad_images().items() if reason != "too many pixels"}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_and_damaged_files_are_refused(name, decoder):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decoder[0](OTHERS[name])
