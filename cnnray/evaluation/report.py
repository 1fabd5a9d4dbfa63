"""The report as one HTML file that needs nothing from elsewhere."""

import base64
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2

_MOST_CONFUSED = 15


def rendered(found: dict[str, Any], errors: Sequence[dict[str, str]], pictures: dict[str, bytes]) -> str:
    """The HTML.

    Args:
        found: what `metrics.json` holds.
        errors: `uri` and `error` of images without an answer, the first of them.
        pictures: PNG by name (see `pictures`).
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"figure": _figure, "percent": _percent, "small": "{:.2g}".format}
    template = environment.from_string(files("cnnray.evaluation").joinpath("report.html").read_text())
    return template.render(
        found=found,
        percent=_percent,
        figure=_figure,
        errors=errors,
        pictures={name: _inline(data) for name, data in pictures.items()},
        confused=_most_confused(found),
        checks=found["data_checks"],
        calibration=found["calibration"],
        comparison=found.get("comparison"),
    )


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _most_confused(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of classes that were taken for one another most often."""
    names = [row["name"] for row in found["classes"]]
    pairs = [
        (count, row, column)
        for row, counts in enumerate(found["confusion_matrix"])
        for column, count in enumerate(counts)
        if count and row != column
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [
        {"true": names[row], "prediction": names[column], "images": count}
        for count, row, column in pairs[:_MOST_CONFUSED]
    ]
