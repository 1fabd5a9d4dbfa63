"""Bundle: the trained model that jobs pass to one another.

A bundle is a folder, local or remote. It holds `model.keras` (uint8 RGB at the bundle's size in, probabilities out),
`bundle.json` (`BundleInfo`), and exported files (see `formats`). `bundle.json` is written last: a folder without it
is not a bundle.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import cnnray
from cnnray.errors import BadInputError
from cnnray.images import storage
from cnnray.images.geometry import RESIZE_RULES, Geometry, ResizeRule
from cnnray.models import startup
from cnnray.models.answers import Decision

if TYPE_CHECKING:
    import keras

FORMAT_VERSION = 5
"""Format 5 has groups of classes, or averages networks, format 4 several labels for an image, format 3 a decision,
format 2 images that are not square, or cut; a bundle has the lowest that it needs."""
MODEL = "model.keras"
INFO = "bundle.json"
_NEWER = {"decision": 3, "thresholds": 4, "training_images": 4, "groups": 5, "averaged": 5}
"""Fields that a bundle has only where they are not None, and the format that they need."""
_SAVED_MODEL = "saved_model"
_LIBRARIES = ("keras", "numpy", "pillow")

log = logging.getLogger(__name__)


class BundleError(BadInputError, ValueError):
    """A bundle that cannot be used; the message is one sentence for the user."""


def library_versions() -> dict[str, str]:
    """The versions of the libraries that affect a bundle's predictions."""
    versions = {library: version(library) for library in _LIBRARIES}
    try:
        tensorflow = version("tensorflow-cpu")  # of requirements.lock
    except PackageNotFoundError:
        tensorflow = version("tensorflow")
    return versions | {"tensorflow": tensorflow, "cnnray": cnnray.__version__}


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """The content of `bundle.json`."""

    class_names: list[str]
    """Names of the model's outputs, in order."""
    image_size: int | str
    """Size of the model's input, as `Size.of` takes it."""
    resize: ResizeRule = "stretch"
    """How images of other shapes are resized (see `Geometry.resize`)."""
    decode_size: int | str | None = None
    """Size to which they are resized before their centre is cut out; None: the input's."""
    architecture: str = ""
    """The network's name (see `models.architectures`)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of exactly these weights on the validation images."""
    thresholds: list[float] | None = None
    """Of images with several labels: the lowest probability with which an image has each class, fitted to the
    validation images. None: each image has one label, and the probabilities sum to 1."""
    temperature: float = 1.0
    """Divisor of the logits before the softmax or sigmoid; 1: not calibrated."""
    decision: Decision | None = None
    """Below which confidence it is unsure, and with what guarantee; None: it answers for every image."""
    groups: dict[str, str] | None = None
    """By class, its group, which the bundle may name where it is unsure of the class; None: there are none."""
    averaged: dict[str, Any] | None = None
    """Where the network averages others (see `averaging`): the addresses of their `bundles`, their `versions`, the
    folders of their `trainings`, and the `views` of an image. None: it does not."""
    parent: str = ""
    """Version of the bundle from which this one was published; empty: a training wrote it."""
    training: str = ""
    """Folder of the training, for a bundle that was published elsewhere; empty: the folder that holds the bundle."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved training config."""
    data_fingerprint: str = ""
    """Hash of the manifest that the model was trained on."""
    class_counts: dict[str, int] = field(default_factory=dict)
    """Number of training images per class."""
    training_images: int | None = None
    """Number of training images, where they may have several labels."""
    reference: dict[str, list[int]] = field(default_factory=dict)
    """Answers to the validation images, from which drift is measured (see `drift.Distribution`); empty: unknown."""
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Measurements of `keras` and of each exported file, by engine (see `verification.Report`)."""
    library_versions: dict[str, str] = field(default_factory=library_versions)
    """Versions of the libraries that wrote the bundle."""
    format_version: int = FORMAT_VERSION
    """Version of this format."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels: the network then ends with a sigmoid."""
        return self.thresholds is not None

    @property
    def activation(self) -> str:
        """What turns logits into probabilities, by its name in `tf.nn` and Keras."""
        return "sigmoid" if self.is_multi_label else "softmax"

    @functools.cached_property
    def geometry(self) -> Geometry:
        """How images become the model's input."""
        return Geometry.of(self.image_size, self.resize, self.decode_size)


@dataclass(frozen=True)
class Bundle:
    """The location and the metadata of a bundle. Its model and its files are read on first use."""

    uri: str
    info: BundleInfo

    @classmethod
    def load(cls, uri: str) -> "Bundle":
        """Read and check the metadata of a bundle.

        Raises:
            BundleError: there is no bundle, its format is newer than this cnnray, or its metadata is invalid.
            OSError: the storage cannot be read.
        """
        uri = storage.absolute(uri)
        return cls(uri, read_info(uri))

    @functools.cached_property
    def model(self) -> "keras.Model":
        """The Keras model, loaded without running any code found in it.

        Raises:
            BundleError: the model cannot be loaded safely, or contradicts `info`.
            OSError: the storage cannot be read.
        """
        return self.load_model()

    def load_model(self) -> "keras.Model":
        """Load the model anew, for one who changes it. Raises what `model` does."""
        with self.local_copy(MODEL) as path:
            model = load_model(path, self.uri)
        _check_model(model, self.info, self.uri)
        return model

    @functools.cached_property
    def version(self) -> str:
        """The architecture and a hash of everything that determines the predictions.

        Copies of a bundle have the same version; every training gives a new one.

        Raises:
            BundleError: the bundle holds no model.
            OSError: the storage cannot be read.
        """
        averaged = self.info.averaged
        # The file of an average has the time in it, and is made anew in each output.
        network = json.dumps([averaged["versions"], averaged["views"]]) if averaged else self.digest(MODEL)
        return _version(self.info, network)

    def digest(self, name: str) -> str:
        """The SHA-256 of a file of the bundle, in hexadecimal.

        Raises:
            BundleError: the bundle holds no such file.
            OSError: the storage cannot be read.
        """
        with self.local_copy(name) as path:
            if not path.is_file():
                raise BundleError(f"{self.uri} holds no {name}.")
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def training(self) -> str:
        """The folder of the training, which holds its manifest and its history if nobody deleted them."""
        return self.info.training or self.uri.rpartition("/")[0]

    @property
    def trainings(self) -> list[str]:
        """The folders of the trainings of all networks that it averages, or of its own."""
        return list(self.info.averaged["trainings"]) if self.info.averaged else [self.training]

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path of a file or folder of the bundle; a copy from a bucket is deleted when the context ends."""
        with storage.local_copy(storage.join(self.uri, name)) as path:
            yield path


def _version(info: BundleInfo, network: str) -> str:
    """See `Bundle.version`; `network` is the digest of the model, or says what it averages."""
    settings: list[Any] = [info.class_names, info.image_size, info.resize, info.temperature]
    if info.decode_size is not None:
        settings.append(info.decode_size)
    if info.decision is not None:
        settings.append(info.decision.settings)
    if info.thresholds is not None:
        settings.append(info.thresholds)
    if info.groups is not None:
        settings.append(info.groups)
    digest = hashlib.sha256(json.dumps([*settings, network]).encode())
    return f"{info.architecture or 'model'}-{digest.hexdigest()[:12]}"


def read_info(uri: str) -> BundleInfo:
    """Read and check `bundle.json` alone.

    Raises:
        BundleError: the file is missing, its format is newer than this cnnray, or its content is invalid.
    """
    try:
        content = json.loads(storage.read_bytes(storage.join(uri, INFO)))
    except (FileNotFoundError, NotADirectoryError):
        reason = f"it holds no {INFO}" if storage.exists(uri) else "it does not exist"
        raise BundleError(f"{uri} is not a bundle: {reason}.") from None
    except ValueError as error:
        raise BundleError(f"{uri}: {INFO} is not JSON ({error}).") from None
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise BundleError(f"{uri}: {INFO} has no format_version.")
    if content["format_version"] > FORMAT_VERSION:
        raise BundleError(
            f"{uri} has format {content['format_version']}; this cnnray reads up to {FORMAT_VERSION}: update it."
        )
    unknown = set(content) - {item.name for item in fields(BundleInfo)}
    try:
        content["decision"] = Decision.from_dict(content.get("decision"))
        info = BundleInfo(**{key: value for key, value in content.items() if key not in unknown})
    except ValueError as error:
        raise BundleError(f"{uri}: decision in {INFO} {error}.") from None
    except TypeError as error:
        raise BundleError(f"{uri}: {INFO} is incomplete: {error}.") from None
    names = info.class_names
    fewest = 1 if info.is_multi_label else 2
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) >= fewest):
        raise BundleError(f"{uri}: class_names in {INFO} is not a list of at least {fewest} names.")
    if len(set(names)) != len(names):
        raise BundleError(f"{uri}: class_names in {INFO} holds a name twice.")
    if info.resize not in RESIZE_RULES:
        raise BundleError(f"{uri}: resize in {INFO} is {info.resize!r}; expected one of {RESIZE_RULES}.")
    try:
        _ = info.geometry
    except ValueError as error:
        raise BundleError(f"{uri}: image_size and decode_size in {INFO}: {error}.") from None
    if not (isinstance(info.temperature, int | float) and info.temperature > 0):
        raise BundleError(f"{uri}: temperature in {INFO} is {info.temperature!r}; expected more than 0.")
    if info.thresholds is not None and not _are_thresholds(info.thresholds, len(names)):
        raise BundleError(f"{uri}: thresholds in {INFO} is not a list of a number from 0 to 1 for each class.")
    if info.averaged is not None and not _are_averages(info.averaged):
        raise BundleError(f"{uri}: averaged in {INFO} does not say what the network averages.")
    if info.groups is not None and not _are_groups(info.groups, names):
        raise BundleError(f"{uri}: groups in {INFO} is not a table with the name of a group for each class.")
    if not (isinstance(info.exports, dict) and all(isinstance(report, dict) for report in info.exports.values())):
        raise BundleError(f"{uri}: exports in {INFO} is not a table of formats.")
    return info


def _are_thresholds(values: Any, classes: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == classes
        and all(isinstance(value, int | float) and 0 <= value <= 1 for value in values)
    )


def _are_averages(values: Any) -> bool:
    lists = ("bundles", "versions", "trainings")
    return (
        isinstance(values, dict) and "views" in values and all(isinstance(values.get(name), list) for name in lists)
    )


def _are_groups(values: Any, class_names: list[str]) -> bool:
    return (
        isinstance(values, dict)
        and sorted(values) == sorted(class_names)
        and all(isinstance(value, str) for value in values.values())
    )


def save(model: "keras.Model", info: BundleInfo, folder: Path) -> None:
    """Write a bundle into a local folder.

    Raises:
        BundleError: the model's output or input contradicts `info`.
    """
    import keras

    _check_model(model, info, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    # A new model of the same layers leaves out the optimizer, whose variables are two thirds of the file.
    keras.Model(model.inputs, model.outputs, name=model.name).save(folder / MODEL)
    write_info(str(folder), info)


def write_info(uri: str, info: BundleInfo) -> None:
    """Write `bundle.json`."""
    content = {name: value for name, value in asdict(info).items() if name not in _NEWER or value is not None}
    is_plain = isinstance(info.image_size, int) and info.decode_size is None
    content["format_version"] = max([1 if is_plain else 2, *(_NEWER[name] for name in _NEWER if name in content)])
    storage.write_bytes(storage.join(uri, INFO), (json.dumps(content, indent=2) + "\n").encode())


def replace(target: str, source: str) -> None:
    """Make `target` a copy of the bundle `source`, local or remote.

    `target` is not a bundle until the copy is complete. All files of an earlier bundle are deleted, among them
    exports of other weights.
    """
    _clear(target)
    storage.copy_folder(source, target, last=[INFO])


def _clear(target: str) -> None:
    """Delete the files of a bundle, `bundle.json` first."""
    storage.delete_file(storage.join(target, INFO))
    if storage.exists(target):
        # File by file, because the lease in the folder must stay.
        for folder in storage.folders(target):
            storage.delete_folder(folder)
        for file in storage.files(target):
            storage.delete_file(file.uri)


def publish(bundle: Bundle, info: BundleInfo, target: str, *, overwrite: bool = False) -> Bundle:
    """Write a bundle of the same files and other metadata; the one that it is made from is not changed.

    A bundle that was published from the same one, and gives the same answers, stays as it is, with the exports that
    it may have got since. A SavedModel, which has the thresholds inside, is left out if they become others.

    Args:
        bundle: holds the files.
        info: metadata of the new bundle; `parent` and `training` are set here.
        target: folder of the new bundle, whose lease the caller has.
        overwrite: replace another bundle there.

    Returns:
        The new bundle.

    Raises:
        BundleError: `target` holds another bundle, or `bundle` has other weights now than when its version was read.
        OSError: the storage cannot be read or written.
    """
    info = dataclasses.replace(info, parent=bundle.version, training=bundle.training)
    changed = (info.decision, info.groups) != (bundle.info.decision, bundle.info.groups)
    stale = _SAVED_MODEL if changed and _SAVED_MODEL in info.exports else ""
    if stale:
        exports = {name: report for name, report in info.exports.items() if name != stale}
        info = dataclasses.replace(info, exports=exports)
        log.warning("the %s is left out, since it has no such thresholds: export the new bundle again", stale)
    if storage.is_file(storage.join(target, INFO)):
        other = Bundle.load(target)
        if (other.info.parent, other.version) == (info.parent, Bundle(target, info).version) and (
            other.info.decision == info.decision
        ):
            return other
        if not overwrite:
            raise BundleError(f"{target} holds another bundle, {other.version}, which may be in use.")
    _clear(target)
    storage.copy_folder(bundle.uri, target, skip=[INFO])
    if stale:
        storage.delete_folder(storage.join(target, stale))
    if (Bundle(target, bundle.info).version, read_info(bundle.uri)) != (bundle.version, bundle.info):
        raise BundleError(f"{bundle.uri} was changed in the meantime: run it again.")
    write_info(target, info)
    return Bundle.load(target)


def load_model(path: Path, uri: str) -> "keras.Model":
    """Load a local `.keras` file without running any code found in it.

    Args:
        path: the file.
        uri: its name in error messages.

    Raises:
        BundleError: the file does not exist, or cannot be loaded safely.
    """
    if not path.is_file():
        raise BundleError(f"{uri} is not a bundle: it holds no {MODEL}.")
    _check_archive(path, uri)
    startup.ensure_tensorflow()
    import keras

    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # among others ValueError, TypeError, OSError, KeyError
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{uri}: {MODEL} cannot be loaded safely: {reason}") from None


def _check_archive(path: Path, uri: str) -> None:
    """
    Raises:
        BundleError: the file is not a zip archive, or has a member whose path leaves the archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise BundleError(f"{uri}: {MODEL} cannot be loaded safely: it is not a Keras archive.") from None
    for name in map(PurePosixPath, names):
        if name.is_absolute() or ".." in name.parts:
            raise BundleError(f"{uri}: {MODEL} cannot be loaded safely: it holds the path {str(name)!r}.")


def _check_model(model: "keras.Model", info: BundleInfo, uri: str) -> None:
    outputs = tuple(model.output_shape)
    if outputs != (None, len(info.class_names)):
        raise BundleError(f"{uri}: the model gives {outputs}, but there are {len(info.class_names)} class names.")
    if not any(layer.name == "logits" for layer in model.layers):
        raise BundleError(f"{uri}: the model has no layer 'logits' before its probabilities.")
    inputs = tuple(model.input_shape)
    if inputs != (None, *info.geometry.image_size.shape):
        raise BundleError(f"{uri}: the model takes {inputs}, but image_size is {info.image_size}.")
