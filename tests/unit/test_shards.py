"""Shards of a manifest, and questions about manifests that do not fit in memory."""

import itertools
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.images import database, manifest, shards, storage
from cnnray.images.inputs import VERSION
from cnnray.images.manifest import ManifestError
from cnnray.images.ranges import split_rows


def _table(uris, **columns):
    columns = {"uri": pa.array(uris, pa.string()), **columns}
    return pa.table({**columns, VERSION: pa.array(["1"] * len(uris), pa.string())})


def _in_pieces(table, *lengths):
    start = 0
    for length in itertools.cycle(lengths):
        if start >= len(table):
            return
        yield table.slice(start, length)
        start += length


def _write(folder, table, rows=10, pieces=(7,), **options):
    options = {"generation": 1, **options}
    return list(shards.write(str(folder), _in_pieces(table, *pieces), rows_per_range=rows, **options))


def _group(number, rows):
    return [f"/d/x.parquet#{number:06d}-{row:09d}" for row in range(rows)]


FILES = [f"/d/{number:06d}.png" for number in range(20000)]
LAYOUTS = {
    "files": FILES[:95],
    "exactly whole ranges": FILES[:100],
    "small groups": [*_group(0, 3), *_group(1, 4), *_group(2, 30), *_group(3, 1), *FILES[:25]],
    "a large group": [*FILES[:5], *_group(0, 9000), *_group(1, 100), *FILES[5:33]],
    "very large groups": [*_group(0, 40000), *_group(1, 4097)],
    "between": [uri for number in range(9) for uri in (*_group(number, 4), *FILES[number * 12 : number * 12 + 12])],
}


def _earlier_ranges(uris, rows):
    """The ranges as earlier versions cut a manifest that was in memory."""
    cuts, start = [0], 0
    for group, run in itertools.groupby(uris, lambda uri: uri[:-10] if "#" in uri else None):
        length = len(list(run))
        stop = start + length
        if group is None:
            cuts += range(max(cuts[-1] + rows, start), stop, rows)
        else:
            large = length > max(rows, 4096)
            if start > cuts[-1] and (large or start - cuts[-1] >= rows):
                cuts.append(start)
            if large:
                cuts += range(start + max(rows, 4096, -(-length // 8)), stop, max(rows, 4096, -(-length // 8)))
        start = stop
    return list(itertools.pairwise([*cuts, len(uris)]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", [(7, 13), (5000,)])
def test_ranges_are_those_of_the_whole_manifest(tmp_path, layout, pieces):
    table = _table(LAYOUTS[layout])
    written = _write(tmp_path, table, rows=10, pieces=pieces)
    expected = split_rows(table["uri"], 10, cut_groups=True)
    assert expected == _earlier_ranges(LAYOUTS[layout], 10)
    assert [(item.first, item.last + 1) for item in written] == expected
    assert [item.rows for item in written] == [stop - start for start, stop in expected]
    assert list(shards.ranges(str(tmp_path))) == written == sorted(written)
    read = pa.concat_tables([shards.read(str(tmp_path), item) for item in written])
    assert read["id"].to_pylist() == list(range(len(table)))
    assert read.drop_columns(["id"]).equals(table.combine_chunks())


def test_shards_grow_and_are_stored_before_their_ranges_are_given(tmp_path):
    read = []

    def tables():
        for table in _in_pieces(_table(FILES[:7000]), 10):
            read.append(len(table))
            yield table

    ranges = shards.write(str(tmp_path), tables(), rows_per_range=10, generation=1)
    first = next(ranges)
    assert sum(read) <= 30  # work begins before the listing ends
    assert shards.read(str(tmp_path), first)["uri"].to_pylist() == FILES[:10]
    counts = [len(list(group)) for _, group in itertools.groupby([first, *ranges], lambda item: item.shard)]
    assert counts == [1, 2, 4, 8, 16, 32, 64, 128, 256, 189]
    assert sorted(path.name for path in tmp_path.iterdir())[:3] == [
        f"rows-{first:012d}.parquet" for first in (0, 10, 30)
    ]


def test_a_listing_that_was_killed_goes_on(tmp_path):
    assert shards.last_row(str(tmp_path)) is None
    assert shards.last_row(str(tmp_path / "none")) is None
    table = _table(FILES[:95], who=list(range(95)))
    some = list(itertools.islice(shards.write(str(tmp_path), [table], rows_per_range=10, generation=1), 3))
    next_id, uri = shards.last_row(str(tmp_path))
    assert (next_id, uri) == (30, FILES[29])
    assert shards.read_facts(str(tmp_path)) is None
    # An image that has come since, before the last one, is not part of this run.
    now = pa.concat_tables([_table(["/a.png"], who=[-1]), table])
    rest = _write(tmp_path, now, first_id=next_id, after=uri)
    shards.finish(str(tmp_path), source="x")
    assert shards.read_facts(str(tmp_path)) == {"source": "x"}
    assert list(shards.ranges(str(tmp_path))) == [*some, *rest]
    read = pa.concat_tables([shards.read(str(tmp_path), item) for item in (*some, *rest)])
    assert read["id"].to_pylist() == read["who"].to_pylist() == list(range(95))
    assert read["uri"].to_pylist() == FILES[:95]


def test_rows_of_a_table_go_on_by_number(tmp_path):
    uris = ["/b.png", "/a.png", "/c.png", "/a.png"]
    (rest,) = _write(tmp_path, _table(uris), pieces=(1,), first_id=2, after=2)
    assert shards.read(str(tmp_path), rest)["uri"].to_pylist() == uris[2:]
    assert (rest.first, rest.last) == (2, 3)


def test_ranges_of_an_update_keep_their_ids_and_generations(tmp_path):
    kept = [(pa.table({"id": [3, 5], "uri": ["/a", "/b"]}), 1), (pa.table({"id": [9], "uri": ["/c"]}), 2)]
    kept += [(pa.table({"id": [number], "uri": ["/d"]}), number) for number in range(10, 15)]
    written = list(shards.write_ranges(str(tmp_path), kept))
    assert written[:2] == [shards.Range(3, 5, 2, 3, 0, 1), shards.Range(9, 9, 1, 9, 0, 2)]
    assert [item.generation for item in shards.ranges(str(tmp_path))] == [1, 2, 10, 11, 12, 13, 14]
    assert list(shards.ranges(str(tmp_path))) == written
    assert shards.read(str(tmp_path), written[0], ["uri"]).to_pydict() == {"uri": ["/a", "/b"]}


def test_shards_of_a_later_version_are_refused(tmp_path):
    (item,) = _write(tmp_path, _table(FILES[:3]))
    path = tmp_path / "rows-000000000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({manifest.FORMAT_KEY: b"3"}), path)
    sentence = rf"{path} has format 3, and this cnnray reads up to 2: update cnnray\."
    with pytest.raises(ManifestError, match=sentence):
        list(shards.ranges(str(tmp_path)))
    with pytest.raises(ManifestError, match=sentence):
        shards.read(str(tmp_path), item)


def test_a_reader_of_whole_manifests_refuses_shards(tmp_path):
    _write(tmp_path, _table(FILES[:3]))
    with pytest.raises(ManifestError, match="is one of the shards of a prediction's manifest"):
        manifest.read(f"{tmp_path}/rows-000000000000.parquet")


# -- database -------------------------------------------------------------------------------------------------


def test_repeated_uris():
    uris = [*FILES, *FILES[7:9], FILES[3], FILES[3]]
    random.Random(0).shuffle(uris)
    calls = []

    def batches(uris=uris):
        calls.append(len(uris))
        return _in_pieces(_table(uris), 1000)

    assert database.repeated_uris(batches) == [FILES[3], FILES[7], FILES[8]]
    assert database.repeated_uris(batches, most=2) == [FILES[3], FILES[7]]
    calls.clear()
    assert database.repeated_uris(lambda: batches(FILES)) == []
    assert len(calls) == 1  # nothing is compared a second time
    assert len(database.repeated_uris(lambda: iter(_table(FILES * 2).to_batches()))) == 6


def _compared(before, now):
    before = before.add_column(0, "id", [list(range(len(before)))])
    return database.compare(_in_pieces(before, 3), _in_pieces(now, 4))


def test_new_changed_and_gone_rows_are_told_apart():
    columns = {"Label": ["x", None, "y", None, "z"], "label": [1, 2, 3, 4, None]}
    before = _table(["/a", "/b", "/c", "/d", "/e"], **columns)
    now = pa.table(
        {
            "uri": ["/n2", "/e", "/c", "/b", "/a", "/n1"],
            "Label": ["n", "z", "y", None, "other", "n"],
            "label": pa.array([None, None, 3, 2, 1, 7], pa.int64()),
            VERSION: ["1", "1", "2", "1", "1", None],
        }
    )
    with _compared(before, now) as comparison:
        assert (comparison.gone, comparison.changed, comparison.new_rows) == (1, 2, 2)
        kept = comparison.kept(0, 4)
        assert kept.drop_columns([shards.CHANGED]).schema == now.schema.insert(0, pa.field("id", pa.int64()))
        assert kept.select(["id", "uri", "Label", VERSION, shards.CHANGED]).to_pydict() == {
            "id": [0, 1, 2, 4],
            "uri": ["/a", "/b", "/c", "/e"],
            "Label": ["other", None, "y", "z"],
            VERSION: ["1", "1", "2", "1"],
            shards.CHANGED: [True, False, True, False],
        }
        assert comparison.kept(1, 2)["uri"].to_pylist() == ["/b", "/c"]
        assert len(comparison.kept(3, 3)) == 0
        new = pa.concat_tables(comparison.new())
        assert new.equals(now.take([0, 5]))


def test_nulls_are_equal_and_the_mark_of_an_earlier_update_is_no_value():
    before = _table(["/a", "/b"]).set_column(1, VERSION, pa.nulls(2, pa.string()))
    now = before.append_column("nothing", pa.nulls(2))
    marked = now.append_column(shards.CHANGED, [[True, False]])
    with _compared(marked, now) as comparison:
        assert (comparison.gone, comparison.changed, comparison.new_rows) == (0, 0, 0)
        assert comparison.kept(0, 1).schema.field("nothing").type == pa.null()
    with _compared(before, now) as comparison:  # another column
        assert comparison.changed == 2


def test_a_uri_that_the_input_repeats_is_named():
    with _compared(_table(["/a"]), _table(["/b", "/a", "/b"])) as comparison:
        assert comparison.repeated == ["/b"]


def test_a_comparison_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with _compared(_table(FILES[:10]), _table(FILES[5:15])) as comparison:
        assert comparison.gone == comparison.new_rows == 5
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())

    def broken():
        yield _table(["/a"])
        raise storage.UnavailableError("no answer")

    with pytest.raises(storage.UnavailableError, match="no answer"):
        database.compare(iter([_table(["/a"]).add_column(0, "id", [[0]])]), broken())
    assert not list(tmp_path.iterdir())


def test_updated_ids_and_rows_are_those_of_a_slow_comparison():
    generator = random.Random(1)
    before = sorted(generator.sample(FILES, 3000))
    now = sorted(generator.sample(FILES, 3000))
    versions = [str(generator.randrange(2)) for _ in now]
    table = pa.table({"uri": now, VERSION: versions})
    with _compared(_table(before), table) as comparison:
        by_uri = dict(zip(now, versions, strict=True))
        expected = [(number, uri, by_uri[uri] != "1") for number, uri in enumerate(before) if uri in by_uri]
        kept = comparison.kept(0, len(before)).select(["id", "uri", shards.CHANGED]).to_pydict()
        assert list(zip(*kept.values(), strict=True)) == expected
        assert pa.concat_tables(comparison.new())["uri"].to_pylist() == [uri for uri in now if uri not in set(before)]
