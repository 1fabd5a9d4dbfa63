"""Row groups of Parquet files that stay open, and are read side by side."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.images import containers, parquet
from cnnray.images.decoders import Decoders
from cnnray.images.manifest import build_manifest
from cnnray.training.epoch import LanesEpoch

GROUPS, ROWS = 4, 100


@pytest.fixture
def stored(tmp_path):
    """A file of several row groups: its uris by group, and their contents."""
    contents = [f"{number}".encode() for number in range(GROUPS * ROWS)]
    pyarrow.parquet.write_table(pa.table({"bytes": contents}), tmp_path / "0.parquet", row_group_size=ROWS)
    uris = build_manifest(str(tmp_path / "0.parquet"), labelled=False)["uri"].to_pylist()
    return [uris[start : start + ROWS] for start in range(0, len(uris), ROWS)], dict(zip(uris, contents, strict=True))


@pytest.fixture
def opened(monkeypatch):
    """The row groups that were opened; some stay open until the end of the test."""
    groups, kind = [], parquet._OpenGroup

    def open_group(file, group):
        groups.append(kind(file, group))
        return groups[-1]

    monkeypatch.setattr(parquet, "_OpenGroup", open_group)
    yield groups
    parquet.keep_open(0)
    parquet._open.clear()


def _read(uris):
    return [data for run in containers.neighbours(uris) for data in containers.encoded(run)]


def test_groups_stay_open_while_images_of_each_are_read_in_turn(stored, opened):
    groups, contents = stored
    parquet.keep_open(GROUPS)
    for row in range(0, ROWS, 2):
        turn = [uri for group in groups for uri in group[row : row + 2]]
        assert _read(turn) == [contents[uri] for uri in turn]
    assert len(opened) == GROUPS
    assert not parquet._open  # they are read to the end


def test_several_parts_of_a_group_are_read_side_by_side(stored, opened):
    (uris, *_), contents = stored
    parquet.keep_open(2)
    for row in range(20):
        turn = [uris[row], uris[70 + row]]
        assert _read(turn) == [contents[uri] for uri in turn]
    assert len(opened) == 2


def test_the_groups_that_were_used_last_stay_open(stored, opened):
    groups, contents = stored
    parquet.keep_open(2)
    for group in (0, 1, 2, 1, 2, 0):
        row = len(opened)
        assert _read([groups[group][row]]) == [contents[groups[group][row]]]
        assert sum(not group._file.closed for group in opened) <= 2
    assert len(opened) == 4


def test_nothing_stays_open_where_nobody_asked_for_it(stored, opened):
    groups, contents = stored
    for row in range(3):
        assert _read([groups[0][row]]) == [contents[groups[0][row]]]
    assert len(opened) == 3
    assert not parquet._open


@pytest.mark.parametrize("processes", [1, 3])
def test_images_in_the_order_of_lanes_are_decoded(processes, tmp_path):
    def png(number):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    table = pa.table({"bytes": [png(number) for number in range(200)]})
    for number in range(4):
        pyarrow.parquet.write_table(table.slice(50 * number, 50), tmp_path / f"{number}.parquet", row_group_size=20)
    manifest = build_manifest(str(tmp_path), labelled=False)
    starts = np.arange(0, 201, 50)
    ordered = [LanesEpoch(0, number, len(manifest), 32, starts=starts) for number in range(2)]
    decoders = Decoders(processes, 8, "stretch", largest_batch=32, lanes=ordered[0].lanes)
    try:
        streams = [
            decoders.batches(
                lambda step, one=one: manifest.take(one.rows(step)),
                one.steps,
                lambda step, one=one: one.lanes_of(step, 0, 1),
            )
            for one in ordered
        ]
        for one, stream in zip(ordered, streams, strict=True):
            seen = []
            for step, batch in enumerate(stream):
                assert not any(batch["error"])
                assert (batch["image"] == batch["id"][:, None, None, None]).all()
                assert batch["id"].tolist() == one.rows(step).tolist()
                seen += batch["id"].tolist()
            assert sorted(seen) == list(range(200))
    finally:
        decoders.close()
