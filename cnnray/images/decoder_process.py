"""A process that decodes images for `decoders.Decoders`, on its machine or on another one."""

import collections
import contextlib
import itertools
import math
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection

import numpy as np

from cnnray.errors import CnnrayError
from cnnray.images import containers, reading
from cnnray.images.containers import Source
from cnnray.images.geometry import Geometry
from cnnray.images.reading import Images

_NICE = 5
"""A training step goes first."""
_SLOW_TURNS = 3
"""Turns, one after another, that took longer to read than to decode, after which several threads read."""

_Turn = tuple[list[int], list[str], list[int] | None]
"""Places in the memory, uris, and lanes, in ascending order; None: the images are of no lanes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a process is told first."""

    geometry: Geometry
    """See `decode`."""
    keep_unavailable: bool
    """See `reading.decoded_blocks`."""
    images: int
    """Length of the shared memory, for a process that shares it."""


def main(connection: Connection, memory: int) -> None:
    """Decode turns into shared memory until the connection ends.

    Args:
        connection: gives `Settings`, then each `_Turn`; gets None once it is ready, then for each turn the errors,
            None where there are none, or the exception that ends the stream.
        memory: file descriptor of the memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    settings: Settings = connection.recv()
    size = settings.geometry.image_size
    images = np.frombuffer(mmap.mmap(memory, settings.images * size.bytes), np.uint8).reshape(-1, *size.shape)
    with contextlib.suppress(ConnectionError):  # the other process is gone, and there will be no turn
        connection.send(None)
    turns = _Turns(connection, settings)
    for places, sources in turns:
        try:
            connection.send(turns.decode([images[place] for place in places], sources))
        except ConnectionError:  # the other process is gone
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the thread that waits for the next turn would keep this process from ending


def join(address: tuple[str, int], key: bytes) -> None:
    """Decode turns for another machine until the connection ends. The pixels follow the errors of a turn.

    Args:
        address, key: from `Decoders.invite`.
    """
    with (
        ThreadPoolExecutor(max(reading.THREADS.values())) as pool,
        contextlib.suppress(OSError, EOFError),
        Client(address, authkey=key) as connection,
    ):
        settings: Settings = connection.recv()
        while True:
            uris: list[str] = connection.recv()
            sources = [source for run in pool.map(_read_run, containers.neighbours(uris)) for source in run]
            images = np.empty((len(sources), *settings.geometry.image_size.shape), np.uint8)
            answer = _decode(images, sources, settings)
            connection.send(answer)
            if not isinstance(answer, Exception):
                connection.send_bytes(images.data.cast("B"))


def _read_run(uris: list[str], lane: containers.Lane | None = None) -> list[Source]:
    """The encoded images of neighbours, or of a lane, or their errors."""
    return [reading.bytes_or_error(source) for source in containers.encoded(uris, lane)]


def _decode(images: Iterable[Images], sources: list[Source], settings: Settings) -> list[str] | Exception | None:
    """Decode a turn, and return its errors, None where there are none, or the exception that ends the stream."""
    try:
        errors = reading.decode_all(images, sources, settings.geometry, settings.keep_unavailable)
    except CnnrayError as error:
        return error
    return errors if any(errors) else None


class _Turns:
    """The turns that come, with their encoded images: those of the next one are read while one is decoded.

    One thread reads, as long as it keeps up with decoding: to hand images to several threads costs 3 % of the time to
    decode them.
    """

    def __init__(self, connection: "Connection[object, _Turn]", settings: Settings) -> None:
        self._connection, self._settings = connection, settings
        self._decoding = math.inf
        """Seconds of the last turn."""
        self._lanes: dict[int, containers.Lane] = collections.defaultdict(containers.Lane)
        self._slow = 0
        """Turns so far that were slow to read, one after another."""

    def __iter__(self) -> Iterator[tuple[list[int], list[Source]]]:
        return reading.prefetched(self._read())

    def _read(self) -> Iterator[tuple[list[int], list[Source]]]:
        with ThreadPoolExecutor(max(reading.THREADS.values())) as pool, contextlib.suppress(EOFError, OSError):
            while True:
                places, uris, lanes = self._connection.recv()
                started = time.perf_counter()
                is_slow = self._slow >= _SLOW_TURNS or reading.place_of(uris[0]) == "remote"
                read = pool.map if is_slow else map
                encoded = [source for run in read(_read_run, *self._runs(uris, lanes)) for source in run]
                if not is_slow:
                    self._slow = self._slow + 1 if time.perf_counter() - started > 2 * self._decoding else 0
                yield places, encoded

    def _runs(self, uris: list[str], lanes: list[int] | None) -> tuple[list[list[str]], list[containers.Lane | None]]:
        """The runs of images that are read together, and the lane of each."""
        if lanes is None:
            runs = list(containers.neighbours(uris))
            return runs, [None] * len(runs)
        pairs = itertools.groupby(zip(lanes, uris, strict=True), lambda pair: pair[0])
        of_lanes = {lane: [uri for _, uri in run] for lane, run in pairs}
        return list(of_lanes.values()), [self._lanes[lane] for lane in of_lanes]

    def decode(self, images: Iterable[Images], sources: list[Source]) -> list[str] | Exception | None:
        """See `_decode`."""
        started = time.perf_counter()
        answer = _decode(images, sources, self._settings)
        self._decoding = time.perf_counter() - started
        return answer


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
