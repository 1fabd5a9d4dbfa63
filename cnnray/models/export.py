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
from cnnray.errors import PermanentError
from cnnray.images import manifest as manifests
from cnnray.images import reading, storage
from cnnray.images.lease import lease
from cnnray.images.manifest import ManifestError
from cnnray.models import bundle as bundles
from cnnray.models import engines, startup, verification
from cnnray.models.bundle import Bundle
from cnnray.models.formats import FORMATS, Images, Network
from cnnray.models.verification import Report

log = logging.getLogger(__name__)

REPORT = "export.md"


class ExportError(PermanentError, RuntimeError):
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
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, not {self.seed}.")
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
        ValueError, OutputInUseError: with a sentence, and the bundle is as it was.
        OSError: with a sentence, and the formats that were ready before are in the bundle.
        ExportError: a format was refused, with its reason; those that were not are in the bundle.
    """
    Bundle.load(config.bundle)  # what is no bundle gets no lease
    with lease(config.bundle):
        bundle = Bundle.load(config.bundle)
        calibration, images, targets = _images(config, bundle)
        startup.load_tensorflow(gpus=False)  # which takes longer than all that can be refused before
        return _Export(config, bundle, calibration, images, targets).run()


class _Export:
    """One export of one bundle, which nobody else writes to meanwhile."""

    def __init__(
        self,
        config: ExportConfig,
        bundle: Bundle,
        calibration: Images,
        images: Images,
        targets: npt.NDArray[np.int64] | None,
    ) -> None:
        self._config, self._bundle, self._images, self._targets = config, bundle, images, targets
        self._threads = config.threads or engines.usable_threads()
        self._network = Network(bundle, calibration)
        keras = engines.engine_of(bundle, engines.KERAS, self._threads)
        self._expected = engines.in_batches(keras, images)
        with bundle.local_copy(bundles.MODEL) as path:
            self._keras = self._report(keras, path, None)
        self._reports = bundle.info.exports | {engines.KERAS: self._keras.as_dict()}
        self._refused: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Each format made, measured, and kept or refused."""
        log.info("comparing on %d images; Keras: accuracy %s", len(self._images), _shown(self._keras.accuracy))
        for name in self._config.names:
            with tempfile.TemporaryDirectory(prefix="cnnray-export-") as folder:
                self._export(name, Path(folder))
        log.info("%s", verification.table(self._reports, self._refused))
        asked = [f"{name} was refused: {reason}" for name, reason in self._refused.items() if name in FORMATS]
        if asked:
            raise ExportError("; ".join(asked) + ".")
        return {"bundle": self._bundle.uri, "formats": {name: self._reports[name] for name in self._config.names}}

    def _export(self, name: str, folder: Path) -> None:
        path = folder / FORMATS[name].path
        log.info("making %s", name)
        others = [other for other, runner in engines.RUNNERS.items() if runner.format == name != other]
        try:
            with startup.without_stderr():  # the converters tell of each pass
                FORMATS[name].write(self._network, path)
                measured = {name: self._measured(name, path)}
                if not isinstance(measured[name], str):
                    usable = [other for other in others if not engines.RUNNERS[other].missing()]
                    measured |= {other: self._measured(other, path) for other in usable}
        except (OSError, MemoryError):  # which say nothing of the format
            raise
        except Exception as error:  # converters and engines raise whatever they run into
            if "No space left" in str(error):  # TensorFlow's own way to say so
                raise OSError(" ".join(str(error).split())[:300]) from None
            log.debug("%s", name, exc_info=True)
            # What the bundle holds of an earlier export is of the same network, and stays.
            self._refuse(name, f"it cannot be made: {' '.join(str(error).split())[:300] or type(error).__name__}")
            self._tell()
            return
        # What the bundle lists is there, and whole, at any moment.
        self._reports = {key: value for key, value in self._reports.items() if key not in (name, *others)}
        self._tell()
        target = storage.join(self._bundle.uri, FORMATS[name].path)
        if path.is_dir():
            storage.delete_folder(target)
        elif isinstance(measured[name], str):
            storage.delete_file(target)
        if not isinstance(measured[name], str):
            storage.copy_folder(str(folder), self._bundle.uri)
        for key, report in measured.items():
            if isinstance(report, str):
                self._refuse(key, report)
            else:
                self._reports[key] = report.as_dict()
                log.info("%s: %s", key, _summary(report))
        self._tell()

    def _measured(self, name: str, path: Path) -> Report | str:
        """What was measured of a file run by an engine, or why that is refused."""
        engine = engines.file_engine(name, path, self._threads, self._bundle)
        report = self._report(engine, path, self._keras)
        if isinstance(engine, engines.SavedModelEngine):  # which has a second way in
            encoded = engines.in_batches(engines.EncodedSavedModelEngine(engine), self._images)
            both = np.maximum(report.max_difference, np.abs(encoded - self._expected).max())
            report = dataclasses.replace(report, max_difference=float(both))
        return _reason_to_refuse(self._config, name, report, self._keras) or report

    def _report(self, engine: engines.Engine, path: Path, keras: Report | None) -> Report:
        return verification.report(
            engine, path, self._images, self._expected, self._targets, self._bundle.info.temperature,
            threads=self._threads, keras=keras,
        )  # fmt: skip

    def _refuse(self, name: str, reason: str) -> None:
        self._refused[name] = reason
        log.warning("%s is refused: %s", name, reason)

    def _tell(self) -> None:
        """Write what the bundle holds, and what was measured."""
        text = verification.table(self._reports, self._refused)
        storage.write_bytes(storage.join(self._bundle.uri, REPORT), f"{text}\n".encode())
        bundles.write_info(self._bundle.uri, dataclasses.replace(self._bundle.info, exports=self._reports))


def _reason_to_refuse(config: ExportConfig, name: str, report: Report, keras: Report) -> str:
    tolerance = engines.RUNNERS[name].tolerance
    if tolerance is not None and not report.max_difference <= tolerance:
        return f"a probability differs from Keras's by {report.max_difference:.2g}, more than {tolerance:g}"
    if report.accuracy is None or keras.accuracy is None:
        before, after, what = 1.0, report.top_1_agreement, "agreement with Keras"
    else:
        before, after, what = keras.accuracy, report.accuracy, "accuracy"
    if before - after > config.max_accuracy_drop + 1e-9:  # 1 - 0.99 is a little more than 0.01
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
        log.info("accuracy is not measured, agreement with Keras is")
        return calibration, images, None
    names = pa.array(bundle.info.class_names, pa.string())
    return calibration, images, pc.index_in(kept["label"], names).to_numpy().astype(np.int64)


def _manifest(source: str, bundle: Bundle) -> pa.Table:
    """
    Raises:
        ManifestError: no images, or labels that the bundle does not know.
    """
    # Folders below a folder are classes; else labels are what a table has of them.
    in_classes = storage.exists(source) and not storage.is_file(source) and bool(storage.folders(source))
    found = manifests.manifest_of(source, labelled=in_classes)
    if found["label"].null_count:
        log.info("%d of %d images of %s have no label", found["label"].null_count, len(found), source)
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
