"""The awkward set: images that decoders often get wrong. Every path from bytes to answer is tested with it."""

import io
import zlib

import numpy as np
from PIL import Image

import cnnray.images.decode  # noqa: F401 - lets Pillow write HEIC

_ORIENTATION = 0x0112


def _pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some structure: uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (5 + c) + seed) + np.cos(y / (7 + c)) for c in range(3)]
    return ((np.stack(waves, -1) + 2) * 63.75).astype(np.uint8)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif


def _with_orientation(image: Image.Image, orientation: int) -> Image.Image:
    """An image which HEIC turns by its container."""
    image = image.copy()
    image.info["exif"] = _exif(orientation).tobytes()
    return image


def _ten_bit_heic(pixels: np.ndarray) -> bytes:
    import pillow_heif

    height, width, _ = pixels.shape
    buffer = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (width, height), (pixels.astype(np.uint16) * 257).tobytes()).save(
        buffer, quality=90
    )
    return buffer.getvalue()


def awkward_images() -> dict[str, bytes]:
    """Encoded images by names that say what is awkward about them; all can be decoded."""
    colour = Image.fromarray(_pixels(60, 90))
    alpha = colour.copy()
    alpha.putalpha(Image.fromarray(_pixels(60, 90, 3)[..., 0]))
    palette = colour.quantize(32)
    frames = [Image.fromarray(_pixels(40, 40, seed)) for seed in range(3)]
    sixteen = Image.fromarray(_pixels(50, 50)[..., 0].astype(np.uint16) * 257)
    images = {
        "rgb.png": _encoded(colour, "PNG"),
        "rgb.jpg": _encoded(colour, "JPEG", quality=90),
        "progressive.jpg": _encoded(colour, "JPEG", progressive=True),
        "grey.jpg": _encoded(colour.convert("L"), "JPEG"),
        "grey.png": _encoded(colour.convert("L"), "PNG"),
        "one_bit.png": _encoded(colour.convert("1"), "PNG"),
        "palette.png": _encoded(palette, "PNG"),
        "palette_transparent.png": _encoded(palette, "PNG", transparency=0),
        "palette.gif": _encoded(palette, "GIF"),
        "alpha.png": _encoded(alpha, "PNG"),
        "grey_alpha.png": _encoded(alpha.convert("LA"), "PNG"),
        "rgb_transparent.png": _encoded(colour, "PNG", transparency=tuple(_pixels(60, 90)[0, 0].tolist())),
        "alpha.webp": _encoded(alpha, "WEBP", lossless=True),
        "cmyk.jpg": _encoded(colour.convert("CMYK"), "JPEG"),
        "sixteen_bit.png": _encoded(sixteen, "PNG"),
        "sixteen_bit.tif": _encoded(sixteen, "TIFF"),
        "animated.gif": _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "tiny.png": _encoded(Image.fromarray(_pixels(1, 1)), "PNG"),
        "thin.png": _encoded(Image.fromarray(_pixels(2, 300)), "PNG"),
        "large.jpg": _encoded(Image.fromarray(_pixels(3000, 4000)), "JPEG", quality=80),
        "bitmap.bmp": _encoded(colour, "BMP"),
        "wrong_ending.gif": _encoded(colour, "PNG"),
    }
    images |= {
        "rgb.heic": _encoded(colour, "HEIF", quality=90),
        "grey.heic": _encoded(colour.convert("L"), "HEIF", quality=90),
        "alpha.heic": _encoded(alpha, "HEIF", quality=90),
        "tiles.heic": _encoded(colour, "HEIF", quality=90, tile_size=64),  # as phones write them
        "turned.heic": _encoded(_with_orientation(colour, 6), "HEIF", quality=90),
        "mirrored.heic": _encoded(_with_orientation(colour, 5), "HEIF", quality=90),
        "exif_6.heic": _encoded(colour, "HEIF", quality=90, exif=_exif(6)),  # not turned: only EXIF says so
        "ten_bit.heic": _ten_bit_heic(_pixels(60, 90)),
    }
    images |= {f"exif_{value}.jpg": _encoded(colour, "JPEG", quality=95, exif=_exif(value)) for value in range(2, 9)}
    images["exif_6.png"] = _encoded(colour, "PNG", exif=_exif(6))
    return images


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Bytes that cannot be decoded, and the reason for refusing each, by name."""
    jpeg = _encoded(Image.fromarray(_pixels(60, 90)), "JPEG")
    png = _encoded(Image.fromarray(_pixels(60, 90)), "PNG")
    bomb = bytearray(png)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    large = _encoded(Image.new("1", (11_000, 11_000)), "PNG")
    return {
        "empty.jpg": (b"", "empty"),
        "html.jpg": (b"<html><body>404</body></html>", "not an image"),
        "text.png": (b"hello", "not an image"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "corrupt"),
        "truncated.png": (png[: len(png) // 2], "corrupt"),
        "header_only.png": (png[:33], "not an image"),
        "bomb.png": (bytes(bomb), "too many pixels"),
        "large.png": (large, "too many pixels"),
        "jpeg2000.jpg": (_encoded(Image.fromarray(_pixels(60, 90)), "JPEG2000"), "unsupported"),
        "float.tif": (_encoded(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "unsupported"),
    }
