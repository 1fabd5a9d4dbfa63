"""The labels of images, as columns of Arrow: one class for each image, or any number of them.

Labels of one class are strings. Those of several classes are lists of strings, each in ascending order and without
repetitions: its label set, which may be empty. An image whose labels are unknown has a null.

Arrow neither compares nor counts lists. `keys` gives a string for each label set, with which all that works on labels
of one class works on label sets, too.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import BadInputError

SEPARATOR = "\x1f"
"""Stands between the labels of a key: the unit separator of ASCII, which no label may hold."""
_LISTS = pa.list_(pa.string())


class LabelError(BadInputError, ValueError):
    """A column of labels that cannot be used; the message completes a sentence that names the file."""


def check_flags(multi_label: bool | None, separator: str | None) -> None:
    """
    Raises:
        ValueError: the separator is empty, or --multi-label false excludes it.
    """
    if separator == "":
        raise ValueError("--label-separator is empty; expected a character such as | or ;.")
    if separator is not None and multi_label is False:
        raise ValueError("--label-separator is for images with several labels, which --multi-label false excludes.")


def are_several(labels: pa.ChunkedArray) -> bool:
    """Whether images may have any number of labels."""
    return bool(pa.types.is_list(labels.type))


def keys(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """A string for each image, equal where the labels are: the class, or the labels joined by `SEPARATOR`."""
    if not are_several(labels):
        return labels
    return pa.chunked_array([pc.binary_join(chunk, SEPARATOR) for chunk in labels.chunks], pa.string())


def of_image(label: str | list[str] | None) -> tuple[str, ...]:
    """The labels of an image, from the value of a column."""
    if label is None:
        return ()
    return (label,) if isinstance(label, str) else tuple(label)


def distinct_keys(labels: pa.ChunkedArray) -> pa.Array:
    """The keys in ascending order."""
    return pa.array(sorted(pc.unique(keys(labels)).drop_null().to_pylist()), pa.string())


def names(labels: pa.ChunkedArray) -> list[str]:
    """The distinct classes in ascending order."""
    classes = pc.list_flatten(labels) if are_several(labels) else labels
    return sorted(pc.unique(classes).drop_null().to_pylist())


def count(labels: pa.ChunkedArray) -> dict[str, int]:
    """The number of images that have each class, by its name in ascending order."""
    classes = pc.list_flatten(labels) if are_several(labels) else labels.drop_null()
    return {row["values"]: row["counts"] for row in sorted(pc.value_counts(classes).to_pylist(), key=_name)}


def _name(row: dict[str, str]) -> str:
    return row["values"]


def as_sets(labels: pa.ChunkedArray, separator: str | None = None) -> pa.ChunkedArray:
    """Label sets of any column: lists in any order, or strings.

    Args:
        labels: lists or strings.
        separator: between the labels of a string, with blanks around it or not (a blank stands for any white space);
            an empty string, and a null, then have no labels. None: a string is one label.

    Raises:
        LabelError: a label that is empty, null or holds `SEPARATOR`; or lists of other things.
    """
    if are_several(labels):
        lists = labels
    elif separator is None:
        return _lists_of_one(labels)
    else:
        lists = pa.chunked_array([_split(chunk, separator) for chunk in labels.chunks], _LISTS)
    return pa.chunked_array([_sorted_sets(chunk) for chunk in lists.chunks], _LISTS)


def _split(labels: pa.Array, separator: str) -> pa.Array:
    texts = pc.utf8_trim_whitespace(pc.fill_null(labels, ""))
    parts = pc.utf8_split_whitespace(texts) if separator == " " else pc.split_pattern(texts, separator)
    trimmed = pa.ListArray.from_arrays(parts.offsets, pc.utf8_trim_whitespace(parts.values))
    return pc.if_else(pc.equal(texts, ""), pa.scalar([], _LISTS), trimmed)


def _lists_of_one(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    def lists(chunk: pa.Array) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(chunk.is_valid().to_numpy(zero_copy_only=False))])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), chunk.drop_null(), mask=chunk.is_null())

    return pa.chunked_array([_sorted_sets(lists(chunk)) for chunk in labels.chunks], _LISTS)


def _sorted_sets(lists: pa.Array) -> pa.Array:
    """Each distinct list is put in order once."""
    classes = pc.list_flatten(lists)
    if classes.null_count or pc.any(pc.equal(classes, "")).as_py():
        raise LabelError("has an empty label among the labels of an image")
    if pc.any(pc.match_substring(classes, SEPARATOR)).as_py():
        raise LabelError(f"has labels with the character {SEPARATOR!r}, which none may hold")
    encoded = pc.dictionary_encode(pc.binary_join(lists, SEPARATOR))
    sets = [sorted({*key.split(SEPARATOR)} - {""}) for key in encoded.dictionary.to_pylist()]
    return pa.array(sets, _LISTS).take(encoded.indices)


def multi_hot(label_sets: pa.ChunkedArray, class_names: Sequence[str]) -> npt.NDArray[np.float32]:
    """See `LabelSets.multi_hot`, of label sets that are not null, and whose labels are all among the classes."""
    distinct = distinct_keys(label_sets)
    targets = pc.index_in(keys(label_sets), distinct).to_numpy().astype(np.int64)
    return LabelSets(distinct, class_names).multi_hot(targets)


class LabelSets:
    """The classes of each distinct label set, of which an image's target is the number."""

    def __init__(self, distinct: pa.Array, class_names: Sequence[str]) -> None:
        """
        Args:
            distinct: the keys (see `distinct_keys`).
            class_names: the columns of what `multi_hot` gives; all classes of the sets are among them.
        """
        sets = pc.split_pattern(distinct, SEPARATOR)
        lengths = pc.if_else(pc.equal(distinct, ""), 0, pc.list_value_length(sets))  # else [""] has one
        columns = pc.index_in(pc.list_flatten(sets), pa.array(class_names, pa.string())).drop_null()
        self._lengths: npt.NDArray[np.int64] = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._columns: npt.NDArray[np.int64] = columns.to_numpy(zero_copy_only=False).astype(np.int64)
        self._classes = len(class_names)

    def multi_hot(self, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """1 for each class that an image has, and 0 for the others: float32 (n, classes).

        Args:
            targets: int64 (n,), the numbers of the images' label sets.
        """
        hot = np.zeros((len(targets), self._classes), np.float32)
        lengths = self._lengths[targets]
        ends = np.cumsum(lengths)
        places = np.arange(lengths.sum()) + np.repeat(self._starts[targets] - (ends - lengths), lengths)
        hot[np.repeat(np.arange(len(targets)), lengths), self._columns[places]] = 1
        return hot
