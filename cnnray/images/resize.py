"""Resizing of decoded images: bilinear with anti-aliasing, with Pillow's pixels to the last bit.

`native/resize.c` has Pillow's arithmetic in a form that compilers vectorise. It is compiled when cnnray is installed,
and several times as fast as Pillow, which is used where there was no C compiler.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from cnnray.images.geometry import ResizeRule, Size

try:
    import _cnnray_resize
except ImportError:
    _cnnray_resize = None

IS_COMPILED = _cnnray_resize is not None
"""Whether images are resized by native/resize.c."""


class _Plan(NamedTuple):
    box: tuple[float, float, float, float]
    """The part of the image that is kept: left, top, right, bottom."""
    width: int
    """Of that part in the result, in pixels; 0 where padding leaves nothing of a thin image."""
    height: int


def resized(pixels: npt.NDArray[np.uint32], size: Size, rule: ResizeRule) -> npt.NDArray[np.uint8]:
    """Resize an image.

    Args:
        pixels: (height, width), contiguous; of each the first three bytes are red, green and blue.
        size: of the result.
        rule: see `Geometry.resize`; as Pillow's `Image.resize`, `ImageOps.fit` and `ImageOps.pad` do.

    Returns:
        uint8 (size.height, size.width, 3), RGB.
    """
    height, width = pixels.shape
    plan = _plan(width, height, size, rule)
    if not plan.width or not plan.height:
        return np.zeros(size.shape, np.uint8)
    if _cnnray_resize is None:
        image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
        image = image.resize((plan.width, plan.height), Image.Resampling.BILINEAR, plan.box)
        part = np.asarray(image)[..., :3]
    else:
        part = np.empty((plan.height, plan.width, 3), np.uint8)
        _cnnray_resize.resize(pixels, (width, height), plan.box, part, (plan.width, plan.height))
    if part.shape == size.shape:
        return np.ascontiguousarray(part)
    result = np.zeros(size.shape, np.uint8)
    left, top = round((size.width - plan.width) * 0.5), round((size.height - plan.height) * 0.5)
    result[top : top + plan.height, left : left + plan.width] = part
    return result


def _plan(width: int, height: int, size: Size, rule: ResizeRule) -> _Plan:
    whole = (0.0, 0.0, float(width), float(height))
    ratio, wanted = width / height, size.width / size.height
    if rule == "stretch" or ratio == wanted:
        return _Plan(whole, size.width, size.height)
    if rule == "crop":
        kept_width = wanted * height if ratio > wanted else width
        kept_height = height if ratio > wanted else width / wanted
        left, top = (width - kept_width) * 0.5, (height - kept_height) * 0.5
        return _Plan((left, top, left + kept_width, top + kept_height), size.width, size.height)
    if ratio > wanted:
        return _Plan(whole, size.width, round(height / width * size.width))
    return _Plan(whole, round(width / height * size.height), size.height)
