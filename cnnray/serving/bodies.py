"""Reads encoded images from request bodies, within limits."""

import asyncio
import base64
import json
import re
import reprlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Any, NoReturn, TypeVar

import numpy as np
import pydantic
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cnnray.errors import BadInputError
from cnnray.images.decode import BadImage
from cnnray.serving.schema import JsonImages
from cnnray.serving.settings import Settings

Parsed = TypeVar("Parsed")
Model = TypeVar("Model", bound=pydantic.BaseModel)

_LARGE_BODY = 2**18
"""Size in bytes above which a body is parsed in a thread."""

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
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type["RequestError"], tuple[int, str]]:
        return type(self), (self.status, str(self))


async def read_body(request: Request, settings: Settings) -> bytes:
    """The whole body.

    Raises:
        RequestError: 413, it is larger than the settings allow.
    """
    return b"".join([chunk async for chunk in _limited(request, settings.max_bytes)])


async def parse_body(parse: Callable[[bytes], Parsed], body: bytes) -> Parsed:
    """Parse a body; a large one in a thread, so that it does not delay other requests."""
    return await asyncio.to_thread(parse, body) if len(body) > _LARGE_BODY else parse(body)


async def read_images(request: Request, settings: Settings) -> tuple[list[bytes | BadImage], bool]:
    """Read the images from the field `image` of a form, from JSON, or from the body itself.

    Returns:
        All images that were sent, in order, empty ones included, and whether the client expects a list of answers.

    Raises:
        RequestError: 400, 413 or 415.
    """
    images: list[bytes | BadImage]
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images, several = await _read_form(request, settings)
    elif kind == "application/json":
        images, several = await parse_body(_parse_json, await read_body(request, settings))
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images, several = [await read_body(request, settings)], False
    elif await read_body(request, settings):
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


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    sentence = f"The body is larger than the {max_bytes} bytes that one request may have."
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise RequestError(413, sentence)
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read > max_bytes:
            raise RequestError(413, sentence)
        yield chunk


async def _read_form(request: Request, settings: Settings) -> tuple[list[bytes | BadImage], bool]:
    parser = MultiPartParser(
        request.headers, _limited(request, settings.max_bytes), max_files=1000, max_fields=1000,
        max_part_size=settings.max_bytes,
    )  # fmt: skip
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:  # KeyError: no boundary
        raise RequestError(400, f"The form cannot be read: {str(error).rstrip('.') or 'it is damaged'}.") from None
    try:
        parts = form.getlist("image")
        for index, part in enumerate(parts):
            if not isinstance(part, UploadFile):
                raise RequestError(
                    400, f"The field image is text at index {index}; send each image as a file (with a filename)."
                )
        others = [name for name, part in form.multi_items() if name != "image" and isinstance(part, UploadFile)]
        if parts and others:
            raise RequestError(400, f"The form has a file in the field {reprlib.repr(others[0])}, not in image.")
        return [await part.read() for part in parts if isinstance(part, UploadFile)], len(parts) > 1
    finally:
        await form.close()


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
            a key, an integer of thousands of digits, or one of the numbers NaN and Infinity.
    """
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
    content = parse_json(body)
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise RequestError(400, f"The JSON cannot be read: {_describe_error(error)}.") from None


def _describe_error(error: pydantic.ValidationError) -> str:
    """The first mistake, in one line."""
    first: Any = error.errors(include_url=False, include_input=False)[0]
    message = "Input should be an object" if first["type"] == "model_type" else str(first["msg"])
    place = ".".join(map(str, first["loc"]))[:200]
    return f"{place}: {message}" if place else message
