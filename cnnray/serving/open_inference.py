"""The Open Inference Protocol v2 over REST, with the binary tensors of KServe and Triton.

The input is either `image`, UINT8 [N, size, size, 3], or `image_bytes`, BYTES [N]: encoded images (base64 in JSON).
The outputs are `probabilities`, FP32 [N, classes], and `label`, BYTES [N]. With the parameter `classification`: k,
`probabilities` is BYTES [N, k] of `probability:index:name`.
"""

import importlib.metadata
import json
import struct
from typing import Any

import numpy as np
import pydantic
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from cnnray.models.engines import Images, Probabilities
from cnnray.models.predictor import ranked
from cnnray.serving.bodies import RequestError, decode_base64, describe_error, parse_body, read_body
from cnnray.serving.models import ServedModel
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])

_HEADER_LENGTH = "inference-header-content-length"


class InferInput(pydantic.BaseModel):
    """An input tensor. Its content is in `data` or, with the parameter `binary_data_size`, behind the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferOutput(pydantic.BaseModel):
    """A requested output tensor."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(pydantic.BaseModel):
    """A request with one of the two inputs. Without `outputs`, the response has all outputs."""

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
    """Whether the models are loaded and warmed up."""
    request.app.state.service.ready_models()
    return {"ready": True}


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(request: Request, model: str, version: str | None = None) -> dict[str, Any]:
    """Inputs and outputs of a model."""
    service: Service = request.app.state.service
    served = service.choose_model(model, version)
    size, classes = served.bundle.info.image_size, len(served.bundle.info.class_names)
    return {
        "name": model,
        "versions": [other.version for other, _ in service.ready_models().versions(model)],
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
    request.app.state.service.choose_model(model, version)
    return {"name": model, "ready": True}


@router.post("/models/{model}/infer", openapi_extra=_BODY)
@router.post("/models/{model}/versions/{version}/infer", openapi_extra=_BODY)
async def infer(request: Request, model: str, version: str | None = None) -> Response:
    """Classify a batch."""
    service: Service = request.app.state.service
    served = service.choose_model(model, version)
    infer_request, images = await service.read(_read, request)
    size = served.bundle.info.image_size
    if isinstance(images, list):
        rows = await service.classify_all(served, images)
    else:
        if images.shape[1:] != (size, size, 3):
            raise RequestError(400, f"image is {list(images.shape)}; expected [N, {size}, {size}, 3].")
        rows = await service.classify_pixels(served, images)
    return _create_response(infer_request, served, rows)


# -- requests -------------------------------------------------------------------------------------------------


async def _read(request: Request, settings: Settings) -> tuple[InferRequest, list[bytes] | Images]:
    """The request, and its images: encoded, or as pixels, uint8 with 4 dimensions."""
    body, length = await read_body(request, settings), request.headers.get(_HEADER_LENGTH)
    return await parse_body(lambda content: _parse(content, length, settings), body)


def _parse(body: bytes, length: str | None, settings: Settings) -> tuple[InferRequest, list[bytes] | Images]:
    if length is not None and not (length.isdecimal() and int(length) <= len(body)):
        raise RequestError(400, f"{_HEADER_LENGTH} is {length!r}, and the body has {len(body)} bytes.")
    end = len(body) if length is None else int(length)
    try:
        infer_request = InferRequest.model_validate_json(body[:end])
    except pydantic.ValidationError as error:
        raise RequestError(400, f"The JSON cannot be read: {describe_error(error)}.") from None
    for output in infer_request.outputs or []:
        if output.name not in ("probabilities", "label"):
            raise RequestError(400, f"There is no output {output.name!r}; there are probabilities and label.")
    (tensor,) = infer_request.inputs
    count = tensor.shape[0] if tensor.shape else 0
    if not 1 <= count <= settings.max_images:
        raise RequestError(413 if count > 0 else 400, f"A request may have 1 to {settings.max_images} images.")
    if (tensor.name, tensor.datatype) == ("image_bytes", "BYTES") and tensor.shape in ([count], [count, 1]):
        return infer_request, _parse_strings(tensor, body[end:], count)
    if (tensor.name, tensor.datatype) == ("image", "UINT8") and len(tensor.shape) == 4:
        return infer_request, _parse_pixels(tensor, body[end:])
    raise RequestError(
        400,
        f"The input is {tensor.name!r}, {tensor.datatype} {tensor.shape}; expected 'image', UINT8 "
        "[N, size, size, 3], or 'image_bytes', BYTES [N].",
    )


def _is_binary(tensor: InferInput, binary: bytes) -> bool:
    """Whether the tensor's content is behind the JSON.

    Raises:
        RequestError: 400, there is no content, or its size is wrong.
    """
    size = tensor.parameters.get("binary_data_size")
    if size is not None and size != len(binary):
        raise RequestError(400, f"binary_data_size is {size!r}, and {len(binary)} bytes follow the JSON.")
    if size is None and tensor.data is None:
        raise RequestError(400, f"The input {tensor.name!r} has no data.")
    return size is not None


def _parse_strings(tensor: InferInput, binary: bytes, count: int) -> list[bytes]:
    elements: list[bytes] = []
    if _is_binary(tensor, binary):
        offset = 0
        while offset + 4 <= len(binary):
            (length,) = struct.unpack_from("<I", binary, offset)
            elements.append(binary[offset + 4 : offset + 4 + length])
            offset += 4 + length
        if offset != len(binary):
            raise RequestError(400, "The elements of image_bytes do not fill its binary data.")
    else:
        texts = [text for item in tensor.data or [] for text in (item if isinstance(item, list) else [item])]
        if not all(isinstance(text, str) for text in texts):
            raise RequestError(400, "The elements of image_bytes are not strings (of base64).")
        elements = [decode_base64(text) for text in texts]
    if len(elements) != count:
        raise RequestError(400, f"image_bytes has {len(elements)} elements, and its shape says {count}.")
    return elements


def _parse_pixels(tensor: InferInput, binary: bytes) -> Images:
    if _is_binary(tensor, binary):
        values: Any = np.frombuffer(binary, np.uint8)
    else:
        values = pixels_from_lists(tensor.data)
    if min(tensor.shape) < 1 or values.size != int(np.prod([*map(int, tensor.shape)], dtype=object)):
        raise RequestError(400, f"image has {values.size} values, and its shape is {tensor.shape}.")
    return np.asarray(values.reshape(tensor.shape))


def pixels_from_lists(values: Any) -> Images:
    """Nested lists of integers from 0 to 255 as a uint8 array.

    Raises:
        RequestError: 400, the values are something else.
    """
    try:
        pixels = np.asarray(values)
    except ValueError:
        raise RequestError(400, "The lists of pixels are not all of the same length.") from None
    if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
        raise RequestError(400, "The pixels are not integers from 0 to 255.")
    return pixels.astype(np.uint8)


# -- responses ------------------------------------------------------------------------------------------------


def _create_response(request: InferRequest, served: ServedModel, rows: Probabilities) -> Response:
    outputs, binary = [], b""
    for output in request.outputs or [InferOutput(name="probabilities"), InferOutput(name="label")]:
        values = _output_values(output, served, rows)
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": "FP32" if values.dtype == np.float32 else "BYTES",
            "shape": list(values.shape),
        }
        if output.parameters.get("binary_data", request.parameters.get("binary_data_output", False)):
            data = _to_binary(values)
            tensor["parameters"] = {"binary_data_size": len(data)}
            binary += data
        else:
            tensor["data"] = values.ravel().tolist()
        outputs.append(tensor)
    content = {"model_name": served.name, "model_version": served.version, "outputs": outputs}
    if request.id is not None:
        content["id"] = request.id
    if not binary:
        return JSONResponse(content)
    header = json.dumps(content).encode()
    return Response(
        header + binary,
        media_type="application/octet-stream",
        headers={"Inference-Header-Content-Length": str(len(header))},
    )


def _output_values(output: InferOutput, served: ServedModel, rows: Probabilities) -> Any:
    """A float32 array, or an object array of str."""
    names = served.bundle.info.class_names
    if output.name == "label":
        return np.asarray([names[index] for index in rows.argmax(1)], object)
    count = output.parameters.get("classification")
    if count is None:
        return rows
    if not isinstance(count, int) or count < 1:
        raise RequestError(400, f"classification is {count!r}; expected a number of classes.")
    order = ranked(rows, count)
    texts = [
        [f"{row[index]:f}:{index}:{names[index]}" for index in best] for row, best in zip(rows, order, strict=True)
    ]
    return np.asarray(texts, object)


def _to_binary(values: Any) -> bytes:
    if values.dtype == np.float32:
        return bytes(values.astype("<f4").tobytes())
    elements = [text.encode() for text in values.ravel()]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
