"""One class per library that runs a bundle's network: TensorFlow, ONNX Runtime, OpenVINO and LiteRT.

See `engines` for their names and for loading them.
"""

import collections
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cnnray.images.geometry import Geometry
from cnnray.models import startup
from cnnray.models.bundle import Bundle

log = logging.getLogger(__name__)

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]

_LITERT_BATCH_SIZES = (32, 8, 1)


class Engine(Protocol):
    """Runs a network on a batch of any size."""

    classes: int
    """Number of classes."""

    def __call__(self, images: Images) -> Probabilities:
        """Map images, uint8 (N, height, width, 3), to probabilities, float32 (N, classes)."""
        ...


class FileEngine(Engine, Protocol):
    """Runs an exported file."""

    shape: tuple[int, ...]
    """Shape of one input image: (height, width, 3)."""


class NetworkOutputs(NamedTuple):
    """All outputs of `KerasEngine` for N images."""

    probabilities: Probabilities
    """float32 (N, classes)."""
    logits: npt.NDArray[np.float32]
    """float32 (N, classes), before the division by the temperature."""
    embeddings: npt.NDArray[np.float32]
    """float32 (N, features), the input of the layer that computes the logits."""


class KerasEngine:
    """The Keras model as one compiled TensorFlow function. It runs on a GPU if TensorFlow sees one."""

    def __init__(self, bundle: Bundle, threads: int, policy: str = "float32") -> None:
        """
        Args:
            bundle: holds the model.
            threads: CPU threads of a call.
            policy: Keras dtype policy of the layers before the logits.
        """
        startup.ensure_tensorflow()
        import keras
        import tensorflow as tf

        _set_threads(threads)
        model = bundle.model if policy == "float32" else bundle.load_model()
        last = model.get_layer("logits")
        network = keras.Model(model.inputs, [last.output, last.input])
        if policy != "float32":
            for layer in network._flatten_layers():
                if layer.name != last.name and not isinstance(layer, keras.layers.InputLayer):
                    layer.dtype_policy = policy
        temperature, size = bundle.info.temperature, bundle.info.geometry.image_size
        activation = getattr(tf.nn, bundle.info.activation)
        self.classes = len(bundle.info.class_names)

        def run(images: Any) -> Any:
            logits, embeddings = (tf.cast(output, tf.float32) for output in network(images, training=False))
            return NetworkOutputs(activation(logits / temperature), logits, embeddings)

        self._run = tf.function(run, [tf.TensorSpec((None, *size.shape), tf.uint8)], autograph=False)

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        return self.outputs_in_batches(images, len(images)).probabilities

    def outputs_in_batches(self, images: Images, size: int) -> NetworkOutputs:
        """Compute probabilities, logits and embeddings of images, in batches of at most `size`.

        A GPU is given the next batch before the outputs of one are waited for.

        Args:
            images: uint8 (N, height, width, 3).
            size: of a batch.
        """
        running: collections.deque[tuple[Any, int]] = collections.deque()
        done = []
        for start in range(0, max(len(images), 1), max(size, 1)):
            running.append(self._start(images[start : start + size]))
            if len(running) == 2:
                done.append(_outputs(*running.popleft()))
        done += [_outputs(*started) for started in running]
        return NetworkOutputs(*(np.concatenate(values) for values in zip(*done, strict=True)))

    def _start(self, images: Images) -> tuple[Any, int]:
        """Begin to compute the outputs of a batch, and return their tensors and the number of images."""
        count = len(images)
        # Padding to a power of two limits the number of batch shapes that TensorFlow sees.
        padding = (1 << max(count - 1, 0).bit_length()) - count
        if padding:
            images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
        return self._run(images), count


def _outputs(tensors: Any, count: int) -> NetworkOutputs:
    """The outputs of the first images, once they are there."""
    return NetworkOutputs(*(values.numpy()[:count] for values in tensors))


class SavedModelEngine:
    """A SavedModel in TensorFlow. Only its verification uses it, because `KerasEngine` is as fast."""

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
    """The signature `encoded` of a SavedModel, called with PNG files of which the images are the centre."""

    def __init__(self, engine: SavedModelEngine, geometry: Geometry) -> None:
        self._encoded, self.classes, self._geometry = engine.encoded, engine.classes, geometry

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        import tensorflow as tf

        whole = np.zeros((len(images), *self._geometry.decode_size.shape), np.uint8)
        self._geometry.centre(whole)[:] = images
        encoded = tf.stack([tf.io.encode_png(image) for image in whole])
        return np.asarray(self._encoded(image_bytes=encoded)["probabilities"])


class OnnxEngine:
    """An ONNX file in ONNX Runtime: on a GPU, if this process was given one that ONNX Runtime can use."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Else it keeps a plan, and the largest memory, for each number of images that it has seen.
        options.enable_mem_pattern = False
        providers: list[Any] = ["CPUExecutionProvider"]
        if startup.was_given_gpu() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            onnxruntime.preload_dlls()  # of NVIDIA's packages, which TensorFlow needs, too
            # TF32 would round the inputs of each layer to ten bits.
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.shape = tuple(self._session.get_inputs()[0].shape[1:])
        self.classes = self._session.get_outputs()[0].shape[-1]

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        return np.asarray(self._session.run(["probabilities"], {"image": images})[0])


class OpenVinoEngine:
    """An ONNX file in OpenVINO, on the CPU.

    OpenVINO compiles for each number of images that it sees, and keeps that, about 1 MiB, for ever: few sizes of
    batches take less memory than many.
    """

    def __init__(self, path: Path, threads: int, precision: str = "f32") -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            # With pinning, each of several processes would take the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._model = openvino.Core().compile_model(path, "CPU", settings)
        self._lock = threading.Lock()  # the request holds the tensors of its call
        self._request = self._model.create_infer_request()
        self.shape = tuple(dimension.get_length() for dimension in list(self._model.input(0).partial_shape)[1:])
        self.classes = int(self._model.output(0).partial_shape[1].get_length())

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        with self._lock:
            return np.array(self._request.infer({0: images})[0])


class LiteRTEngine:
    """A LiteRT file, with one interpreter for each of three batch sizes.

    Attributes:
        multi_label: whether the file has a sigmoid for each class, and not a softmax.
    """

    multi_label = False

    def __init__(self, path: Path, threads: int) -> None:
        self._content, self._threads = path.read_bytes(), threads
        self._interpreters: dict[int, tuple[Any, int, int]] = {}
        """By batch size, with the indices of its input and its output, which take a while to look up."""
        self._lock = threading.Lock()  # an interpreter holds the tensors of its call
        interpreter, _, _ = self._interpreter(1)
        self.shape = tuple(interpreter.get_input_details()[0]["shape"][1:].tolist())
        output = interpreter.get_output_details()[0]
        self.classes = int(output["shape"][-1])
        self._scale, self._zero_point = output["quantization"]

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        with self._lock:
            parts = [self._run(images[start:stop]) for start, stop in _batch_ranges(len(images), _LITERT_BATCH_SIZES)]
        return np.concatenate(parts)

    def _run(self, images: Images) -> Probabilities:
        interpreter, source, target = self._interpreter(len(images))
        interpreter.set_tensor(source, images)
        interpreter.invoke()
        output = interpreter.get_tensor(target)
        if output.dtype == np.float32:
            return np.asarray(output)
        probabilities = (output.astype(np.float32) - self._zero_point) * np.float32(self._scale)
        if self.multi_label:
            return np.asarray(probabilities, np.float32)
        # Each probability is rounded to 1/256, so the sum is not exactly 1, and can be 0 with very many classes.
        return np.asarray(probabilities / np.maximum(probabilities.sum(1, keepdims=True), self._scale), np.float32)

    def _interpreter(self, batch_size: int) -> tuple[Any, int, int]:
        from ai_edge_litert.interpreter import Interpreter

        if batch_size not in self._interpreters:
            interpreter = Interpreter(model_content=self._content, num_threads=self._threads)
            details = interpreter.get_input_details()[0]
            interpreter.resize_tensor_input(details["index"], (batch_size, *details["shape"][1:]))
            interpreter.allocate_tensors()
            target = interpreter.get_output_details()[0]["index"]
            self._interpreters[batch_size] = interpreter, details["index"], target
        return self._interpreters[batch_size]


class RescaledEngine:
    """An engine whose file was exported at another temperature, with its probabilities moved to the bundle's."""

    def __init__(self, engine: Engine, exponent: float, *, multi_label: bool = False) -> None:
        """
        Args:
            engine: the engine of the file.
            exponent: temperature of the file / temperature of the bundle.
            multi_label: see `rescale`.
        """
        self._engine, self._exponent, self._multi_label = engine, exponent, multi_label
        self.classes = engine.classes

    def __call__(self, images: Images) -> Probabilities:
        """See `Engine`."""
        return rescale(self._engine(images), self._exponent, multi_label=self._multi_label)


def rescale(probabilities: Probabilities, exponent: float, *, multi_label: bool = False) -> Probabilities:
    """Probabilities at another temperature.

    softmax(logits / T) is softmax(logits / S) to the power of S / T, normalised. A sigmoid is a softmax of two.

    Args:
        probabilities: float32 (N, classes), at the temperature S.
        exponent: S / T.
        multi_label: whether each is a sigmoid's.
    """
    powers = probabilities ** np.float32(exponent)
    if multi_label:
        return np.asarray(powers / (powers + (1 - probabilities) ** np.float32(exponent)), np.float32)
    # An int8 engine may give zeros only, which stay zeros.
    return np.asarray(powers / np.maximum(powers.sum(1, keepdims=True), np.finfo(np.float32).tiny), np.float32)


def _set_threads(threads: int) -> None:
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:  # TensorFlow is already initialised; its number of threads is fixed
        log.debug("TensorFlow keeps its %d threads", tf.config.threading.get_intra_op_parallelism_threads())


def _batch_ranges(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Split `count` images into batches of the given sizes, the largest first; yield (start, stop) of each."""
    start = 0
    for size in sizes:
        while count - start >= size:
            yield start, start + size
            start += size
