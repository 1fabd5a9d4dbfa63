"""Which images train and which validate, where the data does not say it: at random, stratified by class.

Images with several labels are divided label by label, the rarest first, as their images leave the least choice
(Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data", but with the order of the labels
decided once). Those without any label are one more class.
"""

import warnings

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.images import labels
from cnnray.images import manifest as manifests
from cnnray.images.listing import SPLITS, shorten
from cnnray.images.manifest import ManifestError

_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))

Ints = npt.NDArray[np.int64]


def split_off_validation(manifest: pa.Table, fraction: float, seed: int, group: str | None = None) -> pa.Table:
    """Split a labelled manifest into `train` and `validation`.

    Without groups, round(fraction * n) of the n images of each class go to `validation` (more, where images of
    several labels do for their rarer ones), but at least one stays in `train`. (scikit-learn's stratified splitters
    refuse classes of one image and small fractions.) With groups, `validation` is one of round(1 / fraction) parts,
    the first that leaves images of each class in `train`.

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
        held = _share_of_each_class(_shuffled(classes, seed), len(rows), fraction)
    else:
        parts = max(2, round(1 / fraction))
        part_of = _parts_of_groups(manifest, rows, classes, group, parts, seed)
        leaves_all = [all((part_of[images] != part).any() for images in classes) for part in range(parts)]
        held = part_of == int(np.argmax(leaves_all))
    if not held.any():
        raise ManifestError(f"A validation fraction of {fraction} of {len(rows)} images leaves none for validation.")
    return _with_validation(manifest, rows, held)


def with_fold(manifest: pa.Table, folds: int, fold: int, seed: int, group: str | None = None) -> pa.Table:
    """Split a labelled manifest into `train` and `validation`, as for cross-validation.

    Each image validates in one fold. (One that is the only image of a class trains in all of them, and so does one of
    those of a label that their other labels have put into one fold.)

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
        part_of = _dealt(_shuffled(classes, seed), len(rows), folds)
    else:
        part_of = _parts_of_groups(manifest, rows, classes, group, folds, seed)
    if not (part_of == fold).any():
        raise ManifestError(f"{len(rows)} images are too few for {folds} folds: fold {fold} has none.")
    return _with_validation(manifest, rows, part_of == fold)


def _undecided(manifest: pa.Table) -> tuple[Ints, list[Ints]]:
    """The rows that are not of the split `test`; and, for each class, the places of its images among them. Where
    images may have several labels, the rarest class is the first."""
    is_undecided = manifests.split_numbers(manifest) != _TEST
    column = manifest["label"].filter(pa.array(is_undecided))
    rows, names = np.flatnonzero(is_undecided), pa.array(labels.names(column), pa.string())
    if not labels.are_several(column):
        return rows, _places(pc.index_in(column, names).to_numpy(), np.arange(len(rows)))
    images = np.repeat(np.arange(len(rows)), pc.list_value_length(column).to_numpy())
    numbers = pc.index_in(pc.list_flatten(column), names).to_numpy()
    without = np.setdiff1d(np.arange(len(rows)), images)
    classes = _places(numbers, images) + ([without] if len(without) else [])
    return rows, sorted(classes, key=len)


def _places(classes: Ints, images: Ints) -> list[Ints]:
    """The images of each class, where `images[i]` has the class `classes[i]`."""
    return np.split(images[np.argsort(classes, kind="stable")], np.cumsum(np.bincount(classes))[:-1])


def _with_validation(manifest: pa.Table, rows: Ints, held: npt.NDArray[np.bool_]) -> pa.Table:
    numbers = manifests.split_numbers(manifest)
    numbers[rows] = np.where(held, _VALIDATION, _TRAIN)
    return manifests.with_splits(manifest, numbers)


def _shuffled(classes: list[Ints], seed: int) -> list[Ints]:
    """The images of each class in random order."""
    generator = np.random.default_rng([seed, 0x5711])
    return [generator.permutation(images) for images in classes]


def _share_of_each_class(classes: list[Ints], count: int, fraction: float) -> npt.NDArray[np.bool_]:
    """Which of `count` images validate."""
    held, is_decided = np.zeros((2, count), bool)
    for images in classes:
        wanted = min(round(fraction * len(images)), len(images) - 1) - held[images].sum()
        held[images[~is_decided[images]][: max(wanted, 0)]] = True
        is_decided[images] = True
    for images in classes:
        if len(images) and held[images].all():  # its rarer labels took them all
            held[images[0]] = False
    return held


def _dealt(classes: list[Ints], count: int, folds: int) -> Ints:
    """The fold in which each of `count` images validates, or -1: of each class, about as many in each."""
    part_of, is_decided, dealt = np.full(count, -1, np.int64), np.zeros(count, bool), 0
    for images in classes:
        left = images[~is_decided[images]]
        has = np.bincount(part_of[images] + 1, minlength=folds + 1)[1:]
        if len(images) > 1 and not has.any():
            part_of[left] = (dealt + np.arange(len(left))) % folds
        elif len(images) > 1:
            # A fold's places are as many as it takes; those of the fewest images of this class come first.
            places = (has + np.arange(len(left))[:, None]).ravel()
            turns = np.tile((np.arange(folds) - dealt) % folds, len(left))
            part_of[left] = np.lexsort((turns, places))[: len(left)] % folds
        dealt += len(left) if len(images) > 1 else 0
        is_decided[images] = True
    for images in classes:
        if len(images) > 1 and len(np.unique(part_of[images])) == 1:  # its rarer labels put them into one fold
            part_of[images[0]] = -1
    return part_of


def _parts_of_groups(manifest: pa.Table, rows: Ints, classes: list[Ints], group: str, parts: int, seed: int) -> Ints:
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
    class_of, part_of = np.zeros((2, len(rows)), np.int64)
    for number, images in reversed([*enumerate(classes)]):
        class_of[images] = number  # with several labels the rarest
    if np.bincount(class_of).max() < parts:
        raise ManifestError(
            f"No class has {parts} images, one for each part that --group is to divide: lower --folds, or raise "
            "--validation-fraction."
        )
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # of classes of few images
        for part, (_, held) in enumerate(splitter.split(rows, class_of, groups.indices.to_numpy())):
            part_of[held] = part
    return part_of
