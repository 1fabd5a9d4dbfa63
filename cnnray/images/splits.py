"""Which images train and which validate, where the data does not say it: at random, stratified by class."""

import warnings

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.images import manifest as manifests
from cnnray.images.listing import SPLITS, shorten
from cnnray.images.manifest import ManifestError

_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))

Ints = npt.NDArray[np.int64]


def split_off_validation(manifest: pa.Table, fraction: float, seed: int, group: str | None = None) -> pa.Table:
    """Split a labelled manifest into `train` and `validation`.

    Without groups, round(fraction * n) of the n images of each class go to `validation`, but at least one stays in
    `train`. (scikit-learn's stratified splitters refuse classes of one image and small fractions.) With groups,
    `validation` is one of round(1 / fraction) parts, the first that leaves images of each class in `train`.

    Args:
        manifest: labelled; rows of the split `test` keep it and are not counted, any other split is replaced.
        fraction: of the images, 0 to 1.
        seed: the same seed gives the same split.
        group: column whose values keep together: all rows of a value have the same split.

    Raises:
        ManifestError: no image would be in `validation`, or there are too few groups.
    """
    rows, classes = _undecided(manifest)
    if group is None:
        held = _share_of_each_class(classes, fraction, seed)
    else:
        parts = max(2, round(1 / fraction))
        part_of = _parts_of_groups(manifest, rows, classes, group, parts, seed)
        all_of_them = np.unique(classes)
        leaves_all = [np.array_equal(np.unique(classes[part_of != part]), all_of_them) for part in range(parts)]
        held = part_of == int(np.argmax(leaves_all))
    if not held.any():
        raise ManifestError(f"A validation fraction of {fraction} of {len(rows)} images leaves none for validation.")
    return _with_validation(manifest, rows, held)


def with_fold(manifest: pa.Table, folds: int, fold: int, seed: int, group: str | None = None) -> pa.Table:
    """Split a labelled manifest into `train` and `validation`, as for cross-validation.

    Each image validates in one fold. (One that is the only image of its class trains in all of them.)

    Args:
        manifest: see `split_off_validation`.
        folds: number of parts.
        fold: the part that validates, from 0 on.
        seed: the same seed gives the same parts.
        group: see `split_off_validation`.

    Raises:
        ManifestError: no image would be in `validation`, or there are too few groups.
    """
    rows, classes = _undecided(manifest)
    if group is None:
        part_of, dealt = np.full(len(rows), -1, np.int64), 0
        for images in _shuffled_classes(classes, seed):
            if len(images) > 1:
                part_of[images] = (dealt + np.arange(len(images))) % folds
                dealt += len(images)
    else:
        part_of = _parts_of_groups(manifest, rows, classes, group, folds, seed)
    if not (part_of == fold).any():
        raise ManifestError(f"{len(rows)} images are too few for {folds} folds: fold {fold} has none.")
    return _with_validation(manifest, rows, part_of == fold)


def _undecided(manifest: pa.Table) -> tuple[Ints, Ints]:
    """The rows that are not of the split `test`, and their classes."""
    is_undecided = manifests.split_numbers(manifest) != _TEST
    labels = manifest["label"].filter(pa.array(is_undecided))
    names = pa.array(sorted(pc.unique(labels).to_pylist()), pa.string())
    return np.flatnonzero(is_undecided), pc.index_in(labels, names).to_numpy().astype(np.int64)


def _with_validation(manifest: pa.Table, rows: Ints, held: npt.NDArray[np.bool_]) -> pa.Table:
    numbers = manifests.split_numbers(manifest)
    numbers[rows] = np.where(held, _VALIDATION, _TRAIN)
    return manifests.with_splits(manifest, numbers)


def _shuffled_classes(classes: Ints, seed: int) -> list[Ints]:
    """The places of the images of each class, in random order."""
    generator = np.random.default_rng([seed, 0x5711])
    places = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1])
    return [generator.permutation(of_class) for of_class in places]


def _share_of_each_class(classes: Ints, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    held = np.zeros(len(classes), bool)
    for images in _shuffled_classes(classes, seed):
        held[images[: min(round(fraction * len(images)), len(images) - 1)]] = True
    return held


def _parts_of_groups(manifest: pa.Table, rows: Ints, classes: Ints, group: str, parts: int, seed: int) -> Ints:
    """The part of each row, so that the rows of a group are in the same one."""
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second

    try:
        values = manifest[group].take(pa.array(rows)).cast(pa.string()).combine_chunks()
    except pa.ArrowException:
        raise ManifestError(f"The column {group!r} (--group) has lists or structures: expected one value.") from None
    if missing := pc.sum(pc.is_in(values, pa.array(["nan", "", None]))).as_py():
        raise ManifestError(f"{missing} images have no value in the column {group!r} (--group).")
    groups = pc.dictionary_encode(values)
    if len(groups.dictionary) < parts:
        found = shorten(groups.dictionary.to_pylist())
        raise ManifestError(
            f"The column {group!r} (--group) has {len(groups.dictionary)} values ({found}), too few for {parts} "
            "parts: lower --folds, or raise --validation-fraction."
        )
    if np.bincount(classes).max() < parts:
        raise ManifestError(
            f"No class has {parts} images, one for each part that --group is to divide: lower --folds, or raise "
            "--validation-fraction."
        )
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    part_of = np.empty(len(rows), np.int64)
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # of classes of few images
        for part, (_, held) in enumerate(splitter.split(rows, classes, groups.indices.to_numpy())):
            part_of[held] = part
    return part_of
