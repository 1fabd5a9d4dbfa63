"""List labelled images, with their labels and splits.

Every function gives a table with the string columns `uri`, `label` and `split` (null where unknown), in any order.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

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


def from_folder(root: str) -> pa.Table:
    """The labelled images in a folder: see `manifest.build_manifest`.

    Args:
        root: an existing folder.

    Raises:
        ManifestError: the folders are neither classes nor splits, or a class has no images.
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
        return pa.concat_tables([_from_split_folder(root, folder, split) for folder, split in splits.items()])
    if "train" in known and len(known) > 1:
        raise ManifestError(
            f"{root} has the folders {names}; expected class folders, or only train, validation and test with class "
            "folders in each."
        )
    return _from_class_folders(root, folders)


def _from_files(root: str) -> pa.Table:
    """The images in the Parquet and tar files below a folder without class folders."""
    images, shards = _images_and_shards(root)
    if shards and not len(images):
        return _from_shards(shards, root)
    raise ManifestError(f"{root} has no sub-folders; expected one sub-folder of images for each class.")


def _from_split_folder(root: str, folder: str, split: str | None) -> pa.Table:
    folders = storage.folders(folder)
    if folders:
        table = _from_class_folders(folder, folders)
        return with_column(table, "split", pa.repeat(pa.scalar(split, pa.string()), len(table)))
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


def _images_and_shards(folder: str) -> tuple[pa.Array, list[storage.StoredFile]]:
    """The uris of the images, and the Parquet and tar files, below a folder at any depth."""
    files = storage.files(folder)
    images = pa.array((file.uri for file in files if inputs.is_image(file.uri)), pa.string())
    return images, [file for file in files if inputs.is_container(file.uri)]


def _from_shards(shards: list[storage.StoredFile], root: str) -> pa.Table:
    return whole(inputs.of_containers(shards, root, root))
