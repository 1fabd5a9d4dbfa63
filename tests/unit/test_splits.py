"""Which images train and which validate: stratified, seeded, and with groups that keep together."""

import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from cnnray.images import manifest as manifests
from cnnray.images import splits
from cnnray.images.manifest import ManifestError
from cnnray.training.config import TrainConfig
from cnnray.training.data import build_run_manifest


def _labelled(uris, labels, given=None, **columns):
    columns = {"uri": uris, "label": labels, "split": given or [None] * len(uris), **columns}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return table.add_column(0, "id", [list(range(len(table)))])


def test_split_is_seeded_and_stratified():
    manifest = _labelled([f"/{row:02d}.png" for row in range(16)], [*"aaaaaaaaaabbbbbc"])
    first, again, other = (splits.split_off_validation(manifest, 0.2, seed) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)
    held = manifests.select_split(first, "validation")["label"].to_pylist()
    assert (held.count("a"), held.count("b"), held.count("c")) == (2, 1, 0)


def test_a_fraction_that_leaves_nothing_is_refused():
    with pytest.raises(ManifestError, match="leaves none"):
        splits.split_off_validation(_labelled(["/a.png", "/b.png"], ["a", "b"]), 0.2, 0)


def _earlier_split(labels, fraction, seed):
    """The split as version 0.1.0 drew it."""
    labels = np.asarray(labels, dtype=object)
    split = np.full(len(labels), "train", dtype=object)
    generator = np.random.default_rng([seed, 0x5711])
    for label in sorted(set(labels)):
        rows = generator.permutation(np.flatnonzero(labels == label))
        split[rows[: min(round(fraction * len(rows)), len(rows) - 1)]] = "validation"
    return split.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_gives_the_split_that_earlier_versions_drew(seed):
    labels = [str(number) for number in np.random.default_rng(seed).zipf(1.5, 500) % 37]
    labels += ["é", "Z", "a b", ""]
    manifest = _labelled([f"/{row:04d}.png" for row in range(len(labels))], labels)
    for fraction in (0.05, 0.2, 0.5):
        split = splits.split_off_validation(manifest, fraction, seed)["split"].to_pylist()
        assert split == _earlier_split(labels, fraction, seed)


def test_the_split_test_is_kept_when_validation_images_are_drawn():
    given = ["train", "test", "train", "train", "test", "train"]
    manifest = _labelled([f"/{row}.png" for row in range(6)], list("aabbab"), given)
    split = splits.split_off_validation(manifest, 0.5, 0)
    assert split["id"].to_pylist() == list(range(6))
    assert [row for row, name in enumerate(split["split"].to_pylist()) if name == "test"] == [1, 4]
    others = [0, 2, 3, 5]
    assert split.take(others)["split"].to_pylist() == _earlier_split(list("abbb"), 0.5, 0)


def test_many_classes_take_no_time_for_each_row():
    rows, classes = 60_000, 20_000
    labels = [f"n{row % classes:08d}" for row in range(rows)]
    manifest = _labelled([f"/{row:06d}.png" for row in range(rows)], labels)
    started = time.monotonic()
    split = splits.split_off_validation(manifest, 0.4, 0)
    assert split["split"].to_pylist().count("validation") == classes
    assert time.monotonic() - started < 5  # 38 s when each class was compared with all rows


@pytest.mark.parametrize("group", [None, "patient"])
def test_each_image_validates_in_one_fold(group):
    patients = np.random.default_rng(0).integers(0, 60, 600)
    labels = [["a", "b", "c"][(patient + number // 300) % 3] for number, patient in enumerate(patients)]
    manifest = _labelled(
        [f"/{row:04d}.png" for row in range(602)],
        [*labels, "rare", "a"],
        [None] * 601 + ["test"],
        patient=[*map(str, patients), "61", "0"],
    )
    times, sizes = Counter(), []
    for fold in range(5):
        split = splits.with_fold(manifest, 5, fold, 7, group)
        assert split.equals(splits.with_fold(manifest, 5, fold, 7, group))
        held = manifests.select_split(split, "validation")
        times.update(held["id"].to_pylist())
        sizes.append(len(held))
        counts = Counter(held["label"].to_pylist())
        for label, count in Counter(labels).items():
            assert abs(counts[label] - count / 5) <= (1 if group is None else count / 10)
        if group is not None:
            train = manifests.select_split(split, "train")
            assert not set(train["patient"].to_pylist()) & set(held["patient"].to_pylist())
        assert split["split"][601].as_py() == "test"
    # The only image of its class cannot validate, unless its group does.
    assert times == dict.fromkeys(range(600 if group is None else 601), 1)
    assert max(sizes) - min(sizes) <= (1 if group is None else 40)


def test_groups_keep_together_in_a_fraction_and_leave_all_classes_in_training():
    patients = [str(number // 10) for number in range(300)]
    labels = ["rare" if patient == "3" else "ab"[int(patient) % 2] for patient in patients]
    manifest = _labelled([f"/{row:04d}.png" for row in range(300)], labels, patient=patients)
    for seed in range(8):
        split = splits.split_off_validation(manifest, 0.2, seed, "patient")
        held, train = (manifests.select_split(split, name) for name in ("validation", "train"))
        assert 50 <= len(held) <= 70
        assert set(train["label"].to_pylist()) == {"a", "b", "rare"}
        assert not set(train["patient"].to_pylist()) & set(held["patient"].to_pylist())


def test_what_cannot_be_divided_is_refused():
    manifest = _labelled([f"/{row}.png" for row in range(4)], list("aabb"), patient=["x", "x", "y", None])
    with pytest.raises(ManifestError, match="1 images have no value in the column 'patient'"):
        splits.with_fold(manifest, 2, 0, 0, "patient")
    with pytest.raises(ManifestError, match=r"has 2 values \(.*x.*y.*\), too few for 5 parts: lower --folds"):
        splits.with_fold(manifest.slice(0, 3), 5, 0, 0, "patient")
    with pytest.raises(ManifestError, match="No class has 3 images, one for each part that --group is to divide"):
        splits.with_fold(
            _labelled([f"/{row}.png" for row in range(4)], list("aabb"), patient=list("wxyz")), 3, 0, 0, "patient"
        )
    odd = (
        manifest.slice(0, 3)
        .append_column("lists", [[[1], [2], [3]]])
        .append_column("sizes", [[1.0, float("nan"), 2.0]])
    )
    with pytest.raises(ManifestError, match=r"'lists' \(--group\) has lists or structures"):
        splits.with_fold(odd, 2, 0, 0, "lists")
    with pytest.raises(ManifestError, match="1 images have no value in the column 'sizes'"):
        splits.with_fold(odd, 2, 0, 0, "sizes")
    with pytest.raises(ManifestError, match="4 images are too few for 9 folds: fold 8 has none"):
        splits.with_fold(manifest, 9, 8, 0)


def test_the_flags_reach_the_run(tmp_path):
    table = tmp_path / "images.csv"
    lines = [f"{row:02d}.png,{'ab'[row % 2]},p{row // 4}" for row in range(80)]
    table.write_text("uri,label,patient\n" + "\n".join(lines))

    def held(**changes):
        manifest = build_run_manifest(TrainConfig(data=str(table), output=str(tmp_path / "out"), **changes))
        assert manifest.column_names == ["id", "uri", "label", "split"]
        return manifests.select_split(manifest, "validation")["id"].to_pylist()

    assert sorted(row for fold in range(4) for row in held(folds=4, fold=fold)) == list(range(80))
    patients = Counter(row // 4 for row in held(group="patient"))
    assert len(patients) == 4
    assert set(patients.values()) == {4}
    with pytest.raises(ManifestError, match="has no column 'camera' for --group"):
        held(group="camera")
    table.write_text("uri,label,split,patient\n1.png,a,train,x\n2.png,b,train,y\n3.png,a,validation,z\n")
    with pytest.raises(ManifestError, match="says which images validate: --folds and --group do not go with that"):
        held(folds=2)
