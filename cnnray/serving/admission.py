"""Bounds of what a replica holds at once, so that no number of clients, however slow, takes its memory."""

from cnnray.serving.bodies import RequestError
from cnnray.serving.settings import Settings

_SMALL_BYTES, _SMALL_SHARE = 2**20, 8
"""A body of at most so many bytes is small; an eighth of the room is for small ones, whatever large ones arrive."""


class Admission:
    """What the requests of a replica hold at present.

    Attributes:
        requests: requests whose body is being read.
        images: images that wait or are computed.
        bytes: bytes of bodies, of requests that are not answered yet.
    """

    def __init__(self) -> None:
        self.requests = self.images = self.bytes = 0

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
