import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnray.images import decode as decoder
from cnnray.images import resize
from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import RESIZE_RULES, Geometry, Size
from tests.awkward import awkward_images

_PILLOW = {
    "stretch": lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR),
    "crop": lambda image, size: ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR),
    "pad": lambda image, size: ImageOps.pad(image, size[::-1], Image.Resampling.BILINEAR),
}
IMAGES = 10_000
"""For the three rules together."""


def _noise(generator, width, height):
    """Noise, in which half of the pixels are black or white, so that sums reach both ends of their range."""
    pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
    extreme = generator.random((height, width, 1)) < 0.5
    return Image.fromarray(np.where(extreme, np.where(pixels < 128, 0, 255).astype(np.uint8), pixels))


@pytest.fixture(params=["compiled", "Pillow's"])
def kernel(request, monkeypatch):
    """Both ways to resize; without a C compiler the first is skipped."""
    if request.param == "compiled" and not resize.IS_COMPILED:
        pytest.skip("cnnray was installed without a C compiler")
    if request.param != "compiled":
        monkeypatch.setattr(resize, "_cnnray_resize", None)


@pytest.mark.parametrize("rule", RESIZE_RULES)
def test_pixels_equal_those_of_pillow(kernel, rule):
    generator = np.random.default_rng(0)
    for number in range(IMAGES // 3):
        most = 20 if number % 4 == 0 else 160 if number % 50 else 900
        width, height = generator.integers(1, most, 2).tolist()
        height_of_result, width_of_result = generator.integers(1, most, 2).tolist()
        size = Size(height_of_result, width_of_result if number % 2 else height_of_result)
        image = _noise(generator, width, height)
        expected = np.asarray(_PILLOW[rule](image, size))
        np.testing.assert_array_equal(
            resize.resized(decoder._pixels(image), size, rule), expected, f"{width}x{height} to {size}"
        )


@pytest.mark.skipif(not resize.IS_COMPILED, reason="cnnray was installed without a C compiler")
def test_sizes_that_do_not_fit_are_refused():
    pixels, out = np.zeros((4, 5), np.uint32), np.empty((2, 2, 3), np.uint8)
    function = resize._cnnray_resize.resize
    function(pixels, (5, 4), (0, 0, 5, 4), out, (2, 2))
    for wrong in (
        (pixels, (4, 4), (0, 0, 4, 4), out, (2, 2)),
        (pixels, (5, 4), (0, 0, 6, 4), out, (2, 2)),
        (pixels, (5, 4), (3, 0, 3, 4), out, (2, 2)),
        (pixels, (5, 4), (0, 0, float("nan"), 4), out, (2, 2)),
        (pixels, (5, 4), (0, 0, 5, 4), out, (2, 3)),
        (pixels, (5, 4), (0, 0, 5, 4), out, (0, 0)),
        (pixels, (-5, -4), (0, 0, 5, 4), out, (2, 2)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            function(*wrong)


def _as_pillow_decodes(data, size, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_jpeg_pixels", lambda image, data: None)
        return _outcome(data, size)


def _outcome(data, size):
    try:
        return decode(data, Geometry.of(size)).tobytes()
    except BadImage as error:
        return error.reason


def _jpegs():
    generator = np.random.default_rng(1)
    photo = Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (301, 223), Image.Resampling.BICUBIC
    )
    for mode in ("RGB", "L", "CMYK"):
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                buffer = io.BytesIO()
                photo.convert(mode).save(buffer, "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
                yield buffer.getvalue()


def test_jpegs_have_the_pixels_that_pillow_decodes(monkeypatch):
    awkward = [data for name, data in awkward_images().items() if data[:2] == b"\xff\xd8"]
    for data in (*_jpegs(), *awkward):
        for size in (8, 33, 64, 150, 224):
            assert _outcome(data, size) == _as_pillow_decodes(data, size, monkeypatch)


def test_damaged_jpegs_have_the_outcome_that_pillow_gives(monkeypatch):
    generator = np.random.default_rng(2)
    for data in _jpegs():
        for _ in range(60):
            damaged = bytearray(data)
            for place in generator.integers(2, len(data), generator.integers(1, 4)):
                damaged[place] = generator.integers(256)
            if generator.random() < 0.3:
                del damaged[int(generator.integers(20, len(data))) :]
            assert _outcome(bytes(damaged), 48) == _as_pillow_decodes(bytes(damaged), 48, monkeypatch)
