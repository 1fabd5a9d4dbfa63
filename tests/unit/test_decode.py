import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from cnnray.images import decode as decoder
from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import Geometry
from tests.awkward import awkward_images, bad_images
from tests.conftest import REPOSITORY

AWKWARD = awkward_images()
BAD = bad_images()


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_awkward_images_become_rgb_of_the_target_size(name, resize):
    pixels = decode(AWKWARD[name], Geometry.of(32, resize))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_their_reason(name):
    data, reason = BAD[name]
    with pytest.raises(BadImage) as error:
        decode(data, Geometry.of(32))
    assert error.value.reason == reason


def test_any_truncation_gives_pixels_or_bad_image():
    for name in ("rgb.png", "rgb.jpg", "palette.gif", "alpha.webp", "sixteen_bit.tif", "exif_6.jpg"):
        data = AWKWARD[name]
        for stop in range(1, len(data), max(1, len(data) // 60)):
            with contextlib.suppress(BadImage):
                assert decode(data[:stop], Geometry.of(16)).shape == (16, 16, 3)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation):
    upright = decode(AWKWARD["rgb.png"], Geometry.of(64))
    # A viewer rotates the decoded image as its EXIF says, and only then scales it.
    image = Image.open(io.BytesIO(AWKWARD[f"exif_{orientation}.jpg"]))
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(image).resize((64, 64), Image.Resampling.BILINEAR), int)
    decoded = decode(AWKWARD[f"exif_{orientation}.jpg"], Geometry.of(64)).astype(int)
    assert np.abs(decoded - expected).max() <= 1
    assert np.abs(decoded - upright).mean() > 5  # it was rotated


def _flat(mode, colour, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(buffer, kind, **options)
    return decode(buffer.getvalue(), Geometry.of(4))


def test_transparency_is_composited_over_white():
    assert (_flat("RGBA", (255, 0, 0, 0)) == 255).all()
    assert np.abs(_flat("RGBA", (255, 0, 0, 128)).astype(int) - [255, 127, 127]).max() <= 1
    assert (_flat("LA", (0, 0)) == 255).all()


def _difference(name, other):
    """Mean difference of two images of the awkward set in levels of 255."""
    return np.abs(decode(AWKWARD[name], Geometry.of(64)).astype(int) - decode(AWKWARD[other], Geometry.of(64))).mean()


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("rgb.heic", "rgb.png"), ("tiles.heic", "rgb.png"), ("ten_bit.heic", "rgb.png"), ("grey.heic", "grey.png"),
        ("alpha.heic", "alpha.png"), ("turned.heic", "exif_6.jpg"), ("mirrored.heic", "exif_5.jpg"),
        ("exif_6.heic", "rgb.png"),
    ],
)  # fmt: skip
def test_heic_is_read_like_other_formats(name, same):
    assert _difference(name, same) < 2.5


def test_the_thumbnail_of_a_heic_is_not_taken_for_the_image():
    image, plain, with_thumbnail = Image.open(io.BytesIO(AWKWARD["rgb.png"])), io.BytesIO(), io.BytesIO()
    image.save(plain, "HEIF")
    image.save(with_thumbnail, "HEIF", thumbnails=[32])
    assert len(with_thumbnail.getvalue()) > len(plain.getvalue())
    assert (decode(with_thumbnail.getvalue(), Geometry.of(8)) == decode(plain.getvalue(), Geometry.of(8))).all()


def test_without_the_extra_heic_is_refused_with_the_command_that_helps(monkeypatch):
    monkeypatch.setattr(decoder, "_FORMATS", [name for name in decoder._FORMATS if name != "HEIF"])
    for name in ("rgb.heic", "alpha.heic", "turned.heic"):
        with pytest.raises(BadImage, match=r"^unsupported: HEIC .* pip install 'cnnray\[heic\]'"):
            decode(AWKWARD[name], Geometry.of(8))


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(buffer, "PNG")
    assert (decode(buffer.getvalue(), Geometry.of(4)) == 128).all()


def test_large_images_are_decoded_one_at_a_time_from_the_first_pixel(monkeypatch):
    """Pillow decodes a PNG to look for its EXIF data."""
    buffer = io.BytesIO()
    Image.new("L", (4001, 4000)).save(buffer, "PNG")
    locked, load = [], PngImageFile.load

    def spy(image):
        locked.append(decoder._one_large_image.locked())
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", spy)
    decode(buffer.getvalue(), Geometry.of(4))
    assert locked
    assert all(locked)


OTHER_FORMATS = {
    "JPEG2000": "RGB", "TGA": "RGB", "ICO": "RGB", "ICNS": "RGB", "PCX": "RGB", "SGI": "RGB", "DDS": "RGB",
    "XBM": "1", "EPS": "RGB", "MSP": "1", "QOI": "RGB",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_format_that_is_not_read_is_refused_by_its_name(name):
    buffer = io.BytesIO()
    Image.new(OTHER_FORMATS[name], (64, 64)).save(buffer, name)
    with pytest.raises(BadImage) as error:
        decode(buffer.getvalue(), Geometry.of(4))
    assert str(error.value) == f"unsupported: {name}"


_DECODES_ODD_FILES = """
import contextlib, io, logging
logging.basicConfig(level=logging.INFO)
from PIL import Image
from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import Geometry

def decode_damaged(image, places, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    for place in places:
        for value in (0, 7, 255):
            data = bytearray(buffer.getvalue())
            data[place % len(data)] = value
            with contextlib.suppress(BadImage):
                decode(bytes(data), Geometry.of(16))

noise = Image.effect_noise((60, 40), 99)
decode_damaged(noise, range(140), format="TIFF")
for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
    decode_damaged(noise, range(8, 2000, 60), format="TIFF", compression=compression)
decode_damaged(noise.resize((60, 300)), range(18, 26), format="BMP")
"""


def test_messages_about_odd_files_are_kept_out_of_the_log():
    process = [sys.executable, "-c", _DECODES_ODD_FILES]
    assert subprocess.run(process, cwd=REPOSITORY, capture_output=True, text=True, check=True).stderr == ""


def test_cmyk_is_not_inverted():
    assert decode(AWKWARD["cmyk.jpg"], Geometry.of(32)).astype(int).mean() == pytest.approx(
        decode(AWKWARD["rgb.jpg"], Geometry.of(32)).mean(), abs=12
    )


def test_reduced_scale_stays_close_to_full_decoding():
    image = Image.open(io.BytesIO(AWKWARD["large.jpg"])).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(decode(AWKWARD["large.jpg"], Geometry.of(64)).astype(int) - np.asarray(image, int)).mean() < 1.5


def test_crop_keeps_the_centre_and_pad_the_whole():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert decode(buffer.getvalue(), Geometry.of(10, "crop")).min() == 255
    padded = decode(buffer.getvalue(), Geometry.of(30, "pad"))
    assert padded[:9].max() == 0
    assert padded[15, 15].min() == 255
