"""Tar shards, as WebDataset writes them: each image has an address `FILE.tar#OFFSET-SIZE-NAME`.

That is the offset and size of the member in bytes, padded with zeros, so that addresses sort in the order of the
file, and its name. Any member can be read after any other; those that follow one another are read together.
"""

import contextlib
import functools
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.images import storage
from cnnray.images.decode import EXTENSIONS, MAX_BYTES, BadImage

log = logging.getLogger(__name__)

COLUMNS = pa.schema([(name, pa.string()) for name in ("uri", "key", "label")])
"""Of the tables of `list_rows`."""

_ADDRESS = re.compile(r"(.+\.tar)#(\d{12,})-(\d{9,})-(.+)", re.IGNORECASE | re.DOTALL)
_IN_A_BUCKET = r"(?is)^[a-z0-9]+://.+\.tar#\d{12,}-\d{9,}-"
_FILE_AND_OFFSET = r"(?is)^(?P<file>.+\.tar)#(?P<offset>\d{12,})-\d{9,}-"
_ROWS_OF_A_SLICE = 2**16
_BYTES_AT_ONCE = 8 * 2**20
"""Most bytes that one request reads, unless a single image is larger."""
_GAP = _BYTES_AT_ONCE // 8
"""Most bytes between two members that one request reads."""
_BLOCK_BITS = 20
BYTES_OF_READER = (1 << _BLOCK_BITS) + 2**17
"""Memory of a `Reader`: a block, and what follows it, for a member that begins in it."""
_OPEN_FILES = 64
"""Most files of buckets that stay open."""


def place(uri: str) -> tuple[str, int, int] | None:
    """File, offset and size of an image in bytes; None for an image that is not in a tar file."""
    match = _ADDRESS.fullmatch(uri)
    return (match[1], int(match[2]), int(match[3])) if match else None


def is_near(before: tuple[str, int, int], after: tuple[str, int, int]) -> bool:
    """Whether the images at two places are read together."""
    end = before[1] + before[2]
    return before[0] == after[0] and end <= after[1] <= end + _GAP


def holds_some_of_a_bucket(uris: pa.ChunkedArray) -> bool:
    """Whether some of the images are in tar files of a bucket."""
    return bool(pc.any(pc.match_substring_regex(uris, _IN_A_BUCKET)).as_py())


def blocks_of(uris: pa.Array) -> pa.Array:
    """The name of the block of a file in which each image begins; null for those in no tar file."""
    if (first := place(uris[0].as_py())) and pc.all(pc.starts_with(uris, f"{first[0]}#")).as_py():
        # Most parts are of one file, whose offsets are at the same place of the address.
        start, digits = len(first[0].encode()) + 1, len(f"{first[1]:012d}")
        numbers = pc.binary_slice(uris.cast(pa.binary()), start, start + digits + 1)
        if pc.all(pc.ends_with(numbers, "-")).as_py():
            blocks = pc.shift_right(
                pc.binary_slice(numbers, 0, digits).cast(pa.string()).cast(pa.int64()), _BLOCK_BITS
            )
            return pc.binary_join_element_wise(f"{first[0]}#", blocks.cast(pa.string()), "")
    found = pc.extract_regex(uris, _FILE_AND_OFFSET)
    file, offset = (pc.struct_field(found, name) for name in ("file", "offset"))
    blocks = pc.shift_right(offset.cast(pa.int64()), _BLOCK_BITS)
    return pc.binary_join_element_wise(file, blocks.cast(pa.string()), "#")


# -- listing --------------------------------------------------------------------------------------------------


def list_rows(file: str) -> Iterator[pa.Table]:
    """One row for each image: see `containers.list_rows`."""
    rows: list[tuple[str, str]] = []
    labels: dict[str, str] = {}
    is_cut = False
    try:
        for member, content in _members(file):
            folder, _, name = member.name.rpartition("/")
            key = f"{folder}/{name.partition('.')[0]}".lstrip("/")
            if content is not None:
                labels[key] = content.decode().strip()
                continue
            if len(rows) >= _ROWS_OF_A_SLICE and key != rows[-1][1]:
                yield _table(rows, labels)
                rows, is_cut = [], True
            rows.append((f"{file}#{member.offset_data:012d}-{member.size:09d}-{member.name}", key))
    except (tarfile.TarError, UnicodeDecodeError, EOFError) as error:
        raise pa.ArrowInvalid(f"{error} (tar files must be complete and not compressed)") from None
    yield _table(rows, labels)
    if is_cut and labels:
        log.warning("%s has %d labels that do not follow an image, and are ignored", file, len(labels))


def _table(rows: list[tuple[str, str]], labels: dict[str, str]) -> pa.Table:
    """The table of images. Their labels are taken out of `labels`."""
    columns = [[uri for uri, _ in rows], [key for _, key in rows], [labels.get(key) for _, key in rows]]
    for _, key in rows:
        labels.pop(key, None)
    return pa.table([pa.array(values, pa.string()) for values in columns], schema=COLUMNS)


def _members(file: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The members that are images, and those that hold labels with their content."""
    # A stream: in a bucket, random access would take one request for each member's header.
    filesystem, path = storage.arrow_filesystem(file)
    with (
        filesystem.open_input_stream(path, buffer_size=_BYTES_AT_ONCE) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        for member in archive:
            name = member.name.rpartition("/")[2]
            if not member.isreg() or member.issparse() or name.startswith("."):
                continue
            if PurePosixPath(name).suffix.lower() in EXTENSIONS:
                yield member, None
            elif name.endswith(".cls") and (content := archive.extractfile(member)):
                yield member, content.read()
            archive.members = []  # type: ignore[attr-defined] # which it would keep


# -- reading --------------------------------------------------------------------------------------------------


def images(file: str, places: list[tuple[int, int]]) -> Iterator[bytes | BadImage]:
    """The encoded images at places, each its offset and size in bytes, in their order.

    Raises:
        OSError: the file cannot be read.
    """
    start, held = 0, b""
    for number, (offset, size) in enumerate(places):
        if not start <= offset <= offset + size <= start + len(held) and size <= MAX_BYTES:
            start, held = offset, _read(file, offset, _length_of_run(places[number:]))
        yield _image(file, held[offset - start :][:size], size)


class Reader:
    """Reads images one after another, and keeps the block of the file in which the last one begins."""

    def __init__(self) -> None:
        self._place: tuple[str, int] | None = None
        self._block = b""

    def images(self, file: str, places: list[tuple[int, int]]) -> Iterator[bytes | BadImage]:
        """See `images`."""
        for offset, size in places:
            number, start = offset >> _BLOCK_BITS, offset & ((1 << _BLOCK_BITS) - 1)
            if size > MAX_BYTES:
                yield _image(file, b"", size)
            elif start + size > BYTES_OF_READER:
                yield _image(file, _read(file, offset, size), size)
            else:
                if self._place != (file, number):
                    self._block = _read(file, number << _BLOCK_BITS, BYTES_OF_READER)
                    self._place = file, number
                yield _image(file, self._block[start : start + size], size)


def _image(file: str, data: bytes, size: int) -> bytes | BadImage:
    """An image, or what is wrong with it."""
    if size > MAX_BYTES:
        return BadImage("too large", f"{size} bytes, at most {MAX_BYTES}")
    return data if len(data) == size else BadImage("unreadable", f"{file} ends before the image")


def _read(file: str, offset: int, length: int) -> bytes:
    with _opened(file) as opened:
        data: bytes = opened.read_at(length, offset)
        return data


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A file to read members of, in any number of threads."""
    if storage.is_local(file):
        filesystem, path = storage.arrow_filesystem(file)
        with filesystem.open_input_file(path) as opened:
            yield opened
        return
    try:
        yield _open_remote(file)
    except Exception:
        _open_remote.cache_clear()  # credentials, for example, may be others by now
        raise


@functools.lru_cache(_OPEN_FILES)
def _open_remote(file: str) -> Any:
    """A file in a bucket, which stays open: to open it takes a request."""
    filesystem, path = storage.arrow_filesystem(file)
    return filesystem.open_input_file(path)


def _length_of_run(places: list[tuple[int, int]]) -> int:
    """Bytes from the start of the first member to the end of the last one that follows closely: one request."""
    start, end = places[0][0], sum(places[0])
    for offset, size in places[1:]:
        if not end <= offset <= end + _GAP or offset + size - start > _BYTES_AT_ONCE:
            break
        end = offset + size
    return end - start
