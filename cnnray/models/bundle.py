"""Bundle: the one thing that passes between jobs.

A folder, local or on S3, with `model.keras` (uint8 RGB at the bundle's size in, probabilities out), `bundle.json`
(`BundleInfo`), and what export adds (see `formats`). `bundle.json` is written last: a folder without it is no bundle.
"""

import contextlib
import functools
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import cnnray
from cnnray.errors import BadInputError
from cnnray.images import storage
from cnnray.images.decode import RESIZE_RULES, ResizeRule

if TYPE_CHECKING:
    import keras

FORMAT_VERSION = 1
MODEL = "model.keras"
_INFO = "bundle.json"
_LIBRARIES = ("keras", "tensorflow", "numpy", "pillow")


class BundleError(BadInputError, ValueError):
    """A bundle that cannot be used; the message is one sentence for the user."""


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide a bundle's answers."""
    return {library: version(library) for library in _LIBRARIES} | {"cnnray": cnnray.__version__}


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """What `bundle.json` holds."""

    class_names: list[str]
    """Names of the model's outputs, in order."""
    image_size: int
    """Height and width in pixels that the model takes."""
    resize: ResizeRule = "stretch"
    """How images of another shape are brought to that size (see `images.decode`)."""
    architecture: str = ""
    """Name of the network (see `models.architectures`)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of these very weights on the validation images."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax (1: not calibrated)."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved training config."""
    data_fingerprint: str = ""
    """Hash of the manifest that the model was trained on."""
    class_counts: dict[str, int] = field(default_factory=dict)
    """Training images of each class."""
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was measured of each exported file, and of `keras`, by format (see `export`)."""
    library_versions: dict[str, str] = field(default_factory=library_versions)
    """Versions of the libraries that wrote the bundle."""
    format_version: int = FORMAT_VERSION
    """Version of this format."""


@dataclass(frozen=True)
class Bundle:
    """A bundle: where it is and what it says of itself. Its model and files are read when they are asked for."""

    uri: str
    info: BundleInfo

    @classmethod
    def load(cls, uri: str) -> "Bundle":
        """Read and check what a bundle says of itself.

        Raises:
            BundleError: no bundle, one of a newer format, or one that does not hold what it should.
            OSError: storage that cannot be read.
        """
        uri = storage.absolute(uri)
        return cls(uri, read_info(uri))

    @functools.cached_property
    def model(self) -> "keras.Model":
        """The Keras model, loaded without running any code found in it.

        Raises:
            BundleError: it cannot be loaded safely, or does not agree with `info`.
            OSError: storage that cannot be read.
        """
        with self.local_copy(MODEL) as path:
            model = load_model(path, self.uri)
        _check_model(model, self.info, self.uri)
        return model

    @functools.cached_property
    def version(self) -> str:
        """The architecture and a hash of all that decides the answers: the same for copies, another after training.

        Raises:
            BundleError: it holds no model.
            OSError: storage that cannot be read.
        """
        decisive = [self.info.class_names, self.info.image_size, self.info.resize, self.info.temperature]
        digest = hashlib.sha256(json.dumps([*decisive, self.digest(MODEL)]).encode())
        return f"{self.info.architecture or 'model'}-{digest.hexdigest()[:12]}"

    def digest(self, name: str) -> str:
        """A hash of a file of the bundle, in hexadecimal.

        Raises:
            BundleError: it is not there.
            OSError: storage that cannot be read.
        """
        with self.local_copy(name) as path:
            if not path.is_file():
                raise BundleError(f"{self.uri} holds no {name}.")
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A file or folder of the bundle on a local path, fetched from a bucket for as long as it is needed."""
        uri = storage.join(self.uri, name)
        if storage.is_local(uri):
            yield Path(uri)
            return
        with tempfile.TemporaryDirectory(prefix="cnnray-bundle-") as folder:
            path = Path(folder, name)
            if storage.is_file(uri):
                path.write_bytes(storage.read_bytes(uri))
            else:
                storage.copy_folder(uri, str(path))
            yield path


def read_info(uri: str) -> BundleInfo:
    """Read and check `bundle.json` alone.

    Raises:
        BundleError: it is missing, of a newer format, or does not hold what it should.
    """
    try:
        found = json.loads(storage.read_bytes(storage.join(uri, _INFO)))
    except (FileNotFoundError, NotADirectoryError):
        why = f"it holds no {_INFO}" if storage.exists(uri) else "it does not exist"
        raise BundleError(f"{uri} is not a bundle: {why}.") from None
    except ValueError as error:
        raise BundleError(f"{uri}: {_INFO} is not JSON ({error}).") from None
    if not isinstance(found, dict) or not isinstance(found.get("format_version"), int):
        raise BundleError(f"{uri}: {_INFO} has no format_version.")
    if found["format_version"] > FORMAT_VERSION:
        raise BundleError(
            f"{uri} has format {found['format_version']}; this cnnray reads up to {FORMAT_VERSION}: update it."
        )
    unknown = set(found) - {item.name for item in fields(BundleInfo)}
    try:
        info = BundleInfo(**{key: value for key, value in found.items() if key not in unknown})
    except TypeError as error:
        raise BundleError(f"{uri}: {_INFO} is incomplete: {error}.") from None
    names = info.class_names
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) > 1):
        raise BundleError(f"{uri}: class_names in {_INFO} is not a list of at least two names.")
    if len(set(names)) != len(names):
        raise BundleError(f"{uri}: class_names in {_INFO} holds a name twice.")
    if not (isinstance(info.image_size, int) and info.image_size > 0):
        raise BundleError(f"{uri}: image_size in {_INFO} is {info.image_size!r}; expected pixels.")
    if info.resize not in RESIZE_RULES:
        raise BundleError(f"{uri}: resize in {_INFO} is {info.resize!r}; expected one of {RESIZE_RULES}.")
    if not (isinstance(info.temperature, int | float) and info.temperature > 0):
        raise BundleError(f"{uri}: temperature in {_INFO} is {info.temperature!r}; expected more than 0.")
    if not (isinstance(info.exports, dict) and all(isinstance(report, dict) for report in info.exports.values())):
        raise BundleError(f"{uri}: exports in {_INFO} is not a table of formats.")
    return info


def save(model: "keras.Model", info: BundleInfo, folder: Path) -> None:
    """Write a bundle into a local folder.

    Raises:
        BundleError: the model's output or input does not agree with `info`.
    """
    import keras

    _check_model(model, info, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    # The same layers without the optimizer, whose variables would be two thirds of the file.
    keras.Model(model.inputs, model.outputs, name=model.name).save(folder / MODEL)
    write_info(str(folder), info)


def write_info(uri: str, info: BundleInfo) -> None:
    """Write `bundle.json`."""
    storage.write_bytes(storage.join(uri, _INFO), (json.dumps(asdict(info), indent=2) + "\n").encode())


def replace(target: str, source: str) -> None:
    """Make `target` a copy of the bundle `source`, local or remote; it is a bundle only once it is whole.

    Nothing of an earlier bundle is left, so exports of other weights are not either.
    """
    storage.delete_file(storage.join(target, _INFO))
    if storage.exists(target):
        # One by one, as the folder's lease stays.
        for folder in storage.folders(target):
            storage.delete_folder(folder)
        for file in storage.files(target):
            storage.delete_file(file.uri)
    storage.copy_folder(source, target, last=[_INFO])


def load_model(path: Path, uri: str) -> "keras.Model":
    """A local `.keras` file, loaded without running any code found in it; `uri` is its name in errors.

    Raises:
        BundleError: it is not there, or cannot be loaded safely.
    """
    import keras

    if not path.is_file():
        raise BundleError(f"{uri} is not a bundle: it holds no {MODEL}.")
    _check_archive(path, uri)
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises what its parts run into: ValueError, TypeError, OSError, KeyError
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{uri}: {MODEL} cannot be loaded safely: {reason}") from None


def _check_archive(path: Path, uri: str) -> None:
    """
    Raises:
        BundleError: it is no zip archive, or one whose members lie outside of it.
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
        raise BundleError(f"{uri}: the model has no layer 'logits' in front of its probabilities.")
    inputs = tuple(model.input_shape)
    if inputs != (None, info.image_size, info.image_size, 3):
        raise BundleError(f"{uri}: the model takes {inputs}, but image_size is {info.image_size}.")
