"""List the images of folders, globs and tables, with their labels and splits.

Every function gives a table with the string columns `uri`, `label` and `split` (null where unknown), in any order.
"""

import fnmatch
import glob
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from cnnray.errors import BadInputError
from cnnray.images import containers, storage
from cnnray.images.decode import EXTENSIONS

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
TABLES = (".csv", ".jsonl", ".ndjson", *containers.ENDINGS)
"""File name extensions of tables, in lower case."""

_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_LISTING_THREADS = 8
_WILDCARDS = re.compile(r"[*?[]")


class ManifestError(BadInputError, ValueError):
    """An input that no manifest can be built from; the message is one sentence for the user."""


def split_named(name: str) -> str | None:
    """The split that a folder or a value of a column `split` stands for: `Train` and `val` are `train` and
    `validation`. None for any other name."""
    return _SPLIT_NAMES.get(name.lower())


def from_uris(uris: Sequence[str] | pa.Array, label: str | None = None, split: str | None = None) -> pa.Table:
    """The table of a list of images, all of the same label and split."""
    columns = {"uri": pa.array(uris, pa.string())}
    for name, value in (("label", label), ("split", split)):
        columns[name] = pa.repeat(pa.scalar(value, pa.string()), len(uris))
    return pa.table(columns)


def shorten(values: Sequence[str], most: int = 5) -> str:
    """The first `most` values and the number of the others, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(repr(value) for value in values[:most]) + more


# -- folders --------------------------------------------------------------------------------------------------


def from_folder(root: str, *, labelled: bool) -> pa.Table:
    """The images in a folder: see `manifest.build_manifest`.

    Args:
        root: an existing folder.
        labelled: whether the names of the folders are labels; otherwise all images at any depth are taken.

    Raises:
        ManifestError: the folders are neither classes nor splits, or a class has no images.
        OSError: storage that cannot be read.
    """
    folders = storage.folders(root) if labelled else []
    if not folders:
        return _from_files(root, labelled)
    splits = {folder: split_named(storage.name(folder)) for folder in folders}
    known = [split for split in splits.values() if split]
    names = shorten([storage.name(folder) for folder in folders])
    is_split = len(known) == len(folders)
    if (is_split or "train" in known) and len(known) > len(set(known)):
        raise ManifestError(f"{root} has two folders of the same split ({names}).")
    if is_split:
        return pa.concat_tables([_from_split_folder(root, folder, split) for folder, split in splits.items()])
    if "train" in known and len(known) > 1:
        raise ManifestError(
            f"{root} has the folders {names}; expected class folders, or only train, validation and test with class "
            "folders in each."
        )
    return _from_class_folders(root, folders)


def _from_files(root: str, labelled: bool) -> pa.Table:
    """All images below a folder; if there are none, those in the Parquet and tar files."""
    images, shards = _images_and_shards(root)
    if not len(images) and shards:
        return _from_shards(shards, root)
    if labelled:
        raise ManifestError(f"{root} has no sub-folders; expected one sub-folder of images for each class.")
    if shards:
        log.warning("%s holds images; its Parquet and tar files are ignored: %s", root, shorten(shards))
    return from_uris(images)


def _from_split_folder(root: str, folder: str, split: str | None) -> pa.Table:
    folders = storage.folders(folder)
    if folders:
        table = _from_class_folders(folder, folders)
        return _with_column(table, "split", pa.repeat(pa.scalar(split, pa.string()), len(table)))
    images, shards = _images_and_shards(folder)
    if shards and not len(images):
        return _from_shards(shards, root)
    if split == "test":
        log.info("%s has no class folders: its images have no labels, and are left out", folder)
        return from_uris([])
    raise ManifestError(f"{folder} has no sub-folders; expected one sub-folder of images for each class.")


def _from_class_folders(root: str, folders: list[str]) -> pa.Table:
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        listed = dict(zip(map(storage.name, folders), pool.map(_images_and_shards, folders), strict=True))
    empty = [label for label, (images, _) in listed.items() if not len(images)]
    if len(empty) == len(listed):
        if shards := [shard for _, shards in listed.values() for shard in shards]:
            return _from_shards(shards, root)
        raise ManifestError(f"{root} holds no images in its sub-folders ({shorten(empty)}).")
    if empty:
        raise ManifestError(f"These class folders of {root} hold no images: {shorten(empty)}.")
    return pa.concat_tables([from_uris(images, label) for label, (images, _) in listed.items()])


def _images_and_shards(folder: str) -> tuple[pa.Array, list[str]]:
    """The uris of the images, and of the Parquet and tar files, below a folder at any depth."""
    files = storage.files(folder)
    images = pa.array((file.uri for file in files if _is_image(file.uri)), pa.string())
    return images, [file.uri for file in files if _is_shard(file.uri)]


def _is_image(uri: str) -> bool:
    return PurePosixPath(uri).suffix.lower() in EXTENSIONS


def _is_shard(uri: str) -> bool:
    return uri.lower().endswith(containers.ENDINGS)


# -- globs ----------------------------------------------------------------------------------------------------


def is_glob(source: str) -> bool:
    """Whether a path or address has wildcards."""
    return bool(_WILDCARDS.search(source))


def from_glob(pattern: str) -> pa.Table:
    """The images that match a pattern; if there are none, those in the Parquet and tar files that match it.

    `*` and `?` do not match `/`; `**` stands for folders of any depth, or none. Hidden files and folders (a leading
    dot) match no wildcard. These are the rules of Python's `glob`, for remote files, too. A part of the pattern that
    exists by this very name (`Photos [2023]`) is that folder.

    Raises:
        OSError: storage that cannot be read.
    """
    root, parts = _split_pattern(pattern)
    uris = [storage.join(root, path) for path in _matching(root, parts)]
    if images := [uri for uri in uris if _is_image(uri)]:
        return from_uris(images)
    return _from_shards([uri for uri in uris if _is_shard(uri)], root)


def _split_pattern(pattern: str) -> tuple[str, list[str]]:
    """The folder in front of the first wildcard, and the parts of the pattern below it."""
    parts = pattern.split("/")
    for number, part in enumerate(parts):
        if is_glob(part) and not storage.exists("/".join(parts[: number + 1])):
            return "/".join(parts[:number]) or "/", parts[number:]
    raise AssertionError(f"{pattern} has no wildcard")


def _matching(root: str, parts: list[str]) -> list[str]:
    """The paths of the files that match, relative to `root`."""
    if not storage.is_local(root):
        below = len(root) + 1
        files = (file.uri[below:] for file in storage.files(root))
        return [file for file in files if _matches(file.split("/"), parts)]
    # `Path.glob` takes hidden files, too, and not `**` for files. `**/**` finds a file twice.
    found = set(glob.glob("/".join(parts), root_dir=root, recursive=True))  # noqa: PTH207 - see above
    paths = [path for path in found if "/." not in f"/{path}" and Path(root, path).is_file()]
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ManifestError(f"The file name {os.fsencode(path)!r} is not UTF-8: rename it.") from None
    return paths


def _matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


# -- shards and tables ----------------------------------------------------------------------------------------


def _from_shards(shards: list[str], root: str) -> pa.Table:
    """The rows of all images in Parquet and tar files below `root`."""
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        tables = list(pool.map(lambda shard: _from_shard(shard, root), shards))
    return pa.concat_tables(tables, promote_options="permissive") if tables else from_uris([])


def _from_shard(uri: str, root: str) -> pa.Table:
    table = from_table(uri)
    *folders, file = uri.removeprefix(root).strip("/").split("/")
    names = [re.split(r"[-_.]", file)[0], *folders[-1:]]
    split = next(filter(None, map(split_named, names)), None)
    if split and table["split"].null_count == len(table):
        return _with_column(table, "split", pa.repeat(split, len(table)))
    return table


def from_table(source: str) -> pa.Table:
    """The rows of a table file, or of a file that holds the images.

    Its other columns pass through; an `id` is renamed to `original_id`.

    Raises:
        ManifestError: it cannot be read, has no images, or names an unknown split.
        OSError: storage that cannot be read.
    """
    try:
        table = containers.list_rows(source) if _is_shard(source) else None
        if table is None:
            table = _from_table_of_uris(source)
        for column in ("uri", "label", "split"):
            exists = column in table.column_names
            values = table[column].cast(pa.string()) if exists else pa.nulls(len(table), pa.string())
            table = (table.drop_columns([column]) if exists else table).append_column(column, values)
    except pa.ArrowException as error:
        raise ManifestError(f"{source} cannot be read as a table: {str(error).splitlines()[0]}") from None
    names = pc.unique(table["split"]).drop_null()
    if wrong := sorted(name for name in names.to_pylist() if split_named(name) is None):
        raise ManifestError(f"{source} names the splits {shorten(wrong)}; expected {', '.join(SPLITS)}.")
    splits = pa.array(map(split_named, names.to_pylist()), pa.string())
    table = _with_column(table, "split", splits.take(pc.index_in(table["split"], names).combine_chunks()))
    return table.rename_columns({"id": "original_id"}) if "id" in table.column_names else table


def _from_table_of_uris(source: str) -> pa.Table:
    """A table with a column `uri`, whose relative paths are made absolute."""
    data = storage.read_bytes(source)
    if source.lower().endswith(".csv"):
        # Labels such as 007 or NA are names, not numbers or nulls.
        options = pyarrow.csv.ConvertOptions(
            column_types={column: pa.string() for column in ("uri", "label", "split")},
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        )
        table = pyarrow.csv.read_csv(pa.BufferReader(data), convert_options=options)
    elif source.lower().endswith(".parquet"):
        table = storage.parse_parquet(data)
    else:
        table = pyarrow.json.read_json(pa.BufferReader(data))
    if "uri" not in table.column_names:
        wanted = "'uri' and no column of images" if source.lower().endswith(".parquet") else "'uri'"
        raise ManifestError(f"{source} has no column {wanted} (it has {shorten(table.column_names)}).")
    if table["uri"].null_count:
        raise ManifestError(f"{source} has {table['uri'].null_count} rows without a uri.")
    uris = [_resolved(chunk, source.rpartition("/")[0]) for chunk in table["uri"].cast(pa.string()).chunks]
    return table.set_column(table.column_names.index("uri"), "uri", pa.chunked_array(uris, pa.string()))


def _resolved(uris: pa.Array, folder: str) -> pa.Array:
    """Absolute uris; relative ones are below `folder`."""
    scheme = pc.struct_field(pc.extract_regex(uris, r"^(?P<scheme>[a-z0-9]+://)"), "scheme")
    remote_schemes = [name for name in pc.unique(scheme).to_pylist() if name and not storage.is_local(name)]
    is_remote = pc.is_in(scheme, pa.array(remote_schemes, pa.string()))
    is_absolute = pc.or_(is_remote, pc.starts_with(uris, "/"))
    uris = pc.if_else(is_absolute, uris, pc.binary_join_element_wise(folder, uris, "/"))
    is_path = pc.invert(is_remote) if storage.is_local(folder) else pc.starts_with(uris, "/")
    # ./a.png is a.png. Few paths need it.
    is_odd = pc.and_(is_path, pc.match_substring_regex(uris, r"/\.{0,2}(/|$)"))
    normal = [os.path.normpath(uri) for uri in uris.filter(is_odd).to_pylist()]
    return pc.replace_with_mask(uris, is_odd, pa.array(normal, pa.string())) if normal else uris


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)
