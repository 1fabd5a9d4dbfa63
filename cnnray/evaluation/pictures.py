"""The pictures of a report: which plots it has, and which images are shown in them."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import CnnrayError
from cnnray.evaluation import label_metrics, metrics, plots
from cnnray.evaluation.label_metrics import LabelPredictions
from cnnray.evaluation.metrics import Predictions
from cnnray.evaluation.plots import Tile
from cnnray.images import containers
from cnnray.images.decode import decode
from cnnray.images.reading import load_bytes
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.heat_maps import overlay

log = logging.getLogger(__name__)

HeatMaps = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.int64]], npt.NDArray[np.float32]]
"""Computes the heat maps of images for classes: `grad_cam.heat_maps` of one bundle."""
_TILE_SIZE = 160
"""The longer side of the images in a grid, in pixels."""


def make_pictures(
    bundle: Bundle,
    rows: pa.Table,
    predictions: Predictions,
    results: dict[str, Any],
    history: dict[str, list[float]],
    samples: int,
    heat_maps: HeatMaps,
) -> dict[str, bytes]:
    """Draw the pictures of a report: PNG files by name. A picture without content is left out.

    Args:
        bundle: the bundle that made the predictions.
        rows: one row for each image, with `uri`, `label`, `prediction`, `confidence` and `error`.
        predictions: of the rows without an error, in the same order.
        results: content of `metrics.json`.
        history: columns of the training's history; empty if there is none.
        samples: number of images in a grid.
        heat_maps: of the bundle.
    """
    names, matrix = predictions.class_names, metrics.confusion_matrix(predictions)
    pictures = {
        "confusion_matrix": plots.confusion_matrix(matrix, names, by_row=False),
        "confusion_matrix_by_row": plots.confusion_matrix(matrix, names, by_row=True),
        "class_accuracies": plots.class_bars(results["classes"], "recall", "accuracy"),
        "reliability": plots.reliability_diagram(
            results["calibration"]["reliability"], results["calibration"]["reliability_after"]
        ),
        "coverage": plots.coverage(metrics.coverage_curve(predictions), results["threshold"]),
    }
    if curves := metrics.roc_curves(predictions):
        pictures["roc"] = plots.curves(
            curves, metrics.mean_curve(curves), names, x="false positive rate", y="true positive rate", diagonal=True
        )
        curves = metrics.precision_recall_curves(predictions)
        pictures["precision_recall"] = plots.curves(
            curves, metrics.mean_curve(curves), names, x="recall", y="precision", diagonal=False
        )
    if history:
        pictures["history"] = plots.history(history)
    good = rows.filter(pc.is_null(rows["error"]))
    random = np.sort(np.random.default_rng(0).permutation(len(good))[:samples])
    wrong = np.flatnonzero(~predictions.correct)
    most_confident = wrong[np.argsort(-predictions.confidences[wrong], kind="stable")][:samples]
    for name, indices in (("samples", random), ("mistakes", most_confident)):
        pictures |= _grids(name, bundle, good.take(pa.array(indices)), heat_maps)
    return pictures


def make_label_pictures(
    bundle: Bundle,
    rows: pa.Table,
    predictions: LabelPredictions,
    results: dict[str, Any],
    history: dict[str, list[float]],
    samples: int,
) -> dict[str, bytes]:
    """Draw the pictures of a report on several labels: see `make_pictures`.

    Args:
        bundle, results, history, samples: see there.
        rows: one row for each image, with `uri`, `label`, `labels` and `error`.
        predictions: of the rows without an error, in the same order.
    """
    names = predictions.class_names
    pictures = {
        "average_precisions": plots.class_bars(results["classes"], "average_precision", "average precision"),
        "reliability": plots.reliability_diagram(results["reliability"]),
    }
    if curves := label_metrics.precision_recall_curves(predictions):
        pictures["precision_recall"] = plots.curves(
            curves, metrics.mean_curve(curves), names, x="recall", y="precision", diagonal=False
        )
    if history:
        pictures["history"] = plots.history(history)
    good = rows.filter(pc.is_null(rows["error"]))
    random = np.sort(np.random.default_rng(0).permutation(len(good))[:samples])
    # How sure the network is of the wrong decision of an image that it is most sure of.
    sure = np.where(predictions.given, predictions.probabilities, 1 - predictions.probabilities)
    surest = np.where(predictions.truth == predictions.given, -1.0, sure).max(1)
    wrong = np.flatnonzero(surest >= 0)
    most_confident = wrong[np.argsort(-surest[wrong], kind="stable")][:samples]
    for name, indices in (("samples", random), ("mistakes", most_confident)):
        chosen = good.take(pa.array(indices))
        tiles, _ = _decoded(bundle, chosen["uri"].to_pylist())
        shown = [row | {"index": index} for index, row in enumerate(chosen.to_pylist()) if index in tiles]
        if shown:
            pictures[name] = plots.grid([_tile(tiles[row["index"]], row["label"], row["labels"]) for row in shown])
    return pictures


def _tile(pixels: npt.NDArray[np.uint8], truth: list[str], given: list[str]) -> Tile:
    """An image with its labels, or, where these are wrong, what is too much (+) and what is missing (-)."""
    wrong = [f"+{name}" for name in given if name not in truth] + [f"-{name}" for name in truth if name not in given]
    return Tile(pixels, ", ".join(truth) or "none", " ".join(wrong) or ", ".join(truth) or "none")


Pixels = dict[int, npt.NDArray[np.uint8]]


def _decoded(bundle: Bundle, uris: list[str]) -> tuple[Pixels, Pixels]:
    """Images for a grid, and the same as the network takes them, by index; without those that cannot be read now."""
    info = bundle.info
    order = np.argsort(uris)  # containers are read in the order of their uris
    tiles: Pixels = {}
    inputs: Pixels = {}
    for index, source in zip(order.tolist(), containers.encoded([uris[index] for index in order]), strict=True):
        with contextlib.suppress(CnnrayError):  # it was deleted or changed since, or storage is in trouble
            data = load_bytes(source)
            tiles[index] = decode(data, info.geometry.scaled(_TILE_SIZE))
            inputs[index] = decode(data, info.geometry)
    return tiles, inputs


def _grids(name: str, bundle: Bundle, rows: pa.Table, heat_maps: HeatMaps) -> dict[str, bytes]:
    """A grid of images, and, where the network supports it, a second one with Grad-CAM heat maps."""
    info = bundle.info
    tiles, inputs = _decoded(bundle, rows["uri"].to_pylist())
    images = [row | {"index": index} for index, row in enumerate(rows.to_pylist()) if index in inputs]
    if not images:
        return {}

    def grid(pixels: dict[int, npt.NDArray[np.uint8]]) -> bytes:
        return plots.grid(
            [Tile(pixels[row["index"]], row["label"], row["prediction"], row["confidence"]) for row in images]
        )

    classes = np.asarray([info.class_names.index(row["prediction"]) for row in images])
    indices = [row["index"] for row in images]
    try:
        maps = heat_maps(np.stack([inputs[index] for index in indices]), classes)
    except BundleError as error:
        log.info("no heat maps: %s", error)
        return {name: grid(tiles)}
    heated = {index: overlay(tiles[index], heat) for index, heat in zip(indices, maps, strict=True)}
    return {name: grid(tiles), f"{name}_grad_cam": grid(heated)}
