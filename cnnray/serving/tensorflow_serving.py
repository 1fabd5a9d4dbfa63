"""TensorFlow Serving's REST API, with the signatures of the exported SavedModel.

The signature `serving_default` takes `image`, pixels [N, height, width, 3]; `encoded` takes `image_bytes`,
`{"b64": ...}`. The content of the request selects the signature. The outputs of both are `probabilities` and
`class_names`, each [N, classes].
"""

import functools
import reprlib
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from cnnray.images.decode import BadImage
from cnnray.models.runtimes import Images
from cnnray.serving.bodies import RequestError, decode_base64, parse_body, parse_json, read_body
from cnnray.serving.open_inference import pixels_from_lists
from cnnray.serving.schema import CANARY_KEY_PARAMETER
from cnnray.serving.service import Service, canary_key
from cnnray.serving.settings import Settings

router = APIRouter(prefix="/v1", tags=["TensorFlow Serving"])

_EXAMPLE = {"instances": [{"b64": "..."}]}
_BODY: dict[str, Any] = {
    "parameters": [CANARY_KEY_PARAMETER],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "signature_name": {"type": "string"},
                        "instances": {"type": "array", "items": {}},
                        "inputs": {},
                    },
                },
                "example": _EXAMPLE,
            }
        },
    },
}


# These come before the routes whose pattern `NAME:predict` matches, too.
@router.post("/models/{model}:predict", openapi_extra=_BODY)
@router.post("/models/{model}/versions/{version}:predict", openapi_extra=_BODY)
async def predict(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """Classify a batch in row format (`instances`) or column format (`inputs`)."""
    service: Service = request.app.state.service
    served = service.choose_model(model, version, canary_key(request))
    info = served.bundle.info
    images, by_row = await service.read(functools.partial(_read, info.geometry.image_size.shape), request)
    if isinstance(images, list):
        rows = await service.classify_all(served, images)
    else:
        rows = await service.classify_pixels(served, images)
    probabilities = rows.tolist()
    if by_row:
        return {"predictions": [{"probabilities": row, "class_names": info.class_names} for row in probabilities]}
    return {"outputs": {"probabilities": probabilities, "class_names": [info.class_names] * len(probabilities)}}


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def status(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """The versions that are loaded."""
    service: Service = request.app.state.service
    chosen = service.choose_model(model, version)
    loaded = [chosen] if version else [served for served, _ in service.ready_models().versions(model)]
    ok = {"error_code": "OK", "error_message": ""}
    return {
        "model_version_status": [{"version": served.version, "state": "AVAILABLE", "status": ok} for served in loaded]
    }


@router.get("/models/{model}/metadata")
@router.get("/models/{model}/versions/{version}/metadata")
async def metadata(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """The signatures of a model."""
    served = request.app.state.service.choose_model(model, version)
    shape, classes = served.bundle.info.geometry.image_size.shape, len(served.bundle.info.class_names)

    def tensor(name: str, kind: str, *shape: int) -> dict[str, Any]:
        dimensions = [{"size": str(length), "name": ""} for length in shape]
        return {name: {"dtype": kind, "tensor_shape": {"dim": dimensions, "unknown_rank": False}, "name": name}}

    outputs = tensor("probabilities", "DT_FLOAT", -1, classes) | tensor("class_names", "DT_STRING", -1, classes)
    method = "tensorflow/serving/predict"
    signatures = {
        name: {"inputs": inputs, "outputs": outputs, "method_name": method}
        for name, inputs in (
            ("serving_default", tensor("image", "DT_UINT8", -1, *shape)),
            ("encoded", tensor("image_bytes", "DT_STRING", -1)),
        )
    }
    return {
        "model_spec": {"name": model, "signature_name": "", "version": served.version},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


async def _read(
    shape: tuple[int, int, int], request: Request, settings: Settings
) -> tuple[list[bytes | BadImage] | Images, bool]:
    """The images, encoded or as pixels, uint8 (N, height, width, 3), and whether they came in row format."""
    return await parse_body(lambda body: _parse(body, shape, settings), await read_body(request, settings))


def _parse(
    body: bytes, shape: tuple[int, int, int], settings: Settings
) -> tuple[list[bytes | BadImage] | Images, bool]:
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
