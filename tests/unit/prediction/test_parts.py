"""The output files of a run: names, writing, reading, damage."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from cnnray.images import storage
from cnnray.prediction import parts
from cnnray.prediction.parts import Part, PartError
from cnnray.prediction.tally import Tally
from tests.unit.prediction.helpers import make_rows, write_part


@pytest.mark.parametrize(
    ("part", "name", "errors_name"),
    [
        (Part(0, 0, 0, False, "parquet"), "part-000000000000-0.0.parquet", "errors-000000000000-0.0.csv"),
        (Part(4096, 12, 3, False, "csv"), "part-000000004096-12.3.csv", "errors-000000004096-12.3.csv"),
        (
            Part(7, 1, 0, True, "csv"),
            "part-000000000007-1.0-incomplete.csv",
            "errors-000000000007-1.0-incomplete.csv",
        ),
        (Part(10**13, 0, 0, False, "jsonl"), "part-10000000000000-0.0.jsonl", "errors-10000000000000-0.0.csv"),
    ],
)
def test_the_name_of_a_part_says_which_it_is(part, name, errors_name):
    assert (part.name, part.errors_name) == (name, errors_name)
    assert parts.parse_name(name) == part
    assert parts.parse_name(errors_name) is None
    assert parts.is_part_or_errors(name)
    assert parts.is_part_or_errors(errors_name)


@pytest.mark.parametrize(
    "name",
    [
        "part-000000.parquet", "part-000000-incomplete.parquet", "part-000000000000-0.parquet",
        "part-000000000000-0.0.txt", "part-000000000000-0.0.parquet.tmp", "part-000000000000-0.0-other.parquet",
        "shard-0-of-2/part-000000000000-0.0.parquet", "errors.csv", "errors-000000000000-0.0.parquet", "summary.json",
        "rows-000000000000.parquet",
    ],
)  # fmt: skip
def test_other_files_are_no_parts(name, tmp_path):
    assert parts.parse_name(name) is None
    assert not parts.is_part_or_errors(name)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    part = write_part(tmp_path, range(2))
    assert list(parts.list_parts(str(tmp_path))) == [part]


def test_the_parts_of_a_folder_are_listed_by_their_ids(tmp_path):
    assert list(parts.list_parts(str(tmp_path / "none"))) == []
    written = [write_part(tmp_path, range(first, first + 2)) for first in (10, 9, 2, 1000)]
    written.append(write_part(tmp_path, range(2, 4), attempt=1))
    assert list(parts.list_parts(str(tmp_path))) == sorted(written)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_part_is_created_once_and_read_back_unchanged(kind, tmp_path):
    rows = make_rows(list(range(100, 109)))
    part, tally = Part(100, 0, 0, False, kind), Tally.of(rows, 0.5)
    assert parts.write(str(tmp_path), part, rows, tally)
    content = (tmp_path / part.name).read_bytes()
    read = parts.read(str(tmp_path), part)
    # Without a footer, the most probable class of images without an answer is needed, too.
    labels = [] if kind == "parquet" else ["top_k_labels"]
    assert read.column_names == ["id", "uri", "status", "error", "prediction", "confidence", *labels]
    assert read.equals(rows.select(read.column_names).cast(read.schema))
    assert parts.read_tally(str(tmp_path), part, 0.5) == tally
    assert parts.write(str(tmp_path), part, rows, tally)  # by another worker, of the same images
    other = make_rows(list(range(100, 108)))
    assert not parts.write(str(tmp_path), part, other, Tally.of(other, 0.5))
    assert (tmp_path / part.name).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    if kind == "parquet":
        assert parts.read_all(str(tmp_path), part).equals(rows)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_the_tally_of_a_part_counts_images_of_which_the_bundle_is_unsure(kind, tmp_path):
    rows = make_rows(list(range(9)))
    names = [None if number < 5 else name for number, name in enumerate(rows["prediction"].to_pylist())]
    rows = rows.set_column(rows.column_names.index("prediction"), "prediction", pa.array(names, pa.string()))
    part, tally = Part(0, 0, 0, False, kind), Tally.of(rows, 0.5)
    assert (tally.ok, tally.unsure, tally.most_probable) == (3, {"null": 3}, {"null": 6})
    assert parts.write(str(tmp_path), part, rows, tally)
    assert parts.read_tally(str(tmp_path), part, 0.5) == tally
    if kind == "parquet":
        again = parts.read_tally(str(tmp_path), part, 0.4)
        assert (again.ok, again.unsure.total(), again.most_probable) == (3, 3, None)


def test_storage_that_returns_other_bytes_than_it_was_given_is_reported(tmp_path, monkeypatch):
    part = Part(0, 0, 0, False, "parquet")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", lambda uri: b"other")
        with pytest.raises(PartError, match=r"-0.0.parquet was read back with other content than was written: check"):
            parts.write(str(tmp_path), part, make_rows([0]), Tally.of(make_rows([0]), 0.5))


def test_a_part_counts_as_written_where_the_answer_to_its_request_was_lost(tmp_path, monkeypatch):
    create = storage.create
    monkeypatch.setattr(storage, "create", lambda uri, data: create(uri, data) and False)
    assert write_part(tmp_path, range(3)) in parts.list_parts(str(tmp_path))


@pytest.mark.parametrize("was_written", [True, False])
def test_the_request_that_creates_a_part_is_repeated_where_it_got_no_answer_and_did_nothing(was_written, monkeypatch):
    stored = {}

    def write_if(uri, data, expected):
        requests.append(uri)
        is_first, is_free = len(requests) == 1, uri not in stored
        if is_free and (was_written or not is_first):
            stored[uri] = data
        if is_first:
            raise storage.UnavailableError("S3 cannot be reached.")
        return {"e_tag": "1"} if is_free else None

    requests = []
    monkeypatch.setattr(storage, "write_if", write_if)
    monkeypatch.setattr(storage, "is_file", lambda uri: uri in stored)
    monkeypatch.setattr(storage, "read_bytes", lambda uri: stored[uri])
    part = write_part("s3://bucket/out", range(3))
    assert requests == [f"s3://bucket/out/{part.name}"] * (1 if was_written else 2)
    assert list(stored) == requests[:1]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("data", [b'{"id": 1\n', b"", b'{"id": 1}\n', b"id,uri\r\n1,/a\r\n", b"PAR1"])
def test_a_damaged_part_is_reported(data, kind, tmp_path):
    part = Part(0, 0, 0, False, kind)
    (tmp_path / part.name).write_bytes(data)
    readers = [parts.read, lambda *arguments: parts.read_tally(*arguments, 0.5)]
    if kind == "jsonl" and not data:
        assert [len(parts.read(str(tmp_path), part)), parts.read_tally(str(tmp_path), part, 0.5).rows] == [0, 0]
        return
    for read in [*readers, parts.read_all] if kind == "parquet" else readers:
        with pytest.raises(PartError, match=r"part-000000000000-0.0.\w+ is damaged .*: delete it, and run again"):
            read(str(tmp_path), part)
    (tmp_path / part.name).unlink()
    for read in readers:
        with pytest.raises(PartError, match=r"was deleted while the run was going on: run the same command again"):
            read(str(tmp_path), part)


def test_the_tally_of_a_part_is_counted_where_its_footer_has_none_for_the_threshold(tmp_path):
    part = write_part(tmp_path, range(9))
    for threshold, below in ((0.5, 6), (0.25, 0), (0.3, 6)):
        tally = parts.read_tally(str(tmp_path), part, threshold)
        assert (tally.threshold, tally.rows, tally.below_threshold) == (threshold, 9, below)
    table = pyarrow.parquet.read_table(tmp_path / part.name).replace_schema_metadata(None)
    pyarrow.parquet.write_table(table, tmp_path / part.name)
    assert parts.read_tally(str(tmp_path), part, 0.5) == Tally.of(make_rows(list(range(9))), 0.5)
