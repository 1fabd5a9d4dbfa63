"""The Open Inference Protocol v2 over REST, with the binary tensors of KServe and Triton.

The input is either `image`, UINT8 [N, height, width, 3], or `image_bytes`, BYTES [N]: encoded images (base64 in
JSON).
The outputs are `probabilities`, FP32 [N, classes], and `label`, BYTES [N]. With the parameter `classification`: k,
`probabilities` is BYTES [N, k] of `probability:index:name`. A model that may be unsure has two more: `unsure`, BOOL
[N], where `label` is empty, and `candidates`, BOOL [N, classes], which for the other images are their class alone;
with groups of classes also `group`, BYTES [N], empty where none is named. One with several labels has `labels`, BOOL
[N, classes], too.
"""

import itertools
import json
import math
import reprlib
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import cnnray
from cnnray.images.decode import BadImage
from cnnray.models.answers import Answer, rank_classes
from cnnray.models.runtimes import Images
from cnnray.serving.bodies import RequestError, decode_base64, parse_model
from cnnray.serving.models import ServedModel
from cnnray.serving.operations import BINARY, Bodies, Operation
from cnnray.serving.outputs import outputs_of
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

_TAG = "Open Inference Protocol v2"
_HEADER_LENGTH = "inference-header-content-length"


Integer = Annotated[int, pydantic.Field(strict=True, lt=2**63)]
Flag = Annotated[bool, pydantic.Field(strict=True)]


class InputParameters(pydantic.BaseModel):
    """Parameters of an input tensor; others are ignored."""

    binary_data_size: Integer | None = None


class InferInput(pydantic.BaseModel):
    """An input tensor. Its content is in `data` or, with the parameter `binary_data_size`, behind the JSON."""

    name: str
    shape: list[Integer]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(pydantic.BaseModel):
    """Parameters of an output tensor; others are ignored."""

    binary_data: Flag | None = None
    classification: Annotated[Integer, pydantic.Field(ge=1)] | None = None


class InferOutput(pydantic.BaseModel):
    """A requested output tensor."""

    name: str
    parameters: OutputParameters = OutputParameters()


class RequestParameters(pydantic.BaseModel):
    """Parameters of a request; others are ignored."""

    binary_data_output: Flag = False


class InferRequest(pydantic.BaseModel):
    """A request with one of the two inputs. Without `outputs`, the response has all outputs."""

    id: str | None = None
    parameters: RequestParameters = RequestParameters()
    inputs: list[InferInput] = pydantic.Field(min_length=1, max_length=1)
    outputs: list[InferOutput] | None = pydantic.Field(None, max_length=16)


SERVER = {"name": "cnnray", "version": cnnray.__version__, "extensions": ["binary_tensor_data", "classification"]}
"""Metadata of the server."""


async def _server_metadata(service: Service, request: Request) -> dict[str, Any]:
    """Name and version of the server."""
    return SERVER


async def _live(service: Service, request: Request) -> dict[str, bool]:
    """Whether the process answers."""
    return {"live": True}


async def _ready(service: Service, request: Request) -> dict[str, bool]:
    """Whether the models are loaded and warmed up."""
    service.ready_models()
    return {"ready": True}


async def _model_metadata(service: Service, request: Request) -> dict[str, Any]:
    """Inputs and outputs of a model."""
    return describe_model(service, service.choose_named(request))


def describe_model(service: Service, served: ServedModel) -> dict[str, Any]:
    """Metadata of a model."""
    size, classes = served.bundle.info.geometry.image_size, len(served.bundle.info.class_names)
    others = outputs_of(served.rules).items()
    described: dict[str, dict[str, Any]] = {
        "probabilities": {"datatype": "FP32", "shape": [-1, classes]},
        "label": {"datatype": "BYTES", "shape": [-1]},
        **{
            name: {
                "datatype": "BYTES" if output.is_text else "BOOL",
                "shape": [-1, classes] if output.is_per_class else [-1],
            }
            for name, output in others
        },
    }
    return {
        "name": served.name,
        "versions": [other.version for other, _ in service.ready_models().versions(served.name)],
        "platform": served.engine,
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [-1, *size.shape]},
            {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [{"name": name, **output} for name, output in described.items()],
    }


def _outputs(served: ServedModel) -> tuple[str, ...]:
    """The names of a model's outputs."""
    return "probabilities", "label", *outputs_of(served.rules)


async def _model_ready(service: Service, request: Request) -> dict[str, Any]:
    """Whether a model is loaded."""
    return {"name": service.choose_named(request).name, "ready": True}


async def _infer(service: Service, request: Request) -> Response:
    """Classify a batch."""
    served = service.choose_named(request)
    length = request.headers.get(_HEADER_LENGTH)
    infer_request, images = await service.read(request, lambda body, settings: _parse(body, length, settings))
    check_outputs(infer_request, served)
    return _create_response(infer_request, served, await classify(service, served, images))


def check_outputs(infer_request: InferRequest, served: ServedModel) -> None:
    """
    Raises:
        RequestError: 400, the request asks for an output that the model does not have.
    """
    names = _outputs(served)
    for output in infer_request.outputs or []:
        if output.name not in names:
            raise RequestError(400, f"There is no output {reprlib.repr(output.name)}; there are {', '.join(names)}.")


async def classify(service: Service, served: ServedModel, images: list[bytes | BadImage] | Images) -> list[Answer]:
    """The answers to a request's images.

    Raises:
        RequestError: pixels have another shape than the network takes, or see `Service.classify_all`.
    """
    shape = served.bundle.info.geometry.image_size.shape
    if not isinstance(images, list) and images.shape[1:] != shape:
        raise RequestError(400, f"image is {list(images.shape)}; expected [N, {', '.join(map(str, shape))}].")
    return await service.classify_all(served, images)


# -- requests -------------------------------------------------------------------------------------------------


def _parse(
    body: bytes, length: str | None, settings: Settings
) -> tuple[InferRequest, list[bytes | BadImage] | Images]:
    """The request, and its images: encoded, or as pixels, uint8 with 4 dimensions."""
    end = len(body) if length is None else _header_length(length, len(body))
    infer_request = parse_model(InferRequest, body[:end])
    images = read_images(infer_request, body[end:], settings)
    for tensor in infer_request.inputs:
        tensor.data = None  # takes more memory than the images
    return infer_request, images


def read_images(infer_request: InferRequest, binary: bytes, settings: Settings) -> list[bytes | BadImage] | Images:
    """The images of a request: encoded, or as pixels, uint8 with 4 dimensions.

    Args:
        infer_request: the request.
        binary: what follows the JSON.
        settings: the largest number of images.

    Raises:
        RequestError: 400 or 413, the request or its tensor cannot be used.
    """
    (tensor,) = infer_request.inputs
    count = tensor.shape[0] if tensor.shape else 0
    if not 1 <= count <= settings.max_images:
        raise RequestError(413 if count > 0 else 400, f"A request may have 1 to {settings.max_images} images.")
    if (tensor.name, tensor.datatype) == ("image_bytes", "BYTES") and tensor.shape in ([count], [count, 1]):
        return _parse_strings(tensor, binary, count)
    if (tensor.name, tensor.datatype) == ("image", "UINT8") and len(tensor.shape) == 4:
        return _parse_pixels(tensor, binary, count)
    raise RequestError(
        400,
        f"The input is {reprlib.repr(tensor.name)}, {reprlib.repr(tensor.datatype)} {reprlib.repr(tensor.shape)}; "
        "expected 'image', UINT8 [N, height, width, 3], or 'image_bytes', BYTES [N].",
    )


def _header_length(text: str, body: int) -> int:
    """The length of the JSON at the start of a body of `body` bytes.

    Raises:
        RequestError: 400, the text is no such length.
    """
    if not (text.isdecimal() and len(text) < 20 and int(text) <= body):
        raise RequestError(400, f"{_HEADER_LENGTH} is {reprlib.repr(text)}, and the body has {body} bytes.")
    return int(text)


def _is_binary(tensor: InferInput, binary: bytes) -> bool:
    """Whether the tensor's content is behind the JSON.

    Raises:
        RequestError: 400, there is no content, or its size is wrong.
    """
    size = tensor.parameters.binary_data_size
    if size is not None and size != len(binary):
        raise RequestError(400, f"binary_data_size is {size}, and {len(binary)} bytes follow the JSON.")
    if size is None and tensor.data is None:
        raise RequestError(400, f"The input {tensor.name} has no data.")
    return size is not None


def _parse_strings(tensor: InferInput, binary: bytes, count: int) -> list[bytes | BadImage]:
    elements: list[Any] = []
    is_binary = _is_binary(tensor, binary)
    if is_binary:
        offset = 0
        while offset + 4 <= len(binary):
            (length,) = struct.unpack_from("<I", binary, offset)
            elements.append(binary[offset + 4 : offset + 4 + length])
            offset += 4 + length
        if offset != len(binary):
            raise RequestError(400, "The elements of image_bytes do not fill its binary data.")
    else:
        elements = [text for item in tensor.data or [] for text in (item if isinstance(item, list) else [item])]
    if len(elements) != count:
        raise RequestError(400, f"image_bytes has {len(elements)} elements, and its shape says {count}.")
    return elements if is_binary else [_decode(text, index) for index, text in enumerate(elements)]


def _decode(text: Any, index: int) -> bytes | BadImage:
    if not isinstance(text, str):
        raise RequestError(400, f"The image at index {index} is no string (of base64).")
    return decode_base64(text)


def _parse_pixels(tensor: InferInput, binary: bytes, count: int) -> Images:
    size = math.prod(tensor.shape[1:]) if min(tensor.shape) > 0 else -1
    if _is_binary(tensor, binary):
        if len(binary) != count * size:
            raise RequestError(400, f"image has {len(binary)} values, and its shape is {tensor.shape}.")
        return np.frombuffer(binary, np.uint8).reshape(tensor.shape)
    # The values of an image follow those of the image before, and may be nested.
    values = tensor.data or []
    step = max(1, len(values) // count)
    images = pixels_from_lists([values[start : start + step] for start in range(0, len(values), step)])
    for index, image in enumerate(images):
        if image.size != size or index >= count:
            raise RequestError(
                400, f"The image at index {index} has {image.size} values, and its shape is {tensor.shape[1:]}."
            )
    if len(images) != count:
        raise RequestError(400, f"image has {len(images)} images, and its shape is {tensor.shape}.")
    return np.stack([image.reshape(tensor.shape[1:]) for image in images])


def pixels_from_lists(images: Sequence[Any]) -> list[Images]:
    """Images as nested lists of integers from 0 to 255, each as a uint8 array of its own shape.

    Raises:
        RequestError: 400, the values are something else; the message says at which index.
    """
    return [_image_from_lists(values, index) for index, values in enumerate(images)]


def _image_from_lists(values: Any, index: int) -> Images:
    try:
        pixels = np.asarray(values)
    except ValueError:
        raise RequestError(
            400, f"The lists of pixels of the image at index {index} are not all of the same length."
        ) from None
    leaves = values if pixels.ndim else [values]
    for _ in range(pixels.ndim - 1):
        leaves = itertools.chain.from_iterable(leaves)
    # NumPy would read true as 1.
    if set(map(type, leaves)) != {int} or pixels.min() < 0 or pixels.max() > 255:
        raise RequestError(400, f"The pixels of the image at index {index} are not integers from 0 to 255.")
    return pixels.astype(np.uint8)


# -- responses ------------------------------------------------------------------------------------------------


def requested_outputs(
    request: InferRequest, served: ServedModel, answers: Sequence[Answer]
) -> Iterator[tuple[InferOutput, Any]]:
    """The outputs that a request asks for, each with its values: a float32, bool, or object array of str."""
    for output in request.outputs or [InferOutput(name=name) for name in _outputs(served)]:
        yield output, _output_values(output, served, answers)


def _create_response(request: InferRequest, served: ServedModel, answers: Sequence[Answer]) -> Response:
    outputs, binary = [], b""
    for output, values in requested_outputs(request, served, answers):
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": datatype(values),
            "shape": list(values.shape),
        }
        binary_data = output.parameters.binary_data
        if request.parameters.binary_data_output if binary_data is None else binary_data:
            data = to_binary(values)
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


def datatype(values: Any) -> str:
    """The protocol's name of an output's type."""
    return {"float32": "FP32", "bool": "BOOL"}.get(values.dtype.name, "BYTES")


def _output_values(output: InferOutput, served: ServedModel, answers: Sequence[Answer]) -> Any:
    names, others = served.bundle.info.class_names, outputs_of(served.rules)
    if output.name in others:
        return others[output.name].values(answers, len(names))
    if output.name == "label":
        given = [answer.prediction for answer in answers]
        return np.asarray(["" if index is None else names[index] for index in given], object)
    rows = np.stack([answer.probabilities for answer in answers])
    count = output.parameters.classification
    if count is None:
        return rows
    order = rank_classes(rows, count)
    texts = [
        [f"{row[index]:f}:{index}:{names[index]}" for index in best] for row, best in zip(rows, order, strict=True)
    ]
    return np.asarray(texts, object)


def to_binary(values: Any) -> bytes:
    """The values of a tensor as bytes; strings each behind its length."""
    if values.dtype == np.float32:
        return bytes(values.astype("<f4").tobytes())
    if values.dtype == np.bool_:
        return bytes(values.tobytes())
    return pack_strings([text.encode() for text in values.ravel()])


def pack_strings(elements: Sequence[bytes]) -> bytes:
    """Strings as bytes, each behind its length."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


_BODIES: Bodies = {"application/json": InferRequest, "application/octet-stream": BINARY}
OPERATIONS = [
    *(
        Operation(method, f"/v2/models/{{model}}{version}{path}", handler, bodies=bodies, tag=_TAG)
        for method, path, handler, bodies in (
            ("POST", "/infer", _infer, _BODIES),
            ("GET", "/ready", _model_ready, {}),
            ("GET", "", _model_metadata, {}),
        )
        for version in ("", "/versions/{version}")
    ),
    Operation("GET", "/v2", _server_metadata, tag=_TAG),
    Operation("GET", "/v2/health/live", _live, tag=_TAG, failures=()),
    Operation("GET", "/v2/health/ready", _ready, tag=_TAG, failures=(503,)),
]
