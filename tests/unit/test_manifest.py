import gzip
import hashlib
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from cnnray.images import containers
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError, build_manifest
from tests.conftest import write_tar


def _touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_class_folders(tmp_path):
    _touch(tmp_path, "b/2.JPG", "a/1.png", "a/deep/er/3.jpeg", "a/notes.txt", "a/.hidden.png", ".git/x.png")
    manifest = build_manifest(str(tmp_path), labelled=True)
    assert manifest["id"].to_pylist() == [0, 1, 2]
    assert [uri.removeprefix(str(tmp_path)) for uri in manifest["uri"].to_pylist()] == [
        "/a/1.png",
        "/a/deep/er/3.jpeg",
        "/b/2.JPG",
    ]
    assert manifest["label"].to_pylist() == ["a", "a", "b"]
    assert manifest.equals(build_manifest(str(tmp_path), labelled=True))


def test_split_folders(tmp_path):
    _touch(tmp_path, "train/a/1.png", "train/b/1.png", "validation/a/2.png", "validation/b/2.png")
    manifest = build_manifest(str(tmp_path), labelled=True)
    assert manifest["split"].to_pylist() == ["train", "train", "validation", "validation"]
    assert manifests.class_names(manifest) == ["a", "b"]


def test_a_flat_folder_and_a_glob_need_no_labels(tmp_path):
    _touch(tmp_path, "1.png", "sub/2.png", "sub/3.gif")
    assert len(build_manifest(str(tmp_path), labelled=False)) == 3
    assert len(build_manifest(f"{tmp_path}/**/*.png", labelled=False)) == 2


def test_containers_beside_images_are_not_passed_over_in_silence(tmp_path, caplog):
    _touch(tmp_path, "1.png", "sub/0.tar")
    assert len(build_manifest(str(tmp_path), labelled=False)) == 1
    assert f"its Parquet and tar files are ignored: '{tmp_path}/sub/0.tar'" in caplog.text


def test_a_name_that_is_not_utf_8_gets_a_sentence(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(OSError, match=r"caf\\xe9.png' is not UTF-8: rename it"):
        build_manifest(str(tmp_path), labelled=False)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables(tmp_path, kind):
    rows = [{"uri": "x/2.png", "label": "007", "who": "me"}, {"uri": "/y/1.png", "label": "NA", "who": "you"}]
    path = tmp_path / f"images.{kind}"
    if kind == "csv":
        path.write_text("uri,label,who\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    manifest = build_manifest(str(path), labelled=True).to_pylist()
    assert {row["uri"]: (row["label"], row["who"]) for row in manifest} == {
        f"{tmp_path}/x/2.png": ("007", "me"),
        "/y/1.png": ("NA", "you"),
    }


def _write_images(path, labels, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array([b"x"] * len(labels), pa.binary()), "label": labels, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def test_parquet_with_the_images_in_it(tmp_path):
    path = tmp_path / "images.parquet"
    _write_images(path, ["b", "a", "b"], uri=["x", "x", "z"], who=[1, 2, 3])
    manifest = build_manifest(str(path), labelled=True)
    assert manifest["uri"].to_pylist() == [
        f"{path}#{place}" for place in ("000000-000000000", "000000-000000001", "000001-000000000")
    ]
    assert manifest.drop_columns(["id", "uri"]).to_pylist() == [
        {"original_uri": "x", "label": "b", "split": None, "who": 1},
        {"original_uri": "x", "label": "a", "split": None, "who": 2},
        {"original_uri": "z", "label": "b", "split": None, "who": 3},
    ]


def test_parquet_shards_name_their_split_and_labels_as_hugging_face_does(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    images = pa.array([{"bytes": b"x", "path": "1.png"}] * 3)
    table = pa.table({"image": images, "label": [1, 0, -1]}).replace_schema_metadata(metadata)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    for source in (tmp_path, tmp_path / "*.parquet"):
        manifest = build_manifest(str(source), labelled=False)
        assert manifest["split"].to_pylist() == ["test"] * 3 + ["train"] * 6
        assert manifest["label"].to_pylist() == ["dog", "cat", None] * 3
    with pytest.raises(ManifestError, match="3 images have no label"):
        build_manifest(str(tmp_path), labelled=True)


def test_tar_shards_as_webdataset_writes_them(tmp_path):
    members = {"b/1.jpg": b"one", "b/1.cls": b"cat", "b/1.json": b"{}", "b/2.v2.PNG": b"two", "b/2.cls": b"dog\n"}
    for name in ("train-000", "validation-000"):
        write_tar(tmp_path / f"{name}.tar", {**members, "b/.hidden.png": b"x", "a/long" * 40 + ".png": b"three"})
    for source in (tmp_path, tmp_path / "*.tar"):
        manifest = build_manifest(str(source), labelled=False)
        assert manifest["split"].to_pylist() == ["train"] * 3 + ["validation"] * 3
        assert manifest["key"].to_pylist() == ["b/1", "b/2", "a/long" * 40] * 2
        assert manifest["label"].to_pylist() == ["cat", "dog", None] * 2
    manifest = build_manifest(str(tmp_path / "train-000.tar"), labelled=False)
    assert list(containers.encoded(manifest["uri"].to_pylist())) == [b"one", b"two", b"three"]
    assert list(containers.encoded(manifest["uri"].to_pylist()[::-1])) == [b"three", b"two", b"one"]
    assert manifest["uri"][0].as_py() == f"{tmp_path}/train-000.tar#000000000512-000000003-b/1.jpg"


@pytest.mark.parametrize("case", ["compressed", "cut off", "not a tar"])
def test_a_tar_that_is_not_whole_is_refused(case, tmp_path):
    path = tmp_path / "images.tar"
    write_tar(path, {f"{index}.png": bytes(3000) for index in range(9)})
    data = path.read_bytes()
    path.write_bytes({"compressed": gzip.compress(data), "cut off": data[:5000], "not a tar": b"x" * 5000}[case])
    with pytest.raises(ManifestError, match=r"images.tar cannot be read as a table: .*must be complete"):
        build_manifest(str(path), labelled=False)


def test_images_of_a_tar_that_changed_are_errors(tmp_path):
    path = tmp_path / "images.tar"
    write_tar(path, {f"{index}.png": bytes(3000) for index in range(9)})
    uris = build_manifest(str(path), labelled=False)["uri"].to_pylist()
    path.write_bytes(path.read_bytes()[:9000])
    sources = list(containers.encoded(uris))
    assert sources[:2] == [bytes(3000)] * 2
    assert [str(error) for error in sources[2:]] == [f"unreadable: {path} ends before the image"] * 7
    path.unlink()
    assert [error.reason for error in containers.encoded(uris)] == ["missing"] * 9


def test_an_id_of_the_tables_own_is_kept(tmp_path):
    (tmp_path / "x.csv").write_text("id,uri\nb17,x.png\na4,y.png\n")
    manifest = build_manifest(str(tmp_path / "x.csv"), labelled=False)
    assert manifest["id"].to_pylist() == [0, 1]
    assert manifest["original_id"].to_pylist() == ["b17", "a4"]


def test_parquet_without_images_or_addresses_is_refused(tmp_path):
    pyarrow.parquet.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ManifestError, match="no column 'uri' and no column of images"):
        build_manifest(str(tmp_path / "x.parquet"), labelled=False)
    with pytest.raises(ManifestError, match=r"y.parquet cannot be read as a table"):
        build_manifest(str(tmp_path / "y.parquet"), labelled=False)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "no sub-folders"),
        (["1.png"], "no sub-folders"),
        (["a/1.txt", "b/2.txt"], "holds no images"),
        (["a/1.png", "b/2.txt"], "hold no images: 'b'"),
        (["a/1.png", "a/2.png"], "one class only"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.txt"], "holds no images"),
    ],
)
def test_bad_folders_get_one_sentence(tmp_path, files, sentence):
    _touch(tmp_path, *files)
    with pytest.raises(ManifestError, match=sentence) as error:
        build_manifest(str(tmp_path), labelled=True)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("url,label\na.png,x\n", "no column 'uri'"),
        ("uri,label\na.png,x\na.png,y\n", "listed more than once"),
        ("uri,label\na.png,x\n./a.png,y\n", "listed more than once"),
        ("uri,label\na.png,x\nb.png,\n", "have no label"),
        ("uri,label,split\na.png,x,dev\nb.png,y,dev\n", "splits 'dev'"),
        ("uri,label\n", "holds no images"),
        ('uri,label\n"a.png,x\n', "cannot be read as a table|has no column|hold"),
    ],
)
def test_bad_tables_get_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "images.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=sentence):
        build_manifest(str(path), labelled=True)


def test_missing_folder_and_unknown_scheme(tmp_path):
    with pytest.raises(ManifestError, match="does not exist"):
        build_manifest(str(tmp_path / "nowhere"), labelled=True)
    with pytest.raises(OSError, match="neither a local path nor"):
        build_manifest("ftp://bucket/x", labelled=True)


def _labelled(uris, labels, splits=None):
    columns = {"uri": uris, "label": labels, "split": splits or [None] * len(uris)}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    return table.add_column(0, "id", [list(range(len(table)))])


def test_the_fingerprint_is_that_of_earlier_versions():
    uris = ["/plain.png", "/it's.png", '/"both" isn\'t.png', "/back\\slash.png", "/é ü.png", "/new\nline\t.png",
            "/\x7f\u200b\U0001f600.png", "s3://bucket/a+b=c,[d]~.png", ""]  # fmt: skip
    manifest = _labelled(uris, ["a", None, "c'", "d", "é", "f", "g", "h", ""], ["train", None, "test"] * 3)
    digest = hashlib.sha256()
    for column in ("id", "uri", "label", "split"):
        for value in manifest[column].to_pylist():
            digest.update(repr(value).encode())
    for table in (manifest, pa.concat_tables([manifest.slice(0, 4), manifest.slice(4)])):
        assert manifests.fingerprint(table) == digest.hexdigest()[:32]


def test_validation_may_not_repeat_or_add_labels(tmp_path):
    _touch(tmp_path, "t/a/0.png", "t/b/0.png", "v/a/1.png", "v/z/1.png")
    train, validation = (build_manifest(str(tmp_path / name), labelled=True) for name in ("t", "v"))
    with pytest.raises(ManifestError, match="no training image has: 'z'"):
        manifests.with_validation(train, validation)
    with pytest.raises(ManifestError, match="more than once"):
        manifests.with_validation(train, train)


def test_validation_images_of_their_own_take_the_place_of_those_of_the_data(caplog):
    data = _labelled(
        [f"/d/{row}.png" for row in range(7)], list("ababaab"), ["train"] * 4 + ["validation"] + ["test"] * 2
    )
    other = _labelled([f"/o/{row}.png" for row in range(4)], list("abab"), ["validation", "train", "train", "test"])
    with caplog.at_level(logging.INFO, "cnnray"):
        manifest = manifests.with_validation(data, other)
    assert manifest["id"].to_pylist() == list(range(8))
    assert dict(zip(manifest["uri"].to_pylist(), manifest["split"].to_pylist(), strict=True)) == {
        "/d/0.png": "train", "/d/1.png": "train", "/d/2.png": "train", "/d/3.png": "train", "/d/5.png": "test",
        "/d/6.png": "test", "/o/0.png": "validation", "/o/3.png": "test",
    }  # fmt: skip
    assert "3 images of other splits are left out" in caplog.text


@pytest.mark.parametrize(
    ("splits", "other_splits", "expected"),
    [
        ([None, None, None], [None], ["train", "train", "train", "validation"]),
        ([None, None, "test"], [None], ["train", "train", "test", "validation"]),
        (["test", "test", "test"], ["test"], ["train", "train", "train", "validation"]),
        (["train", "train", "test"], ["test"], ["train", "train", "test", "validation"]),
    ],
)
def test_all_images_serve_where_none_has_the_split(splits, other_splits, expected):
    data, other = _labelled(["/0", "/1", "/2"], list("abb"), splits), _labelled(["/3"], ["a"], other_splits)
    assert manifests.with_validation(data, other)["split"].to_pylist() == expected


def test_the_test_images_of_the_data_may_validate():
    data = _labelled(["/0", "/1", "/2", "/3"], list("abab"), ["train", "train", "test", "test"])
    assert manifests.with_validation(data, data.slice(3))["split"].to_pylist() == [
        "train",
        "train",
        "test",
        "validation",
    ]


def test_targets_are_places_among_the_class_names(tmp_path):
    _touch(tmp_path, "b/0.png", "a/1.png", "c/2.png")
    manifest = manifests.with_targets(build_manifest(str(tmp_path), labelled=True))
    assert dict(zip(manifest["label"].to_pylist(), manifest["target"].to_pylist(), strict=True)) == {
        "a": 0, "b": 1, "c": 2,
    }  # fmt: skip


def test_written_and_read_back_whole(tmp_path):
    _touch(tmp_path, "a/0.png", "b/0.png")
    manifest = build_manifest(str(tmp_path), labelled=True)
    manifests.write(manifest, str(tmp_path / "manifest.parquet"))
    assert manifests.read(str(tmp_path / "manifest.parquet")).equals(manifest)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
