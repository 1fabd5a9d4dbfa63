"""The Open Inference Protocol v2 over REST, with binary tensors, as KServe and Triton speak it.

A model takes either `image`, UINT8 [N, size, size, 3], or `image_bytes`, BYTES [N]: encoded images (base64 in JSON).
It gives `probabilities`, FP32 [N, classes] (with the parameter `classification`: k, BYTES [N, k] of
`probability:index:name`), and `label`, BYTES [N].
"""

import importlib.metadata
import json
import struct
from typing import Any

import numpy as np
import pydantic
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from cnnray.models.predictor import rank_classes
from cnnray.models.runtimes import Images, Probabilities
from cnnray.serving.bodies import RequestError, base64_of, body_of, parsed, sentence_of
from cnnray.serving.models import Served
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])

_HEADER_LENGTH = "inference-header-content-length"


class InferInput(pydantic.BaseModel):
    """A tensor that is given; its content is in `data`, or behind the JSON where `binary_data_size` says so."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferOutput(pydantic.BaseModel):
    """A tensor that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(pydantic.BaseModel):
    """One of the two inputs; no outputs are all outputs."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[InferInput] = pydantic.Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = None


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Name and version of the server."""
    version = importlib.metadata.version("cnnray")
    return {"name": "cnnray", "version": version, "extensions": ["binary_tensor_data", "classification"]}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Whether the process answers."""
    return {"live": True}


@router.get("/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """Whether models are loaded, and have answered an image."""
    request.app.state.service.served()
    return {"ready": True}


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """Inputs and outputs of a model."""
    service: Service = request.app.state.service
    served = service.served(model, version)
    size, classes = served.bundle.info.image_size, len(served.bundle.info.class_names)
    assert service.models is not None
    return {
        "name": model,
        "versions": [one.version for one, _ in service.models.versions(model)],
        "platform": served.engine,
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [-1, size, size, 3]},
            {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
    }


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """Whether a model is loaded."""
    request.app.state.service.served(model, version)
    return {"name": model, "ready": True}


@router.post("/models/{model}/infer", openapi_extra=_BODY)
@router.post("/models/{model}/versions/{version}/infer", openapi_extra=_BODY)
async def infer(request: Request, model: str, version: str | None = None) -> Response:
    """Classify a batch."""
    service: Service = request.app.state.service
    served = service.served(model, version)
    asked, tensor = await service.read(_read, request)
    size = served.bundle.info.image_size
    if isinstance(tensor, list):
        rows = await service.classify_all(served, tensor)
    else:
        if tensor.shape[1:] != (size, size, 3):
            raise RequestError(400, f"image is {list(tensor.shape)}; expected [N, {size}, {size}, 3].")
        rows = await service.classify_pixels(served, tensor)
    return _answer(asked, served, rows)


# -- what comes in --------------------------------------------------------------------------------------------


async def _read(request: Request, settings: Settings) -> tuple[InferRequest, list[bytes] | Images]:
    body, length = await body_of(request, settings), request.headers.get(_HEADER_LENGTH)
    return await parsed(lambda found: _parsed(found, length, settings), body)


def _parsed(body: bytes, length: str | None, settings: Settings) -> tuple[InferRequest, list[bytes] | Images]:
    if length is not None and not (length.isdecimal() and int(length) <= len(body)):
        raise RequestError(400, f"{_HEADER_LENGTH} is {length!r}, and the body has {len(body)} bytes.")
    end = len(body) if length is None else int(length)
    try:
        asked = InferRequest.model_validate_json(body[:end])
    except pydantic.ValidationError as error:
        raise RequestError(400, f"The JSON cannot be read: {sentence_of(error)}.") from None
    for output in asked.outputs or []:
        if output.name not in ("probabilities", "label"):
            raise RequestError(400, f"There is no output {output.name!r}; there are probabilities and label.")
    (given,) = asked.inputs
    count = given.shape[0] if given.shape else 0
    if not 1 <= count <= settings.max_images:
        raise RequestError(413 if count > 0 else 400, f"A request may have 1 to {settings.max_images} images.")
    if (given.name, given.datatype) == ("image_bytes", "BYTES") and given.shape in ([count], [count, 1]):
        return asked, _strings(given, body[end:], count)
    if (given.name, given.datatype) == ("image", "UINT8") and len(given.shape) == 4:
        return asked, _pixels(given, body[end:])
    raise RequestError(
        400,
        f"The input is {given.name!r}, {given.datatype} {given.shape}; expected 'image', UINT8 [N, size, size, 3], "
        "or 'image_bytes', BYTES [N].",
    )


def _is_binary(given: InferInput, binary: bytes) -> bool:
    size = given.parameters.get("binary_data_size")
    if size is not None and size != len(binary):
        raise RequestError(400, f"binary_data_size is {size!r}, and {len(binary)} bytes came.")
    if size is None and given.data is None:
        raise RequestError(400, f"The input {given.name!r} has no data.")
    return size is not None


def _strings(given: InferInput, binary: bytes, count: int) -> list[bytes]:
    found: list[bytes] = []
    if _is_binary(given, binary):
        place = 0
        while place + 4 <= len(binary):
            (length,) = struct.unpack_from("<I", binary, place)
            found.append(binary[place + 4 : place + 4 + length])
            place += 4 + length
        if place != len(binary):
            raise RequestError(400, "The elements of image_bytes do not fill its binary data.")
    else:
        texts = [text for item in given.data or [] for text in (item if isinstance(item, list) else [item])]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(400, "The elements of image_bytes are not strings (of base64).")
        found = [base64_of(text) for text in texts]
    if len(found) != count:
        raise RequestError(400, f"image_bytes has {len(found)} elements, and its shape says {count}.")
    return found


def _pixels(given: InferInput, binary: bytes) -> Images:
    if _is_binary(given, binary):
        values: Any = np.frombuffer(binary, np.uint8)
    else:
        values = pixels_of(given.data)
    if min(given.shape) < 1 or values.size != int(np.prod([*map(int, given.shape)], dtype=object)):
        raise RequestError(400, f"image has {values.size} values, and its shape is {given.shape}.")
    return np.asarray(values.reshape(given.shape))


def pixels_of(values: Any) -> Images:
    """Nested lists of integers from 0 to 255 as uint8.

    Raises:
        RequestError: 400, they are something else.
    """
    try:
        found = np.asarray(values)
    except ValueError:
        raise RequestError(400, "The lists of pixels are not all of the same length.") from None
    if found.dtype.kind not in "iu" or found.size == 0 or found.min() < 0 or found.max() > 255:
        raise RequestError(400, "The pixels are not integers from 0 to 255.")
    return found.astype(np.uint8)


# -- what goes out --------------------------------------------------------------------------------------------


def _answer(asked: InferRequest, served: Served, rows: Probabilities) -> Response:
    wanted = asked.outputs or [InferOutput(name="probabilities"), InferOutput(name="label")]
    outputs, binary = [], b""
    for output in wanted:
        values = _values(output, served, rows)
        stated: dict[str, Any] = {
            "name": output.name,
            "datatype": "FP32" if values.dtype == np.float32 else "BYTES",
            "shape": list(values.shape),
        }
        if output.parameters.get("binary_data", asked.parameters.get("binary_data_output", False)):
            data = _binary(values)
            stated["parameters"] = {"binary_data_size": len(data)}
            binary += data
        else:
            stated["data"] = values.ravel().tolist()
        outputs.append(stated)
    content = {"model_name": served.name, "model_version": served.version, "outputs": outputs}
    if asked.id is not None:
        content["id"] = asked.id
    if not binary:
        return JSONResponse(content)
    header = json.dumps(content).encode()
    return Response(
        header + binary,
        media_type="application/octet-stream",
        headers={"Inference-Header-Content-Length": str(len(header))},
    )


def _values(output: InferOutput, served: Served, rows: Probabilities) -> Any:
    names = served.bundle.info.class_names
    if output.name == "label":
        return np.asarray([names[index] for index in rows.argmax(1)], object)
    count = output.parameters.get("classification")
    if count is None:
        return rows
    if not isinstance(count, int) or count < 1:
        raise RequestError(400, f"classification is {count!r}; expected a number of classes.")
    order = rank_classes(rows, count)
    found = [
        [f"{row[index]:f}:{index}:{names[index]}" for index in best] for row, best in zip(rows, order, strict=True)
    ]
    return np.asarray(found, object)


def _binary(values: Any) -> bytes:
    if values.dtype == np.float32:
        return bytes(values.astype("<f4").tobytes())
    texts = [text.encode() for text in values.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
