"""TensorFlow Serving's REST API, with the signatures of the SavedModel that export writes.

`serving_default` takes `image`, pixels [N, size, size, 3]; `encoded` takes `image_bytes`, `{"b64": ...}`. Which of
the two is meant is seen by what comes. Both give `probabilities` and `class_names`, each [N, classes].
"""

import json
from typing import Any

from fastapi import APIRouter, Request

from cnnray.serving.bodies import RequestError, base64_of, body_of, parsed
from cnnray.serving.open_inference import pixels_of
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


# Before the routes that `NAME:predict` fits as well.
@router.post("/models/{model}:predict", openapi_extra=_BODY)
@router.post("/models/{model}/versions/{version}:predict", openapi_extra=_BODY)
async def predict(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """Classify a batch, in rows (`instances`) or columns (`inputs`)."""
    service: Service = request.app.state.service
    served = service.served(model, version)
    found, by_row = await service.read(_read, request)
    names, size = served.bundle.info.class_names, served.bundle.info.image_size
    if all(isinstance(one, bytes) for one in found):
        rows = await service.classify_all(served, found)
    else:
        pixels = pixels_of(found)
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
    asked = service.served(model, version)
    assert service.models is not None
    there = [asked.version] if version else [one.version for one, _ in service.models.versions(model)]
    fine = {"error_code": "OK", "error_message": ""}
    return {"model_version_status": [{"version": one, "state": "AVAILABLE", "status": fine} for one in there]}


@router.get("/models/{model}/metadata")
@router.get("/models/{model}/versions/{version}/metadata")
async def metadata(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """The signatures."""
    served = request.app.state.service.served(model, version)
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
    """The images, each as bytes or as lists of pixels, and whether they came in rows."""
    return await parsed(lambda body: _parsed(body, settings), await body_of(request, settings))


def _parsed(body: bytes, settings: Settings) -> tuple[list[Any], bool]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise RequestError(400, f"The JSON cannot be read: {error}.") from None
    if not isinstance(found, dict) or ("instances" in found) == ("inputs" in found):
        raise RequestError(400, "The JSON has not just one of instances and inputs.")
    signature, by_row = found.get("signature_name", "serving_default"), "instances" in found
    if signature not in ("serving_default", "encoded", ""):
        raise RequestError(400, f"There is no signature {signature!r}; there are serving_default and encoded.")
    given = found["instances" if by_row else "inputs"]
    if not by_row and isinstance(given, dict) and "b64" not in given:
        given = _only(given)
    if not isinstance(given, list):
        given = [given]
    if not 1 <= len(given) <= settings.max_images:
        raise RequestError(413 if given else 400, f"A request may have 1 to {settings.max_images} images.")
    return [_image(one) for one in given], by_row


def _image(given: Any) -> Any:
    if isinstance(given, dict) and "b64" not in given:
        given = _only(given)
    if isinstance(given, dict):
        if not isinstance(given.get("b64"), str):
            raise RequestError(400, 'An image is not {"b64": ...} of a string.')
        return base64_of(given["b64"])
    return given


def _only(given: dict[str, Any]) -> Any:
    """The one input of a signature."""
    if len(given) != 1 or next(iter(given)) not in ("image", "image_bytes"):
        raise RequestError(400, f"The inputs are {sorted(given)}; expected 'image' or 'image_bytes'.")
    return next(iter(given.values()))
