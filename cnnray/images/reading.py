"""Read and decode manifest rows in one process: every row gets an image or an error."""

import functools
import io
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cnnray.errors import CnnrayError
from cnnray.images import containers, storage
from cnnray.images.containers import Source
from cnnray.images.decode import MAX_BYTES, BadImage, decode
from cnnray.images.geometry import Geometry
from cnnray.images.retries import Attempts

THREADS = {"local": 4, "remote": 16}
"""Threads of one task. They read and decode: Pillow releases the interpreter's lock while it decodes."""
_TURN = 8
"""Images that a thread takes at once: to hand one over costs a tenth of the time to decode it."""
_SOURCES_AT_ONCE = 64
"""Encoded images that are held in memory: all of them are read before the first is decoded."""

FEW_IMAGES, FEW_BYTES = 4096, 2**29
"""Images, and bytes of them, that a job reads in its own process at most: Ray's tasks would take longer to start."""

UNAVAILABLE = "unavailable"
"""Begins the error of a row whose storage was in trouble, which says nothing about the image."""

Batch = dict[str, npt.NDArray[Any]]
Images = npt.NDArray[np.uint8]
Item = TypeVar("Item")


def decoded_blocks(
    table: pa.Table,
    geometry: Geometry,
    rows_per_block: int,
    *,
    threads: int | None = None,
    sources: Iterator[Source] | None = None,
    keep_unavailable: bool = False,
) -> Iterator[Batch]:
    """Read and decode the images of a manifest in this process, a block at a time, with threads.

    Args:
        table: rows with `uri`; images in containers in the order of the file (see `containers`).
        geometry: see `decode`.
        rows_per_block: rows of one block.
        threads: threads that read and decode; None for 4 with local files, 16 with remote ones.
        sources: one for each row (see `containers.encoded`); None for those of the table's uris.
        keep_unavailable: whether rows whose storage is in trouble get an error that begins with `UNAVAILABLE`.

    Raises:
        CnnrayError: storage is in trouble, also after several attempts (see `retries`), and `keep_unavailable` is not
            set.

    Yields:
        the table's columns as arrays (n,), in order; `image`, uint8 (n, height, width, 3), zeros where decoding
        failed; and `error`, (n,) strings, empty where decoding succeeded.
    """
    if not len(table):
        return
    uris = table["uri"].to_pylist()
    sources = containers.encoded(uris) if sources is None else sources
    at_once = _SOURCES_AT_ONCE if containers.is_inside(uris[0]) else rows_per_block
    threads = threads or threads_for(uris[0])
    decode_turn = functools.partial(decode_all, geometry=geometry, keep_unavailable=keep_unavailable)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(table), rows_per_block):
            rows = table.slice(start, rows_per_block)
            images = np.zeros((len(rows), *geometry.image_size.shape), np.uint8)
            errors: list[str] = []
            for first in range(0, len(rows), at_once):
                chunk = images[first : first + at_once]
                turn = max(1, min(_TURN, len(chunk) // threads))
                starts = range(0, len(chunk), turn)
                turns = [chunk[start : start + turn] for start in starts]
                taken = [list(itertools.islice(sources, turn)) for _ in starts]
                errors += itertools.chain.from_iterable(pool.map(decode_turn, turns, taken))
            columns = {name: rows[name].to_numpy() for name in rows.column_names}
            yield columns | {"image": images, "error": np.asarray(errors, dtype=object)}


def loaded_if_few(table: pa.Table) -> Iterator[tuple[pa.Table, list[Source]]] | None:
    """Read the images of a small manifest in this process, for several uses of the same bytes.

    Args:
        table: rows with `uri`.

    Returns:
        an iterator over parts of the rows, each with its encoded images, or what is wrong with them, as sources; None
        where there are more than `FEW_IMAGES`, or, as far as the first ones tell, more than `FEW_BYTES`.
    """
    if len(table) > FEW_IMAGES:
        return None
    parts = _loaded(table)
    first = next(parts, None)
    if first is None:
        return parts
    held = sum(len(source) for source in first[1] if isinstance(source, bytes))
    return itertools.chain([first], parts) if held * len(table) <= FEW_BYTES * len(first[0]) else None


def _loaded(table: pa.Table) -> Iterator[tuple[pa.Table, list[Source]]]:
    uris = table["uri"].to_pylist()
    sources = containers.encoded(uris)
    for start in range(0, len(table), _SOURCES_AT_ONCE):
        part = table.slice(start, _SOURCES_AT_ONCE)
        with ThreadPoolExecutor(threads_for(uris[0])) as pool:
            encoded = list(pool.map(bytes_or_error, itertools.islice(sources, len(part))))
        yield part, encoded


def bytes_or_error(source: Source) -> Source:
    """`load_bytes` whose error is returned."""
    try:
        return load_bytes(source)
    except CnnrayError as error:
        return error


def threads_for(uri: str) -> int:
    """The number of threads that read images from the storage of this one."""
    return THREADS[place_of(uri)]


def place_of(uri: str) -> str:
    """Where an image is: `local` or `remote`."""
    return "local" if storage.is_local(uri) else "remote"


def prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each computed in a thread while the item before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item


def concatenated(parts: list[Batch]) -> Batch:
    """Several batches, at least one, as one."""
    filled = [part for part in parts if len(part["id"])] or parts[-1:]
    if len(filled) == 1:
        return filled[0]
    return {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}


def image_sizes(table: pa.Table) -> list[tuple[int, int]]:
    """The width and height in pixels of a manifest's images, read from their headers; without bad images.

    Raises:
        CnnrayError: storage is in trouble, also after several attempts.
    """

    def size(source: Source) -> tuple[int, int] | None:
        try:
            with Image.open(io.BytesIO(load_bytes(source))) as image:
                return image.size
        except (BadImage, OSError, Image.DecompressionBombError):
            return None

    uris = table["uri"].to_pylist()
    if not uris:
        return []
    with ThreadPoolExecutor(threads_for(uris[0])) as pool:
        return [found for found in pool.map(size, containers.encoded(uris)) if found is not None]


def unavailable(error: CnnrayError) -> str:
    """The error of a row whose storage was in trouble."""
    return f"{UNAVAILABLE}: {error}"


def is_unavailable(errors: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which errors of rows, strings or null, say that storage was in trouble."""
    return pc.fill_null(pc.starts_with(errors, f"{UNAVAILABLE}: "), False)


def decode_all(
    images: Iterable[Images], sources: list[Source], geometry: Geometry, keep_unavailable: bool
) -> list[str]:
    """Decode images into arrays, as `decoded_blocks` does, and return their errors, empty where there are none."""
    pairs = zip(images, sources, strict=True)
    return [_decode_into(pixels, source, geometry, keep_unavailable) for pixels, source in pairs]


def _decode_into(pixels: npt.NDArray[np.uint8], source: Source, geometry: Geometry, keep_unavailable: bool) -> str:
    try:
        pixels[:] = decode(load_bytes(source), geometry)
    except BadImage as error:
        pixels[:] = 0
        return str(error)
    except CnnrayError as error:
        if not keep_unavailable:
            raise
        pixels[:] = 0
        return unavailable(error)
    return ""


def load_bytes(source: Source) -> bytes:
    """The encoded image of a source, read from storage if it is a uri.

    Raises:
        BadImage: the file alone cannot be read; the reason says why.
        CnnrayError: storage is in trouble, also after several attempts (see `retries`).
    """
    if isinstance(source, CnnrayError):
        raise source
    if isinstance(source, bytes):
        return source
    attempts = Attempts(source)
    while True:
        try:
            data = storage.read_bytes(source, MAX_BYTES)
        except (CnnrayError, ValueError) as error:  # ValueError: an impossible path
            if not attempts.wait(error):
                raise containers.image_error(error) from None
        else:
            attempts.succeeded()
            return data
