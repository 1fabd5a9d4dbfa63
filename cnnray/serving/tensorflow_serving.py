"""TensorFlow Serving's REST API, with the signatures of the exported SavedModel.

The signature `serving_default` takes `image`, pixels [N, height, width, 3]; `encoded` takes `image_bytes`,
`{"b64": ...}`. The content of the request selects the signature. The outputs of both are `probabilities` and
`class_names`, each [N, classes]; those of a model that may be unsure also `unsure` [N] and `candidates` [N, classes],
and, with groups of classes, `group` [N].
"""

import reprlib
from typing import Any

import numpy as np
from starlette.requests import Request

from cnnray.images.decode import BadImage
from cnnray.models.runtimes import Images
from cnnray.serving.bodies import RequestError, decode_base64, parse_json
from cnnray.serving.open_inference import pixels_from_lists
from cnnray.serving.operations import Bodies, Operation
from cnnray.serving.outputs import outputs_of
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

_TAG = "TensorFlow Serving"
_BODIES: Bodies = {
    "application/json": {
        "type": "object",
        "properties": {
            "signature_name": {"type": "string"},
            "instances": {"type": "array", "items": {}},
            "inputs": {},
        },
        "examples": [{"instances": [{"b64": "..."}]}],
    }
}


async def _predict(service: Service, request: Request) -> dict[str, Any]:
    """Classify a batch in row format (`instances`) or column format (`inputs`)."""
    served = service.choose_named(request)
    info = served.bundle.info
    shape = info.geometry.image_size.shape
    images, by_row = await service.read(request, lambda body, settings: _parse(body, shape, settings))
    answers = await service.classify_all(served, images)
    outputs: dict[str, list[Any]] = {
        "probabilities": [answer.probabilities.tolist() for answer in answers],
        "class_names": [info.class_names] * len(answers),
    }
    for name, output in outputs_of(served.rules).items():
        outputs[name] = output.values(answers, len(info.class_names)).tolist()
    if by_row:
        return {"predictions": [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]}
    return {"outputs": outputs}


async def _status(service: Service, request: Request) -> dict[str, Any]:
    """The versions that are loaded."""
    chosen = service.choose_named(request)
    is_one = "version" in request.path_params
    loaded = [chosen] if is_one else [served for served, _ in service.ready_models().versions(chosen.name)]
    ok = {"error_code": "OK", "error_message": ""}
    return {
        "model_version_status": [{"version": served.version, "state": "AVAILABLE", "status": ok} for served in loaded]
    }


async def _metadata(service: Service, request: Request) -> dict[str, Any]:
    """The signatures of a model."""
    served = service.choose_named(request)
    shape, classes = served.bundle.info.geometry.image_size.shape, len(served.bundle.info.class_names)

    def tensor(name: str, kind: str, *shape: int) -> dict[str, Any]:
        dimensions = [{"size": str(length), "name": ""} for length in shape]
        return {name: {"dtype": kind, "tensor_shape": {"dim": dimensions, "unknown_rank": False}, "name": name}}

    outputs = tensor("probabilities", "DT_FLOAT", -1, classes) | tensor("class_names", "DT_STRING", -1, classes)
    for name, output in outputs_of(served.rules).items():
        kind = "DT_STRING" if output.is_text else "DT_BOOL"
        outputs |= tensor(name, kind, *([-1, classes] if output.is_per_class else [-1]))
    method = "tensorflow/serving/predict"
    signatures = {
        name: {"inputs": inputs, "outputs": outputs, "method_name": method}
        for name, inputs in (
            ("serving_default", tensor("image", "DT_UINT8", -1, *shape)),
            ("encoded", tensor("image_bytes", "DT_STRING", -1)),
        )
    }
    return {
        "model_spec": {"name": served.name, "signature_name": "", "version": served.version},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def _parse(
    body: bytes, shape: tuple[int, int, int], settings: Settings
) -> tuple[list[bytes | BadImage] | Images, bool]:
    """The images, encoded or as pixels, uint8 (N, height, width, 3), and whether they came in row format."""
    content = parse_json(body)
    if not isinstance(content, dict) or ("instances" in content) == ("inputs" in content):
        raise RequestError(400, "The JSON must have either instances or inputs.")
    signature, by_row = content.get("signature_name", "serving_default"), "instances" in content
    if signature not in ("serving_default", "encoded", ""):
        raise RequestError(
            400, f"There is no signature {reprlib.repr(signature)}; there are serving_default and encoded."
        )
    values = content["instances" if by_row else "inputs"]
    if not by_row:
        values = _only_input(values)
    if not isinstance(values, list):
        values = [values]
    if not 1 <= len(values) <= settings.max_images:
        raise RequestError(413 if values else 400, f"A request may have 1 to {settings.max_images} images.")
    images = [_only_input(value, f" at index {index}") for index, value in enumerate(values)]
    if isinstance(images[0], dict):
        return [_decode(image, index) for index, image in enumerate(images)], by_row
    pixels = pixels_from_lists(images)
    for index, image in enumerate(pixels):
        if image.shape != shape:
            raise RequestError(400, f"The image at index {index} is {list(image.shape)}; expected {list(shape)}.")
    return np.stack(pixels), by_row


def _decode(image: Any, index: int) -> bytes | BadImage:
    if not isinstance(image, dict) or not isinstance(image.get("b64"), str):
        raise RequestError(400, f'The image at index {index} is not {{"b64": ...}} with a string.')
    return decode_base64(image["b64"])


def _only_input(value: Any, where: str = "") -> Any:
    """The value of a signature's single input where it is named; the value itself where it is not."""
    if not isinstance(value, dict) or "b64" in value:
        return value
    if len(value) != 1 or next(iter(value)) not in ("image", "image_bytes"):
        names = reprlib.repr(sorted(value))
        raise RequestError(400, f"The inputs{where} are {names}; expected 'image' or 'image_bytes'.")
    return next(iter(value.values()))


OPERATIONS = [
    Operation(method, f"/v1/models/{{model}}{version}{path}", handler, bodies=bodies, tag=_TAG)
    for method, path, handler, bodies in (
        # Before the paths whose pattern NAME:predict matches, too.
        ("POST", ":predict", _predict, _BODIES),
        ("GET", "/metadata", _metadata, {}),
        ("GET", "", _status, {}),
    )
    for version in ("", "/versions/{version}")
]
