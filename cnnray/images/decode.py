"""Decode encoded images into pixels: the only decoder of the project.

The rules, the same from training to HTTP:

- EXIF orientation is applied; ICC profiles are ignored.
- Grey, palette, CMYK, YCbCr and one-bit images become RGB by Pillow's conversions.
- Transparency (alpha, or a transparent palette entry) is composited over white.
- 16-bit grey is scaled to 8 bits by 1/257; 16-bit colour keeps its high byte.
- Floating-point images have no defined range and are refused.
- The first frame of an animated image is used; of a HEIC file with several images, the primary one.
- Of HEIC, the turns of the container are applied and EXIF orientation is ignored, as the format says; 10 and 12 bits
  keep the high eight.
- JPEGs with both sides at least twice the size that they are resized to are decoded at 1/2, 1/4 or 1/8 scale.
- Resizing is bilinear with anti-aliasing; what the network does not take is cut off afterwards.
"""

import contextlib
import ctypes
import importlib.util
import io
import logging
import threading
import warnings

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
from PIL import Image, UnidentifiedImageError, _imaging

from cnnray.errors import BadInputError
from cnnray.images.geometry import Geometry
from cnnray.images.resize import resized

# Messages of Pillow and libtiff about odd files do not name them. What cannot be decoded becomes a BadImage.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # a Pillow without libtiff
    _pillow = ctypes.CDLL(_imaging.__file__)
    _pillow.TIFFSetErrorHandler(None)
    _pillow.TIFFSetWarningHandler(None)

_FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"]
if importlib.util.find_spec("pillow_heif"):  # the extra `heic`
    import pillow_heif

    # The pixels of the image, not of a thumbnail, and decoded in the calling thread, as those of other formats.
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=0)
    _FORMATS.append("HEIF")

MAX_BYTES = 256 * 2**20
"""Largest encoded image that is read, in bytes."""

MAX_PIXELS = 100_000_000
"""Most pixels that one image may occupy while it is decoded (for a JPEG, after the reduced scale). Pillow has a limit
of its own: 179 million pixels by the header."""

_imaging.set_block_size(2**29)  # more than 4 * MAX_PIXELS: pixels in one piece need not be copied

_LARGE_PIXELS = 16_000_000
_one_large_image = threading.Lock()
"""Larger images are decoded one at a time in each process, which bounds its memory."""

EXTENSIONS = frozenset(
    {
        ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic",
        ".heif", ".hif",
    }
)  # fmt: skip
"""File name extensions of images in a folder, in lower case."""

_SCRATCH_PIXELS = 2**22
"""Largest image whose memory a thread keeps for the next one, in pixels."""
_of_thread = threading.local()

_HEAD = 2**18
"""Bytes at the start of a file in which the name of an unsupported format is looked for."""
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
"""Orientations with rows for columns."""
_JPEG = ("JPEG", "MPO")


class BadImage(BadInputError, ValueError):  # noqa: N818 - it is the image that is bad, not the program
    """An image that cannot be used.

    Attributes:
        reason: one of a few fixed words, for counting: `empty`, `too large`, `not an image`, `corrupt`,
            `too many pixels`, `unsupported`; and from reading: `missing`, `access denied`, `throttled`,
            `unreadable`; and from classifying: `no probabilities`; and from HTTP: `not valid base64`.
        detail: what is wrong with this image.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode(data: bytes, geometry: Geometry, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode one image.

    Args:
        data: an encoded image: JPEG, PNG, GIF, BMP, WebP, TIFF, PPM, AVIF, or, with the extra `heic`, HEIC.
        geometry: how it is resized and cut.
        max_pixels: see `MAX_PIXELS`.

    Returns:
        uint8 (height, width, 3) of `geometry.image_size`, RGB.

    Raises:
        BadImage: the bytes are not a usable image; bad bytes raise nothing else.
    """
    if not data:
        raise BadImage("empty")
    if len(data) > MAX_BYTES:
        raise BadImage("too large", f"{len(data)} bytes, at most {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            is_large = image.width * image.height > _LARGE_PIXELS
            height, width = geometry.decode_size
            if height != width and image.format in _JPEG and image.getexif().get(_ORIENTATION) in _TRANSPOSED:
                height, width = width, height
            image.draft(None, (width, height))
            if image.width * image.height > max_pixels:
                raise BadImage("too many pixels", f"{image.width}x{image.height}, at most {max_pixels}")
            with _one_large_image if is_large else contextlib.nullcontext():
                # Of a PNG, `getexif` decodes all pixels, because EXIF data may stand behind them.
                orientation = image.getexif().get(_ORIENTATION)
                pixels = _jpeg_pixels(image, data)
                if pixels is None:
                    pixels = _pixels(_to_rgb(image))
                whole = resized(_upright(pixels, orientation), geometry.decode_size, geometry.resize)
                return np.ascontiguousarray(geometry.centre(whole))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels", str(error)) from None
    except MemoryError:
        raise BadImage("too many pixels", "no memory to decode it") from None
    except Exception as error:
        # Pillow's plugins raise whatever their parsers run into (OSError, SyntaxError, struct.error, ...).
        raise BadImage("corrupt", str(error) or type(error).__name__) from None


def _unidentified(data: bytes) -> BadImage:
    """The error for bytes in none of `_FORMATS`; it names the format if it is known."""
    if "HEIF" not in _FORMATS and data[4:8] == b"ftyp" and b"hei" in data[8:64]:  # brands heic, heix, ...
        return BadImage("unsupported", "HEIC is read with the extra heic: pip install 'cnnray[heic]'")
    # Some of Pillow's parsers walk through all that they are given.
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data[:_HEAD])) as image:
        return BadImage("unsupported", str(image.format))
    return BadImage("not an image", f"starts with {data[:8]!r}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):
        wide = np.clip(np.asarray(image, np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("unsupported", "floating-point pixels have no defined range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _pixels(image: Image.Image) -> npt.NDArray[np.uint32]:
    """The pixels as Pillow holds them: red, green, blue, and a byte without meaning."""
    pixels: npt.NDArray[np.uint8] = pa.array(image).values.to_numpy(zero_copy_only=True)
    return pixels.view(np.uint32).reshape(image.height, image.width)


def _jpeg_pixels(image: Image.Image, data: bytes) -> npt.NDArray[np.uint32] | None:
    """The same pixels, sooner, until this thread's next call; None for what Pillow has to look at."""
    if image.format not in _JPEG or image.mode == "CMYK":
        return None
    shape = (image.height, image.width)
    try:
        # The libjpeg-turbo of simplejpeg decodes into the result, without Pillow's buffers between.
        pixels = simplejpeg.decode_jpeg(data, "RGBA", min_height=shape[0], min_width=shape[1], buffer=_scratch(shape))
    except ValueError:
        return None
    pixels = pixels.view(np.uint32)[..., 0]
    return pixels if pixels.shape == shape else None


def _scratch(shape: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Memory for pixels, until this thread decodes its next image. New memory costs a third of a decoder's time."""
    count = shape[0] * shape[1]
    if count > _SCRATCH_PIXELS:
        return np.empty(count, np.uint32)
    if len(getattr(_of_thread, "pixels", ())) < count:
        _of_thread.pixels = np.empty(count, np.uint32)
    pixels: npt.NDArray[np.uint32] = _of_thread.pixels
    return pixels


def _upright(pixels: npt.NDArray[np.uint32], orientation: int | None) -> npt.NDArray[np.uint32]:
    """Apply an EXIF orientation."""
    if orientation in _TRANSPOSED:
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
