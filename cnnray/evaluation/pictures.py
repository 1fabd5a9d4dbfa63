"""Which pictures a report has, and of which images."""

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.evaluation import metrics, plots
from cnnray.evaluation.metrics import Answers
from cnnray.evaluation.plots import Tile
from cnnray.images import containers
from cnnray.images.decode import BadImage, decode
from cnnray.images.reading import bytes_of
from cnnray.models import grad_cam, startup
from cnnray.models.bundle import Bundle, BundleError

_SHOWN = 160
"""Height and width in pixels of the images of a grid."""


def pictures_of(
    bundle: Bundle,
    rows: pa.Table,
    answers: Answers,
    found: dict[str, Any],
    history: dict[str, list[float]],
    samples: int,
) -> dict[str, bytes]:
    """All plots, PNG by name; those left out of which there is nothing to show.

    Args:
        bundle: that answered.
        rows: by image, with `uri`, `label`, `prediction`, `confidence` and `error`.
        answers: to those without an error, in the same order.
        found: what `metrics.json` holds.
        history: columns of the training's history, where there is one.
        samples: images in a grid.
    """
    names, matrix = answers.class_names, metrics.confusion(answers)
    shown = {
        "confusion_matrix": plots.confusion_matrix(matrix, names, by_row=False),
        "confusion_matrix_by_row": plots.confusion_matrix(matrix, names, by_row=True),
        "class_accuracies": plots.class_accuracies(found["classes"]),
        "reliability": plots.reliability_diagram(
            found["calibration"]["reliability"], found["calibration"]["reliability_after"]
        ),
        "coverage": plots.coverage(metrics.coverage_curve(answers), found["threshold"]),
    }
    if curves := metrics.roc_curves(answers):
        shown["roc"] = plots.curves(
            curves, metrics.macro_curve(curves), names, x="false positive rate", y="true positive rate", diagonal=True
        )
        curves = metrics.precision_recall_curves(answers)
        shown["precision_recall"] = plots.curves(
            curves, metrics.macro_curve(curves), names, x="recall", y="precision", diagonal=False
        )
    if history:
        shown["history"] = plots.history(history)
    good = rows.filter(pc.is_null(rows["error"]))
    some = np.sort(np.random.default_rng(0).permutation(len(good))[:samples])
    wrong = np.flatnonzero(~answers.correct)
    worst = wrong[np.argsort(-answers.confidences[wrong], kind="stable")][:samples]
    for name, places in (("samples", some), ("mistakes", worst)):
        shown |= _grids(name, bundle, good.take(pa.array(places)))
    return shown


def _grids(name: str, bundle: Bundle, rows: pa.Table) -> dict[str, bytes]:
    """Images, and the same with what Grad-CAM makes of them."""
    info, uris = bundle.info, rows["uri"].to_pylist()
    order = np.argsort(uris)  # in which containers are read
    shown, seen = {}, {}
    for place, source in zip(order.tolist(), containers.encoded([uris[place] for place in order]), strict=True):
        with contextlib.suppress(BadImage):  # it was there a moment ago
            data = bytes_of(source)
            shown[place] = decode(data, _SHOWN, info.resize)
            seen[place] = decode(data, info.image_size, info.resize)
    found = [row | {"place": place} for place, row in enumerate(rows.to_pylist()) if place in seen]
    if not found:
        return {}

    def grid(pixels: dict[int, npt.NDArray[np.uint8]]) -> bytes:
        return plots.grid(
            [Tile(pixels[row["place"]], row["label"], row["prediction"], row["confidence"]) for row in found]
        )

    startup.load_tensorflow(gpus=False)
    classes = np.asarray([info.class_names.index(row["prediction"]) for row in found])
    places = [row["place"] for row in found]
    try:
        heat = grad_cam.heat_maps(bundle, np.stack([seen[place] for place in places]), classes)
    except BundleError:
        return {name: grid(shown)}
    heated = {place: plots.with_heat(shown[place], one) for place, one in zip(places, heat, strict=True)}
    return {name: grid(shown), f"{name}_grad_cam": grid(heated)}
