"""Sizes and cuts of images: as they are stated, and the pixels that they give."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnray.images.decode import decode
from cnnray.images.geometry import RESIZE_RULES, Geometry, Size
from tests.awkward import awkward_images

AWKWARD = awkward_images()


@pytest.mark.parametrize(
    ("stated", "size", "restated"),
    [(224, (224, 224), 224), ("224", (224, 224), 224), ("224x320", (224, 320), "224x320"), ("8x8", (8, 8), 8)],
)
def test_a_size_is_stated_as_a_number_or_as_height_and_width(stated, size, restated):
    assert Size.of(stated) == size
    assert Size.of(Size.of(stated)) == size
    assert Size.of(stated).stated == restated
    assert Size.of(stated).shape == (*size, 3)
    assert Size.of(stated).bytes == size[0] * size[1] * 3


@pytest.mark.parametrize("stated", [0, -1, "0x8", "8x0", "8x", "x8", "8x8x3", "large", "", 8.5, None, True, [8, 8]])
def test_other_sizes_are_refused(stated):
    with pytest.raises(ValueError, match=r"is no size in pixels, such as 224 or 224x320 \(height x width\)"):
        Size.of(stated)


def test_what_is_cut_is_at_least_half():
    for decode_size in ("30x40", "32x65", 999_999):
        with pytest.raises(ValueError, match="is not between 32x32 and twice that"):
            Geometry.of(32, decode_size=decode_size)
    assert not Geometry.of(32, decode_size=32).is_cut
    assert Geometry.of(32, decode_size="32x40").is_cut


@pytest.mark.parametrize("resize", RESIZE_RULES)
@pytest.mark.parametrize("name", AWKWARD)
def test_the_centre_has_the_pixels_that_the_whole_has_there(name, resize):
    geometry = Geometry.of("24x19", resize, "31x38")
    whole = decode(AWKWARD[name], geometry.uncut)
    assert whole.shape == (31, 38, 3)
    pixels = decode(AWKWARD[name], geometry)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, whole[3:27, 9:28])
    np.testing.assert_array_equal(geometry.centre(np.stack([whole, whole])), np.stack([pixels, pixels]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_decoded_at_the_scale_that_its_upright_sides_allow(orientation):
    """At 900x600 it is decoded whole for 500x320, and at half for 400x300, also where it lies on its side."""
    generator = np.random.default_rng(0)
    photo = Image.fromarray(generator.integers(0, 256, (60, 90, 3), np.uint8)).resize((900, 600))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95, exif=exif)
    for height, width, scale in ((320, 500, 1), (300, 400, 2), (500, 320, 1), (400, 300, 2)):
        is_turned = orientation >= 5
        image = Image.open(io.BytesIO(buffer.getvalue()))
        upright = (600, 900) if is_turned else (900, 600)
        image.draft(
            None,
            (900 // scale, 600 // scale) if min(upright[0] / width, upright[1] / height) >= scale else (900, 600),
        )
        expected = ImageOps.exif_transpose(image).resize((width, height), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(
            decode(buffer.getvalue(), Geometry.of(f"{height}x{width}")), np.asarray(expected)
        )


def test_a_picture_for_people_shows_the_same_part():
    geometry = Geometry.of("20x40", "crop", "30x50")
    assert geometry.scaled(160) == Geometry.of("80x160", "crop", "120x200")
    assert Geometry.of(224).scaled(64) == Geometry.of(64)
