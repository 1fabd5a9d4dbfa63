"""Data sets as people publish and keep them: names of splits, unlabelled test images, globs."""

import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.images import listing
from cnnray.images.manifest import ManifestError, build_manifest
from tests.conftest import write_tar

CLASSES = ("cat", "dog")


def _touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _counts(source, labelled=True):
    """Number of images by split and label."""
    manifest = build_manifest(str(source), labelled=labelled)
    assert manifest["id"].to_pylist() == list(range(len(manifest)))
    rows = [(row["split"], row["label"]) for row in manifest.to_pylist()]
    return {row: rows.count(row) for row in rows}


def _each(splits, count=1):
    return {(split, label): count for split in splits for label in CLASSES}


NAMES = [
    ("train", "validation", "test"),
    ("train", "val", "test"),
    ("train", "valid", "test"),
    ("Train", "Valid", "Test"),
    ("TRAIN", "VAL", "TEST"),
    ("training", "validation", "testing"),
]


@pytest.mark.parametrize("names", NAMES)
def test_folders_of_splits(tmp_path, names):
    _touch(tmp_path, *(f"{split}/{label}/{split}.png" for split in names for label in CLASSES))
    assert _counts(tmp_path) == _each(listing.SPLITS)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("place", ["{}-00000-of-00001", "data/{}-00000-of-00001", "default/{}/0000", "{}/0000"])
def test_shards_of_splits(tmp_path, names, kind, place):
    for split in names:
        path = tmp_path / f"{place.format(split)}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "tar":
            members = {f"{label}.{ending}": label.encode() for label in CLASSES for ending in ("png", "cls")}
            write_tar(path, members)
        else:
            pq.write_table(pa.table({"image": [b"x"] * 2, "label": CLASSES}), path)
    assert _counts(tmp_path) == _each(listing.SPLITS)
    assert _counts(f"{tmp_path}/**/*.{kind}") == _each(listing.SPLITS)


@pytest.mark.parametrize("names", NAMES)
def test_columns_of_splits(tmp_path, names):
    rows = [f"{split}-{label}.png,{label},{split}" for split in names for label in CLASSES]
    (tmp_path / "images.csv").write_text("\n".join(["uri,label,split", *rows]))
    assert _counts(tmp_path / "images.csv") == _each(listing.SPLITS)


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (("train", "val", "validation"), "two folders of the same split"),
        (("Train", "train"), "two folders of the same split"),
        (("train", "test", "cat"), "expected class folders, or only train, validation and test"),
    ],
)
def test_folders_that_could_mean_two_things_are_refused(tmp_path, folders, sentence):
    _touch(tmp_path, *(f"{folder}/{label}/1.png" for folder in folders for label in CLASSES))
    with pytest.raises(ManifestError, match=sentence) as error:
        build_manifest(str(tmp_path), labelled=True)
    assert str(tmp_path) in str(error.value)


def test_a_class_may_be_called_like_a_split(tmp_path):
    _touch(tmp_path, "train/1.png", "bus/1.png", "tram/1.png")
    assert _counts(tmp_path) == {(None, label): 1 for label in ("train", "bus", "tram")}


# -- test images without labels -------------------------------------------------------------------------------


def _write_shard(path, labels, *, names=True):
    """A Parquet file as Hugging Face writes it."""
    table = pa.table({"image": pa.array([{"bytes": b"x", "path": "1.png"}] * len(labels)), "label": labels})
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}}
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.mark.parametrize("unknown", [-1, None])
@pytest.mark.parametrize("names", [True, False])
def test_unlabelled_test_files_are_left_out_where_labels_are_needed(tmp_path, caplog, unknown, names):
    _write_shard(tmp_path / "train-0.parquet", [0, 1], names=names)
    _write_shard(tmp_path / "test-0.parquet", pa.array([unknown] * 3, pa.int64()), names=names)
    with caplog.at_level(logging.INFO, "cnnray"):
        manifest = build_manifest(str(tmp_path), labelled=True)
    assert manifest["split"].to_pylist() == ["train"] * 2
    assert f"{tmp_path}: the 3 images of the split test have no labels, and are left out" in caplog.text
    assert len(build_manifest(str(tmp_path), labelled=False)) == 5


def test_an_unlabelled_test_folder_is_left_out_where_labels_are_needed(tmp_path, caplog):
    _touch(tmp_path, "train/cat/1.png", "train/dog/1.png", "Test/1.png", "Test/2.png")
    with caplog.at_level(logging.INFO, "cnnray"):
        assert _counts(tmp_path) == _each(["train"])
    assert f"{tmp_path}/Test has no class folders: its images have no labels, and are left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "labels"), [("test-0.parquet", [0, -1]), ("validation-0.parquet", [-1, -1])], ids=["some", "validation"]
)
def test_other_images_without_a_label_are_refused(tmp_path, name, labels):
    _write_shard(tmp_path / "train-0.parquet", [0, 1])
    _write_shard(tmp_path / name, labels)
    with pytest.raises(ManifestError, match=r"\d images have no label, such as .*/" + name):
        build_manifest(str(tmp_path), labelled=True)


def test_a_class_may_be_called_minus_one(tmp_path):
    for split in ("train", "test"):
        _write_shard(tmp_path / f"{split}-0.parquet", [-1, 1] if split == "train" else [-1], names=False)
    assert _counts(tmp_path) == {("train", "-1"): 1, ("train", "1"): 1, ("test", "-1"): 1}


# -- globs ----------------------------------------------------------------------------------------------------

FILES = (
    "1.png", "a/1.png", "a/2.jpg", "a/b/1.png", "a/b/c/1.png", "a/.hidden/1.png", "a/.1.png", "ab/1.png",
    "a/notes.txt", "[ab]/3.png",
)  # fmt: skip
GLOBS = {
    "*.png": ["1.png"],
    "*/1.png": ["a/1.png", "ab/1.png"],
    "*/*": ["[ab]/3.png", "a/1.png", "a/2.jpg", "ab/1.png"],
    "a*/*.png": ["a/1.png", "ab/1.png"],
    "a/*": ["a/1.png", "a/2.jpg"],
    "a/?.[jp][pn]g": ["a/1.png", "a/2.jpg"],
    "a/[!1].*": ["a/2.jpg"],
    "a/**": ["a/1.png", "a/2.jpg", "a/b/1.png", "a/b/c/1.png"],
    "a/**/1.png": ["a/1.png", "a/b/1.png", "a/b/c/1.png"],
    "**/b/*.png": ["a/b/1.png"],
    "**/b/**/*.png": ["a/b/1.png", "a/b/c/1.png"],
    "**/**/c/*.png": ["a/b/c/1.png"],
    "a/.*/*.png": [],
    "[ab]/*.png": ["[ab]/3.png"],
    "[ab]*/1.png": ["a/1.png", "ab/1.png"],
    "[[]ab]/*.png": ["[ab]/3.png"],
}


def glob(root, pattern):
    """The paths below `root` that a pattern finds."""
    try:
        uris = build_manifest(f"{root}/{pattern}", labelled=False)["uri"].to_pylist()
    except ManifestError:  # no images
        uris = []
    return [uri.removeprefix(f"{root}/") for uri in uris]


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_on_a_disk(tmp_path, pattern):
    _touch(tmp_path, *FILES)
    assert glob(tmp_path, pattern) == GLOBS[pattern]


def test_a_folder_that_exists_is_no_glob(tmp_path):
    _touch(tmp_path, "Photos [2023]/cat/1.png", "Photos [2023]/dog/1*.png", "Photos 2/cat/9.png")
    assert _counts(tmp_path / "Photos [2023]") == _each([None])
    assert glob(tmp_path, "Photos [2023]/*/1*.png") == ["Photos [2023]/cat/1.png", "Photos [2023]/dog/1*.png"]
    assert glob(tmp_path, "Photos [2023]") == ["Photos [2023]/cat/1.png", "Photos [2023]/dog/1*.png"]
    assert glob(tmp_path, "Photos [0-9]/*/*.png") == ["Photos 2/cat/9.png"]


def test_a_folder_with_brackets_that_does_not_exist_gets_a_sentence(tmp_path):
    with pytest.raises(ManifestError, match=r"Photos \[2023\] does not exist, and no images match it"):
        build_manifest(f"{tmp_path}/Photos [2023]", labelled=True)


def test_a_file_name_that_is_not_utf_8_gets_a_sentence(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(OSError, match=r"caf\\xe9.png' is not UTF-8: rename it"):
        build_manifest(f"{tmp_path}/*.png", labelled=False)
