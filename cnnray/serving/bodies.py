"""Reads encoded images from request bodies, within limits."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import pydantic
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cnnray.errors import BadInputError
from cnnray.serving.schema import JsonImages
from cnnray.serving.settings import Settings

Parsed = TypeVar("Parsed")

_LARGE_BODY = 2**18
"""Size in bytes above which a body is parsed in a thread."""

NO_IMAGE = "No image provided"


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


async def read_images(request: Request, settings: Settings) -> tuple[list[bytes], bool]:
    """Read the images from the field `image` of a form, from JSON, or from the body itself.

    Returns:
        The images, and whether the client expects a list of answers.

    Raises:
        RequestError: 400, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images, several = await _read_form(request, settings)
    elif kind == "application/json":
        images, several = await parse_body(_parse_json, await read_body(request, settings))
    elif kind.startswith("image/") or kind == "application/octet-stream":
        body = await read_body(request, settings)
        images, several = [body] if body else [], False
    elif await read_body(request, settings):
        raise RequestError(
            415,
            f"The content type {kind!r} is not supported: send multipart/form-data with the field image, image/*, or "
            "application/json with base64.",
        )
    else:
        images, several = [], False
    if not images:
        raise RequestError(400, NO_IMAGE)
    if len(images) > settings.max_images:
        raise RequestError(
            413, f"{len(images)} images are more than the {settings.max_images} that one request may have."
        )
    return images, several


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    sentence = f"The body is larger than the {max_bytes} bytes that one request may have."
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise RequestError(413, sentence)
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read > max_bytes:
            raise RequestError(413, sentence)
        yield chunk


async def _read_form(request: Request, settings: Settings) -> tuple[list[bytes], bool]:
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
        if any(not isinstance(part, UploadFile) for part in parts):
            raise RequestError(400, "The field image is text; send a file (with a filename).")
        images = [await part.read() for part in parts if isinstance(part, UploadFile)]
    finally:
        await form.close()
    # A browser sends an empty file input as a file without name and content.
    return [image for image in images if image], len(images) > 1


def _parse_json(body: bytes) -> tuple[list[bytes], bool]:
    if not body:
        return [], False
    try:
        parsed = JsonImages.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise RequestError(400, f"The JSON cannot be read: {describe_error(error)}.") from None
    if parsed.images is not None and parsed.image is not None:
        raise RequestError(400, "The JSON has both image and images.")
    texts = [parsed.image] if parsed.image is not None else parsed.images or []
    return [decode_base64(text) for text in texts if text], parsed.images is not None


def decode_base64(text: str) -> bytes:
    """Decode base64, or a data URL with base64.

    Raises:
        RequestError: 400, it is not valid base64.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "An image is not valid base64.") from None


def describe_error(error: pydantic.ValidationError) -> str:
    """The first mistake, in one line."""
    first: Any = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
