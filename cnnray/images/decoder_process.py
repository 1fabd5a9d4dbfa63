"""A process that decodes images for `decoders.Decoders`, on its machine or on another one."""

import contextlib
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection

import numpy as np

from cnnray.errors import CnnrayError
from cnnray.images import containers, reading
from cnnray.images.containers import Source
from cnnray.images.reading import Images
from cnnray.images.resize import ResizeRule

_NICE = 5
"""A training step goes first."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a process is told first."""

    size: int
    """Height and width in pixels."""
    resize: ResizeRule
    """See `decode`."""
    keep_unavailable: bool
    """See `reading.decoded_blocks`."""
    images: int
    """Length of the shared memory, for a process that shares it."""


def main(connection: Connection, memory: int) -> None:
    """Decode turns into shared memory until the connection ends.

    Args:
        connection: gives `Settings`, then for each turn its first place in the memory and the uris; gets None once it
            is ready, then for each turn the errors, None where there are none, or the exception that ends the stream.
        memory: file descriptor of the memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    settings: Settings = connection.recv()
    pixels = np.frombuffer(mmap.mmap(memory, settings.images * settings.size**2 * 3), np.uint8)
    images = pixels.reshape(-1, settings.size, settings.size, 3)
    connection.send(None)
    for first, sources in reading.prefetched(_loaded(connection)):
        connection.send(_decode(images[first : first + len(sources)], sources, settings))


def join(address: tuple[str, int], key: bytes) -> None:
    """Decode turns for another machine until the connection ends. The pixels follow the errors of a turn.

    Args:
        address, key: from `Decoders.invite`.
    """
    with contextlib.suppress(OSError, EOFError), Client(address, authkey=key) as connection:
        settings: Settings = connection.recv()
        connection.send(None)
        for _, sources in reading.prefetched(_loaded(connection)):
            images = np.empty((len(sources), settings.size, settings.size, 3), np.uint8)
            answer = _decode(images, sources, settings)
            connection.send(answer)
            if not isinstance(answer, Exception):
                connection.send_bytes(images.data.cast("B"))


def _loaded(connection: "Connection[object, tuple[int, list[str]]]") -> Iterator[tuple[int, list[Source]]]:
    """The turns that come, with their encoded images."""
    with ThreadPoolExecutor(max(reading.THREADS.values())) as pool, contextlib.suppress(EOFError, OSError):
        while True:
            first, uris = connection.recv()
            yield first, list(pool.map(reading.bytes_or_error, containers.encoded(uris)))


def _decode(images: Images, sources: list[Source], settings: Settings) -> list[str] | Exception | None:
    try:
        errors = reading.decode_all(images, sources, settings.size, settings.resize, settings.keep_unavailable)
    except CnnrayError as error:
        return error
    return errors if any(errors) else None


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
