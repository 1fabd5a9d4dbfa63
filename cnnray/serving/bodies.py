"""Parses request bodies, within limits."""

import base64
import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np
import pydantic
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from cnnray.errors import BadInputError
from cnnray.images.decode import BadImage
from cnnray.serving.schema import JsonImages
from cnnray.serving.settings import Settings

Model = TypeVar("Model", bound=pydantic.BaseModel)

LARGE_BODY = 2**18
"""Size in bytes above which a body is parsed in a thread."""
_MOST_MEMORY = 2**29
"""Largest size in bytes of the objects that a JSON may become. Three bytes of it, such as `[],`, can become 80."""
_BYTES_OF = {b"[": 88, b"{": 240, b",": 40, b'"': 30}
"""Size in memory, at most, of what a character of JSON stands for: a list, an object, a value, half of a string."""

_MAX_PARTS = 1000
"""Largest number of parts of a form."""
_MAX_DEPTH = 100
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A string of JSON; one that has no end matches, too, which keeps the time for any body linear."""
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Translates brackets to int8: 1 opens a list or an object, -1 ends it."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))

NO_IMAGE = "No image provided"
NOT_BASE64 = "not valid base64"
"""`BadImage.reason` of an image that is no base64 where it should be."""


class RequestError(BadInputError):
    """A request that cannot be answered; the message is one sentence for the client.

    Attributes:
        status: HTTP status of the response.
        headers: of the response.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers if status != 503 else {"Retry-After": "1"}

    def __reduce__(self) -> tuple[type["RequestError"], tuple[int, str, Mapping[str, str] | None]]:
        return type(self), (self.status, str(self), self.headers)


def declared_length(request: Request, settings: Settings) -> int:
    """The length of the body in bytes, by the header Content-Length; 0 if there is none.

    Raises:
        RequestError: 413, it is larger than the settings allow.
    """
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        return 0
    if len(length) > 18 or int(length) > settings.max_bytes:
        raise too_large(settings)
    return int(length)


def too_large(settings: Settings) -> RequestError:
    """The error of a body that is larger than the settings allow."""
    return RequestError(413, f"The body is larger than the {settings.max_bytes} bytes that one request may have.")


def parse_images(body: bytes, content_type: str, settings: Settings) -> tuple[list[bytes | BadImage], bool]:
    """Get the images from the field `image` of a form, from JSON, or from the body itself.

    Returns:
        All images that were sent, in order, empty ones included, and whether the client expects a list of answers.

    Raises:
        RequestError: 400, 413 or 415.
    """
    images: list[bytes | BadImage]
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images, several = _parse_form(body, content_type)
    elif kind == "application/json":
        images, several = _parse_json(body)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images, several = [body], False
    elif body:
        raise RequestError(
            415,
            f"The content type {kind!r} is not supported: send multipart/form-data with the field image, image/*, or "
            "application/json with base64.",
        )
    else:
        images, several = [], False
    if not images or (not several and not images[0]):
        raise RequestError(400, NO_IMAGE)
    if len(images) > settings.max_images:
        raise RequestError(
            413, f"{len(images)} images are more than the {settings.max_images} that one request may have."
        )
    return images, several


def _parse_form(body: bytes, content_type: str) -> tuple[list[bytes | BadImage], bool]:
    parts = _split_form(body, content_type)
    images: list[bytes | BadImage] = []
    for name, is_file, content in parts:
        if name != "image":
            continue
        if not is_file:
            raise RequestError(
                400,
                f"The field image is text at index {len(images)}; send each image as a file (with a filename).",
            )
        images.append(content)
    others = [name for name, is_file, _ in parts if name != "image" and is_file]
    if others:
        problem = "" if images else f"{NO_IMAGE}. "
        raise RequestError(
            400, f"{problem}The form has a file in the field {reprlib.repr(others[0])}; expected image."
        )
    return images, len(images) > 1


def _split_form(body: bytes, content_type: str) -> list[tuple[str, bool, bytes]]:
    """The parts of a form: the field's name, whether the part is a file, and its content.

    Raises:
        RequestError: 400, the form is damaged, or has too many parts.
    """
    parts: list[tuple[str, bool, bytes]] = []
    header: list[bytes] = []
    headers: dict[bytes, bytes] = {}
    content: list[bytes] = []

    def end_header() -> None:
        headers[header[0].lower()] = b"".join(header[1:])
        header.clear()

    def end_part() -> None:
        disposition, options = parse_options_header(headers.get(b"content-disposition", b""))
        if disposition != b"form-data" or b"name" not in options:
            raise FormParserError("a part has no Content-Disposition with a name")
        if len(parts) == _MAX_PARTS:
            raise FormParserError(f"it has more than {_MAX_PARTS} parts")
        parts.append((options[b"name"].decode(errors="replace"), b"filename" in options, b"".join(content)))
        headers.clear()
        content.clear()

    def add_to_name(data: bytes, start: int, end: int) -> None:
        header[:] = [b"".join(header) + data[start:end]]

    parser = MultipartParser(
        parse_options_header(content_type)[1].get(b"boundary", b""),
        {
            "on_header_field": add_to_name,
            "on_header_value": lambda data, start, end: header.append(data[start:end]),
            "on_header_end": end_header,
            "on_part_data": lambda data, start, end: content.append(data[start:end]),
            "on_part_end": end_part,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise RequestError(400, f"The form cannot be read: {str(error).rstrip('.')}.") from None
    return parts


def _parse_json(body: bytes) -> tuple[list[bytes | BadImage], bool]:
    if not body:
        return [], False
    parsed = parse_model(JsonImages, body)
    if parsed.images is not None and parsed.image is not None:
        raise RequestError(400, "The JSON has both image and images.")
    texts = [parsed.image] if parsed.image is not None else parsed.images or []
    return [decode_base64(text) for text in texts], parsed.images is not None


def decode_base64(text: str) -> bytes | BadImage:
    """Decode base64, or a data URL with base64; an error with the reason `NOT_BASE64` if it is neither."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error, or characters beyond ASCII
        return BadImage(NOT_BASE64)


def parse_json(body: bytes) -> Any:
    """Parse the JSON of a client, by RFC 8259 and its advice for interoperability.

    Raises:
        RequestError: 400, it is not JSON in UTF-8, is nested too deeply, has a key twice, half of a surrogate pair in
            a key, an integer of thousands of digits, or one of the numbers NaN and Infinity; 413, it has so many
            values that they would take too much memory.
    """
    if sum(size * body.count(character) for character, size in _BYTES_OF.items()) > _MOST_MEMORY:
        raise RequestError(
            413, "The JSON has too many values: send fewer images, or encoded ones, or tensors as binary data."
        )
    try:
        _check_depth(body)
        return json.loads(body.decode(), object_pairs_hook=_make_object, parse_constant=_refuse_constant)
    except ValueError as error:
        raise RequestError(400, f"The JSON cannot be read: {error}.") from None


def _check_depth(body: bytes) -> None:
    """
    Raises:
        ValueError: lists and objects are nested more than `_MAX_DEPTH` deep. Python's own limit is higher, and
            depends on its version.
    """
    if body.count(b"[") + body.count(b"{") > _MAX_DEPTH:
        steps = np.frombuffer(_STRING.sub(b"", body).translate(_STEPS, _NO_BRACKETS), np.int8)
        if steps.cumsum(dtype=np.int64).max(initial=0) > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    for key in values:
        key.encode()  # half of a surrogate pair is a ValueError here, and would be one in a response
    if len(values) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def parse_model(model: type[Model], body: bytes) -> Model:
    """Parse JSON into a model.

    Raises:
        RequestError: 400, see `parse_json`, or the model does not allow the values.
    """
    return validate(model, parse_json(body), "The JSON")


def validate(model: type[Model], content: Any, name: str) -> Model:
    """Make a model of values.

    Args:
        model: the model.
        content: the values.
        name: what they come from, for the error.

    Raises:
        RequestError: 400, the model does not allow them.
    """
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise RequestError(400, f"{name} cannot be read: {_describe_error(error)}.") from None


def _describe_error(error: pydantic.ValidationError) -> str:
    """The first mistake, in one line."""
    first: Any = error.errors(include_url=False, include_input=False)[0]
    message = "Input should be an object" if first["type"] == "model_type" else str(first["msg"])
    place = ".".join(map(str, first["loc"]))[:200]
    return f"{place}: {message}" if place else message
