"""The pictures of a report, each as the bytes of a PNG file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from cnnray.evaluation.metrics import Curve, Integers

_BLUE, _GREEN, _RED, _GREY = "#2563eb", "#15803d", "#b91c1c", "#9ca3af"
_DPI = 110
_READABLE = 30
"""Classes up to which names and numbers of a confusion matrix can be read."""
_BARS = 60
_LONGEST_NAME = 24


@dataclass(frozen=True)
class Tile:
    """An image of a grid."""

    pixels: npt.NDArray[np.uint8]
    """uint8 (height, width, 3)."""
    label: str
    prediction: str
    confidence: float


def confusion_matrix(matrix: Integers, names: Sequence[str], *, by_row: bool) -> bytes:
    """A heat map.

    Args:
        matrix: int64 (classes, classes), by true class and prediction.
        names: of the classes.
        by_row: whether cells are shares of their true class, and not numbers of images.
    """
    count = len(names)
    values = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) if by_row else matrix.astype(np.float64)
    side = min(14.0, max(4.5, 0.42 * count))
    figure = Figure((side + 1.5, side))
    axes = figure.add_subplot()
    shown = axes.imshow(values, cmap="Blues", vmin=0, vmax=1 if by_row else None, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="share of the true class" if by_row else "images", shrink=0.8)
    step = max(1, -(-count // (2 * _READABLE)))
    places = range(0, count, step)
    _ticks(axes, places, [names[place] for place in places])
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    if count <= _READABLE:
        dark = values.max() / 2
        for row, column in zip(*np.nonzero(matrix), strict=True):
            text = f"{values[row, column]:.2f}" if by_row else str(matrix[row, column])
            colour = "white" if values[row, column] > dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    return _png(figure)


def class_accuracies(rows: Sequence[dict[str, Any]]) -> bytes:
    """Bars of each class's accuracy (`recall` of `metrics.by_class`); where there are very many, the worst."""
    there = sorted((row for row in rows if row["recall"] is not None), key=lambda row: row["recall"])
    shown = there[:_BARS][::-1]
    figure = Figure((8, max(2.5, 0.22 * len(shown) + 1)))
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), [row["recall"] for row in shown], color=_BLUE)
    axes.set_yticks(range(len(shown)), [_short(row["name"]) for row in shown], fontsize=8, parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("accuracy" if len(shown) == len(there) else f"accuracy, the {len(shown)} lowest of {len(there)}")
    return _png(figure)


def curves(
    by_class: dict[int, Curve], macro: Curve, names: Sequence[str], *, x: str, y: str, diagonal: bool
) -> bytes:
    """Curves of all classes, and their mean."""
    figure = Figure((6.5, 5))
    axes = figure.add_subplot()
    named = len(by_class) <= 10
    for index, curve in by_class.items():
        if named:
            axes.plot(curve["x"], curve["y"], linewidth=1.2, label=_short(names[index]))
        else:
            axes.plot(curve["x"], curve["y"], linewidth=0.4, color=_GREY)
    axes.plot(macro["x"], macro["y"], color="black", linewidth=2, label="mean of the classes")
    if diagonal:
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
    _unit_square(axes, x, y)
    _legend(axes)
    return _png(figure)


def reliability_diagram(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> bytes:
    """Accuracy by confidence (`metrics.reliability`), as the answers are and with a fitted temperature."""
    figure = Figure((6.5, 6))
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1, label="as good as they say")
    for bins, colour, label in ((before, _BLUE, "as they are"), (after, _GREEN, "with a fitted temperature")):
        axes.plot(
            [one["confidence"] for one in bins],
            [one["accuracy"] for one in bins],
            marker="o",
            color=colour,
            label=label,
        )
    _unit_square(axes, "", "accuracy")
    _legend(axes)
    counts.bar(
        [(one["low"] + one["high"]) / 2 for one in before],
        [one["images"] for one in before],
        width=[0.9 * (one["high"] - one["low"]) for one in before],
        color=_BLUE,
    )
    counts.set_xlabel("confidence")
    counts.set_ylabel("images")
    return _png(figure)


def coverage(curve: Curve, chosen: dict[str, float] | None) -> bytes:
    """Accuracy against coverage (`metrics.coverage_curve`), and the chosen threshold (`metrics.threshold_for`)."""
    figure = Figure((6.5, 4.5))
    axes = figure.add_subplot()
    axes.plot(curve["coverage"], curve["accuracy"], color=_BLUE, label="accuracy of the answers given")
    axes.plot(curve["coverage"], curve["threshold"], color=_GREY, linestyle="--", label="lowest confidence of them")
    if chosen:
        label = f"{chosen['accuracy']:.4f} from a confidence of {chosen['threshold']:.3f} on"
        axes.plot([chosen["coverage"]], [chosen["accuracy"]], "o", color=_GREEN, label=label)
    _unit_square(axes, "share of images that are answered", "")
    _legend(axes)
    return _png(figure)


def history(columns: dict[str, list[float]]) -> bytes:
    """Training curves: `loss`, `accuracy` and their `val_` counterparts by epoch."""
    figure = Figure((9, 3.8))
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for column, colour, label in ((name, _GREY, "training"), (f"val_{name}", _BLUE, "validation")):
            if column in columns:
                axes.plot(columns.get("epoch", range(1, len(columns[column]) + 1)), columns[column], color=colour,
                          marker=".", label=label)  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        _legend(axes)
    return _png(figure)


def grid(tiles: Sequence[Tile], columns: int = 4) -> bytes:
    """Images with their true class, prediction and confidence; green where that is right, else red."""
    rows = -(-len(tiles) // columns)
    figure = Figure((2.3 * columns, 2.75 * rows))
    for number, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).ravel()):
        axes.set_axis_off()
        if number < len(tiles):
            tile = tiles[number]
            right = tile.label == tile.prediction
            axes.imshow(tile.pixels, interpolation="nearest")
            text = f"{_short(tile.prediction, 20)} ({tile.confidence:.2f})"
            text += "" if right else f"\ntrue: {_short(tile.label, 20)}"
            axes.set_title(text, fontsize=9, color=_GREEN if right else _RED, parse_math=False)
    return _png(figure)


def with_heat(pixels: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """An image, uint8 (height, width, 3), under a map of heat, float32 (h, w), 0 to 1, brought to its size."""
    large = Image.fromarray(heat).resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.BILINEAR)
    colours = colormaps["jet"](np.asarray(large))[..., :3] * 255
    return np.asarray(0.55 * pixels + 0.45 * colours, np.uint8)


def _ticks(axes: Axes, places: range, names: Sequence[str]) -> None:
    shown = [_short(name) for name in names]
    size = 8 if len(names) <= _READABLE else 6
    axes.set_xticks(places, shown, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(places, shown, fontsize=size, parse_math=False)


def _unit_square(axes: Axes, x: str, y: str) -> None:
    axes.set_xlim(0, 1.005)
    axes.set_ylim(0, 1.005)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _legend(axes: Axes) -> None:
    legend = axes.legend(fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(name: str, most: int = _LONGEST_NAME) -> str:
    short = name if len(name) <= most else f"{name[: most - 1]}…"
    return f"\u200b{short}" if short.startswith("_") else short  # matplotlib leaves such out of legends


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    return buffer.getvalue()
