"""The report of a drift measurement as one self-contained HTML file."""

from typing import Any

from cnnray.evaluation import plots
from cnnray.evaluation.report import data_url, template
from cnnray.models import drift

_MOST_CLASSES = 15
LARGE_AUC = 0.64
"""Area under the ROC curve below which embeddings have not drifted, however many images show it: that of two normal
distributions whose means are half a standard deviation apart, "medium" in Cohen's table."""


def render(results: dict[str, Any]) -> str:
    """Render the report as HTML.

    Args:
        results: content of `drift.json`.
    """
    windows = results["windows"]
    pictures = {}
    for of in ("classes", "confidences"):
        figures = [(row["start"], row["drift"][of]) for row in windows]
        pictures[of] = plots.drift(figures, "effect_size", drift.LARGE_EFFECT)
    embeddings = [(row["start"], row["embeddings"]) for row in windows]
    if any(found for _, found in embeddings):
        pictures["embeddings"] = plots.drift(embeddings, "auc", LARGE_AUC)
    accuracies = [(row["start"], row["accuracy"]) for row in windows]
    if any(found for _, found in accuracies):
        pictures["accuracy"] = plots.accuracies(accuracies)
    return template("drift.html").render(
        results=results,
        pictures={name: data_url(png) for name, png in pictures.items()},
        moved=_most_moved(results),
    )


def _most_moved(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes whose share differs most between the reference and the last window."""
    before, now = results["reference_answers"]["classes"], results["windows"][-1]["answers"]["classes"]
    rows = [
        {"name": name, "before": old / max(sum(before), 1), "now": new / max(sum(now), 1)}
        for name, old, new in zip(results["class_names"], before, now, strict=True)
    ]
    return sorted(rows, key=lambda row: -abs(row["now"] - row["before"]))[:_MOST_CLASSES]
