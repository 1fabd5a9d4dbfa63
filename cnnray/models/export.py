"""The export job: load calibration images, convert the network to each format, verify it, and keep or refuse it."""

import dataclasses
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import flags
from cnnray.cpus import usable_cpus
from cnnray.errors import PermanentError
from cnnray.images import labels, reading, storage
from cnnray.images import manifest as manifests
from cnnray.images.lease import lease
from cnnray.images.manifest import ManifestError
from cnnray.models import averaging, engines, runtimes, startup, verification
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from cnnray.models.formats import FORMATS, Images, Network
from cnnray.models.verification import Report

log = logging.getLogger(__name__)

REPORT = "export.md"
_FORMATS = (*FORMATS, engines.KERAS_BFLOAT16)
_ENCODED_IMAGES = 256
"""Most images that are encoded to compare a SavedModel's signature for encoded images."""


class ExportError(PermanentError, RuntimeError):
    """An export that cannot start, or of which a part was refused; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a bundle's network to other formats, and keep each that gives the same answers."""

    bundle: str
    """Folder or s3:// prefix of the bundle."""
    calibration: str
    """Images like those that the network will get, in the same forms as training's --data. The activation ranges of
    int8 formats come from them, and every format is compared on them. Accuracy is measured if they have labels."""
    verification: str | None = None
    """Other images to compare on; null: images of --calibration that were not used for the ranges, or its validation
    split."""
    merge: list[str] = field(default_factory=list)
    """Other bundles of the same classes and image sizes: addresses with commas between them. --output becomes one
    bundle whose probabilities are the mean of theirs and those of --bundle, and that one is exported."""
    tta: averaging.Views | None = None
    """Test-time augmentation inside --output: its probabilities are means over an image and other views of it. flips:
    mirrored left to right; crops: the four corners, each 7/8 of the height and width, enlarged."""
    output: str | None = None
    """With --merge or --tta: folder or s3:// prefix of the new bundle. Otherwise the exports go into --bundle."""
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    """Formats to export: saved_model, onnx, onnx-int8, litert, litert-float16, litert-int8; and, if it is named,
    keras-bfloat16, which is no file: the Keras model is verified in bfloat16, in which GPUs then run it."""
    calibration_images: int = 100
    """Largest number of images for the activation ranges."""
    verification_images: int = 2000
    """Largest number of images to compare on."""
    max_accuracy_drop: float = 0.01
    """Refuse a format whose accuracy on the labelled images is lower than Keras's by more than this; where images may
    have several labels, mean average precision or micro F1. Without labels, refuse a format that disagrees with Keras
    on more than this share of the images (where they may have several labels: whose labels have an F1 of less than 1
    minus this, if Keras's are taken for right)."""
    multi_label: bool | None = None
    """Whether files of the same name in several class folders are one image with several labels; null: where the
    bundle has several labels for an image."""
    label_separator: str | None = None
    """What stands between the labels of an image in a column of text, such as |; an empty one then has no label."""
    seed: int = 0
    """Seed of the random choice of images."""
    threads: int | None = None
    """CPU threads in the measurements; null: all that the process may use."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value is invalid; the message names the flag.
        """
        object.__setattr__(self, "formats", _normalize_formats(self.formats))
        flags.check_at_least_one(self, "calibration_images", "verification_images", "threads")
        flags.check_share(self, "max_accuracy_drop")
        labels.check_flags(self.multi_label, self.label_separator)
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, not {self.seed}.")
        flags.make_absolute(self, "bundle", "calibration", "verification", "output")
        object.__setattr__(self, "merge", averaging.split_uris("merge", self.bundle, self.merge))
        if (self.output is not None) != (bool(self.merge) or self.tta is not None):
            raise ValueError("--merge and --tta need --output, and --output needs one of them.")
        if self.output is not None:
            for uri in (self.bundle, *self.merge, self.calibration, self.verification or ""):
                if f"{uri}/".startswith(f"{self.output}/"):
                    raise ValueError(f"--output {self.output} holds {uri}: give another folder.")


def _normalize_formats(formats: list[str] | str) -> list[str]:
    """The requested formats in the order of `_FORMATS`, each once.

    Earlier versions took one string, separated by commas. It is still accepted, also as an item of the list, which is
    how the parser passes `--formats onnx,litert`.

    Raises:
        ValueError: no format is given, or one is unknown.
    """
    values = formats if isinstance(formats, list) else [formats]
    requested = {name.strip() for value in values for name in str(value).split(",")} - {""}
    if not requested:
        raise ValueError(f"--formats is empty; expected some of {', '.join(_FORMATS)}.")
    if unknown := sorted(requested - set(_FORMATS)):
        raise ValueError(f"--formats {unknown[0]!r} is unknown; expected some of {', '.join(_FORMATS)}.")
    return [name for name in _FORMATS if name in requested]


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a bundle to other formats, and write the measurements into its `bundle.json` and `export.md`.

    Returns:
        `bundle`: its address; `formats`: by format, a `verification.Report` as a dict.

    Raises:
        ValueError, OutputInUseError: the export could not start, and the bundle is unchanged.
        OSError: the storage failed; the formats that were finished before are in the bundle.
        ExportError: a format was refused, with the reason; the other formats are in the bundle.
    """
    first = Bundle.load(config.bundle)  # fails before a lease is taken where there is no bundle
    planned = averaging.plan(first, config.merge, config.tta, config.output) if config.output else first
    with lease(planned.uri):
        bundle = averaging.write(planned) if config.output else Bundle.load(config.bundle)
        calibration_rows, rows = _choose_images(config, bundle)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(startup.load_tensorflow, gpus=False)  # takes seconds
            calibration, _ = _decode_images(calibration_rows, config.calibration, bundle)
            images, rows = _decode_images(rows, config.verification or config.calibration, bundle)
            loading.result()
        return _Export(config, bundle, calibration, images, _targets(rows, bundle)).run()


class _Export:
    """One export of a bundle. The caller holds the bundle's lock."""

    def __init__(
        self,
        config: ExportConfig,
        bundle: Bundle,
        calibration: Images,
        images: Images,
        targets: npt.NDArray[np.int64] | None,
    ) -> None:
        self._config, self._bundle, self._images, self._targets = config, bundle, images, targets
        self._threads = config.threads or usable_cpus()
        self._network = Network(bundle, calibration)
        keras = engines.load_engine(bundle, engines.KERAS, self._threads)
        self._expected = engines.predict_in_batches(keras, images)
        with bundle.local_copy(bundles.MODEL) as path:
            self._keras = self._measure(keras, path, self._expected, None)
        self._reports = bundle.info.exports | {engines.KERAS: self._keras.as_dict()}
        self._refused: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """Convert, verify, and keep or refuse each format."""
        log.info("comparing on %d images; Keras: %s", len(self._images), _accuracy_text(self._keras))
        for name in self._config.formats:
            if name == engines.KERAS_BFLOAT16:
                self._export_bfloat16()
                continue
            with tempfile.TemporaryDirectory(prefix="cnnray-export-") as folder:
                self._export_format(name, Path(folder))
        log.info("%s", verification.table(self._reports, self._refused))
        refused = [f"{name} was refused: {reason}" for name, reason in self._refused.items() if name in _FORMATS]
        if refused:
            raise ExportError("; ".join(refused) + ".")
        return {"bundle": self._bundle.uri, "formats": {name: self._reports[name] for name in self._config.formats}}

    def _export_format(self, name: str, folder: Path) -> None:
        path = folder / FORMATS[name].path
        log.info("converting to %s", name)
        other_engines = [other for other, runner in engines.RUNNERS.items() if runner.format == name != other]
        try:
            with startup.suppress_stderr():  # the converters log each of their passes
                FORMATS[name].write(self._network, path)
                measured = {name: self._verify(name, path)}
                if not isinstance(measured[name], str):
                    usable = [other for other in other_engines if not engines.RUNNERS[other].why_unavailable()]
                    measured |= {other: self._verify(other, path) for other in usable}
        except (OSError, MemoryError):  # the machine's fault, not the format's
            raise
        except Exception as error:  # converters and engines raise exceptions of any type
            if "No space left" in str(error):  # TensorFlow reports a full disk with an error of its own
                raise OSError(" ".join(str(error).split())[:300]) from None
            log.debug("%s", name, exc_info=True)
            # A file of an earlier export stays: it is of the same network.
            self._refuse(
                name, f"it cannot be converted: {' '.join(str(error).split())[:300] or type(error).__name__}"
            )
            self._write_reports()
            return
        # At any moment, every file that the bundle lists exists and is complete. So remove a format from the list
        # before its file changes, and add it afterwards.
        self._reports = {key: value for key, value in self._reports.items() if key not in (name, *other_engines)}
        self._write_reports()
        target = storage.join(self._bundle.uri, FORMATS[name].path)
        if path.is_dir():
            storage.delete_folder(target)
        elif isinstance(measured[name], str):
            storage.delete_file(target)
        if not isinstance(measured[name], str):
            storage.copy_folder(str(folder), self._bundle.uri)
        for engine, result in measured.items():
            self._keep_or_refuse(engine, result)
        self._write_reports()

    def _keep_or_refuse(self, engine: str, result: Report | str) -> None:
        if isinstance(result, str):
            self._refuse(engine, result)
        else:
            self._reports[engine] = result.as_dict()
            log.info("%s: %s", engine, _summarize(result))

    def _export_bfloat16(self) -> None:
        name = engines.KERAS_BFLOAT16
        self._reports = {key: value for key, value in self._reports.items() if key != name}
        try:
            engine = runtimes.KerasEngine(self._bundle, self._threads, engines.KERAS_POLICIES[name])
            with self._bundle.local_copy(bundles.MODEL) as path:
                result = self._compare(name, engine, path)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a layer that has no bfloat16
            log.debug("%s", name, exc_info=True)
            result = f"it cannot be computed: {' '.join(str(error).split())[:300] or type(error).__name__}"
        self._keep_or_refuse(name, result)
        self._write_reports()

    def _verify(self, name: str, path: Path) -> Report | str:
        """Compare an engine that runs the exported file with Keras.

        Returns:
            The report, or the reason why the engine is refused.
        """
        return self._compare(name, engines.load_file_engine(name, path, self._threads, self._bundle), path)

    def _compare(self, name: str, engine: runtimes.Engine, path: Path) -> Report | str:
        """See `_verify`."""
        probabilities = engines.predict_in_batches(engine, self._images)
        report = self._measure(engine, path, probabilities, self._keras)
        if isinstance(engine, runtimes.SavedModelEngine):  # a SavedModel has a second signature, for encoded images
            some = slice(_ENCODED_IMAGES)
            by_bytes = runtimes.EncodedSavedModelEngine(engine, self._bundle.info.geometry)
            encoded = engines.predict_in_batches(by_bytes, self._images[some])
            largest = np.maximum(report.max_difference, np.abs(encoded - self._expected[some]).max())
            report = dataclasses.replace(report, max_difference=float(largest))
        return _reason_to_refuse(self._config, name, report, self._keras) or report

    def _measure(
        self, engine: runtimes.Engine, path: Path, probabilities: runtimes.Probabilities, keras: Report | None
    ) -> Report:
        return verification.measure(
            engine, path, self._images, probabilities, self._expected, self._targets, self._bundle.info,
            threads=self._threads, keras=keras,
        )  # fmt: skip

    def _refuse(self, name: str, reason: str) -> None:
        self._refused[name] = reason
        log.warning("%s is refused: %s", name, reason)

    def _write_reports(self) -> None:
        """Write the measurements to `export.md` and `bundle.json`."""
        text = verification.table(self._reports, self._refused)
        storage.write_bytes(storage.join(self._bundle.uri, REPORT), f"{text}\n".encode())
        bundles.write_info(self._bundle.uri, dataclasses.replace(self._bundle.info, exports=self._reports))


def _reason_to_refuse(config: ExportConfig, name: str, report: Report, keras: Report) -> str:
    tolerance = engines.tolerance(name)
    if tolerance is not None and not report.max_difference <= tolerance:
        return f"a probability differs from Keras's by {report.max_difference:.2g}, more than {tolerance:g}"
    if report.accuracy is None or keras.accuracy is None:
        figures = [("agreement with Keras", 1.0, report.top_1_agreement)]
    elif report.f1 is None or keras.f1 is None:
        figures = [("accuracy", keras.accuracy, report.accuracy)]
    else:
        figures = [("mean average precision", keras.accuracy, report.accuracy), ("micro F1", keras.f1, report.f1)]
    for metric, before, after in figures:
        if before - after > config.max_accuracy_drop + 1e-9:  # in floating point, 1 - 0.99 is slightly more than 0.01
            return f"{metric} {after:.4f} instead of {before:.4f}, a loss of more than --max-accuracy-drop"
    return ""


def _summarize(report: Report) -> str:
    same = "same top-1" if report.f1 is None else "same labels (F1)"
    return (
        f"{report.bytes / 2**20:.2f} MiB, largest difference {report.max_difference:.1e}, {same} "
        f"{report.top_1_agreement:.4f}, {_accuracy_text(report)}"
    )


def _accuracy_text(report: Report) -> str:
    if report.accuracy is None:
        return "accuracy not measured"
    if report.f1 is None:
        return f"accuracy {report.accuracy:.4f}"
    return f"mean average precision {report.accuracy:.4f}, micro F1 {report.f1:.4f}"


# -- the images -----------------------------------------------------------------------------------------------


def _choose_images(config: ExportConfig, bundle: Bundle) -> tuple[pa.Table, pa.Table]:
    """The manifest's rows of the images to calibrate on, and of those to compare on."""
    rows = _read_manifest(config.calibration, bundle, config)
    rows = rows.take(np.random.default_rng(config.seed).permutation(len(rows)))
    if config.verification is not None:
        held_out = _read_manifest(config.verification, bundle, config)
        held_out = held_out.take(np.random.default_rng(config.seed).permutation(len(held_out)))
        calibration_rows = rows
    elif len(held_out := manifests.select_split(rows, "validation")):
        training_rows = manifests.select_split(rows, "train")
        calibration_rows = training_rows if len(training_rows) else held_out
    else:
        # With few images, all serve for comparison, including those that the ranges come from.
        first = config.calibration_images if len(rows) >= 2 * config.calibration_images else 0
        calibration_rows, held_out = rows, rows.slice(first)
    return calibration_rows.slice(0, config.calibration_images), held_out.slice(0, config.verification_images)


def _targets(rows: pa.Table, bundle: Bundle) -> npt.NDArray[Any] | None:
    """What `verification.measure` takes for the images to compare on; None if some have no label."""
    if rows["label"].null_count:
        log.info("some images have no label: agreement with Keras is measured instead of accuracy")
        return None
    if bundle.info.is_multi_label:
        return labels.multi_hot(rows["label"], bundle.info.class_names) > 0
    names = pa.array(bundle.info.class_names, pa.string())
    targets: npt.NDArray[np.int32] = pc.index_in(rows["label"], names).to_numpy()
    return targets.astype(np.int64)


def _read_manifest(source: str, bundle: Bundle, config: ExportConfig) -> pa.Table:
    """
    Raises:
        ManifestError: there are no images, or the bundle does not know one of the labels.
    """
    # In a folder of folders, each folder is a class. Otherwise only a table can give labels.
    in_class_folders = storage.exists(source) and not storage.is_file(source) and bool(storage.folders(source))
    several = bundle.info.is_multi_label
    rows = manifests.build_manifest(
        source,
        labelled=in_class_folders,
        multi_label=several and config.multi_label is not False,
        label_separator=config.label_separator,
    )
    rows = manifests.as_multi_label(rows) if several else rows
    if manifests.is_multi_label(rows) != bundle.info.is_multi_label:
        raise ManifestError(f"{source} has lists of labels, and {bundle.uri} one label for each image.")
    if rows["label"].null_count:
        log.info("%d of %d images of %s have no label", rows["label"].null_count, len(rows), source)
    unknown = sorted(set(manifests.class_names(rows)) - set(bundle.info.class_names))
    if unknown:
        raise ManifestError(
            f"{source} has the label {unknown[0]!r}, which is not a class of {bundle.uri} "
            f"({', '.join(bundle.info.class_names[:5])}, ...)."
        )
    return rows


def _decode_images(rows: pa.Table, source: str, bundle: Bundle) -> tuple[Images, pa.Table]:
    """Decode the images of manifest rows; those that cannot be read are left out.

    Returns:
        The images, uint8 (N, height, width, 3), and their rows.

    Raises:
        ManifestError: no image can be read.
    """
    rows = rows.sort_by("id")
    (block,) = reading.decoded_blocks(rows.select(["id", "uri"]), bundle.info.geometry, len(rows))
    readable = block["error"] == ""
    if not readable.any():
        raise ManifestError(f"{source}: no image can be read; the first is {rows['uri'][0]} ({block['error'][0]}).")
    if not readable.all():
        unreadable = int((~readable).sum())
        log.warning("%s: %d of %d images cannot be read; they are left out", source, unreadable, len(rows))
    return block["image"][readable], rows.filter(pa.array(readable))
