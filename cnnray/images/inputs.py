"""The images of an input as a stream of rows: work begins before a listing ends, and no table is whole in memory."""

import itertools
import logging
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from cnnray.images import ahead, containers, globs, storage, tables
from cnnray.images.decode import EXTENSIONS
from cnnray.images.storage import StoredFile
from cnnray.images.tables import ROWS_AT_ONCE, TABLES, ManifestError, shorten, split_named
from cnnray.images.tables import VERSION as VERSION

log = logging.getLogger(__name__)

_THREADS = 16
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Input:
    """The images of an input, in the order in which they get their ids."""

    source: str
    """What a message calls the input."""
    is_table: bool
    """Whether the rows are those of a table of uris or of a list: uris may be repeated, and have any order. Otherwise
    the uris are distinct and ascending."""
    tables: Iterator[pa.Table]
    """The rows, at most 65,536 at once, all tables with the same columns: `uri` first, then the user's own columns,
    and `VERSION` last. `label` and `split` are there only where the input has them. Raises `ManifestError` for bad
    rows, or if there are none, and `OSError` for storage that cannot be read."""


def open_input(source: str) -> Input:
    """Begin to list an input, whose images need no labels.

    Args:
        source: a folder, glob, table, or file that holds the images: see `manifest.build_manifest`.

    Raises:
        ManifestError: no images, or a table that cannot be read.
        OSError: storage that cannot be read.
    """
    source = storage.absolute(source)
    if source.lower().endswith(TABLES) and (file := storage.stored_file(source)):
        return of_containers([file], source)
    if storage.exists(source):
        if storage.is_file(source):
            raise ManifestError(f"{source} is a file; expected a folder, or a {', '.join(TABLES)} table.")
        return _of_files(storage.walk(source), source, source)
    if globs.is_glob(source):
        root, parts = globs.split_pattern(source)
        return _of_files(globs.walk(root, parts), source, root)
    raise ManifestError(f"{source} does not exist; expected a folder of images or a table of them.")


def input_of_uris(uris: Sequence[str]) -> Input:
    """The input of a list of paths and addresses, also of images in containers.

    Raises:
        ManifestError: the list is empty.
        OSError: the scheme of an address is unknown. Raised by `Input.tables`.
    """
    if not len(uris):
        raise ManifestError("The list of images is empty.")
    slices = (uris[start : start + ROWS_AT_ONCE] for start in range(0, len(uris), ROWS_AT_ONCE))
    columns = (pa.table({"uri": pa.array(map(storage.absolute, part), pa.string())}) for part in slices)
    versioned = (table.append_column(VERSION, pa.nulls(len(table), pa.string())) for table in columns)
    return Input(source="The list of images", is_table=True, tables=versioned)


def no_images(source: str) -> ManifestError:
    """The error for an input without images."""
    return ManifestError(f"{source} holds no images (looked for {', '.join(sorted(EXTENSIONS))}).")


def is_image(uri: str) -> bool:
    """Whether a file name is one of an image."""
    return posixpath.splitext(uri)[1].lower() in EXTENSIONS


def is_container(uri: str) -> bool:
    """Whether a file name is one of a Parquet or tar file."""
    return uri.lower().endswith(containers.ENDINGS)


# -- folders and globs ----------------------------------------------------------------------------------------


def _of_files(files: Iterator[StoredFile], source: str, root: str) -> Input:
    """The images among some files; if there are none, those in the Parquet and tar files."""
    skipped: list[StoredFile] = []
    for file in files:
        if is_image(file.uri):
            images = itertools.chain([file], _only_images(files, source, skipped))
            return Input(source=source, is_table=False, tables=_tables_of_files(images))
        if is_container(file.uri):
            skipped.append(file)
    if skipped:
        return of_containers(skipped, source, root)
    if source == root:
        raise no_images(source)
    endings = ", ".join(sorted(EXTENSIONS))
    raise ManifestError(f"{source} does not exist, and no images match it (looked for {endings}).")


def _only_images(files: Iterator[StoredFile], source: str, skipped: list[StoredFile]) -> Iterator[StoredFile]:
    names, count = [file.uri for file in skipped[:_MOST_NAMED]], len(skipped)
    skipped.clear()
    for file in files:
        if is_image(file.uri):
            yield file
        elif is_container(file.uri):
            names += [file.uri] if count < _MOST_NAMED else []
            count += 1
    if count and not globs.is_glob(source):
        more = f" and {count - len(names)} more" if count > len(names) else ""
        log.warning("%s holds images; its Parquet and tar files are ignored: %s%s", source, shorten(names), more)


def _tables_of_files(files: Iterator[StoredFile]) -> Iterator[pa.Table]:
    while part := list(itertools.islice(files, ROWS_AT_ONCE)):
        columns = {"uri": [file.uri for file in part], VERSION: [file.version for file in part]}
        yield pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


# -- containers and tables ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Container:
    """A Parquet or tar file, or a table of uris."""

    file: StoredFile
    schema: pa.Schema
    is_table: bool
    split: str | None
    """Of its images, by its name, where the file itself names none."""
    tables: Iterator[pa.Table]


def of_containers(files: Iterable[StoredFile], source: str, root: str | None = None) -> Input:
    """The images in Parquet and tar files, and of tables of uris.

    Args:
        files: of which the schemas are read now, and the rows later.
        source: what a message calls the input.
        root: the folder below which the names of files and their folders may be those of splits; None: they are not.

    Raises:
        ManifestError: a file cannot be read as a table, or files have a column of the same name and other types.
        OSError: storage that cannot be read.
    """
    # The rows of FILE are called FILE#...
    ordered = sorted(files, key=lambda file: f"{file.uri}#")
    opened: list[_Container] = []
    schema = pa.schema([("uri", pa.string())])
    for container in ahead.mapped(lambda file: _opened(file, root), ordered, _THREADS):
        columns = container.schema
        if container.split and "split" not in columns.names:
            columns = columns.append(pa.field("split", pa.string()))
        try:
            schema = pa.unify_schemas([schema, columns], promote_options="permissive")
        except pa.ArrowException as error:
            raise ManifestError(
                f"{container.file.uri} has other columns than the files before it: {str(error).splitlines()[0]}"
            ) from None
        opened.append(container)
    rows = _rows(opened, schema.append(pa.field(VERSION, pa.string())))
    return Input(source=source, is_table=any(item.is_table for item in opened), tables=_not_empty(rows, source))


def _opened(file: StoredFile, root: str | None) -> _Container:
    schema, is_table, rows = tables.read(file.uri)
    split = None if root is None else _split_of_name(file.uri, root)
    if split and "split" in schema.names and tables.has_splits(file.uri):
        split = None
    return _Container(file, schema, is_table, split, rows)


def _split_of_name(uri: str, root: str) -> str | None:
    *folders, file = uri.removeprefix(root).strip("/").split("/")
    names = [re.split(r"[-_.]", file)[0], *folders[-1:]]
    return next(filter(None, map(split_named, names)), None)


def _rows(opened: list[_Container], schema: pa.Schema) -> Iterator[pa.Table]:
    empty = schema.empty_table()
    for container in opened:
        version = None if container.is_table else container.file.version
        for table in container.tables:
            constants = {VERSION: version} | ({"split": container.split} if container.split else {})
            for name, value in constants.items():
                values = pa.repeat(pa.scalar(value, pa.string()), len(table))
                exists = name in table.column_names
                table = tables.with_column(table, name, values) if exists else table.append_column(name, values)
            # Missing columns become nulls, and numbers the wider type.
            yield pa.concat_tables([empty, table], promote_options="permissive").select(schema.names)


def _not_empty(rows: Iterator[pa.Table], source: str) -> Iterator[pa.Table]:
    has_rows = False
    for table in rows:
        if len(table):
            has_rows = True
            yield table
    if not has_rows:
        raise no_images(source)
