"""Containers that are read at many places side by side: row groups that stay open, and blocks of tar files."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.images import containers, parquet, tar
from cnnray.images.decoders import Decoders
from cnnray.images.manifest import build_manifest
from cnnray.training.epoch import LanesEpoch
from tests.conftest import write_tar

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

    def open_group(*arguments):
        groups.append(kind(*arguments))
        return groups[-1]

    monkeypatch.setattr(parquet, "_OpenGroup", open_group)
    yield groups
    containers.keep_open(0)
    parquet._open.clear()


def _read(uris, *, in_lane=True):
    return [data for run in containers.neighbours(uris) for data in containers.encoded(run, in_lane=in_lane)]


def test_groups_stay_open_while_images_of_each_are_read_in_turn(stored, opened):
    groups, contents = stored
    containers.keep_open(GROUPS)
    for row in range(0, ROWS, 2):
        turn = [uri for group in groups for uri in group[row : row + 2]]
        assert _read(turn) == [contents[uri] for uri in turn]
    assert len(opened) == GROUPS
    assert not parquet._open  # they are read to the end


def test_several_parts_of_a_group_are_read_side_by_side(stored, opened):
    (uris, *_), contents = stored
    containers.keep_open(2)
    for row in range(20):
        turn = [uris[row], uris[70 + row]]
        assert _read(turn) == [contents[uri] for uri in turn]
    assert len(opened) == 2


def test_the_groups_that_were_used_last_stay_open(stored, opened):
    groups, contents = stored
    containers.keep_open(2)
    for group in (0, 1, 2, 1, 2, 0):
        row = len(opened)
        assert _read([groups[group][row]]) == [contents[groups[group][row]]]
        assert sum(not group._file.closed for group in opened) <= 2
    assert len(opened) == 4


def test_nothing_stays_open_where_nobody_asked_for_it(stored, opened):
    groups, contents = stored
    containers.keep_open(4)
    for row in range(3):
        assert _read([groups[0][row]], in_lane=False) == [contents[groups[0][row]]]
    assert len(opened) == 3
    assert not parquet._open


def test_blocks_of_tar_files_are_read_once(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    contents = {f"{number:04d}.png": random.bytes(random.integers(1, 3000)) for number in range(800)}
    contents["0400.png"] = random.bytes(3 * 2**20)  # larger than a block
    contents["0500.png"] = random.bytes(2**17 + 1)
    write_tar(tmp_path / "0.tar", contents)
    uris = build_manifest(str(tmp_path / "0.tar"), labelled=False)["uri"]
    lengths = [length for _, length in containers.group_runs(uris.chunks)]
    assert (len(lengths), sum(lengths)) == (3, 800)
    requests, read = [], tar._read_block
    monkeypatch.setattr(tar, "_read_block", lambda *arguments: requests.append(arguments) or read(*arguments))
    containers.keep_open(3)
    lanes = [uris.to_pylist()[start : start + 200] for start in range(0, 800, 200)]
    expected = [list(contents.values())[start : start + 200] for start in range(0, 800, 200)]
    for row in range(200):
        assert _read([lane[row] for lane in lanes]) == [lane[row] for lane in expected]
    assert len(requests) == len(set(requests)) == 3
    containers.keep_open(0)
    file = tmp_path / "0.tar"
    file.write_bytes(file.read_bytes()[: 2**20])
    found = _read([lanes[0][0], lanes[3][0]])
    assert found[0] == expected[0][0]
    assert found[1].reason == "unreadable"


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


def test_the_blocks_of_tar_files():
    def uris(file, *offsets):
        return [f"{file}#{offset:012d}-000000100-é.png" for offset in offsets]

    first, block, large = "s3://b/ä-0.tar", 2**20, 10**12
    cases = [
        (uris(first, 512, block - 1, block, large - 1), ["0", "0", "1", str((large - 1) // block)]),
        (uris(first, large - 1, large), [str((large - 1) // block), str(large // block)]),
        ([*uris(first, 0), *uris("/1.TAR", 0), "/a.png"], ["0", "0", None]),
    ]
    for addresses, numbers in cases:
        files = [address.partition("#")[0] for address in addresses]
        expected = [number and f"{file}#{number}" for file, number in zip(files, numbers, strict=True)]
        assert tar.blocks_of(pa.array(addresses)).to_pylist() == expected
