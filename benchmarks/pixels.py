"""Decoding on one core, against bare Pillow."""

import functools
import io
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.report import Comparison
from cnnray.images import resize
from cnnray.images.decode import decode
from cnnray.images.geometry import Geometry

_SECONDS = 0.5
"""Of each method, in each round."""
_CASES = (
    # format, width, height, size, the ratio to reach
    ("JPEG", 500, 375, 224, 1.6),
    ("JPEG", 500, 375, 64, 1.15),
    ("JPEG", 4000, 3000, 224, 1.05),
    ("PNG", 500, 375, 224, 1.0),
)


def measure(*, rounds: int = 9) -> list[Comparison]:
    """Measure both decoders in turns, on one of scikit-learn's photos.

    Args:
        rounds: number of rounds.
    """
    ours = "cnnray" if resize.IS_COMPILED else "cnnray without a C compiler"
    photo = Image.fromarray(load_sample_image("china.jpg"))
    comparisons = []
    for kind, width, height, size, target in _CASES:
        buffer = io.BytesIO()
        photo.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, quality=87)
        data = buffer.getvalue()
        methods: dict[str, Callable[[bytes], npt.NDArray[np.uint8]]] = {
            "ours": functools.partial(decode, geometry=Geometry.of(size)),
            "Pillow": functools.partial(with_pillow, size=size),
        }
        assert (methods["ours"](data) == methods["Pillow"](data)).all()
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(rounds):
            for name, method in methods.items():
                rates[name].append(_rate(method, data))
        name = f"{ours}: {kind} {width}x{height} to {size}"
        comparisons.append(Comparison(name, rates["ours"], "bare Pillow, one core", rates["Pillow"], target))
    return comparisons


def with_pillow(data: bytes, size: int) -> npt.NDArray[np.uint8]:
    """An image decoded and resized by Pillow's calls alone."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (size, size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def _rate(method: Callable[[bytes], npt.NDArray[np.uint8]], data: bytes) -> float:
    """Images per second of CPU time."""
    count, started = 0, time.process_time()
    while (seconds := time.process_time() - started) < _SECONDS:
        method(data)
        count += 1
    return count / seconds
