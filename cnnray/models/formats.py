"""The formats that a bundle's network can be exported to, and the conversion from the Keras model to each.

Every exported file takes uint8 RGB (N, height, width, 3), gives the probabilities softmax(logits / temperature), of
several labels sigmoid(logits / temperature), as float32 (N, classes), and contains `metadata`. `litert-int8` gives
uint8 with quantization parameters instead of float32.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnray.models.answers import FLOAT32
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.groups import Groups

METADATA = "cnnray.json"
"""Name of the metadata file: in LiteRT, a member of the zip archive appended to the file (as the associated files of
TensorFlow Lite Metadata); in a SavedModel, a file in `assets.extra/`. ONNX has metadata properties instead."""

_OPSET = 18

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """One export format."""

    path: str
    """Name of the file or folder in the bundle."""
    write: Callable[["Network", Path], None]
    """Converts the network and writes it to a local path."""


class Network:
    """A bundle's network during conversion. It caches the representations that several formats share.

    Attributes:
        bundle: the bundle to convert.
        calibration: images, uint8 (N, height, width, 3), from which int8 formats compute activation ranges.
    """

    def __init__(self, bundle: Bundle, calibration: Images) -> None:
        self.bundle, self.calibration = bundle, calibration

    def tf_function(self, dtype: str = "uint8") -> Any:
        """Build a TensorFlow function from pixels (N, height, width, 3) of this dtype to probabilities."""
        import keras
        import tensorflow as tf

        info, model = self.bundle.info, self.bundle.model
        network = keras.Model(model.inputs, model.get_layer("logits").output)

        def probabilities(image: Any) -> Any:
            logits = tf.cast(network(image, training=False), tf.float32)
            return getattr(tf.nn, info.activation)(logits / info.temperature, name="probabilities")

        shape = (None, *info.geometry.image_size.shape)
        return tf.function(probabilities, [tf.TensorSpec(shape, dtype, name="image")], autograph=False)

    def freeze(self, dtype: str = "uint8") -> Any:
        """Build the same function with its weights as constants.

        Without freezing, tf2onnx mistakes two weights of EfficientNetB0 for inputs.
        """
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

        return convert_variables_to_constants_v2(self.tf_function(dtype).get_concrete_function())

    @functools.cached_property
    def frozen_uint8(self) -> Any:
        """The frozen function that takes uint8."""
        return self.freeze()

    @functools.cached_property
    def onnx(self) -> Any:
        """The float32 ONNX model."""
        import onnx
        import tf2onnx

        names = {self.frozen_uint8.inputs[0].name: "image", self.frozen_uint8.outputs[0].name: "probabilities"}
        model, _ = tf2onnx.convert.from_graph_def(
            self.frozen_uint8.graph.as_graph_def(),
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
        properties = {key: json.dumps(value) for key, value in metadata(self.bundle).items()}
        onnx.helper.set_model_props(model, properties)
        onnx.checker.check_model(model)
        return model


def metadata(bundle: Bundle) -> dict[str, Any]:
    """The metadata with which an exported file can be used without its bundle."""
    info = bundle.info
    cut = {"decode_size": info.decode_size} if info.geometry.is_cut else {}
    then = "to decode_size, and image_size cut out of the centre" if cut else "to image_size"
    return {
        "class_names": info.class_names,
        "image_size": info.image_size,
        **cut,
        "resize": info.resize,
        "preprocessing": "RGB pixels as uint8: EXIF orientation applied, transparency over white, resized by "
        f"bilinear interpolation with anti-aliasing {then}; scaling is inside the network",
        "temperature": info.temperature,
        **({"decision": asdict(info.decision)} if info.decision else {}),
        **({"thresholds": info.thresholds} if info.is_multi_label else {}),
        **({"groups": info.groups} if info.groups else {}),
        "architecture": info.architecture,
    }


# -- TensorFlow -----------------------------------------------------------------------------------------------


def _write_saved_model(network: Network, path: Path) -> None:
    import tensorflow as tf

    from cnnray.models import graph_decode

    info, module = network.bundle.info, tf.Module()
    threshold = info.decision.thresholds.get(FLOAT32) if info.decision else None
    if info.decision and threshold is None:
        raise BundleError("the bundle has no confidence threshold for float32")
    groups = Groups.of(info.groups, info.class_names) if info.groups and threshold else None
    module.weights = [variable.value for variable in network.bundle.model.variables]
    predict = network.tf_function()

    def predict_pixels(image: Any) -> dict[str, Any]:
        names, probabilities = tf.constant([info.class_names]), predict(image)
        outputs = {"probabilities": probabilities, "class_names": tf.tile(names, [tf.shape(image)[0], 1])}
        if threshold:
            unsure = tf.reduce_max(probabilities, 1) < threshold.confidence
            best = tf.one_hot(tf.argmax(probabilities, 1), len(info.class_names), True, False, dtype=tf.bool)
            masks = best | (unsure[:, None] & (probabilities >= threshold.candidate))
            outputs |= {"unsure": unsure, "candidates": masks}
            if groups:
                of_groups = probabilities @ tf.constant(groups.membership)
                is_named = tf.reduce_max(probabilities, 1) < threshold.group_below
                is_named &= tf.reduce_max(of_groups, 1) >= (2.0 if threshold.group is None else threshold.group)
                outputs["group"] = tf.where(is_named, tf.gather([*groups.names], tf.argmax(of_groups, 1)), "")
        if info.thresholds is not None:
            outputs["labels"] = probabilities >= tf.constant([info.thresholds])
        return outputs

    def decode(data: Any) -> Any:
        return graph_decode.decode(data, info.geometry)

    def predict_encoded(image_bytes: Any) -> dict[str, Any]:
        return predict_pixels(tf.map_fn(decode, image_bytes, fn_output_signature=tf.uint8))

    module.pixels = tf.function(predict_pixels, predict.input_signature, autograph=False)
    module.encoded = tf.function(predict_encoded, [tf.TensorSpec((None,), tf.string, "image_bytes")], autograph=False)
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

    float32, prepared = path.with_suffix(".float.onnx"), path.with_suffix(".prepared.onnx")
    _write_onnx(network, float32)
    quant_pre_process(float32, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # The softmax or the last sigmoid stays float32. Otherwise probabilities would be rounded to 1/256.
        nodes_to_exclude=[
            node.name
            for node in network.onnx.graph.node
            if node.op_type == "Softmax" or "probabilities" in node.output
        ],
    )
    float32.unlink()
    prepared.unlink()


# -- LiteRT ---------------------------------------------------------------------------------------------------


def _write_litert(network: Network, path: Path) -> None:
    _convert_to_litert(network, path, _make_converter(network.frozen_uint8))


def _write_litert_float16(network: Network, path: Path) -> None:
    import tensorflow as tf

    converter = _make_converter(network.frozen_uint8)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    _convert_to_litert(network, path, converter)


def _write_litert_int8(network: Network, path: Path) -> None:
    import tensorflow as tf

    def representative_dataset() -> Iterator[list[Any]]:
        # A black and a white pixel in the first image make the range of the input 0 to 255.
        first, *others = network.calibration.astype(np.float32)
        first[0, 0], first[0, 1] = 0, 255
        for image in (first, *others):
            yield [image[None]]

    converter = _make_converter(network.freeze("float32"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative_dataset
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.uint8
    converter.inference_output_type = tf.uint8
    _convert_to_litert(network, path, converter)


def _make_converter(frozen: Any) -> Any:
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
"""The formats by name, in the order in which export makes them."""
