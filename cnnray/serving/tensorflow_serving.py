"""TensorFlow Serving's REST API, with the signatures of the exported SavedModel.

The signature `serving_default` takes `image`, pixels [N, size, size, 3]; `encoded` takes `image_bytes`,
`{"b64": ...}`. The content of the request selects the signature. The outputs of both are `probabilities` and
`class_names`, each [N, classes].
"""

import json
from typing import Any

from fastapi import APIRouter, Request

from cnnray.serving.bodies import RequestError, decode_base64, parse_body, read_body
from cnnray.serving.open_inference import pixels_from_lists
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

router = APIRouter(prefix="/v1", tags=["TensorFlow Serving"])

_EXAMPLE = {"instances": [{"b64": "..."}]}
_BODY = {
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
    }
}


# These come before the routes whose pattern `NAME:predict` matches, too.
@router.post("/models/{model}:predict", openapi_extra=_BODY)
@router.post("/models/{model}/versions/{version}:predict", openapi_extra=_BODY)
async def predict(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """Classify a batch in row format (`instances`) or column format (`inputs`)."""
    service: Service = request.app.state.service
    served = service.choose_model(model, version)
    images, by_row = await service.read(_read, request)
    names, size = served.bundle.info.class_names, served.bundle.info.image_size
    if all(isinstance(image, bytes) for image in images):
        rows = await service.classify_all(served, images)
    else:
        pixels = pixels_from_lists(images)
        if pixels.shape[1:] != (size, size, 3):
            raise RequestError(400, f"image is {list(pixels.shape)}; expected [N, {size}, {size}, 3].")
        rows = await service.classify_pixels(served, pixels)
    probabilities = rows.tolist()
    if by_row:
        return {"predictions": [{"probabilities": row, "class_names": names} for row in probabilities]}
    return {"outputs": {"probabilities": probabilities, "class_names": [names] * len(probabilities)}}


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
    size, classes = served.bundle.info.image_size, len(served.bundle.info.class_names)

    def tensor(name: str, kind: str, *shape: int) -> dict[str, Any]:
        dimensions = [{"size": str(length), "name": ""} for length in shape]
        return {name: {"dtype": kind, "tensor_shape": {"dim": dimensions, "unknown_rank": False}, "name": name}}

    outputs = tensor("probabilities", "DT_FLOAT", -1, classes) | tensor("class_names", "DT_STRING", -1, classes)
    method = "tensorflow/serving/predict"
    signatures = {
        name: {"inputs": inputs, "outputs": outputs, "method_name": method}
        for name, inputs in (
            ("serving_default", tensor("image", "DT_UINT8", -1, size, size, 3)),
            ("encoded", tensor("image_bytes", "DT_STRING", -1)),
        )
    }
    return {
        "model_spec": {"name": model, "signature_name": "", "version": served.version},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


async def _read(request: Request, settings: Settings) -> tuple[list[Any], bool]:
    """The images, each as bytes or as lists of pixels, and whether they came in row format."""
    return await parse_body(lambda body: _parse(body, settings), await read_body(request, settings))


def _parse(body: bytes, settings: Settings) -> tuple[list[Any], bool]:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise RequestError(400, f"The JSON cannot be read: {error}.") from None
    if not isinstance(content, dict) or ("instances" in content) == ("inputs" in content):
        raise RequestError(400, "The JSON must have either instances or inputs.")
    signature, by_row = content.get("signature_name", "serving_default"), "instances" in content
    if signature not in ("serving_default", "encoded", ""):
        raise RequestError(400, f"There is no signature {signature!r}; there are serving_default and encoded.")
    images = content["instances" if by_row else "inputs"]
    if not by_row and isinstance(images, dict) and "b64" not in images:
        images = _only_input(images)
    if not isinstance(images, list):
        images = [images]
    if not 1 <= len(images) <= settings.max_images:
        raise RequestError(413 if images else 400, f"A request may have 1 to {settings.max_images} images.")
    return [_parse_image(image) for image in images], by_row


def _parse_image(image: Any) -> Any:
    """An image as bytes, or as lists of pixels."""
    if isinstance(image, dict) and "b64" not in image:
        image = _only_input(image)
    if isinstance(image, dict):
        if not isinstance(image.get("b64"), str):
            raise RequestError(400, 'An image is not {"b64": ...} with a string.')
        return decode_base64(image["b64"])
    return image


def _only_input(inputs: dict[str, Any]) -> Any:
    """The value of a signature's single input."""
    if len(inputs) != 1 or next(iter(inputs)) not in ("image", "image_bytes"):
        raise RequestError(400, f"The inputs are {sorted(inputs)}; expected 'image' or 'image_bytes'.")
    return next(iter(inputs.values()))
