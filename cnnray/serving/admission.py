"""Bounds of what a replica holds at once, so that no number of clients, however slow, takes its memory."""

import asyncio
from collections import Counter

from starlette.requests import Request

from cnnray.serving.bodies import RequestError, too_large
from cnnray.serving.settings import Settings

_VERSION_SHARE = 0.75
"""Of the images, what one of several versions may hold."""
_SMALL_BYTES, _SMALL_SHARE = 2**20, 8
"""A body of at most so many bytes is small; an eighth of the room is for small ones, whatever large ones arrive."""

_GRACE_SECONDS, _LOWEST_RATE = 5.0, 32 * 2**10
"""A client whose body arrives, after so many seconds, at a lower rate than this, in bytes a second, is let go of: it
holds memory that others could use."""


class Admission:
    """What the requests of a replica hold at present.

    Attributes:
        requests: requests whose body is being read.
        images: images that wait or are computed.
        images_of: those of each version of a model, by its name and version.
        bytes: bytes of bodies, of requests that are not answered yet.
    """

    def __init__(self) -> None:
        self.requests = self.images = self.bytes = 0
        self.images_of: Counter[tuple[str, str]] = Counter()

    @property
    def load(self) -> int:
        """The number of images here, where a request whose body is being read counts as one."""
        return self.requests + self.images

    def check_images(self, settings: Settings, count: int) -> None:
        """Check that there is room for further images. A request that is alone has room.

        Raises:
            RequestError: 503, there is none.
        """
        if self.images and self.images + count > settings.max_queued_images:
            raise RequestError(503, f"The service is overloaded: {self.images} images wait. Try again.")

    def check_version(self, settings: Settings, version: tuple[str, str], count: int) -> None:
        """Check that further images of one of several versions leave room for the others, should it hang.

        Raises:
            RequestError: 503, they do not.
        """
        held = self.images_of[version]
        if held and held + count > _VERSION_SHARE * settings.max_queued_images:
            name = " ".join(version)
            raise RequestError(503, f"The service is overloaded: {held} images wait for {name}. Try again.")

    def add_images(self, version: tuple[str, str], count: int) -> None:
        """Count images that a version is to answer; or, where negative, that it has answered."""
        self.images += count
        self.images_of[version] += count
        if not self.images_of[version]:
            del self.images_of[version]


class Held:
    """What one request holds of an `Admission`, until it is released."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self._bytes, self._expected = admission, 0, 0

    def expect_bytes(self, count: int, settings: Settings) -> None:
        """Check that there is room for a body of so many bytes, before it arrives.

        Raises:
            RequestError: 503, there is none.
        """
        self._check(count, settings)
        self._expected = count

    def add_bytes(self, count: int, settings: Settings) -> None:
        """Hold bytes that have arrived.

        Raises:
            RequestError: 503, there is no room for them.
        """
        self._check(count, settings)
        self._admission.bytes += count
        self._bytes += count

    def _check(self, further: int, settings: Settings) -> None:
        """Check that there is room for further bytes. A request that is alone has room."""
        held, room = self._admission.bytes, settings.max_bytes_in_flight
        if max(self._expected, self._bytes + further) > _SMALL_BYTES:
            room -= room // _SMALL_SHARE
        if held > self._bytes and held + further > room:
            raise RequestError(503, f"The service is overloaded: it holds {held} bytes of requests. Try again.")

    def release(self) -> None:
        """Hold nothing any more."""
        self._admission.bytes -= self._bytes
        self._bytes = 0


async def read_body(request: Request, settings: Settings) -> bytes:
    """Read the body of a request. The `Held` of the request, in its scope, holds the bytes.

    Raises:
        RequestError: 413, the body is too large; 503, there is no room for it; 408, it does not arrive in time.
        ClientDisconnect: the client has left.
    """
    held: Held = request.scope["held"]
    chunks, read, loop = [], 0, asyncio.get_running_loop()
    start = loop.time()
    try:
        async with asyncio.timeout(min(settings.timeout_seconds, _GRACE_SECONDS)) as deadline:
            async for chunk in request.stream():
                read += len(chunk)
                if read > settings.max_bytes:
                    raise too_large(settings)
                held.add_bytes(len(chunk), settings)
                chunks.append(chunk)
                allowed = _GRACE_SECONDS + read / _LOWEST_RATE
                deadline.reschedule(start + min(settings.timeout_seconds, allowed))
    except TimeoutError:
        raise RequestError(
            408,
            f"The body did not arrive in time: a client has {settings.timeout_seconds:g} seconds, and must send at "
            f"least {_LOWEST_RATE // 2**10} KiB a second.",
        ) from None
    return b"".join(chunks)
