"""The plots of a report, each as the bytes of a PNG file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cnnray.evaluation.metrics import Curve, Integers

_BLUE, _GREEN, _RED, _GREY = "#2563eb", "#15803d", "#b91c1c", "#9ca3af"
_DPI = 110
_MAX_READABLE = 30
"""Most classes with which the names and numbers of a confusion matrix are readable."""
_MAX_BARS = 60
_MAX_NAME_LENGTH = 24


@dataclass(frozen=True)
class Tile:
    """An image in a grid."""

    pixels: npt.NDArray[np.uint8]
    """uint8 (height, width, 3)."""
    label: str
    prediction: str
    confidence: float | None = None
    """None: there is none of the whole prediction."""


def confusion_matrix(matrix: Integers, names: Sequence[str], *, by_row: bool) -> bytes:
    """A confusion matrix as a heat map.

    Args:
        matrix: int64 (classes, classes), number of images by true class (row) and prediction (column).
        names: the class names.
        by_row: show shares of the true class instead of numbers of images.
    """
    count = len(names)
    values = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) if by_row else matrix.astype(np.float64)
    side = min(14.0, max(4.5, 0.42 * count))
    figure = Figure((side + 1.5, side))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1 if by_row else None, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class" if by_row else "images", shrink=0.8)
    step = max(1, -(-count // (2 * _MAX_READABLE)))
    positions = range(0, count, step)
    _ticks(axes, positions, [names[index] for index in positions])
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    if count <= _MAX_READABLE:
        dark = values.max() / 2
        for row, column in zip(*np.nonzero(matrix), strict=True):
            text = f"{values[row, column]:.2f}" if by_row else str(matrix[row, column])
            colour = "white" if values[row, column] > dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    return _png(figure)


def class_bars(rows: Sequence[dict[str, Any]], figure_name: str, label: str) -> bytes:
    """A bar for a figure of each class, of at most the 60 lowest.

    Args:
        rows: see `metrics.class_metrics`.
        figure_name: the key of the figure.
        label: what the figure is called.
    """
    ordered = sorted((row for row in rows if row[figure_name] is not None), key=lambda row: row[figure_name])
    shown = ordered[:_MAX_BARS][::-1]
    figure = Figure((8, max(2.5, 0.22 * len(shown) + 1)))
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), [row[figure_name] for row in shown], color=_BLUE)
    axes.set_yticks(range(len(shown)), [_shorten(row["name"]) for row in shown], fontsize=8, parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(label if len(shown) == len(ordered) else f"{label}, the {len(shown)} lowest of {len(ordered)}")
    return _png(figure)


def curves(by_class: dict[int, Curve], mean: Curve, names: Sequence[str], *, x: str, y: str, diagonal: bool) -> bytes:
    """The curves of all classes, and their mean.

    Args:
        by_class: curves by index of the class.
        mean: their mean.
        names: the class names.
        x: label of the axis.
        y: label of the axis.
        diagonal: draw the line from (0, 0) to (1, 1).
    """
    figure = Figure((6.5, 5))
    axes = figure.add_subplot()
    in_legend = len(by_class) <= 10
    for index, curve in by_class.items():
        if in_legend:
            axes.plot(curve["x"], curve["y"], linewidth=1.2, label=_shorten(names[index]))
        else:
            axes.plot(curve["x"], curve["y"], linewidth=0.4, color=_GREY)
    axes.plot(mean["x"], mean["y"], color="black", linewidth=2, label="mean of the classes")
    if diagonal:
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
    _unit_square(axes, x, y)
    _legend(axes)
    return _png(figure)


def reliability_diagram(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]] | None = None) -> bytes:
    """Accuracy by confidence (`metrics.reliability_bins`), before and, if that is given, after a temperature is
    fitted."""
    figure = Figure((6.5, 6))
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1, label="perfect calibration")
    lines = [(before, _BLUE, "temperature of the bundle")]
    lines += [] if after is None else [(after, _GREEN, "fitted temperature")]
    for bins, colour, label in lines:
        axes.plot(
            [row["confidence"] for row in bins],
            [row["accuracy"] for row in bins],
            marker="o",
            color=colour,
            label=label,
        )
    _unit_square(axes, "", "accuracy")
    _legend(axes)
    counts.bar(
        [(row["low"] + row["high"]) / 2 for row in before],
        [row["images"] for row in before],
        width=[0.9 * (row["high"] - row["low"]) for row in before],
        color=_BLUE,
    )
    counts.set_xlabel("confidence")
    counts.set_ylabel("images")
    return _png(figure)


def coverage(curve: Curve, threshold: dict[str, float] | None) -> bytes:
    """Accuracy and confidence threshold by coverage (`metrics.coverage_curve`), and one marked threshold
    (`metrics.find_threshold`)."""
    figure = Figure((6.5, 4.5))
    axes = figure.add_subplot()
    axes.plot(curve["coverage"], curve["accuracy"], color=_BLUE, label="accuracy at this coverage")
    axes.plot(curve["coverage"], curve["threshold"], color=_GREY, linestyle="--", label="confidence threshold")
    if threshold:
        label = f"accuracy {threshold['accuracy']:.4f} at threshold {threshold['threshold']:.3f}"
        axes.plot([threshold["coverage"]], [threshold["accuracy"]], "o", color=_GREEN, label=label)
    _unit_square(axes, "coverage: share of images at or above the threshold", "")
    _legend(axes)
    return _png(figure)


def history(columns: dict[str, list[float]]) -> bytes:
    """Training curves: `loss`, `accuracy` (with several labels `mean_average_precision`) and their `val_`
    counterparts by epoch."""
    figure = Figure((9, 3.8))
    second = "accuracy" if "val_accuracy" in columns else "mean_average_precision"
    for axes, name in zip(figure.subplots(1, 2), ("loss", second), strict=True):
        for column, colour, label in ((name, _GREY, "training"), (f"val_{name}", _BLUE, "validation")):
            if column in columns:
                axes.plot(columns.get("epoch", range(1, len(columns[column]) + 1)), columns[column], color=colour,
                          marker=".", label=label)  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(alpha=0.3)
        _legend(axes)
    return _png(figure)


def drift(windows: Sequence[tuple[str, dict[str, Any] | None]], figure_name: str, threshold: float) -> bytes:
    """A figure of drift by window, beside the threshold of a warning.

    Args:
        windows: by start, the figures; None where there are too few images.
        figure_name: the one that is shown.
        threshold: values below it give no warning.
    """
    figure = Figure((9, 2.8))
    axes = figure.add_subplot()
    values = [found[figure_name] if found else np.nan for _, found in windows]
    axes.plot(range(len(windows)), values, color=_BLUE, marker="o", markersize=4)
    axes.axhline(threshold, color=_GREY, linestyle="--", label="threshold of a warning")
    axes.set_ylim(0.4 if figure_name == "auc" else -0.02, None)
    axes.set_ylabel({"auc": "area under the ROC curve", "effect_size": "effect size"}[figure_name])
    _window_ticks(axes, [start for start, _ in windows])
    _legend(axes)
    return _png(figure)


def accuracies(windows: Sequence[tuple[str, dict[str, float] | None]]) -> bytes:
    """Accuracy by window, `accuracy` with its interval from `low` to `high`; None where there are no labels."""
    figure = Figure((9, 2.8))
    axes = figure.add_subplot()
    known = [(place, found) for place, (_, found) in enumerate(windows) if found]
    values = np.array([[found[name] for name in ("accuracy", "low", "high")] for _, found in known]).T
    axes.errorbar(
        [place for place, _ in known],
        values[0],
        yerr=[values[0] - values[1], values[2] - values[0]],
        color=_BLUE,
        marker=".",
        capsize=3,
    )
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy")
    _window_ticks(axes, [start for start, _ in windows])
    return _png(figure)


def _window_ticks(axes: Axes, starts: Sequence[str]) -> None:
    step = max(1, -(-len(starts) // 12))
    places = range(0, len(starts), step)
    labels = [starts[place].removesuffix("Z").removesuffix(":00").removesuffix("T00:00") for place in places]
    axes.set_xticks(places, labels, rotation=30, ha="right", fontsize=7)
    axes.grid(alpha=0.3)


def grid(tiles: Sequence[Tile], columns: int = 4) -> bytes:
    """Images titled with prediction and confidence: green if correct, else red with the truth."""
    rows = -(-len(tiles) // columns)
    figure = Figure((2.3 * columns, 2.75 * rows))
    for number, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).ravel()):
        axes.set_axis_off()
        if number < len(tiles):
            tile = tiles[number]
            correct = tile.label == tile.prediction
            axes.imshow(tile.pixels, interpolation="nearest")
            text = _shorten(tile.prediction, 20)
            text += "" if tile.confidence is None else f" ({tile.confidence:.2f})"
            text += "" if correct else f"\ntrue: {_shorten(tile.label, 20)}"
            axes.set_title(text, fontsize=9, color=_GREEN if correct else _RED, parse_math=False)
    return _png(figure)


def _ticks(axes: Axes, positions: range, names: Sequence[str]) -> None:
    labels = [_shorten(name) for name in names]
    size = 8 if len(names) <= _MAX_READABLE else 6
    axes.set_xticks(positions, labels, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(positions, labels, fontsize=size, parse_math=False)


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


def _shorten(name: str, length: int = _MAX_NAME_LENGTH) -> str:
    short = name if len(name) <= length else f"{name[: length - 1]}…"
    return f"\u200b{short}" if short.startswith("_") else short  # matplotlib hides labels that begin with _


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    return buffer.getvalue()
