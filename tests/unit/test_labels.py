"""Several labels for an image: their sets, where they come from, and their splits."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cnnray import commandline, configs
from cnnray.evaluation.config import EvaluateConfig
from cnnray.images import labels, splits
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError, build_manifest
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DECIDED, differences
from cnnray.training.decisions import as_before

SETS = [["cat", "dog"], ["dog"], [], ["bird", "cat"]]


def _column(values, kind=None):
    return pa.chunked_array(
        [pa.array(values[:2], kind or labels._LISTS), pa.array(values[2:], kind or labels._LISTS)]
    )


def test_label_sets_are_in_order_and_without_repetitions():
    sets = labels.as_sets(_column([["dog", "cat", "dog"], ["dog"], [], None]))
    assert sets.to_pylist() == [["cat", "dog"], ["dog"], [], None]
    assert labels.keys(sets).to_pylist() == ["cat\x1fdog", "dog", "", None]
    assert labels.names(sets) == ["cat", "dog"]
    assert labels.count(sets) == {"cat": 1, "dog": 2}


def test_strings_become_label_sets():
    texts = _column(["dog | cat", "dog", None, " "], pa.string())
    assert labels.as_sets(texts, "|").to_pylist() == [["cat", "dog"], ["dog"], [], []]
    assert labels.as_sets(texts).to_pylist() == [["dog | cat"], ["dog"], None, [" "]]
    assert labels.count(texts) == {" ": 1, "dog": 1, "dog | cat": 1}
    assert labels.as_sets(_column(["dog  cat", "dog", "", None], pa.string()), " ").to_pylist() == [
        ["cat", "dog"], ["dog"], [], [],
    ]  # fmt: skip
    with pytest.raises(labels.LabelError, match="an empty label"):
        labels.as_sets(_column(["", "dog"], pa.string()))


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ([], None), (["--multi-label"], True), (["--multi-label", "true"], True), (["--multi-label", "false"], False),
        (["--multi-label=null"], None), (["--label-separator", "|"], None),
    ],
)  # fmt: skip
def test_flags_of_the_command_line(flags, known):
    config = commandline.parse(TrainConfig, "train", ["--data", "/d", "--output", "/o", *flags])
    assert config.multi_label is known


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [({"label_separator": ""}, "--label-separator is empty"),
     ({"label_separator": "|", "multi_label": False}, "which --multi-label false excludes")],
)  # fmt: skip
def test_flags_that_cannot_work(flags, sentence):
    for kind in (TrainConfig, EvaluateConfig):
        with pytest.raises(ValueError, match=sentence):
            kind(**{"data": "/d", "output": "/o"} | flags | ({} if kind is TrainConfig else {"bundle": "/b"}))


def test_runs_of_earlier_versions_had_one_label_of_each_image():
    config = TrainConfig(data="/d", output="/o")
    earlier = dict.fromkeys(DECIDED) | {"architecture": "small_cnn", "epochs": 3}
    for name in ("multi_label", "select"):
        del earlier[name]
    decided_config = as_before(config, earlier)
    assert (decided_config.multi_label, decided_config.select) == (False, "val_accuracy")
    same = configs.as_dict(TrainConfig(data="/d", output="/o", select="val_accuracy"))
    del same["select"], same["multi_label"]
    assert differences(TrainConfig(data="/d", output="/o", select="val_accuracy"), same) == []
    assert differences(TrainConfig(data="/d", output="/o", multi_label=True), same) != []


def test_a_test_split_without_labels_is_left_out(tmp_path):
    text = "uri,label,split\na,x|y,train\nb,,train\nc,y,validation\nd,,test\ne,,test\n"
    (tmp_path / "images.csv").write_text(text)
    manifest = build_manifest(str(tmp_path / "images.csv"), labelled=True, label_separator="|")
    assert manifest["split"].to_pylist() == ["train", "train", "validation"]
    assert manifest["label"].to_pylist() == [["x", "y"], [], ["y"]]


@pytest.mark.parametrize(("values", "why"), [([["a", ""]], "an empty label"), ([["a", None]], "an empty label"),
                                             ([["a\x1fb"]], "the character")])  # fmt: skip
def test_labels_that_cannot_be_used_get_a_sentence(values, why, tmp_path):
    with pytest.raises(labels.LabelError, match=why):
        labels.as_sets(_column(values))
    path = str(tmp_path / "images.parquet")
    pyarrow.parquet.write_table(pa.table({"uri": ["a.png"], "label": values}), path)
    with pytest.raises(ManifestError, match=rf"images.parquet has .*{why}"):
        build_manifest(path, labelled=True)


def test_targets_become_rows_of_zeros_and_ones():
    sets = _column(SETS)
    names, distinct = labels.names(sets), labels.distinct_keys(sets)
    assert distinct.to_pylist() == ["", "bird\x1fcat", "cat\x1fdog", "dog"]
    hot = labels.LabelSets(distinct, names).multi_hot(np.asarray([2, 0, 3, 2, 1]))
    assert hot.dtype == np.float32
    assert [[names[index] for index in np.flatnonzero(row)] for row in hot] == [
        ["cat", "dog"], [], ["dog"], ["cat", "dog"], ["bird", "cat"],
    ]  # fmt: skip
    assert labels.LabelSets(pa.array([""]), ["a"]).multi_hot(np.zeros(3, np.int64)).tolist() == [[0]] * 3
    assert labels.multi_hot(sets, names).sum() == 5


# -- where they come from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "large", "jsonl", "csv"])
def test_tables_with_several_labels(tmp_path, kind):
    path, uris = tmp_path / f"images.{kind}", [f"{row}.png" for row in range(4)]
    if kind == "csv":
        fields = ["cat|dog", "dog", "", "bird|cat"]
        path.write_text("uri,label\n" + "".join(f"{uri},{text}\n" for uri, text in zip(uris, fields, strict=True)))
    elif kind == "jsonl":
        rows = [{"uri": uri, "label": of_image[::-1]} for uri, of_image in zip(uris, SETS, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path = tmp_path / "images.parquet"
        lists = pa.array(SETS, pa.large_list(pa.string()) if kind == "large" else None)
        pyarrow.parquet.write_table(pa.table({"uri": uris, "label": lists}), path)
    manifest = build_manifest(str(path), labelled=True, label_separator="|" if kind == "csv" else None)
    assert manifest["label"].to_pylist() == SETS
    assert manifests.is_multi_label(manifest)
    assert manifests.class_names(manifest) == ["bird", "cat", "dog"]
    manifests.write(manifest, str(tmp_path / "written"))
    assert manifests.read(str(tmp_path / "written")).equals(manifest)
    assert manifests.read_metadata(str(tmp_path / "written"))[manifests.FORMAT_KEY] == b"3"
    assert manifests.with_targets(manifest)["target"].to_pylist() == [2, 3, 0, 1]
    others = manifest.set_column(2, "label", _column([["cat"], *SETS[1:]]))
    assert manifests.fingerprint(others) != manifests.fingerprint(manifest)


def test_hugging_face_lists_of_class_labels(tmp_path):
    names = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    for number, feature in enumerate([[names], {"feature": names, "_type": "List"}]):
        metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
        images = pa.array([{"bytes": b"x", "path": "1.png"}] * 4)
        table = pa.table({"image": images, "label": [[1, 0], [], [1], None]}).replace_schema_metadata(metadata)
        pyarrow.parquet.write_table(table, path := str(tmp_path / f"{number}.parquet"))
        assert build_manifest(path, labelled=False)["label"].to_pylist() == [["cat", "dog"], [], ["dog"], None]


def _write(root, **files):
    for name, text in files.items():
        path = root / f"{name.replace('_', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_files_of_the_same_name_in_class_folders_are_one_image(tmp_path):
    _write(tmp_path, cat_1="x", dog_1="x", dog_2="xx", dog_deep_1="xxx", bird_1="x")
    manifest = build_manifest(str(tmp_path), labelled=True, multi_label=True)
    assert [uri.removeprefix(str(tmp_path)) for uri in manifest["uri"].to_pylist()] == [
        "/bird/1.png", "/dog/2.png", "/dog/deep/1.png",
    ]  # fmt: skip
    assert manifest["label"].to_pylist() == [["bird", "cat", "dog"], ["dog"], ["dog"]]
    assert len(build_manifest(str(tmp_path), labelled=True)) == 5


def test_splits_do_not_share_images_by_their_names(tmp_path):
    _write(tmp_path, train_cat_1="x", train_dog_1="x", val_cat_1="yyy", val_dog_2="y")
    manifest = build_manifest(str(tmp_path), labelled=True, multi_label=True)
    assert manifest["split"].to_pylist() == ["train", "validation", "validation"]
    assert manifest["label"].to_pylist() == [["cat", "dog"], ["cat"], ["dog"]]


def test_different_files_of_one_name_are_refused(tmp_path):
    _write(tmp_path, cat_1="x", dog_1="xx")
    with pytest.raises(ManifestError, match=r"cat/1.png and \S+dog/1.png have the same name in two class folders"):
        build_manifest(str(tmp_path), labelled=True, multi_label=True)


def test_images_without_any_label_or_with_unknown_ones_are_refused(tmp_path):
    pyarrow.parquet.write_table(
        pa.table({"uri": ["a", "b"], "label": [["x"], None]}), path := str(tmp_path / "a.parquet")
    )
    with pytest.raises(ManifestError, match="1 images have no label, such as"):
        build_manifest(path, labelled=True)
    nothing = pa.array([[], []], labels._LISTS)
    pyarrow.parquet.write_table(pa.table({"uri": ["a", "b"], "label": nothing}), path := str(tmp_path / "b.parquet"))
    with pytest.raises(ManifestError, match="no image has a label"):
        build_manifest(path, labelled=True)


def test_validation_images_have_as_many_labels_as_the_others(tmp_path):
    for name, values in (("one", ["x", "y"]), ("several", [["x"], ["y"]])):
        pyarrow.parquet.write_table(
            pa.table({"uri": [f"{name}1", f"{name}2"], "label": values}), tmp_path / f"{name}.parquet"
        )
    one, several = (build_manifest(str(tmp_path / f"{name}.parquet"), labelled=True) for name in ("one", "several"))
    with pytest.raises(
        ManifestError, match="The images of --data have lists of labels, and those of --validation one"
    ):
        manifests.with_validation(several, one)
    with pytest.raises(ManifestError, match="The images of --validation have lists"):
        manifests.with_validation(one, several)


# -- splits ---------------------------------------------------------------------------------------------------


@pytest.fixture
def many():
    """A manifest of 2,000 images; labels from every second image to one of a hundred, and one that three have."""
    generator = np.random.default_rng(0)
    shares = np.geomspace(0.5, 0.01, 8)
    has = generator.random((2000, 8)) < shares
    sets = [[f"label {index}" for index in np.flatnonzero(row)] for row in has]
    for row in (5, 50, 500):
        sets[row] = [*sets[row], "rare"]
    sets[7] = [*sets[7], "single"]
    columns = {"id": np.arange(2000), "uri": [f"/{row:04d}" for row in range(2000)], "label": sets}
    columns["group"] = [str(row % 50) for row in range(2000)]
    table = pa.table(columns).append_column("split", pa.nulls(2000, pa.string()))
    return pa.concat_tables([table.slice(0, 700), table.slice(700)])  # columns of two chunks


def _counts(manifest, split):
    rows = manifests.select_split(manifest, split)["label"]
    return labels.count(rows), sum(not of_image for of_image in rows.to_pylist())


@pytest.mark.parametrize("seed", range(5))
def test_each_label_has_its_share_of_the_validation_images(many, seed):
    split = splits.split_off_validation(many, 0.2, seed)
    assert split.equals(splits.split_off_validation(many, 0.2, seed))
    (held, empty), (of_all, all_empty) = _counts(split, "validation"), _counts(with_split(many), "train")
    for name, count in of_all.items():
        assert abs(held.get(name, 0) - 0.2 * count) <= max(1, 0.02 * count), name
    assert abs(empty - 0.2 * all_empty) <= 1
    assert "single" not in held


def with_split(manifest):
    """All rows with the split `train`."""
    return manifests.with_splits(manifest, np.zeros(len(manifest), np.int8))


def test_a_label_whose_images_its_rarer_labels_would_take_keeps_one():
    held = splits._share_of_each_class([np.asarray([0, 1]), np.asarray([2, 3]), np.asarray([0, 2])], 4, 0.5)
    assert held.tolist() == [False, False, True, False]


def test_each_image_validates_in_one_fold_and_each_fold_has_its_share_of_each_label(many):
    folds = [splits.with_fold(many, 5, fold, 1) for fold in range(5)]
    validates = np.stack([(fold["split"].to_numpy(zero_copy_only=False) == "validation") for fold in folds])
    is_single = np.asarray(["single" in of_image for of_image in many["label"].to_pylist()])
    assert validates.sum(0).tolist() == np.where(is_single, 0, 1).tolist()
    of_all = labels.count(many["label"])
    for fold in folds:
        held, _ = _counts(fold, "validation")
        for name, count in of_all.items():
            assert abs(held.get(name, 0) - count / 5) <= max(1, 0.02 * count), name


def test_images_without_any_label_can_be_divided():
    nothing = pa.table({"id": range(20), "uri": [f"/{row:02d}" for row in range(20)], "label": [[]] * 20})
    nothing = nothing.set_column(2, "label", pa.array([[]] * 20, labels._LISTS))
    nothing = nothing.append_column("split", pa.nulls(20, pa.string()))
    assert _counts(splits.split_off_validation(nothing, 0.2, 0), "validation") == ({}, 4)


def test_a_label_whose_images_its_rarer_labels_would_put_into_one_fold_keeps_one():
    dealt = splits._dealt([np.asarray([0, 2]), np.asarray([3, 1]), np.asarray([0, 3])], 4, 2)
    assert dealt.tolist() == [-1, 1, 1, 0]  # the label of 0 and 3 keeps the first of them


def test_groups_keep_together(many):
    split = splits.split_off_validation(many, 0.2, 0, "group")
    held = set(manifests.select_split(split, "validation")["group"].to_pylist())
    assert not held & set(manifests.select_split(split, "train")["group"].to_pylist())
    assert set(manifests.class_names(manifests.select_split(split, "train"))) == set(manifests.class_names(many))
    assert len(held) == 10
