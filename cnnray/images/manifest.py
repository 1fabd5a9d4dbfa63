"""Build manifests from folders, globs and tables: one row for each image.

A manifest is a pyarrow table with the columns

- `id`: int64, 0 to N-1 in the order of the sorted `uri`s, so that the same input gives the same ids;
- `uri`: string, an absolute path or s3:// address;
- `label`: string, or, where images may have several, a list of strings (see `labels`); null if it is unknown;
- `split`: string, `train`, `validation` or `test`, or null if it is not decided;

and the other columns of a table of images.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cnnray.images import inputs, labels, listing, storage
from cnnray.images.listing import SPLITS, shorten
from cnnray.images.listing import ManifestError as ManifestError

log = logging.getLogger(__name__)

FORMAT = 3
"""Number of the manifest format (columns and their meaning), kept in the metadata of the schema: 1, or 3 where images
may have several labels."""
_SHARD = 2
"""Number of the format of a prediction's shards (see `shards.FORMAT`), which are no whole manifests."""
FORMAT_KEY = b"cnnray.manifest_format"
_ROWS_AT_ONCE = 2**16
_ROWS_OF_A_GROUP = 2**18
"""In a file; readers hold a few row groups in memory."""
_PLAIN = r"^[ -&(-\[\]-~]*$"
"""Matches strings of printable ASCII without ' and \\, whose `repr` is the string between two '."""


def build_manifest(
    source: str, *, labelled: bool, multi_label: bool = False, label_separator: str | None = None
) -> pa.Table:
    """Build the manifest of any accepted input.

    Args:
        source: a local path or remote address of

            - a folder of class folders (`root/class/*`, or `root/{train,validation,test}/class/*`);
            - any folder, searched at all depths, or a glob (see `globs`), where no labels are needed;
            - a CSV, JSONL or Parquet file with a column `uri` and perhaps `label` and `split`, whose relative paths
              are relative to the folder of the table;
            - a Parquet or tar file that holds the images themselves (see `containers`), or a folder or glob of such
              files; without a column `split`, the beginning of a file's name decides it
              (`train-00000-of-00002.parquet`), or else the name of its folder (`train/0000.parquet`).

            Splits may be called as people do: `Train`, `val`, `valid`, `testing` (see `tables.split_named`).
        labelled: whether every image must have a label; those of a folder are the names of its class folders. Where
            no image of the split `test` has a label, as in many published data sets, these images are left out.
        multi_label: whether images may have several labels: files of the same name in several class folders are then
            one image. It is so in any case where a table has lists of labels, or `label_separator` is given.
        label_separator: between the labels of an image in a column of strings. Where it is given, an empty field, or
            none, says that the image has no label of any.

    Returns:
        the manifest, sorted by uri.

    Raises:
        ManifestError: no images, a class folder without images, one class only, a missing label or column,
            or the same uri twice; or files of the same name that are different images.
        OSError: storage that cannot be read (see `storage`).
    """
    source = storage.absolute(source)
    if labelled and storage.exists(source) and not storage.is_file(source):
        table = listing.from_folder(source, multi_label=multi_label)
        if not len(table):
            raise inputs.no_images(source)
    else:
        table = listing.whole(inputs.open_input(source))
    if multi_label or label_separator is not None or labels.are_several(table["label"]):
        table = _with_label_sets(table, source, label_separator)
    if labelled:
        table = _without_unlabelled_test(table, source)
        _check_labels(table, source)
    return _with_ids(table, source)


def manifest_from_uris(uris: Sequence[str]) -> pa.Table:
    """Build the manifest of a list of paths and addresses, also of images in containers.

    Raises:
        ManifestError: the list is empty, or names an image twice.
        OSError: the scheme of an address is unknown.
    """
    images = inputs.input_of_uris(uris)
    return _with_ids(listing.whole(images), images.source)


def class_names(manifest: pa.Table) -> list[str]:
    """The distinct labels in sorted order: the order of a model's outputs."""
    return labels.names(manifest["label"])


def is_multi_label(manifest: pa.Table) -> bool:
    """Whether images may have several labels."""
    return labels.are_several(manifest["label"])


def fingerprint(manifest: pa.Table) -> str:
    """A hash of the manifest's ids, uris, labels and splits, in hexadecimal.

    It is the SHA-256 of the values' `repr`, column by column, of label sets that of their key. Outputs of earlier
    versions hold it.
    """
    digest = hashlib.sha256()
    for column in ("id", "uri", "label", "split"):
        values = labels.keys(manifest[column]) if column == "label" else manifest[column]
        for chunk in values.chunks:
            for start in range(0, len(chunk), _ROWS_AT_ONCE):
                reprs = _reprs(chunk.slice(start, _ROWS_AT_ONCE))
                joined = pc.binary_join(pa.ListArray.from_arrays([0, len(reprs)], reprs), "")
                digest.update(joined[0].as_buffer())
    return digest.hexdigest()[:32]


def _reprs(values: pa.Array) -> pa.Array:
    """Python's `repr` of integers, strings and nulls."""
    if not pa.types.is_string(values.type):
        return pc.fill_null(values.cast(pa.string()), "None")
    reprs = pc.fill_null(pc.binary_join_element_wise("'", values, "'", ""), "None")
    is_other = pc.fill_null(pc.invert(pc.match_substring_regex(values, _PLAIN)), False)
    others = [repr(value) for value in values.filter(is_other).to_pylist()]
    return pc.replace_with_mask(reprs, is_other, pa.array(others, pa.string())) if others else reprs


def with_validation(data: pa.Table, validation: pa.Table) -> pa.Table:
    """Join the manifest of a data set with one of other images, which take the place of its validation images.

    The rows of `data` with the split `train` are trained on, and the rows of `validation` with the split `validation`
    validate. Where no row has that split, all but those of `test` serve. Rows of `test` stay what they are, unless
    there are no others. Rows that are left out are logged.

    Returns:
        `id` (new), `uri`, `label` and `split`.

    Raises:
        ManifestError: an image is in both, no training image has the label of a validation image, or the images of
            one of them have several labels and those of the other one each.
    """
    if is_multi_label(data) != is_multi_label(validation):
        one, other = ("--data", "--validation") if is_multi_label(data) else ("--validation", "--data")
        raise ManifestError(f"The images of {one} have lists of labels, and those of {other} one label each.")
    data, validation = (part.select(["uri", "label", "split"]) for part in (data, validation))
    train, rest = _divided(data, "train")
    validating, other_rest = _divided(validation, "validation")
    if unknown := sorted(set(class_names(validating)) - set(class_names(train))):
        raise ManifestError(f"The validation images have labels that no training image has: {shorten(unknown)}.")
    parts, left_out = [train, validating], 0
    for rows in (rest, other_rest):
        test = select_split(rows, "test")
        left_out += len(rows) - len(test)
        seen = pc.is_in(pa.concat_tables(parts)["uri"], test["uri"].combine_chunks())
        repeated = pa.concat_tables(parts)["uri"].filter(seen).combine_chunks()
        parts.append(test.filter(pc.invert(pc.is_in(test["uri"], repeated))))
    if left_out:
        log.info("%d images of other splits are left out, because the validation images are given", left_out)
    return _with_ids(pa.concat_tables(parts), "The training and validation images together")


def _divided(manifest: pa.Table, split: str) -> tuple[pa.Table, pa.Table]:
    """The rows that serve as `split`, which they get, and the other rows."""
    numbers, wanted, test = split_numbers(manifest), SPLITS.index(split), SPLITS.index("test")
    serving = next(mask for mask in (numbers == wanted, numbers != test, numbers == test) if mask.any())
    return (
        with_splits(manifest.filter(pa.array(serving)), np.full(serving.sum(), wanted, np.int8)),
        manifest.filter(pa.array(~serving)),
    )


def with_targets(manifest: pa.Table) -> pa.Table:
    """A labelled manifest with a column `target`: int64, the index of the label in `class_names`, or of the label set
    in `labels.distinct_keys`."""
    keys = labels.keys(manifest["label"])
    return manifest.append_column("target", pc.index_in(keys, labels.distinct_keys(keys)).cast(pa.int64()))


def select_split(manifest: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return manifest.filter(pc.equal(manifest["split"], split))


def count_split(manifest: pa.Table, split: str) -> int:
    """The number of rows of one split."""
    return int(pc.sum(pc.equal(manifest["split"], split)).as_py() or 0)


def write(manifest: pa.Table, uri: str) -> None:
    """Write a manifest as Parquet, whole or not at all."""
    number = FORMAT if "label" in manifest.column_names and is_multi_label(manifest) else 1
    metadata = {**(manifest.schema.metadata or {}), FORMAT_KEY: str(number).encode()}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(manifest.replace_schema_metadata(metadata), buffer, row_group_size=_ROWS_OF_A_GROUP)
    storage.write_bytes(uri, buffer.getvalue())


def read(uri: str) -> pa.Table:
    """Read a manifest that `write` wrote.

    Raises:
        ManifestError: a later version of cnnray wrote it.
        OSError: storage that cannot be read.
    """
    manifest = storage.parse_parquet(storage.read_bytes(uri))
    _checked_metadata(manifest.schema, uri)
    return manifest


def read_metadata(uri: str) -> dict[bytes, bytes]:
    """The metadata of a manifest that `write` wrote, without its rows.

    Raises:
        ManifestError, OSError: as `read`.
    """
    return _checked_metadata(pyarrow.parquet.read_schema(pa.BufferReader(storage.read_bytes(uri))), uri)


def _checked_metadata(schema: pa.Schema, uri: str) -> dict[bytes, bytes]:
    metadata: dict[bytes, bytes] = schema.metadata or {}
    check_format(metadata, uri, FORMAT)
    if metadata.get(FORMAT_KEY) == str(_SHARD).encode():
        raise ManifestError(f"{uri} is one of the shards of a prediction's manifest, and no whole manifest.")
    return metadata


def check_format(metadata: dict[bytes, bytes], uri: str, newest: int) -> None:
    """Refuse the file of a later cnnray.

    Args:
        metadata: of the file.
        uri: its name.
        newest: number of the newest format that can be read.

    Raises:
        ManifestError: a later version of cnnray wrote it.
    """
    number = int(metadata.get(FORMAT_KEY, b"1"))  # the first manifests of format 1 have no number
    if number > newest:
        raise ManifestError(f"{uri} has format {number}, and this cnnray reads up to {newest}: update cnnray.")


def _with_ids(table: pa.Table, source: str) -> pa.Table:
    """Sort by uri, and number the rows.

    Raises:
        ManifestError: a uri is there twice.
    """
    if not pc.all(_neighbours(pc.less, table["uri"])).as_py():
        table = _sorted(table)
        is_repeated = _neighbours(pc.equal, table["uri"])
        if twice := pc.unique(table["uri"].slice(1).filter(is_repeated)).to_pylist():
            raise ManifestError(f"{source}: the same image is listed more than once: {shorten(twice)}.")
    return table.add_column(0, "id", pa.array(np.arange(len(table), dtype=np.int64)))


def _sorted(table: pa.Table) -> pa.Table:
    """Sort by uri. (`Table.sort_by` fails where a column has 2 GiB of strings, which is 30 million uris.)"""
    fields = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    wide = table.cast(pa.schema(fields)).combine_chunks()
    order = pc.sort_indices(wide["uri"])
    slices = [order.slice(start, _ROWS_AT_ONCE) for start in range(0, len(order), _ROWS_AT_ONCE)]
    return pa.concat_tables([wide.take(rows).cast(table.schema) for rows in slices])


def _neighbours(compare: Callable[[Any, Any], Any], values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Compare each value with the one after it."""
    return compare(values.slice(0, max(len(values) - 1, 0)), values.slice(1))


def _without_unlabelled_test(table: pa.Table, source: str) -> pa.Table:
    """Leave out the rows of the split `test` if none of them has a label: null, -1 in files of Hugging Face, or an
    empty list or text where images may have several."""
    is_test = pc.fill_null(pc.equal(table["split"], "test"), False)
    found = set(pc.unique(labels.keys(table["label"].filter(is_test))).to_pylist())
    if not found or not found <= {None, "-1", *([""] if is_multi_label(table) else [])}:
        return table
    others = table.filter(pc.invert(is_test))
    if not class_names(others) or "-1" in class_names(others):
        return table
    log.info("%s: the %d images of the split test have no labels, and are left out", source, len(table) - len(others))
    return others


def as_multi_label(manifest: pa.Table) -> pa.Table:
    """A manifest whose images have one label each, or none, as one whose images may have several."""
    if is_multi_label(manifest):
        return manifest
    return _with_label_sets(manifest, "The manifest", None)


def _with_label_sets(table: pa.Table, source: str, separator: str | None) -> pa.Table:
    try:
        sets = labels.as_sets(table["label"], separator)
    except labels.LabelError as error:
        raise ManifestError(f"{source} {error}.") from None
    return table.set_column(table.column_names.index("label"), "label", sets)


def _check_labels(table: pa.Table, source: str) -> None:
    if table["label"].null_count:
        uri = table.filter(pc.is_null(table["label"]))["uri"][0].as_py()
        raise ManifestError(
            f"{source}: {table['label'].null_count} images have no label, such as {uri}; expected a class "
            "folder, or a column 'label'."
        )
    names = class_names(table)
    if is_multi_label(table):
        if not names:
            raise ManifestError(f"{source}: no image has a label.")
    elif len(names) < 2:
        raise ManifestError(f"{source} has one class only ({names[0]}); a classifier needs at least two.")


def split_numbers(manifest: pa.Table) -> npt.NDArray[np.int8]:
    """The index of each row's split in `SPLITS`, or -1: int8 (rows,)."""
    numbers: npt.NDArray[np.int32] = pc.fill_null(pc.index_in(manifest["split"], pa.array(SPLITS)), -1).to_numpy()
    return numbers.astype(np.int8)


def with_splits(manifest: pa.Table, numbers: npt.NDArray[np.int8]) -> pa.Table:
    """The manifest with these splits, indices in `SPLITS`, in place of its own."""
    splits = pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(SPLITS)).cast(pa.string())
    return manifest.set_column(manifest.column_names.index("split"), "split", splits)
