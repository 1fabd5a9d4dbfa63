"""List labelled images, with their labels and splits.

Every function gives a table with the string columns `uri`, `label` and `split` (null where unknown), in any order.
`label` may be a list of strings (see `labels`).
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.images import inputs, storage
from cnnray.images.tables import SPLITS as SPLITS
from cnnray.images.tables import TABLES as TABLES
from cnnray.images.tables import VERSION, split_named, with_column
from cnnray.images.tables import ManifestError as ManifestError
from cnnray.images.tables import shorten as shorten

log = logging.getLogger(__name__)

_LISTING_THREADS = 8


def whole(images: inputs.Input) -> pa.Table:
    """All rows of an input in memory."""
    table = pa.concat_tables(images.tables).drop_columns([VERSION])
    for name in ("label", "split"):
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.string()))
    return table


def from_uris(uris: Sequence[str] | pa.Array, label: str | None = None, split: str | None = None) -> pa.Table:
    """The table of a list of images, all of the same label and split."""
    columns = {"uri": pa.array(uris, pa.string())}
    for name, value in (("label", label), ("split", split)):
        columns[name] = pa.repeat(pa.scalar(value, pa.string()), len(uris))
    return pa.table(columns)


# -- folders --------------------------------------------------------------------------------------------------


def from_folder(root: str, *, multi_label: bool = False) -> pa.Table:
    """The labelled images in a folder: see `manifest.build_manifest`.

    Args:
        root: an existing folder.
        multi_label: whether files of the same name in several class folders are one image.

    Raises:
        ManifestError: the folders are neither classes nor splits, a class has no images, or files of the same name
            are different ones.
        OSError: storage that cannot be read.
    """
    folders = storage.folders(root)
    if not folders:
        return _from_files(root)
    splits = {folder: split_named(storage.name(folder)) for folder in folders}
    known = [split for split in splits.values() if split]
    names = shorten([storage.name(folder) for folder in folders])
    is_split = len(known) == len(folders)
    if (is_split or "train" in known) and len(known) > len(set(known)):
        raise ManifestError(f"{root} has two folders of the same split ({names}).")
    if is_split:
        parts = [_from_split_folder(root, folder, split, multi_label) for folder, split in splits.items()]
        return pa.concat_tables(parts)
    if "train" in known and len(known) > 1:
        raise ManifestError(
            f"{root} has the folders {names}; expected class folders, or only train, validation and test with class "
            "folders in each."
        )
    return _from_class_folders(root, folders, multi_label)


def _from_files(root: str) -> pa.Table:
    """The images in the Parquet and tar files below a folder without class folders."""
    images, shards = _images_and_shards(root)
    if shards and not images:
        return _from_shards(shards, root)
    raise ManifestError(f"{root} has no sub-folders; expected one sub-folder of images for each class.")


def _from_split_folder(root: str, folder: str, split: str | None, multi_label: bool) -> pa.Table:
    folders = storage.folders(folder)
    if folders:
        table = _from_class_folders(folder, folders, multi_label)
        return with_column(table, "split", pa.repeat(pa.scalar(split, pa.string()), len(table)))
    images, shards = _images_and_shards(folder)
    if shards and not images:
        return _from_shards(shards, root)
    if split == "test":
        log.info("%s has no class folders: its images have no labels, and are left out", folder)
        return from_uris([])
    raise ManifestError(f"{folder} has no sub-folders; expected one sub-folder of images for each class.")


def _from_class_folders(root: str, folders: list[str], multi_label: bool) -> pa.Table:
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        listed = dict(zip(map(storage.name, folders), pool.map(_images_and_shards, folders), strict=True))
    empty = [label for label, (images, _) in listed.items() if not images]
    if len(empty) == len(listed):
        if shards := [shard for _, shards in listed.values() for shard in shards]:
            return _from_shards(shards, root)
        raise ManifestError(f"{root} holds no images in its sub-folders ({shorten(empty)}).")
    if empty:
        raise ManifestError(f"These class folders of {root} hold no images: {shorten(empty)}.")
    tables = [from_uris([file.uri for file in images], label) for label, (images, _) in listed.items()]
    if not multi_label:
        return pa.concat_tables(tables)
    sizes = [pa.array([file.size for file in images], pa.int64()) for images, _ in listed.values()]
    return _joined([table.append_column("size", size) for table, size in zip(tables, sizes, strict=True)], folders)


def _joined(tables: list[pa.Table], folders: list[str]) -> pa.Table:
    """One row for each name of a file, with the labels of all class folders that have it; the uri is the first one's.

    Raises:
        ManifestError: files of the same name have different sizes.
    """
    named = [
        table.append_column("name", pc.utf8_slice_codeunits(table["uri"], len(folder) + 1))
        for table, folder in zip(tables, folders, strict=True)
    ]
    wanted = {"uri": ("first", "last"), "split": ("first",), "label": ("list",), "size": ("min", "max")}
    pairs = [(name, function) for name, functions in wanted.items() for function in functions]
    joined = pa.concat_tables(named).group_by("name", use_threads=False).aggregate(pairs)
    differ = joined.filter(pc.not_equal(joined["size_min"], joined["size_max"]))
    if len(differ):
        raise ManifestError(
            f"{differ['uri_first'][0]} and {differ['uri_last'][0]} have the same name in two class folders, which "
            "makes them one image with both labels, and are different files."
        )
    columns = {"uri": "uri_first", "label": "label_list", "split": "split_first"}
    return pa.table({name: joined[column] for name, column in columns.items()})


def _images_and_shards(folder: str) -> tuple[list[storage.StoredFile], list[storage.StoredFile]]:
    """The images, and the Parquet and tar files, below a folder at any depth."""
    files = storage.files(folder)
    images = [file for file in files if inputs.is_image(file.uri)]
    return images, [file for file in files if inputs.is_container(file.uri)]


def _from_shards(shards: list[storage.StoredFile], root: str) -> pa.Table:
    return whole(inputs.of_containers(shards, root, root))
