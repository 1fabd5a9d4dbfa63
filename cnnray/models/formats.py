"""What a bundle can hold beside `model.keras`, and how each is made of the Keras model.

Every file takes uint8 RGB (N, size, size, 3), gives the probabilities softmax(logits / temperature), float32
(N, classes) (`litert-int8`: uint8, which its quantization parameters scale), and carries `metadata` inside.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnray.models.bundle import Bundle

METADATA = "cnnray.json"
"""Where the metadata are: a member of the zip archive that ends a LiteRT file (as TensorFlow Lite Metadata's
associated files are), a file in `assets.extra/` of a SavedModel; in ONNX they are the model's metadata properties."""

_OPSET = 18

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """One format of export."""

    path: str
    """Of the file, or folder, in the bundle."""
    write: Callable[["Network", Path], None]
    """Make it at a local path."""


class Network:
    """A bundle's network on its way into other formats; what several of them need is made once.

    Attributes:
        bundle: with its model.
        calibration: images that int8 formats take their ranges from.
    """

    def __init__(self, bundle: Bundle, calibration: Images) -> None:
        self.bundle, self.calibration = bundle, calibration

    def function(self, dtype: str = "uint8") -> Any:
        """A TensorFlow function from pixels (N, size, size, 3) to probabilities."""
        import keras
        import tensorflow as tf

        info, model = self.bundle.info, self.bundle.model
        network = keras.Model(model.inputs, model.get_layer("logits").output)

        def probabilities(image: Any) -> Any:
            logits = tf.cast(network(image, training=False), tf.float32)
            return tf.nn.softmax(logits / info.temperature, name="probabilities")

        shape = (None, info.image_size, info.image_size, 3)
        return tf.function(probabilities, [tf.TensorSpec(shape, dtype, name="image")], autograph=False)

    def frozen(self, dtype: str = "uint8") -> Any:
        """The same with its weights as constants.

        tf2onnx on an unfrozen EfficientNetB0 takes two of its weights for inputs.
        """
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

        return convert_variables_to_constants_v2(self.function(dtype).get_concrete_function())

    @functools.cached_property
    def of_bytes(self) -> Any:
        """`frozen`, which takes uint8."""
        return self.frozen()

    @functools.cached_property
    def onnx(self) -> Any:
        """The ONNX model, float32."""
        import onnx
        import tf2onnx

        names = {self.of_bytes.inputs[0].name: "image", self.of_bytes.outputs[0].name: "probabilities"}
        model, _ = tf2onnx.convert.from_graph_def(
            self.of_bytes.graph.as_graph_def(),
            input_names=list(names)[:1],
            output_names=list(names)[1:],
            opset=_OPSET,
        )
        for node in model.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for value in (*model.graph.input, *model.graph.output):
            value.name = names[value.name]
            value.type.tensor_type.shape.dim[0].dim_param = "N"
        stated = {key: json.dumps(value) for key, value in metadata(self.bundle).items()}
        onnx.helper.set_model_props(model, stated)
        onnx.checker.check_model(model)
        return model


def metadata(bundle: Bundle) -> dict[str, Any]:
    """What a file says of itself to those who have the file alone."""
    info = bundle.info
    return {
        "class_names": info.class_names,
        "image_size": info.image_size,
        "resize": info.resize,
        "preprocessing": "RGB pixels as uint8: EXIF orientation applied, transparency over white, resized by "
        "bilinear interpolation with anti-aliasing; scaling is inside the network",
        "temperature": info.temperature,
        "architecture": info.architecture,
    }


# -- TensorFlow -----------------------------------------------------------------------------------------------


def _write_saved_model(network: Network, path: Path) -> None:
    import tensorflow as tf

    from cnnray.models import graph_decode

    info, module = network.bundle.info, tf.Module()
    module.weights = [variable.value for variable in network.bundle.model.variables]
    pixels = network.function()

    def answers(image: Any) -> dict[str, Any]:
        names = tf.constant([info.class_names])
        return {"probabilities": pixels(image), "class_names": tf.tile(names, [tf.shape(image)[0], 1])}

    def decoded(data: Any) -> Any:
        return graph_decode.decode(data, info.image_size, info.resize)

    def answers_to_bytes(image_bytes: Any) -> dict[str, Any]:
        return answers(tf.map_fn(decoded, image_bytes, fn_output_signature=tf.uint8))

    module.pixels = tf.function(answers, pixels.input_signature, autograph=False)
    module.encoded = tf.function(
        answers_to_bytes, [tf.TensorSpec((None,), tf.string, "image_bytes")], autograph=False
    )
    tf.saved_model.save(module, path, signatures={"serving_default": module.pixels, "encoded": module.encoded})
    extra = path / "assets.extra" / METADATA
    extra.parent.mkdir()
    extra.write_text(json.dumps(metadata(network.bundle), indent=2))


# -- ONNX -----------------------------------------------------------------------------------------------------


def _write_onnx(network: Network, path: Path) -> None:
    import onnx

    onnx.save(network.onnx, path)


def _write_onnx_int8(network: Network, path: Path) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._images = iter(network.calibration)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._images, None)
            return None if image is None else {"image": image[None]}

    plain, prepared = path.with_suffix(".float.onnx"), path.with_suffix(".prepared.onnx")
    _write_onnx(network, plain)
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # The softmax stays float32: its probabilities would be rounded to a 256th.
        nodes_to_exclude=[node.name for node in network.onnx.graph.node if node.op_type == "Softmax"],
    )
    plain.unlink()
    prepared.unlink()


# -- LiteRT ---------------------------------------------------------------------------------------------------


def _write_litert(network: Network, path: Path) -> None:
    _convert_to_litert(network, path, _lite_converter(network.of_bytes))


def _write_litert_float16(network: Network, path: Path) -> None:
    import tensorflow as tf

    converter = _lite_converter(network.of_bytes)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    _convert_to_litert(network, path, converter)


def _write_litert_int8(network: Network, path: Path) -> None:
    import tensorflow as tf

    def representative() -> Iterator[list[Any]]:
        # The range of the input is that of the bytes: a black and a white pixel in the first image make it so.
        first, *others = network.calibration.astype(np.float32)
        first[0, 0], first[0, 1] = 0, 255
        for image in (first, *others):
            yield [image[None]]

    converter = _lite_converter(network.frozen("float32"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.uint8
    converter.inference_output_type = tf.uint8
    _convert_to_litert(network, path, converter)


def _lite_converter(frozen: Any) -> Any:
    import tensorflow as tf

    return tf.lite.TFLiteConverter.from_concrete_functions([frozen])


def _convert_to_litert(network: Network, path: Path, converter: Any) -> None:
    path.write_bytes(converter.convert())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(METADATA, json.dumps(metadata(network.bundle), indent=2))


FORMATS = {
    "saved_model": Format("saved_model", _write_saved_model),
    "onnx": Format("model.onnx", _write_onnx),
    "onnx-int8": Format("model.int8.onnx", _write_onnx_int8),
    "litert": Format("model.tflite", _write_litert),
    "litert-float16": Format("model.float16.tflite", _write_litert_float16),
    "litert-int8": Format("model.int8.tflite", _write_litert_int8),
}
"""Every format by name."""
