"""Engines: what runs a bundle's network on decoded images.

Each is called with uint8 (N, size, size, 3) and gives float32 probabilities (N, classes), by the temperature that the
bundle has now. How images are grouped into batches changes a probability by less than 1e-5 (int8 engines: not at all
in LiteRT, by rounding in ONNX Runtime).
"""

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cnnray.models.bundle import MODEL, Bundle, BundleError
from cnnray.models.formats import FORMATS

log = logging.getLogger(__name__)

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]

KERAS, SAVED_MODEL = "keras", "saved_model"
BATCH_SIZE = 64
"""Images that a network is given at once, at most, where the caller does not say."""
_LITERT_BATCH_SIZES = (32, 8, 1)


class Engine(Protocol):
    """Runs a network on as many images at once as it is given."""

    classes: int
    """Number of probabilities that it gives."""

    def __call__(self, images: Images) -> Probabilities:
        """Probabilities float32 (N, classes) of images uint8 (N, size, size, 3)."""
        ...


class FileEngine(Engine, Protocol):
    """Runs an exported file."""

    shape: tuple[int, ...]
    """(height, width, 3) of the images that it takes."""


@dataclass(frozen=True)
class Runner:
    """How an exported file is run."""

    format: str
    """Of `FORMATS`: that which writes the file."""
    engine: Callable[[Path, int], FileEngine]
    """Loads it, for calls of so many threads."""
    tolerance: float | None = None
    """Largest difference of a probability from Keras's; None: the network is rounded to few bits, and judged by what
    it answers alone."""
    missing: Callable[[], str] = str
    """Says why it cannot be used here, or nothing."""


def usable_threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def engine_of(bundle: Bundle, name: str, threads: int | None = None) -> Engine:
    """Load an engine.

    Args:
        bundle: with the file that the engine runs.
        name: one of `ENGINES`.
        threads: CPU threads of one call; None: as many as this process may use.

    Raises:
        BundleError: the bundle does not hold what the engine runs, or holds something else.
    """
    threads = threads or usable_threads()
    check_exported(bundle, name)
    if name == KERAS:
        return KerasEngine(bundle, threads)
    file = FORMATS[RUNNERS[name].format].path
    with bundle.local_copy(file) as path:
        if not path.is_file():
            raise BundleError(f"{bundle.uri} lists an export to {name}, but holds no {file}.")
        engine = file_engine(name, path, threads, bundle)
    exported = float(bundle.info.exports[name].get("temperature", 1.0))
    return engine if exported == bundle.info.temperature else _Tempered(engine, exported / bundle.info.temperature)


def check_exported(bundle: Bundle, name: str) -> None:
    """
    Raises:
        BundleError: there is no such engine, or the bundle does not list what it runs.
    """
    if name not in ENGINES:
        raise BundleError(f"No engine is called {name!r}; there are {', '.join(ENGINES)}.")
    if name != KERAS and name not in bundle.info.exports:
        there = ", ".join([KERAS, *(other for other in bundle.info.exports if other in ENGINES and other != KERAS)])
        raise BundleError(f"{bundle.uri} was not exported to {name} (it has {there}): run jobs/export.py.")
    if name != KERAS and (reason := RUNNERS[name].missing()):
        raise BundleError(f"The engine {name} cannot be used here: {reason}.")


def digest(bundle: Bundle, name: str) -> str:
    """A hash of the file that an engine runs.

    Raises:
        BundleError, OSError: as `engine_of`.
    """
    check_exported(bundle, name)
    return bundle.digest(MODEL if name == KERAS else FORMATS[RUNNERS[name].format].path)


def file_engine(name: str, path: Path, threads: int, bundle: Bundle) -> Engine:
    """The engine of an exported file, whatever its bundle says of it.

    Raises:
        BundleError: the file cannot be run, or its shapes are not the bundle's.
    """
    try:
        engine = RUNNERS[name].engine(path, threads)
    except Exception as error:  # the engines' libraries raise exceptions of their own
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{bundle.uri}: {path.name} cannot be loaded: {reason}") from None
    size, classes = bundle.info.image_size, len(bundle.info.class_names)
    if engine.shape != (size, size, 3) or engine.classes != classes:
        raise BundleError(
            f"{bundle.uri}: {path.name} takes {engine.shape} and gives {engine.classes} probabilities; the bundle "
            f"has images of {size}x{size} and {classes} classes."
        )
    return engine


def in_batches(engine: Engine, images: Images, size: int = BATCH_SIZE) -> Probabilities:
    """An engine's answers to any number of images, given to it at most `size` at once."""
    parts = [engine(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate(parts) if parts else np.empty((0, engine.classes), np.float32)


class InFull(NamedTuple):
    """What Keras's engine gives for N images."""

    probabilities: Probabilities
    """float32 (N, classes)."""
    logits: npt.NDArray[np.float32]
    """float32 (N, classes), before the temperature."""
    embeddings: npt.NDArray[np.float32]
    """float32 (N, features), of which the last layer makes the logits."""


class KerasEngine:
    """The Keras model as one compiled TensorFlow function; on a GPU where TensorFlow sees one."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        import keras
        import tensorflow as tf

        _set_threads(threads)
        last = bundle.model.get_layer("logits")
        network = keras.Model(bundle.model.inputs, [last.output, last.input])
        temperature, size = bundle.info.temperature, bundle.info.image_size
        self.classes = len(bundle.info.class_names)

        def run(images: Any) -> Any:
            logits, embeddings = (tf.cast(one, tf.float32) for one in network(images, training=False))
            return InFull(tf.nn.softmax(logits / temperature), logits, embeddings)

        self._run = tf.function(run, [tf.TensorSpec((None, size, size, 3), tf.uint8)], autograph=False)

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        return self.in_full(images).probabilities

    def in_full(self, images: Images) -> InFull:
        """Probabilities, and what they are made of."""
        count = len(images)
        padding = (1 << max(count - 1, 0).bit_length()) - count  # to a power of two, so that it meets few shapes
        if padding:
            images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
        return InFull(*(values.numpy()[:count] for values in self._run(images)))


class OnnxEngine:
    """An ONNX file in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.shape = tuple(self._session.get_inputs()[0].shape[1:])
        self.classes = self._session.get_outputs()[0].shape[-1]

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        return np.asarray(self._session.run(["probabilities"], {"image": images})[0])


class SavedModelEngine:
    """A SavedModel in TensorFlow. Only its verification uses it: `KerasEngine` is as fast."""

    def __init__(self, path: Path, threads: int) -> None:
        import tensorflow as tf

        _set_threads(threads)
        signatures = tf.saved_model.load(path).signatures
        self._signature, self.encoded = signatures["serving_default"], signatures["encoded"]
        (pixels,) = self._signature.structured_input_signature[1].values()
        self.shape = tuple(pixels.shape[1:])
        self.classes = int(self._signature.structured_outputs["probabilities"].shape[-1])

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        return np.asarray(self._signature(image=images)["probabilities"])


class EncodedSavedModelEngine:
    """The same by the signature that takes encoded images, which are made PNG files here."""

    def __init__(self, engine: SavedModelEngine) -> None:
        self._encoded, self.classes = engine.encoded, engine.classes

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        import tensorflow as tf

        encoded = tf.stack([tf.io.encode_png(image) for image in images])
        return np.asarray(self._encoded(image_bytes=encoded)["probabilities"])


class OpenVinoEngine:
    """An ONNX file in OpenVINO, on the CPU."""

    def __init__(self, path: Path, threads: int, precision: str = "f32") -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            # Of several processes each would take the first cores for itself.
            "ENABLE_CPU_PINNING": False,
        }
        self._model = openvino.Core().compile_model(path, "CPU", settings)
        self._lock = threading.Lock()  # a request holds its call's tensors
        self._request = self._model.create_infer_request()
        self.shape = tuple(dimension.get_length() for dimension in list(self._model.input(0).partial_shape)[1:])
        self.classes = int(self._model.output(0).partial_shape[1].get_length())

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        with self._lock:
            return np.array(self._request.infer({0: images})[0])


class LiteRTEngine:
    """A LiteRT file in its interpreter, one for each of three batch sizes."""

    def __init__(self, path: Path, threads: int) -> None:
        self._content, self._threads = path.read_bytes(), threads
        self._interpreters: dict[int, Any] = {}
        self._lock = threading.Lock()  # an interpreter holds its call's tensors
        interpreter = self._interpreter(1)
        self.shape = tuple(interpreter.get_input_details()[0]["shape"][1:].tolist())
        output = interpreter.get_output_details()[0]
        self.classes = int(output["shape"][-1])
        self._scale, self._zero = output["quantization"]

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        with self._lock:
            parts = [self._run(images[start:stop]) for start, stop in _cut(len(images), _LITERT_BATCH_SIZES)]
        return np.concatenate(parts)

    def _run(self, images: Images) -> Probabilities:
        interpreter = self._interpreter(len(images))
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
        interpreter.invoke()
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        if found.dtype == np.float32:
            return np.asarray(found)
        probabilities = (found.astype(np.float32) - self._zero) * np.float32(self._scale)
        # Each is rounded by itself to a 256th, so that their sum is not quite 1 (or 0, where there are very many).
        return np.asarray(probabilities / np.maximum(probabilities.sum(1, keepdims=True), self._scale), np.float32)

    def _interpreter(self, batch_size: int) -> Any:
        from ai_edge_litert.interpreter import Interpreter

        if batch_size not in self._interpreters:
            interpreter = Interpreter(model_content=self._content, num_threads=self._threads)
            details = interpreter.get_input_details()[0]
            interpreter.resize_tensor_input(details["index"], (batch_size, *details["shape"][1:]))
            interpreter.allocate_tensors()
            self._interpreters[batch_size] = interpreter
        return self._interpreters[batch_size]


@functools.cache
def _no_openvino() -> str:
    found = importlib.util.find_spec("openvino")
    return "" if found else "OpenVINO is not installed (the extra openvino of cnnray)"


@functools.cache
def _no_bfloat16() -> str:
    if reason := _no_openvino():
        return reason
    import openvino

    able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "" if able else "this CPU does not compute in bfloat16"


RUNNERS = {
    SAVED_MODEL: Runner("saved_model", SavedModelEngine, 1e-4),
    "onnx": Runner("onnx", OnnxEngine, 1e-4),
    "onnx-int8": Runner("onnx-int8", OnnxEngine),
    "litert": Runner("litert", LiteRTEngine, 1e-4),
    # Weights rounded to float16 are off by up to 5e-4 of their size, layer by layer.
    "litert-float16": Runner("litert-float16", LiteRTEngine, 5e-2),
    "litert-int8": Runner("litert-int8", LiteRTEngine),
    "openvino-bfloat16": Runner("onnx", functools.partial(OpenVinoEngine, precision="bf16"), missing=_no_bfloat16),
    "openvino-int8": Runner("onnx-int8", OpenVinoEngine, missing=_no_openvino),
}
"""What runs exported files, by name."""
ENGINES = (KERAS, *(name for name in RUNNERS if name != SAVED_MODEL))
"""What can be asked for by name, beside `auto`. (A SavedModel is for others: in TensorFlow `keras` is as fast.)"""


def _set_threads(threads: int) -> None:
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:  # TensorFlow runs already, with the threads that the process has given it
        log.debug("TensorFlow keeps its %d threads", tf.config.threading.get_intra_op_parallelism_threads())


class _Tempered:
    """The probabilities of an engine at another temperature than its file was made with."""

    def __init__(self, engine: Engine, exponent: float) -> None:
        self._engine, self._exponent = engine, exponent
        self.classes = engine.classes

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`: softmax(logits / T) is softmax(logits / S) to the power of S / T, normalised."""
        powers = self._engine(images) ** np.float32(self._exponent)
        return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)


def _cut(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cut `count` images into batches of the given sizes, the largest first."""
    start = 0
    for size in sizes:
        while count - start >= size:
            yield start, start + size
            start += size


def choose(bundle: Bundle, *, gpus: bool, batch_size: int) -> str:
    """The engine that `auto` stands for: on a GPU Keras; else the fastest whose export was verified.

    An engine that rounds the network (int8, bfloat16) is only chosen where its accuracy was measured on labelled
    images, and none that cannot be used in this process.

    Args:
        bundle: with what export measured in its `info.exports`.
        gpus: whether the process has a GPU.
        batch_size: images in a call; the measurement at 1 or at 32 is taken, whichever is nearer.
    """
    if gpus:
        log.info("engine keras: there is a GPU")
        return KERAS
    key = "1" if batch_size < 6 else "32"
    speeds = {
        name: float(report["times_keras"][key])
        for name, report in bundle.info.exports.items()
        if name == KERAS or (name in ENGINES and _is_proven(name, report) and not RUNNERS[name].missing())
    }
    if not speeds:
        log.info("engine keras: the bundle has no verified exports (jobs/export.py makes them)")
        return KERAS
    chosen = max(speeds, key=lambda name: speeds[name])
    measured = ", ".join(f"{name} {speed:.2f}" for name, speed in sorted(speeds.items(), key=lambda item: -item[1]))
    log.info("engine %s: the fastest by export's measurement at batch %s (times Keras: %s)", chosen, key, measured)
    return chosen


def _is_proven(name: str, report: dict[str, Any]) -> bool:
    return RUNNERS[name].tolerance is not None or report["accuracy"] is not None
