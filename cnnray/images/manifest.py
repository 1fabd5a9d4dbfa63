"""Build manifests from folders, globs and tables: one row for each image.

A manifest is a pyarrow table with the columns

- `id`: int64, 0 to N-1 in the order of the sorted `uri`s, so that the same input gives the same ids;
- `uri`: string, an absolute path or s3:// address;
- `label`: string, or null if it is unknown;
- `split`: string, `train`, `validation` or `test`, or null if it is not decided;

and the other columns of a table of images.
"""

import fnmatch
import hashlib
import io
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from cnnray.errors import BadInputError
from cnnray.images import containers, storage
from cnnray.images.decode import EXTENSIONS

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_TABLES = (".csv", ".jsonl", ".ndjson", *containers.ENDINGS)
_LISTING_THREADS = 8

FORMAT = 1
"""Number of the manifest format (columns and their meaning), kept in the metadata of the schema."""
_FORMAT_KEY = b"cnnray.manifest_format"


class ManifestError(BadInputError, ValueError):
    """An input that no manifest can be built from; the message is one sentence for the user."""


def build_manifest(source: str, *, labelled: bool) -> pa.Table:
    """Build the manifest of any accepted input.

    Args:
        source: a local path or remote address of

            - a folder of class folders (`root/class/*`, or `root/{train,validation,test}/class/*`);
            - any folder, searched at all depths, or a glob, where no labels are needed;
            - a CSV, JSONL or Parquet file with a column `uri` and perhaps `label` and `split`, whose relative paths
              are relative to the folder of the table;
            - a Parquet or tar file that holds the images themselves (see `containers`), or a folder or glob of such
              files; without a column `split`, the beginning of a file's name decides it
              (`train-00000-of-00002.parquet`).
        labelled: whether every image must have a label; those of a folder are the names of its class folders.

    Returns:
        the manifest, sorted by uri.

    Raises:
        ManifestError: no images, a class folder without images, one class only, a missing label or column,
            or the same uri twice.
        OSError: storage that cannot be read (see `storage`).
    """
    source = storage.absolute(source)
    if source.lower().endswith(_TABLES) and storage.is_file(source):
        table = _from_table(source)
    elif any(character in source for character in "*?["):
        table = _from_uris([uri for uri in _glob(source) if _is_image(uri)])
        if not len(table):
            table = _from_shards(_glob(source))
    elif not storage.exists(source):
        raise ManifestError(f"{source} does not exist; expected a folder of images or a table of them.")
    elif storage.is_file(source):
        raise ManifestError(f"{source} is a file; expected a folder, or a {', '.join(_TABLES)} table.")
    else:
        table = _from_folder(source, labelled)
    if not len(table):
        raise ManifestError(f"{source} holds no images (looked for {', '.join(sorted(EXTENSIONS))}).")
    _check_unique(table, source)
    if labelled:
        _check_labels(table, source)
    return _with_ids(table)


def manifest_from_uris(uris: Sequence[str]) -> pa.Table:
    """Build the manifest of a list of paths and addresses, also of images in containers.

    Raises:
        ManifestError: the list is empty, or names an image twice.
        OSError: the scheme of an address is unknown.
    """
    table = _from_uris([storage.absolute(uri) for uri in uris])
    if not len(table):
        raise ManifestError("The list of images is empty.")
    _check_unique(table, "The list of images")
    return _with_ids(table)


def class_names(manifest: pa.Table) -> list[str]:
    """The distinct labels in sorted order: the order of a model's outputs."""
    return sorted(label for label in pc.unique(manifest["label"]).to_pylist() if label is not None)


def fingerprint(manifest: pa.Table) -> str:
    """A hash of the manifest's ids, uris, labels and splits, in hexadecimal."""
    digest = hashlib.sha256()
    for column in ("id", "uri", "label", "split"):
        for value in manifest[column].to_pylist():
            digest.update(repr(value).encode())
    return digest.hexdigest()[:32]


def split_off_validation(manifest: pa.Table, fraction: float, seed: int) -> pa.Table:
    """Split a labelled manifest into `train` and `validation` at random, stratified by class.

    round(fraction * n) of the n images of each class go to `validation`, but at least one stays in `train`.
    (scikit-learn's stratified splitters refuse classes of one image and small fractions.)

    Args:
        manifest: labelled; a `split` that it has is replaced.
        fraction: of the images, 0 to 1.
        seed: the same seed gives the same split.

    Raises:
        ManifestError: no image would be in `validation`.
    """
    labels = np.asarray(manifest["label"].to_pylist(), dtype=object)
    split = np.full(len(manifest), "train", dtype=object)
    generator = np.random.default_rng([seed, 0x5711])
    for label in class_names(manifest):
        rows = generator.permutation(np.flatnonzero(labels == label))
        split[rows[: min(round(fraction * len(rows)), len(rows) - 1)]] = "validation"
    if not (split == "validation").any():
        raise ManifestError(
            f"A validation fraction of {fraction} of {len(manifest)} images leaves none for validation."
        )
    return _with_split(manifest, pa.array(split, pa.string()))


def with_validation(train: pa.Table, validation: pa.Table) -> pa.Table:
    """Join two manifests, `train` as the split `train` and `validation` as `validation`, with new ids.

    Raises:
        ManifestError: a uri is in both, or a label of `validation` is not in `train`.
    """
    unknown = sorted(set(class_names(validation)) - set(class_names(train)))
    if unknown:
        raise ManifestError(f"The validation images have labels that no training image has: {_shorten(unknown)}.")
    columns = ["uri", "label"]
    parts = [
        _with_split(part.select(columns), pa.array([split] * len(part), pa.string()))
        for part, split in ((train, "train"), (validation, "validation"))
    ]
    table = pa.concat_tables(parts)
    _check_unique(table, "The training and validation images together")
    return _with_ids(table)


def with_targets(manifest: pa.Table) -> pa.Table:
    """A labelled manifest with a column `target`: int64, the index of the label in `class_names`."""
    order = pa.array(class_names(manifest), pa.string())
    return manifest.append_column("target", pc.index_in(manifest["label"], order).cast(pa.int64()))


def select_split(manifest: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return manifest.filter(pc.equal(manifest["split"], split))


def write(manifest: pa.Table, uri: str) -> None:
    """Write a manifest as Parquet, whole or not at all."""
    metadata = {**(manifest.schema.metadata or {}), _FORMAT_KEY: str(FORMAT).encode()}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(manifest.replace_schema_metadata(metadata), buffer)
    storage.write_bytes(uri, buffer.getvalue())


def read(uri: str) -> pa.Table:
    """Read a manifest that `write` wrote.

    Raises:
        ManifestError: a later version of cnnray wrote it.
        OSError: storage that cannot be read.
    """
    manifest = pyarrow.parquet.read_table(pa.BufferReader(storage.read_bytes(uri)))
    # The first manifests of format 1 have no number.
    number = int((manifest.schema.metadata or {}).get(_FORMAT_KEY, b"1"))
    if number > FORMAT:
        raise ManifestError(f"{uri} has format {number}, and this cnnray reads up to {FORMAT}: update cnnray.")
    return manifest


def _with_ids(table: pa.Table) -> pa.Table:
    table = table.sort_by("uri")
    return table.add_column(0, "id", pa.array(np.arange(len(table), dtype=np.int64)))


def _from_folder(root: str, labelled: bool) -> pa.Table:
    folders = storage.folders(root) if labelled else []
    if not folders:
        uris = [file.uri for file in storage.files(root)]
        images = [uri for uri in uris if _is_image(uri)]
        if not labelled and images:
            if shards := [uri for uri in uris if _is_shard(uri)]:
                log.warning("%s holds images; its Parquet and tar files are ignored: %s", root, _shorten(shards))
            return _from_uris(images)
        if not images and any(map(_is_shard, uris)):
            return _from_shards(uris)
        if not labelled:
            return _from_uris([])
    names = {storage.name(folder) for folder in folders}
    others = names - set(SPLITS)
    if "train" in names and (names & {"validation", "test"} or others & {"val", "valid"}) and others:
        raise ManifestError(
            f"{root} has the folders {_shorten(sorted(names))}; expected class folders, or only train, validation "
            "and test with class folders in each."
        )
    if "train" not in names or others:
        return _from_class_folders(root, None)
    return pa.concat_tables([_from_class_folders(folder, storage.name(folder)) for folder in folders])


def _from_class_folders(root: str, split: str | None) -> pa.Table:
    folders = storage.folders(root)
    if not folders:
        raise ManifestError(f"{root} has no sub-folders; expected one sub-folder of images for each class.")
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        images = pool.map(lambda folder: [f.uri for f in storage.files(folder) if _is_image(f.uri)], folders)
        uris = dict(zip(map(storage.name, folders), images, strict=True))
    empty = [label for label, images in uris.items() if not images]
    if len(empty) == len(uris):
        raise ManifestError(f"{root} holds no images in its sub-folders ({_shorten(list(uris))}).")
    if empty:
        raise ManifestError(f"These class folders of {root} hold no images: {_shorten(empty)}.")
    labels = [label for label, images in uris.items() for _ in images]
    return _from_uris([uri for images in uris.values() for uri in images], labels, split)


def _from_uris(uris: list[str], labels: list[str] | None = None, split: str | None = None) -> pa.Table:
    nulls = [None] * len(uris)
    return pa.table(
        {
            "uri": pa.array(uris, pa.string()),
            "label": pa.array(labels or nulls, pa.string()),
            "split": pa.array([split] * len(uris), pa.string()),
        }
    )


def _glob(pattern: str) -> list[str]:
    if storage.is_local(pattern):
        return [str(path) for path in Path("/").glob(pattern.lstrip("/")) if path.is_file()]
    fixed = pattern[: min(pattern.index(character) for character in "*?[" if character in pattern)]
    root = fixed.rpartition("/")[0]
    return [file.uri for file in storage.files(root) if fnmatch.fnmatchcase(file.uri, pattern)]


def _is_image(uri: str) -> bool:
    return PurePosixPath(uri).suffix.lower() in EXTENSIONS


def _is_shard(uri: str) -> bool:
    return uri.lower().endswith(containers.ENDINGS)


def _from_shards(uris: list[str]) -> pa.Table:
    """The rows of all images in the Parquet and tar files among `uris`."""
    shards = [uri for uri in uris if _is_shard(uri)]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        tables = list(pool.map(_from_shard, shards))
    return pa.concat_tables(tables, promote_options="permissive") if tables else _from_uris([])


def _from_shard(uri: str) -> pa.Table:
    table = _from_table(uri)
    stem = re.split(r"[-_.]", storage.name(uri))[0]
    if stem in SPLITS and table["split"].null_count == len(table):
        return _with_split(table, pa.array([stem] * len(table), pa.string()))
    return table


def _from_table(source: str) -> pa.Table:
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
    wrong = sorted(set(pc.unique(table["split"]).to_pylist()) - {*SPLITS, None})
    if wrong:
        raise ManifestError(f"{source} names the splits {_shorten(wrong)}; expected {', '.join(SPLITS)}.")
    return table.rename_columns({"id": "original_id"}) if "id" in table.column_names else table


def _from_table_of_uris(source: str) -> pa.Table:
    """A table with a column `uri`, whose relative paths are made absolute."""
    data = pa.BufferReader(storage.read_bytes(source))
    if source.lower().endswith(".csv"):
        # Labels such as 007 or NA are names, not numbers or nulls.
        options = pyarrow.csv.ConvertOptions(
            column_types={column: pa.string() for column in ("uri", "label", "split")},
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        )
        table = pyarrow.csv.read_csv(data, convert_options=options)
    elif source.lower().endswith(".parquet"):
        table = pyarrow.parquet.read_table(data)
    else:
        table = pyarrow.json.read_json(data)
    if "uri" not in table.column_names:
        wanted = "'uri' and no column of images" if source.lower().endswith(".parquet") else "'uri'"
        raise ManifestError(f"{source} has no column {wanted} (it has {_shorten(table.column_names)}).")
    if table["uri"].null_count:
        raise ManifestError(f"{source} has {table['uri'].null_count} rows without a uri.")
    folder = source.rpartition("/")[0]
    uris = [_resolved(uri, folder) for uri in table["uri"].cast(pa.string()).to_pylist()]
    return table.set_column(table.column_names.index("uri"), "uri", pa.array(uris, pa.string()))


def _resolved(uri: str, folder: str) -> str:
    if not storage.is_local(uri):
        return uri
    path = uri if uri.startswith("/") else storage.join(folder, uri)
    return os.path.normpath(path) if storage.is_local(path) else path  # ./a.png is a.png


def _check_unique(table: pa.Table, source: str) -> None:
    counts = pc.value_counts(table["uri"])
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    if twice:
        raise ManifestError(f"{source}: the same image is listed more than once: {_shorten(twice)}.")


def _check_labels(table: pa.Table, source: str) -> None:
    if table["label"].null_count:
        uri = table.filter(pc.is_null(table["label"]))["uri"][0].as_py()
        raise ManifestError(
            f"{source}: {table['label'].null_count} images have no label, such as {uri}; expected a class "
            "folder, or a column 'label'."
        )
    names = class_names(table)
    if len(names) < 2:
        raise ManifestError(f"{source} has one class only ({names[0]}); a classifier needs at least two.")


def _with_split(table: pa.Table, split: pa.Array) -> pa.Table:
    position = table.column_names.index("split") if "split" in table.column_names else None
    if position is None:
        return table.append_column("split", split)
    return table.set_column(position, "split", split)


def _shorten(values: Sequence[str], most: int = 5) -> str:
    """The first `most` values and the number of the others, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(repr(value) for value in values[:most]) + more
