"""An engine against the Keras model on the same images: how far apart, how right, how fast."""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnray.models.engines import Engine, Images, Probabilities, in_batches

MEASURED_BATCH_SIZES = (1, 32)
_ROUNDS = 3
_SECONDS_A_ROUND = 0.4


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured of one exported format."""

    path: str
    """Of the file, or folder, in the bundle."""
    bytes: int
    max_difference: float
    """Largest difference of any probability of any image from the Keras model's."""
    top_1_agreement: float
    """Share of the images for which both have the same most probable class."""
    accuracy: float | None
    """On the labelled images; None where there are no labels."""
    keras_accuracy: float | None
    """Keras's on the same images."""
    images_per_second: dict[str, float]
    """By batch size: the median of three rounds."""
    times_keras: dict[str, float]
    """The same as multiples of Keras's in the same export: other exports may have had other machines or threads."""
    threads: int
    """CPU threads of the engine."""
    temperature: float
    """That of the bundle when it was exported."""
    images: int
    """How many were compared."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def report(
    engine: Engine,
    path: Path,
    images: Images,
    expected: Probabilities,
    targets: npt.NDArray[np.int64] | None,
    temperature: float,
    *,
    threads: int,
    keras: Report | None,
) -> Report:
    """Run an engine and compare.

    Args:
        engine: what runs the file.
        path: of the file or folder, by the name that it has in the bundle.
        images: uint8 (N, size, size, 3).
        expected: the Keras model's probabilities, float32 (N, classes).
        targets: int64 (N,), or None where there are no labels.
        temperature: the bundle's.
        threads: that the engine was loaded for.
        keras: what was measured of the Keras model just before; None: this is it.
    """
    found = in_batches(engine, images)
    accuracy = None if targets is None else float((found.argmax(1) == targets).mean())
    speeds_found = speeds(engine, images)
    of_keras = keras.images_per_second if keras else speeds_found
    return Report(
        path=path.name,
        bytes=sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()),
        max_difference=float(np.abs(found - expected).max()),
        top_1_agreement=float((found.argmax(1) == expected.argmax(1)).mean()),
        accuracy=accuracy,
        keras_accuracy=keras.accuracy if keras else accuracy,
        images_per_second=speeds_found,
        times_keras={size: round(speed / of_keras[size], 3) for size, speed in speeds_found.items()},
        threads=threads,
        temperature=temperature,
        images=len(images),
    )


def speeds(engine: Engine, images: Images) -> dict[str, float]:
    """Images/s of an engine at each of `MEASURED_BATCH_SIZES`."""
    found = {}
    for size in MEASURED_BATCH_SIZES:
        batch = np.resize(images, (size, *images.shape[1:]))
        engine(batch)
        found[str(size)] = round(statistics.median(_rate(engine, batch) for _ in range(_ROUNDS)), 2)
    return found


def _rate(engine: Engine, batch: Images) -> float:
    calls, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < _SECONDS_A_ROUND or not calls:
        engine(batch)
        calls += 1
    return calls * len(batch) / took


def table(reports: dict[str, dict[str, Any]], refused: dict[str, str]) -> str:
    """The reports, and why others were refused, as Markdown."""
    lines = [
        "| format | MiB | of Keras's | largest difference | same top-1 | accuracy before | after "
        "| images/s at 1 | at 32 | times Keras's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keras = reports["keras"]
    for name, report in reports.items():
        speed = report["images_per_second"]
        cells = [
            name,
            f"{report['bytes'] / 2**20:.2f}",
            f"{report['bytes'] / keras['bytes']:.2f}",
            f"{report['max_difference']:.1e}",
            f"{report['top_1_agreement']:.4f}",
            *("" if share is None else f"{share:.4f}" for share in (report["keras_accuracy"], report["accuracy"])),
            f"{speed['1']:.0f}",
            f"{speed['32']:.0f}",
            f"{report['times_keras']['32']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | refused: {reason} | | | | | | | | |" for name, reason in refused.items()]
    return "\n".join(lines)
