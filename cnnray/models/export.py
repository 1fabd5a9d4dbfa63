"""An export from end to end: calibration data, each format made, measured, and kept or refused."""

import dataclasses
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import flags
from cnnray.images import manifest as manifests
from cnnray.images import reading, storage
from cnnray.images.lock import alone
from cnnray.images.manifest import ManifestError
from cnnray.models import bundle as bundles
from cnnray.models import engines, startup, verification
from cnnray.models.bundle import Bundle
from cnnray.models.formats import FORMATS, Images, Network
from cnnray.models.verification import Report

log = logging.getLogger(__name__)

REPORT = "export.md"


class ExportError(RuntimeError):
    """An export that cannot start, or of which a part was refused; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Add other formats of its network to a bundle, each proven to give the same answers."""

    bundle: str
    """Folder or s3:// prefix of the bundle."""
    calibration: str
    """Images like those that the network will see: int8 formats take their ranges from them, and every format is
    compared on them. In the same forms as training's --data, with labels where accuracy is to be measured."""
    verification: str | None = None
    """Other images to compare on; null: those of --calibration that the ranges were not taken from, or that it calls
    validation."""
    formats: str = ",".join(FORMATS)
    """Which, separated by commas: saved_model, onnx, onnx-int8, litert, litert-float16, litert-int8."""
    calibration_images: int = 100
    """Images that ranges are taken from, at most."""
    verification_images: int = 2000
    """Images that formats are compared on, at most."""
    max_accuracy_drop: float = 0.01
    """A format that is right in fewer of the labelled images by more than this share is refused; without labels, one
    that agrees with Keras in fewer."""
    seed: int = 0
    """Seed of the choice of images."""
    threads: int | None = None
    """CPU threads in the measurements; null: all that the process may use."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        unknown = [name for name in self.names if name not in FORMATS]
        if unknown or not self.names:
            raise ValueError(f"--formats {self.formats!r}: expected some of {', '.join(FORMATS)}.")
        flags.check_at_least_one(self, "calibration_images", "verification_images", "threads")
        flags.check_share(self, "max_accuracy_drop")
        flags.make_absolute(self, "bundle", "calibration", "verification")

    @property
    def names(self) -> list[str]:
        """The formats, in the order of `FORMATS`."""
        asked = {name.strip() for name in self.formats.split(",") if name.strip()}
        return [name for name in FORMATS if name in asked] + sorted(asked - set(FORMATS))


def export(config: ExportConfig) -> dict[str, Any]:
    """Add formats to a bundle, with what was measured of each in `bundle.json` and `export.md`.

    Returns:
        `bundle`, and `formats`: a `verification.Report` as a dict for each.

    Raises:
        ValueError, OSError: with a sentence, and the bundle is as it was.
        ExportError: a format was refused, with its reason; those that were not are in the bundle.
    """
    bundle = Bundle.load(config.bundle)
    calibration, images, targets = _images(config, bundle)
    startup.load_tensorflow(gpus=False)  # which takes longer than all that can be refused before
    with alone(bundle.uri):
        # Read again: another export may have ended since.
        return _export(config, Bundle.load(config.bundle), calibration, images, targets)


def _export(
    config: ExportConfig,
    bundle: Bundle,
    calibration: Images,
    images: Images,
    targets: npt.NDArray[np.int64] | None,
) -> dict[str, Any]:
    threads = config.threads or engines.usable_threads()
    keras = engines.engine_of(bundle, engines.KERAS, threads)
    expected, temperature = engines.in_batches(keras, images), bundle.info.temperature
    with bundle.local_copy(bundles.MODEL) as path:
        stated = verification.report(keras, path, images, expected, targets, temperature)
    log.info("comparing on %d images; Keras: accuracy %s", len(images), _shown(stated.accuracy))
    reports = bundle.info.exports | {engines.KERAS: stated.as_dict()}
    refused: dict[str, str] = {}
    network = Network(bundle, calibration)

    def measured(name: str, path: Path) -> Report | str:
        """What was measured of a file run by an engine, or why that is refused."""
        engine = engines.file_engine(name, path, threads, bundle)
        report = verification.report(engine, path, images, expected, targets, temperature)
        if name == engines.SAVED_MODEL:  # which has a second way in
            encoded = engines.in_batches(engines.EncodedSavedModelEngine(path, threads), images)
            both = np.maximum(report.max_difference, np.abs(encoded - expected).max())
            report = dataclasses.replace(report, max_difference=float(both))
        return _reason_to_refuse(config, name, report, stated) or report

    def tried(name: str, path: Path, *, write: bool) -> Report | str:
        """The same, of a file that is perhaps made first."""
        try:
            with startup.without_stderr():  # the converters tell of each pass
                if write:
                    FORMATS[name].write(network, path)
                return measured(name, path)
        except OSError:  # a full disk says nothing of the format
            raise
        except Exception as error:  # converters and engines raise whatever they run into
            log.debug("%s", name, exc_info=True)
            return f"it cannot be made: {' '.join(str(error).split())[:300] or type(error).__name__}"

    for name in config.names:
        form = FORMATS[name]
        others = [other for other, runner in engines.RUNNERS.items() if runner.format == name != other]
        with tempfile.TemporaryDirectory(prefix="cnnray-export-") as folder:
            path = Path(folder, form.path)
            found = {name: tried(name, path, write=True)}
            if not isinstance(found[name], str):
                installed = [other for other in others if engines.RUNNERS[other].is_installed]
                found |= {other: tried(other, path, write=False) for other in installed}
            # What the bundle lists is there, and whole, at any moment.
            reports = {key: value for key, value in reports.items() if key not in (name, *others)}
            bundles.write_info(bundle.uri, dataclasses.replace(bundle.info, exports=reports))
            delete = storage.delete_folder if name == engines.SAVED_MODEL else storage.delete_file
            delete(storage.join(bundle.uri, form.path))
            if not isinstance(found[name], str):
                storage.copy_folder(folder, bundle.uri)
            for key, report in found.items():
                if isinstance(report, str):
                    refused[key] = report
                    log.warning("%s is refused: %s", key, report)
                else:
                    reports[key] = report.as_dict()
                    log.info("%s: %s", key, _summary(report))
            bundles.write_info(bundle.uri, dataclasses.replace(bundle.info, exports=reports))
    text = verification.table(reports, refused)
    storage.write_bytes(storage.join(bundle.uri, REPORT), f"{text}\n".encode())
    log.info("%s", text)
    if asked := [f"{name} was refused: {reason}" for name, reason in refused.items() if name in config.names]:
        raise ExportError("; ".join(asked) + ".")
    return {"bundle": bundle.uri, "formats": {name: reports[name] for name in config.names}}


def _reason_to_refuse(config: ExportConfig, name: str, report: Report, keras: Report) -> str:
    tolerance = engines.RUNNERS[name].tolerance
    if tolerance is not None and not report.max_difference <= tolerance:
        return f"a probability differs from Keras's by {report.max_difference:.2g}, more than {tolerance:g}"
    if report.accuracy is None or keras.accuracy is None:
        before, after, what = 1.0, report.top_1_agreement, "agreement with Keras"
    else:
        before, after, what = keras.accuracy, report.accuracy, "accuracy"
    if before - after > config.max_accuracy_drop:
        return f"{what} {after:.4f} instead of {before:.4f}, a loss of more than --max-accuracy-drop"
    return ""


def _summary(report: Report) -> str:
    return (
        f"{report.bytes / 2**20:.2f} MiB, largest difference {report.max_difference:.1e}, same top-1 "
        f"{report.top_1_agreement:.4f}, accuracy {_shown(report.accuracy)}"
    )


def _shown(accuracy: float | None) -> str:
    return "not measured" if accuracy is None else f"{accuracy:.4f}"


# -- the images -----------------------------------------------------------------------------------------------


def _images(config: ExportConfig, bundle: Bundle) -> tuple[Images, Images, npt.NDArray[np.int64] | None]:
    """Images to calibrate on, images to compare on, and the targets of these where they are labelled."""
    found = _manifest(config.calibration, bundle)
    order = np.random.default_rng(config.seed).permutation(len(found))
    if config.verification is not None:
        held_out = _manifest(config.verification, bundle)
        held_out = held_out.take(np.random.default_rng(config.seed).permutation(len(held_out)))
        calibrating = found.take(order)
    elif len(manifests.rows_of(found, "validation")):
        shuffled = found.take(order)
        held_out = manifests.rows_of(shuffled, "validation")
        calibrating = manifests.rows_of(shuffled, "train")
        calibrating = calibrating if len(calibrating) else held_out
    else:
        # Of few images all are compared on, also those that ranges are taken from.
        first = config.calibration_images if len(found) >= 2 * config.calibration_images else 0
        calibrating, held_out = found.take(order), found.take(order[first:])
    calibration, _ = _pixels(calibrating.slice(0, config.calibration_images), config.calibration, bundle)
    images, kept = _pixels(held_out.slice(0, config.verification_images), "the verification images", bundle)
    if kept["label"].null_count:
        return calibration, images, None
    names = pa.array(bundle.info.class_names, pa.string())
    return calibration, images, pc.index_in(kept["label"], names).to_numpy().astype(np.int64)


def _manifest(source: str, bundle: Bundle) -> pa.Table:
    """
    Raises:
        ManifestError: no images, or labels that the bundle does not know.
    """
    try:
        found = manifests.manifest_of(source, labelled=True)
    except ManifestError:
        found = manifests.manifest_of(source, labelled=False)
        log.info("%s has no labels: accuracy is not measured", source)
    unknown = sorted(set(manifests.class_names(found)) - set(bundle.info.class_names))
    if unknown:
        raise ManifestError(
            f"{source} has the label {unknown[0]!r}, which is no class of {bundle.uri} "
            f"({', '.join(bundle.info.class_names[:5])}, ...)."
        )
    return found


def _pixels(rows: pa.Table, source: str, bundle: Bundle) -> tuple[Images, pa.Table]:
    """The images that can be read, and their rows.

    Raises:
        ManifestError: none can.
    """
    info = bundle.info
    rows = rows.sort_by("id")
    (block,) = reading.decoded_blocks(rows.select(["id", "uri"]), info.image_size, info.resize, len(rows))
    good = block["error"] == ""
    if not good.any():
        raise ManifestError(f"{source}: no image can be read, {rows['uri'][0]} for one ({block['error'][0]}).")
    if not good.all():
        log.warning("%s: %d of %d images cannot be read; they are left out", source, int((~good).sum()), len(rows))
    return block["image"][good], rows.filter(pa.array(good))
