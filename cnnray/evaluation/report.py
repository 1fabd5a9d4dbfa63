"""The report of an evaluation as one self-contained HTML file."""

import base64
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2

from cnnray.evaluation import selective
from cnnray.evaluation.metrics import TOP_K

_MOST_CONFUSED = 15


def render(results: dict[str, Any], errors: Sequence[dict[str, str]], pictures: dict[str, bytes]) -> str:
    """Render the report as HTML.

    Args:
        results: content of `metrics.json`.
        errors: `uri` and `error` of the first images without a prediction.
        pictures: PNG files by name (see `pictures.make_pictures` and `make_label_pictures`).
    """
    shared = {
        "results": results,
        "percent": percent,
        "decimal": decimal,
        "errors": errors,
        "pictures": {name: data_url(png) for name, png in pictures.items()},
        "checks": results["data_checks"],
    }
    if "mean_average_precision" in results:
        return template("label_report.html").render(shared)
    precision = results["wanted_accuracy"]
    return template("report.html").render(
        shared,
        top_k=TOP_K,
        confused=_most_confused(results),
        calibration=results["calibration"],
        comparison=results.get("comparison"),
        answers=results.get("answers"),
        images_needed=selective.images_needed(precision, results["certainty"]) if 0 < precision < 1 else None,
    )


def template(name: str) -> jinja2.Template:
    """A template of this package, by the name of its file."""
    folder = files("cnnray.evaluation")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text())
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"decimal": decimal, "percent": percent, "small": "{:.2g}".format}
    return environment.get_template(name)


def data_url(png: bytes) -> str:
    """A PNG file as an address that HTML can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def decimal(value: float | None) -> str:
    """Four places; a dash for None."""
    return "-" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A share in percent; a dash for None."""
    return "-" if value is None else f"{100 * value:.2f} %"


def _most_confused(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of true and predicted class with the most images."""
    names = [row["name"] for row in results["classes"]]
    pairs = [
        (count, row, column)
        for row, counts in enumerate(results["confusion_matrix"])
        for column, count in enumerate(counts)
        if count and row != column
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [
        {"true": names[row], "prediction": names[column], "images": count}
        for count, row, column in pairs[:_MOST_CONFUSED]
    ]
