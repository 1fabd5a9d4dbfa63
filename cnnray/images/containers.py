"""Files that hold many images: Parquet and tar. Each image has a uri of its own, and neighbours are read together.

Where all images are read, in another order in each epoch, those of some containers are read in lanes: one after
another in the order of the file, at many places side by side.
"""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import CnnrayError, PermanentError, TransientError
from cnnray.images import parquet, storage, tar
from cnnray.images.decode import BadImage
from cnnray.images.retries import Attempts, patient

log = logging.getLogger(__name__)

ENDINGS = (".parquet", ".tar")

_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (FileNotFoundError, "missing"),
    (PermissionError, "access denied"),
    (OverflowError, "too large"),
)
"""The reason of an image that cannot be read by the class of the error; all other errors give `unreadable`."""

Source = str | bytes | CnnrayError
"""Where an image comes from: the uri of its file, its encoded bytes, or the error of reading them."""


def containing_file(uri: str) -> str:
    """The file that is opened to read an image: the image's own, or the container that holds it."""
    return _container(uri)[0] or uri


def is_inside(uri: str) -> bool:
    """Whether an image is inside a container."""
    return _container(uri)[0] is not None


def rows_schema(file: str) -> pa.Schema | None:
    """The columns that `list_rows` gives for a file; None for a Parquet file without a column of images.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
    """
    return tar.COLUMNS if file.lower().endswith(".tar") else parquet.rows_schema(file)


def list_rows(file: str) -> Iterator[pa.Table]:
    """One row for each image that a file holds, as a stream of tables, without reading Parquet's images.

    Yields:
        tables of at most 65,536 rows with `uri`, and

        - for Parquet the file's other columns: a column `uri` is called `original_uri`, and the numbers of a Hugging
          Face `label` become its names;
        - for tar `key`, and `label`: the content of the member `KEY.cls`, or null.

    Raises:
        pa.ArrowException: the file is damaged.
        OSError: the file cannot be read.
    """
    return tar.list_rows(file) if file.lower().endswith(".tar") else parquet.list_rows(file)


def image_error(error: Exception, place: str = "") -> CnnrayError:
    """The error of an image whose bytes cannot be read.

    Args:
        error: raised by reading it.
        place: put in front of the error's message if the message does not name the file.

    Returns:
        A `BadImage` if the file alone is at fault: it is missing, denied, too large or damaged. Otherwise the error
        itself: storage is in trouble, and says nothing about the image.
    """
    of_the_file = isinstance(error, storage.NotFoundError | storage.DeniedError) and not isinstance(
        error, storage.NoBucketError | storage.CredentialsError
    )
    if isinstance(error, TransientError | PermanentError) and not of_the_file:
        return error
    reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "unreadable")
    return BadImage(reason, place + (str(error).partition("\n")[0] or type(error).__name__))


def group_runs(uris: Iterable[pa.Array]) -> Iterator[tuple[str | None, int]]:
    """Neighbouring images that a lane reads one after another, or that are in no container: a name or None, and the
    number of images (see `parquet.runs`).

    Args:
        uris: the chunks of a column.
    """
    return parquet.runs(uris, lambda part: pc.coalesce(parquet.groups_of(part), tar.blocks_of(part)))


class Lane:
    """What is kept between the images of a lane: an open row group, or a block of a tar file."""

    def __init__(self) -> None:
        self.parquet, self.tar = parquet.Reader(), tar.Reader()


@patient
def bytes_of_lane(uri: str) -> int:
    """About the memory that a lane takes at an image, in bytes.

    Raises:
        CnnrayError: storage is in trouble, also after several attempts.
    """
    if place := parquet.place(uri):
        with (
            contextlib.suppress(pa.ArrowException, storage.NotFoundError, storage.DeniedError),
            storage.translated_errors(place[0]),
        ):
            return parquet.bytes_of_reader(*place[:2])
    return tar.BYTES_OF_READER


def encoded(uris: Sequence[str], lane: Lane | None = None) -> Iterator[Source]:
    """The `Source` of each uri, in order.

    An image in a file of its own gives its uri. An image in a container gives its bytes, which are read when the
    iterator reaches it, or the error.

    Args:
        uris: of the images.
        lane: that they are the next images of; None: of none.
    """
    of_parquet, of_tar = (lane.parquet, lane.tar) if lane else (parquet, tar)
    for (file, group), run in itertools.groupby(uris, _container):
        if file is None:
            yield from run
        elif group is None:
            members = [(offset, size) for _, offset, size in filter(None, map(tar.place, run))]
            yield from _read_with_retries(file, functools.partial(of_tar.images, file), members)
        else:
            rows = [int(uri.rpartition("-")[2]) for uri in run]
            yield from _read_with_retries(file, functools.partial(of_parquet.images, file, group), rows)


def neighbours(uris: Sequence[str]) -> Iterator[list[str]]:
    """Runs of images that `encoded` reads together. A run of images that are files of their own has one."""
    run: list[str] = []
    for uri in uris:
        if run and not _follows(run[-1], uri):
            yield run
            run = []
        run.append(uri)
    if run:
        yield run


def _follows(before: str, uri: str) -> bool:
    first, second = parquet.place(before), parquet.place(uri)
    if first and second:
        return first[:2] == second[:2]
    first, second = tar.place(before), tar.place(uri)
    return bool(first and second and tar.is_near(first, second))


def _read_with_retries(
    file: str, read: Callable[[list[Any]], Iterator[bytes | BadImage]], places: list[Any]
) -> Iterator[Source]:
    """Read images of a container, and after an error those that are left, if another attempt may succeed.

    Args:
        file: the container.
        read: yields the images at places.
        places: of the images.
    """
    attempts, done = Attempts(file), 0
    while done < len(places):
        try:
            with storage.translated_errors(file):
                for source in read(places[done:]):
                    done += 1
                    attempts.succeeded()
                    yield source
            return
        except (CnnrayError, pa.ArrowException, IndexError) as error:
            if not attempts.wait(error):
                reason = image_error(error, "" if isinstance(error, CnnrayError) else f"{file}: ")
                yield from itertools.repeat(reason, len(places) - done)
                return


def _container(uri: str) -> tuple[str | None, int | None]:
    """The container that holds an image and, for Parquet, the row group; None for what does not apply."""
    place = parquet.place(uri)
    if place is not None:
        return place[:2]
    member = tar.place(uri)
    return (member[0] if member else None), None
