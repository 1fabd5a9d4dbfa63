"""Resizing of decoded images: bilinear with anti-aliasing, with Pillow's pixels to the last bit.

`native/resize.c` has Pillow's arithmetic in a form that compilers vectorise. It is compiled when cnnray is installed,
and several times as fast as Pillow, which is used where there was no C compiler.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    import _cnnray_resize
except ImportError:
    _cnnray_resize = None

ResizeRule = Literal["stretch", "crop", "pad"]
RESIZE_RULES: tuple[ResizeRule, ...] = get_args(ResizeRule)

IS_COMPILED = _cnnray_resize is not None
"""Whether images are resized by native/resize.c."""


class _Plan(NamedTuple):
    box: tuple[float, float, float, float]
    """The part of the image that is kept: left, top, right, bottom."""
    width: int
    """Of that part in the result, in pixels; 0 where padding leaves nothing of a thin image."""
    height: int


def resized(pixels: npt.NDArray[np.uint32], size: int, rule: ResizeRule = "stretch") -> npt.NDArray[np.uint8]:
    """Resize an image to a square.

    Args:
        pixels: (height, width), contiguous; of each the first three bytes are red, green and blue.
        size: height and width of the result in pixels.
        rule: `stretch` changes the aspect ratio, `crop` keeps it and cuts the longer side around the centre, `pad`
            keeps it and fills the shorter side with black; as Pillow's `Image.resize`, `ImageOps.fit` and
            `ImageOps.pad` do.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    height, width = pixels.shape
    plan = _plan(width, height, size, rule)
    if not plan.width or not plan.height:
        return np.zeros((size, size, 3), np.uint8)
    if _cnnray_resize is None:
        image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
        image = image.resize((plan.width, plan.height), Image.Resampling.BILINEAR, plan.box)
        part = np.asarray(image)[..., :3]
    else:
        part = np.empty((plan.height, plan.width, 3), np.uint8)
        _cnnray_resize.resize(pixels, (width, height), plan.box, part, (plan.width, plan.height))
    if part.shape == (size, size, 3):
        return np.ascontiguousarray(part)
    result = np.zeros((size, size, 3), np.uint8)
    left, top = round((size - plan.width) * 0.5), round((size - plan.height) * 0.5)
    result[top : top + plan.height, left : left + plan.width] = part
    return result


def _plan(width: int, height: int, size: int, rule: ResizeRule) -> _Plan:
    whole = (0.0, 0.0, float(width), float(height))
    if rule == "stretch" or width == height:
        return _Plan(whole, size, size)
    if rule == "crop":
        side = min(width, height)
        left, top = (width - side) * 0.5, (height - side) * 0.5
        return _Plan((left, top, left + side, top + side), size, size)
    if width > height:
        return _Plan(whole, size, round(height / width * size))
    return _Plan(whole, round(width / height * size), size)
