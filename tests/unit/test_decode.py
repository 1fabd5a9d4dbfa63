import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from cnnray.images.decode import BadImage, decode
from tests.awkward import awkward_images, bad_images

AWKWARD = awkward_images()
BAD = bad_images()


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_awkward_images_become_rgb_of_the_target_size(name, resize):
    pixels = decode(AWKWARD[name], 32, resize)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_their_reason(name):
    data, reason = BAD[name]
    with pytest.raises(BadImage) as error:
        decode(data, 32)
    assert error.value.reason == reason


def test_any_truncation_gives_pixels_or_bad_image():
    for name in ("rgb.png", "rgb.jpg", "palette.gif", "alpha.webp", "sixteen_bit.tif", "exif_6.jpg"):
        data = AWKWARD[name]
        for stop in range(1, len(data), max(1, len(data) // 60)):
            with contextlib.suppress(BadImage):
                assert decode(data[:stop], 16).shape == (16, 16, 3)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation):
    upright = decode(AWKWARD["rgb.png"], 64)
    # A viewer rotates the decoded image as its EXIF says, and only then scales it.
    image = Image.open(io.BytesIO(AWKWARD[f"exif_{orientation}.jpg"]))
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(image).resize((64, 64), Image.Resampling.BILINEAR), int)
    decoded = decode(AWKWARD[f"exif_{orientation}.jpg"], 64).astype(int)
    assert np.abs(decoded - expected).max() <= 1
    assert np.abs(decoded - upright).mean() > 5  # it was rotated


def _flat(mode, colour, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(buffer, kind, **options)
    return decode(buffer.getvalue(), 4)


def test_transparency_is_composited_over_white():
    assert (_flat("RGBA", (255, 0, 0, 0)) == 255).all()
    assert np.abs(_flat("RGBA", (255, 0, 0, 128)).astype(int) - [255, 127, 127]).max() <= 1
    assert (_flat("LA", (0, 0)) == 255).all()


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(buffer, "PNG")
    assert (decode(buffer.getvalue(), 4) == 128).all()


def test_cmyk_is_not_inverted():
    assert decode(AWKWARD["cmyk.jpg"], 32).astype(int).mean() == pytest.approx(
        decode(AWKWARD["rgb.jpg"], 32).mean(), abs=12
    )


def test_reduced_scale_stays_close_to_full_decoding():
    image = Image.open(io.BytesIO(AWKWARD["large.jpg"])).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(decode(AWKWARD["large.jpg"], 64).astype(int) - np.asarray(image, int)).mean() < 1.5


def test_crop_keeps_the_centre_and_pad_the_whole():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert decode(buffer.getvalue(), 10, "crop").min() == 255
    padded = decode(buffer.getvalue(), 30, "pad")
    assert padded[:9].max() == 0
    assert padded[15, 15].min() == 255
