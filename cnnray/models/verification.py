"""Comparison of an engine with the Keras model on the same images: difference, accuracy, speed."""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnray.models.answers import label_masks
from cnnray.models.bundle import BundleInfo
from cnnray.models.engines import KERAS
from cnnray.models.runtimes import Engine, Images, Probabilities

MEASURED_BATCH_SIZES = (1, 32)
_ROUNDS = 3
_SECONDS_PER_ROUND = 0.05


@dataclass(frozen=True, kw_only=True)
class Report:
    """The measurements of one engine."""

    path: str
    """Name of the file or folder in the bundle."""
    bytes: int
    max_difference: float
    """Largest difference from the Keras model in any probability of any image."""
    top_1_agreement: float
    """Fraction of the images for which both give the same most probable class; where images may have several labels,
    the micro F1 of the labels if the Keras model's are taken for right."""
    accuracy: float | None
    """Accuracy on the images, or, where they may have several labels, mean average precision; None without labels."""
    keras_accuracy: float | None
    """That of the Keras model on the same images."""
    images_per_second: dict[str, float]
    """Speed by batch size, the median of three rounds."""
    times_keras: dict[str, float]
    """Speed by batch size relative to Keras in the same export, because another export may have run on another
    machine or with other threads."""
    threads: int
    """CPU threads of the engine."""
    temperature: float
    """Temperature of the bundle at the time of the export."""
    images: int
    """Number of images compared."""
    f1: float | None = None
    """Where images may have several labels, the micro F1 at the bundle's thresholds; not there without labels."""

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        values = asdict(self)
        if self.f1 is None:
            del values["f1"]
        return values


def measure(
    engine: Engine,
    path: Path,
    images: Images,
    probabilities: Probabilities,
    expected: Probabilities,
    targets: npt.NDArray[Any] | None,
    info: BundleInfo,
    *,
    threads: int,
    keras: Report | None,
) -> Report:
    """Compare the answers of an engine with the Keras model's, and measure its speed.

    Args:
        engine: runs the file.
        path: local path of the file or folder, which has the same name as in the bundle.
        images: uint8 (N, height, width, 3).
        probabilities: the engine's, float32 (N, classes).
        expected: the Keras model's, float32 (N, classes).
        targets: class indices, int64 (N,), or, with several labels, whether an image has each, bool (N, classes);
            None without labels.
        info: of the bundle.
        threads: CPU threads that the engine was loaded with.
        keras: the report of the Keras model from the same export; None: `engine` is the Keras model.
    """
    accuracy, f1 = None, None
    if info.thresholds is None:
        predicted = probabilities.argmax(1)
        agreement = float((predicted == expected.argmax(1)).mean())
        if targets is not None:
            accuracy = float((predicted == targets).mean())
    else:
        given = label_masks(probabilities, info.thresholds)
        agreement = _micro_f1(given, label_masks(expected, info.thresholds))
        if targets is not None:
            averages = average_precisions(targets, probabilities)[targets.any(0)]
            accuracy, f1 = float(averages.mean()) if len(averages) else 0.0, _micro_f1(given, targets)
    speeds = measure_speeds(engine, images)
    keras_speeds = keras.images_per_second if keras else speeds
    return Report(
        path=path.name,
        bytes=sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()),
        max_difference=float(np.abs(probabilities - expected).max()),
        top_1_agreement=agreement,
        accuracy=accuracy,
        keras_accuracy=keras.accuracy if keras else accuracy,
        images_per_second=speeds,
        times_keras={size: round(speed / keras_speeds[size], 3) for size, speed in speeds.items()},
        threads=threads,
        temperature=info.temperature,
        images=len(images),
        f1=f1,
    )


def average_precisions(truth: npt.NDArray[np.bool_], scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The average precision of each label, float64 (classes,); 0 of those that no image has.

    Args:
        truth: bool (N, classes), which labels images have.
        scores: (N, classes).
    """
    from sklearn.metrics import average_precision_score

    values = np.zeros(truth.shape[1])
    for index in np.flatnonzero(truth.any(0)):
        values[index] = average_precision_score(truth[:, index], scores[:, index])
    return values


def _micro_f1(given: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Over all labels of all images; 1 where there are none, and none are given."""
    count = int(given.sum() + truth.sum())
    return float(2 * (given & truth).sum() / count) if count else 1.0


def measure_speeds(engine: Engine, images: Images) -> dict[str, float]:
    """Measure the images/s of an engine at each of `MEASURED_BATCH_SIZES`."""
    speeds = {}
    for size in MEASURED_BATCH_SIZES:
        batch = np.resize(images, (size, *images.shape[1:]))
        engine(batch)
        speeds[str(size)] = round(statistics.median(_measure_rate(engine, batch) for _ in range(_ROUNDS)), 2)
    return speeds


def _measure_rate(engine: Engine, batch: Images) -> float:
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < _SECONDS_PER_ROUND or not calls:
        engine(batch)
        calls += 1
    return calls * len(batch) / elapsed


def table(reports: dict[str, dict[str, Any]], refused: dict[str, str]) -> str:
    """The reports, and the reasons of refused formats, as a Markdown table."""
    several = "f1" in reports[KERAS]
    same, accuracy = ("same labels", "mean average precision") if several else ("same top-1", "accuracy")
    lines = [
        f"| format | MiB | of Keras's | largest difference | {same} | {accuracy} before | after "
        "| images/s at 1 | at 32 | times Keras's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keras = reports[KERAS]
    for name, report in reports.items():
        speed = report["images_per_second"]
        cells = [
            name,
            f"{report['bytes'] / 2**20:.2f}",
            f"{report['bytes'] / keras['bytes']:.2f}",
            f"{report['max_difference']:.1e}",
            f"{report['top_1_agreement']:.4f}",
            *("" if figure is None else f"{figure:.4f}" for figure in (report["keras_accuracy"], report["accuracy"])),
            f"{speed['1']:.0f}",
            f"{speed['32']:.0f}",
            f"{report['times_keras']['32']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | refused: {reason} | | | | | | | | |" for name, reason in refused.items()]
    return "\n".join(lines)
