"""Request bodies to encoded images, within limits."""

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

_LONG = 2**18

NO_IMAGE = "No image provided"


class RequestError(BadInputError):
    """A request that gets no answer; the message is one sentence for the client.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type["RequestError"], tuple[int, str]]:
        return type(self), (self.status, str(self))


async def body_of(request: Request, settings: Settings) -> bytes:
    """The whole body.

    Raises:
        RequestError: 413, it is longer than the settings allow.
    """
    return b"".join([chunk async for chunk in _limited(request, settings.max_bytes)])


async def parsed(parse: Callable[[bytes], Parsed], body: bytes) -> Parsed:
    """What is made of a body; in a thread where it is long, so that other requests need not wait for it."""
    return await asyncio.to_thread(parse, body) if len(body) > _LONG else parse(body)


async def images_of(request: Request, settings: Settings) -> tuple[list[bytes], bool]:
    """The images of a request: of a form's field `image`, of JSON, or the body itself.

    Returns:
        the images, and whether the client sent them as several.

    Raises:
        RequestError: 400, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images, several = await _of_form(request, settings)
    elif kind == "application/json":
        images, several = await parsed(_of_json, await body_of(request, settings))
    elif kind.startswith("image/") or kind == "application/octet-stream":
        body = await body_of(request, settings)
        images, several = [body] if body else [], False
    elif await body_of(request, settings):
        raise RequestError(
            415,
            f"The content type {kind!r} is not read: send multipart/form-data with the field image, image/*, or "
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


async def _limited(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    sentence = f"The body is larger than the {most} bytes that one request may have."
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise RequestError(413, sentence)
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read > most:
            raise RequestError(413, sentence)
        yield chunk


async def _of_form(request: Request, settings: Settings) -> tuple[list[bytes], bool]:
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
    # A browser sends a file input that was left empty as a file without a name and content.
    return [image for image in images if image], len(images) > 1


def _of_json(body: bytes) -> tuple[list[bytes], bool]:
    if not body:
        return [], False
    try:
        found = JsonImages.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise RequestError(400, f"The JSON cannot be read: {sentence_of(error)}.") from None
    if found.images is not None and found.image is not None:
        raise RequestError(400, "The JSON has both image and images.")
    texts = [found.image] if found.image is not None else found.images or []
    return [base64_of(text) for text in texts if text], found.images is not None


def base64_of(text: str) -> bytes:
    """The bytes of base64, or of a data URL of it.

    Raises:
        RequestError: 400, it is none.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "An image is not valid base64.") from None


def sentence_of(error: pydantic.ValidationError) -> str:
    """What is wrong first."""
    first: Any = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])
