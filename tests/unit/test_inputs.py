"""Inputs as streams of rows, and the walks below them."""

import glob
import json
import logging
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.images import ahead, globs, inputs, storage, tables
from cnnray.images.inputs import VERSION, open_input
from cnnray.images.manifest import ManifestError, build_manifest
from tests.conftest import write_tar

ODD = (
    "a-b.jpg", "a/1.png", "a/z.png", "a.jpg", "a/b-c/2.png", "a/b/1.png", "a/b.png", "a b/1.png", "a!/1.png", "é.png",
    "\U0001f600.png", "\uffee.png", "Z.png", "a0.png", "a/\U0001f600/x.png", ".hidden/1.png", "a/.1.png",
    "0/notes.txt",
)  # fmt: skip


def _touch(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _read(source):
    """All rows of an input, whose tables have the same columns."""
    read = list(open_input(str(source)).tables)
    assert all(table.schema == read[0].schema for table in read)
    assert read[0].column_names[0] == "uri"
    assert read[0].column_names[-1] == VERSION
    return pa.concat_tables(read)


# -- walks ----------------------------------------------------------------------------------------------------


def test_files_come_in_the_order_of_their_uris(tmp_path):
    _touch(tmp_path, *ODD)
    files = list(storage.walk(str(tmp_path)))
    expected = sorted(f"{tmp_path}/{name}" for name in ODD if "/." not in f"/{name}")
    assert [file.uri for file in files] == expected
    assert files == storage.files(str(tmp_path))


def test_a_version_changes_with_the_content(tmp_path):
    _touch(tmp_path, "1.png", "2.png")
    first = {file.uri: file for file in storage.walk(str(tmp_path))}
    (tmp_path / "1.png").write_bytes(b"other")
    os.utime(tmp_path / "2.png", ns=(1, 1))
    second = {file.uri: file for file in storage.walk(str(tmp_path))}
    assert all(first[uri].version != second[uri].version for uri in first)
    assert storage.stored_file(f"{tmp_path}/1.png") == second[f"{tmp_path}/1.png"]
    assert storage.stored_file(f"{tmp_path}/3.png") is None


def test_a_file_that_is_deleted_during_a_walk_is_left_out(tmp_path):
    _touch(tmp_path, "1.png", "2.png", "3.png")
    walk = storage.walk(str(tmp_path))
    assert next(walk).uri == f"{tmp_path}/1.png"
    (tmp_path / "2.png").unlink()
    assert [file.uri for file in walk] == [f"{tmp_path}/3.png"]


# -- work ahead -----------------------------------------------------------------------------------------------


def _streams(count, length, read):
    def stream(number):
        for item in range(length):
            read.append((number, item))
            yield number, item

    return map(stream, range(count))


def test_streams_are_read_ahead_by_a_bounded_amount():
    read = []
    chained = ahead.chained(_streams(20, 50, read), 3)
    assert next(chained) == (0, 0)
    time.sleep(0.3)
    assert {number for number, _ in read} == {0, 1, 2}
    assert len(read) <= 3 * 6
    assert list(chained) == [(number, item) for number in range(20) for item in range(50)][1:]


@pytest.mark.parametrize("taken", [0, 1, 7, 70])
def test_threads_end_when_the_consumer_does(taken):
    before = set(threading.enumerate())
    chained = ahead.chained(_streams(20, 50, []), 3)
    for _ in range(taken):
        next(chained)
    chained.close()
    assert set(threading.enumerate()) <= before


def test_an_error_of_a_stream_comes_after_its_items():
    def broken():
        yield 1
        raise storage.UnavailableError("no answer")

    chained = ahead.chained(iter([iter([0]), broken(), iter(range(100))]), 2)
    assert [next(chained), next(chained)] == [0, 1]
    with pytest.raises(storage.UnavailableError, match="no answer"):
        next(chained)


def test_items_are_mapped_in_order_and_not_all_at_once():
    begun = []

    def slow(number):
        begun.append(number)
        time.sleep(0.01 * (number % 3))
        return number

    mapped = ahead.mapped(slow, range(50), 3)
    assert next(mapped) == 0
    assert max(begun) <= 6
    assert list(mapped) == list(range(1, 50))


# -- creating files -------------------------------------------------------------------------------------------


def test_of_several_creators_one_succeeds(tmp_path):
    for race in range(20):
        uri, start, created = f"{tmp_path}/new/{race}", threading.Barrier(8), {}

        def create(number, uri=uri, start=start, created=created):
            start.wait()
            created[number] = storage.create(uri, b"%d" % number * 100_000)

        threads = [threading.Thread(target=create, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (number for number, won in created.items() if won)
        assert storage.read_bytes(uri) == b"%d" % winner * 100_000
    assert len(list((tmp_path / "new").iterdir())) == 20  # no temporary files


def test_creating_is_guarded(tmp_path):
    def refuse():
        raise storage.StorageError("lost the lease")

    with storage.guarded(str(tmp_path), refuse), pytest.raises(storage.StorageError, match="lost the lease"):
        storage.create(f"{tmp_path}/x", b"")
    assert not list(tmp_path.iterdir())


# -- folders and globs ----------------------------------------------------------------------------------------


def test_a_folder_gives_images_in_order_with_their_versions(tmp_path):
    _touch(tmp_path, *ODD)
    images = open_input(str(tmp_path))
    assert not images.is_table
    table = pa.concat_tables(images.tables)
    files = [file for file in storage.files(str(tmp_path)) if not file.uri.endswith(".txt")]
    assert table.to_pydict() == {"uri": [file.uri for file in files], VERSION: [file.version for file in files]}
    assert build_manifest(str(tmp_path), labelled=False)["uri"].to_pylist() == [file.uri for file in files]


def test_a_listing_is_read_as_far_as_it_is_needed(tmp_path, monkeypatch):
    _touch(tmp_path, *(f"{number:04d}.png" for number in range(100)))
    monkeypatch.setattr(inputs, "ROWS_AT_ONCE", 8)
    walk, walked = storage.walk, []
    monkeypatch.setattr(storage, "walk", lambda root: (walked.append(file) or file for file in walk(root)))
    images = open_input(str(tmp_path)).tables
    assert len(next(images)) == 8
    assert len(walked) == 8
    assert sum(map(len, images)) == 92


def test_containers_beside_images_are_counted_in_a_warning(tmp_path, caplog):
    _touch(tmp_path, "0.tar", "5.png", *(f"9{number}.parquet" for number in range(6)))
    with caplog.at_level(logging.WARNING, "cnnray"):
        assert len(_read(tmp_path)) == 1
    assert f"its Parquet and tar files are ignored: '{tmp_path}/0.tar', '{tmp_path}/90.parquet'" in caplog.text
    assert f"'{tmp_path}/93.parquet' and 2 more" in caplog.text


PATTERNS = (
    "*", "**", "*.png", "*/*", "a*", "a*/**", "a/**/*.png", "**/*.png", "**/b*/**", "a?b*", "[a-z]*/*", "*/b/*",
    "a/*/*", "**/a/**/?.png", "nothing/*", "*/*/*", "**/1.png", "a/b/[0-9].png", "**/.*", "*/.1.png", "é*",
    "**/**/**",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_find_what_pythons_find(tmp_path, pattern):
    _touch(tmp_path, *ODD, "b/a/b/1.png", "b/b/b/b.png")
    found = set(glob.glob(pattern, root_dir=tmp_path, recursive=True))  # noqa: PTH207 - the one to compare with
    expected = sorted(
        f"{tmp_path}/{path}" for path in found if "/." not in f"/{path}" and (tmp_path / path).is_file()
    )
    root, parts = globs.split_pattern(f"{tmp_path}/{pattern}")
    assert [file.uri for file in globs.walk(root, parts)] == expected


def test_folders_that_cannot_match_are_not_read(tmp_path, monkeypatch):
    _touch(tmp_path, "a/1.png", "b/1.png", "a/b/c/1.png")
    (tmp_path / "a" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")  # does not match: no error
    scandir, read = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: read.append(path) or scandir(path))
    assert _read(f"{tmp_path}/a*/*.png")["uri"].to_pylist() == [f"{tmp_path}/a/1.png"]
    assert read == [str(tmp_path), f"{tmp_path}/a"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("empty", "empty holds no images \\(looked for .*jpg"),
        ("nowhere", "nowhere does not exist; expected a folder of images or a table of them"),
        ("empty/*.png", r"empty/\*.png does not exist, and no images match it"),
        ("empty/notes.txt", "notes.txt is a file; expected a folder, or a .csv"),
        ("empty.csv", "empty.csv holds no images"),
        ("shards", "shards holds no images"),
    ],
)
def test_inputs_without_images_get_one_sentence(tmp_path, source, sentence):
    _touch(tmp_path, "empty/notes.txt")
    (tmp_path / "empty.csv").write_text("uri,label\n")
    write_tar(tmp_path / "shards.tar", {"1.txt": b"x"})
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/0.tar", {"1.txt": b"x"})
    with pytest.raises(ManifestError, match=sentence):
        list(open_input(f"{tmp_path}/{source}").tables)


def test_a_list_of_uris(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "ROWS_AT_ONCE", 2)
    images = inputs.input_of_uris([f"{tmp_path}/2.png", "s3://b/1.png", f"{tmp_path}/2.png"])
    assert images.is_table
    (first, second) = images.tables
    assert pa.concat_tables([first, second]).to_pydict() == {
        "uri": [f"{tmp_path}/2.png", "s3://b/1.png", f"{tmp_path}/2.png"],
        VERSION: [None] * 3,
    }
    with pytest.raises(ManifestError, match="The list of images is empty"):
        inputs.input_of_uris([])


# -- tables ---------------------------------------------------------------------------------------------------

ROWS = [
    {"who": "me", "uri": "x/2.png", "label": "007", "split": "Val", "id": 5},
    {"who": "you", "uri": "/y/1.png", "label": "NA", "split": None, "id": 6},
    {"who": None, "uri": "./x//3.png", "label": None, "split": "train", "id": 7},
    {"who": "they", "uri": "s3://b/./4.png", "label": "x", "split": "test", "id": 8},
]


def _write_rows(path, rows):
    if path.suffix == ".csv":
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "ndjson", "parquet"])
def test_tables_are_read_row_by_row(tmp_path, monkeypatch, kind):
    path = tmp_path / f"images.{kind}"
    _write_rows(path, ROWS)
    assert open_input(str(path)).is_table
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 2)
    assert max(len(table) for table in open_input(str(path)).tables) <= 2
    table = _read(path)
    assert table.to_pydict() == {
        "uri": [f"{tmp_path}/x/2.png", "/y/1.png", f"{tmp_path}/x/3.png", "s3://b/./4.png"],
        "who": ["me", "you", None, "they"],
        "label": ["007", "NA", None, "x"],
        "split": ["validation", None, "train", "test"],
        "original_id": [5, 6, 7, 8],
        VERSION: [None] * 4,
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_value_that_does_not_fit_the_first_block_gets_a_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 2000)
    rows = [{"uri": f"{number:06d}.png", "size": number} for number in range(1000)]
    _write_rows(tmp_path / f"good.{kind}", rows)
    assert _read(tmp_path / f"good.{kind}")["size"].to_pylist() == list(range(1000))
    rows[900]["size"] = "large"
    _write_rows(tmp_path / f"bad.{kind}", rows)
    with pytest.raises(ManifestError, match=rf"bad.{kind} cannot be read as a table: .*Parquet file states"):
        list(open_input(f"{tmp_path}/bad.{kind}").tables)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("url\na.png\n", r"no column 'uri' \(it has 'url'\)"),
        ("uri,a\n,1\nb.png,2\n", "1 rows without a uri"),
        ("uri,split\na.png,dev\n", "names the splits 'dev'; expected train, validation, test"),
        ("uri,id,original_id\na.png,1,2\n", "the columns 'id' and 'original_id'"),
        ("uri,a,a\na.png,1,2\n", "several columns of the same name: 'a'"),
        ("", "cannot be read as a table"),
    ],
)
def test_bad_tables_get_one_sentence(tmp_path, text, sentence):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ManifestError, match=sentence) as error:
        list(open_input(f"{tmp_path}/x.csv").tables)
    assert f"{tmp_path}/x.csv" in str(error.value)


# -- containers -----------------------------------------------------------------------------------------------


def _write_images(path, count, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [b"x"] * count, **columns}), path, row_group_size=2)


def test_containers_are_joined_with_the_columns_of_all(tmp_path):
    _write_images(tmp_path / "b.parquet", 3, size=pa.array([1, 2, 3], pa.int32()))
    _write_images(tmp_path / "b.parquet !.parquet", 1)  # sorts before b.parquet#000000
    _write_images(tmp_path / "c.parquet", 2, size=[0.5, None], uri=["x", "y"])
    write_tar(tmp_path / "a.tar", {"1.png": b"x", "1.cls": b"cat", "2.png": b"x"})
    images = open_input(str(tmp_path))
    assert not images.is_table
    table = pa.concat_tables(images.tables)
    assert table["uri"].to_pylist() == sorted(table["uri"].to_pylist())
    assert [uri.removeprefix(f"{tmp_path}/") for uri in table["uri"].to_pylist()] == [
        "a.tar#000000000512-000000001-1.png", "a.tar#000000002560-000000001-2.png",
        "b.parquet !.parquet#000000-000000000", "b.parquet#000000-000000000", "b.parquet#000000-000000001",
        "b.parquet#000001-000000000", "c.parquet#000000-000000000", "c.parquet#000000-000000001",
    ]  # fmt: skip
    assert set(table.column_names) == {"uri", "key", "label", "size", "original_uri", VERSION}
    assert table["label"].to_pylist() == ["cat"] + [None] * 7
    assert table["size"].to_pylist() == [None] * 3 + [1, 2, 3, 0.5, None]
    assert table["original_uri"].to_pylist() == [None] * 6 + ["x", "y"]
    versions = {file.uri: file.version for file in storage.walk(str(tmp_path))}
    containers = [f"{tmp_path}/{name}" for name in ("a.tar", "b.parquet !.parquet", "b.parquet", "c.parquet")]
    assert list(dict.fromkeys(table[VERSION].to_pylist())) == list(dict.fromkeys(map(versions.get, containers)))


@pytest.mark.parametrize("source", ["", "/**/*.parquet"])
def test_splits_of_names_fill_files_without_splits_of_their_own(tmp_path, source):
    _write_images(tmp_path / "train-0.parquet", 2)
    _write_images(tmp_path / "train-1.parquet", 2, split=pa.nulls(2))
    _write_images(tmp_path / "train-2.parquet", 2, split=["Test", None])
    _write_images(tmp_path / "val/0.parquet", 1)
    _write_images(tmp_path / "x.parquet", 1)
    table = _read(f"{tmp_path}{source}")
    assert table["split"].to_pylist() == ["train"] * 4 + ["test", None, "validation", None]
    assert "split" not in _read(tmp_path / "train-0.parquet").column_names


def test_columns_that_cannot_be_joined_get_a_sentence(tmp_path):
    _write_images(tmp_path / "a.parquet", 1, size=[1])
    _write_images(tmp_path / "b.parquet", 1, size=["large"])
    with pytest.raises(ManifestError, match=r"b.parquet has other columns than the files before it: .*size"):
        open_input(str(tmp_path))


def test_a_folder_of_tables_of_uris_is_a_table(tmp_path):
    pq.write_table(pa.table({"uri": ["2.png", "1.png"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"uri": ["2.png"]}), tmp_path / "b.parquet")
    images = open_input(str(tmp_path))
    assert images.is_table
    table = pa.concat_tables(images.tables)
    assert table["uri"].to_pylist() == [f"{tmp_path}/{number}.png" for number in (2, 1, 2)]
    assert table[VERSION].to_pylist() == [None] * 3


def test_tar_files_of_many_images_are_cut_between_keys(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cnnray.images.tar._ROWS_OF_A_SLICE", 4)
    members = {}
    for number in range(10):
        members |= {f"{number}.{kind}": b"x" for kind in ("left.png", "png")} | {f"{number}.cls": b"c%d" % number}
    write_tar(tmp_path / "x.tar", members)
    read = list(open_input(f"{tmp_path}/x.tar").tables)
    assert len(read) == 5
    assert pa.concat_tables(read)["label"].to_pylist() == [f"c{number}" for number in range(10) for _ in range(2)]
    assert not caplog.text
    write_tar(tmp_path / "y.tar", dict(sorted(members.items(), key=lambda item: item[0].endswith("cls"))))
    labels = pa.concat_tables(open_input(f"{tmp_path}/y.tar").tables)["label"].to_pylist()
    assert labels[-2:] == ["c9", "c9"]
    assert "8 labels that do not follow an image, and are ignored" in caplog.text
