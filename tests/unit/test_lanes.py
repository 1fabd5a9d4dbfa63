"""Containers that are read at many places side by side: row groups that stay open, and blocks of tar files."""

import errno
import io
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.images import containers, parquet, tar
from cnnray.images.decoders import Decoders
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import build_manifest
from cnnray.training.epoch import LanesEpoch, number_of_lanes
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
    """The row groups that were opened."""
    groups, kind = [], parquet._OpenGroup

    def open_group(*arguments):
        groups.append(kind(*arguments))
        return groups[-1]

    monkeypatch.setattr(parquet, "_OpenGroup", open_group)
    return groups


def test_a_lane_keeps_its_row_group_open(stored, opened):
    groups, contents = stored
    lanes = [containers.Lane() for _ in groups]
    for row in range(0, ROWS, 2):
        for lane, group in zip(lanes, groups, strict=True):
            assert list(containers.encoded(group[row : row + 2], lane)) == [
                contents[uri] for uri in group[row : row + 2]
            ]
    assert len(opened) == GROUPS
    assert all(group._file.closed for group in opened)  # they are read to the end


def test_lanes_at_two_places_of_a_row_group_have_a_reader_each(stored, opened):
    (uris, *_), contents = stored
    lanes = containers.Lane(), containers.Lane()
    for row in range(20):
        for lane, place in zip(lanes, (row, 70 + row), strict=True):
            assert list(containers.encoded([uris[place]], lane)) == [contents[uris[place]]]
    assert len(opened) == 2


def test_a_lane_closes_a_row_group_that_it_leaves(stored, opened):
    (first, second, *_), contents = stored
    lane = containers.Lane()
    for uri in (first[3], first[70], second[2], first[5], first[3]):
        assert list(containers.encoded([uri], lane)) == [contents[uri]]
        assert [group._file.closed for group in opened] == [True] * (len(opened) - 1) + [False]
    assert len(opened) == 3  # 5 and 3 were read together


def test_a_lane_goes_on_after_an_error(stored, opened, monkeypatch):
    (uris, *_), contents = stored
    monkeypatch.setattr("cnnray.images.retries.time.sleep", lambda _: None)
    lane = containers.Lane()
    assert list(containers.encoded(uris[:2], lane)) == [contents[uri] for uri in uris[:2]]
    broken = iter([OSError(errno.EIO, os.strerror(errno.EIO))])
    next_batches = opened[0]._batches

    def batches():
        for error in broken:
            raise error
        yield from next_batches

    opened[0]._batches = batches()
    assert list(containers.encoded(uris[30:32], lane)) == [contents[uri] for uri in uris[30:32]]
    assert [group._file.closed for group in opened] == [True, False]


def test_the_memory_of_a_lane(tmp_path):
    """A page holds many images: as pyarrow writes it, up to 1,024."""
    images = [np.random.default_rng(number).bytes(20_000) for number in range(300)]
    pyarrow.parquet.write_table(pa.table({"bytes": images}), tmp_path / "0.parquet", row_group_size=100)
    uris = build_manifest(str(tmp_path / "0.parquet"), labelled=False)["uri"].to_pylist()
    assert containers.bytes_of_lane(uris[150]) == pytest.approx(2**20 + 2 * 100 * 20_000, rel=0.01)
    (tmp_path / "0.parquet").unlink()
    assert containers.bytes_of_lane(uris[150]) == containers.bytes_of_lane("/d/0.png") == tar.BYTES_OF_READER
    assert number_of_lanes(1000, 1, 2, 2**20) == 240
    assert number_of_lanes(100, 1, 2, 2**20) == 100
    assert number_of_lanes(100, 8, 2, 2**20) == 96
    assert number_of_lanes(3, 2, 2, 2**20) == 12
    assert number_of_lanes(60, 8, 12, 2**20) == 96  # a lane for each process
    assert number_of_lanes(1000, 1, 2, 2**26) == 32
    assert number_of_lanes(1000, 4, 2, 2**26) == 128
    assert number_of_lanes(1000, 1, 2, 2**30) == 12
    assert number_of_lanes(100, 128, 1, 2**20) == 128


def test_blocks_of_tar_files_are_read_once(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    contents = {f"{number:04d}.png": random.bytes(random.integers(1, 3000)) for number in range(800)}
    contents["0400.png"] = random.bytes(3 * 2**20)  # larger than a block
    contents["0500.png"] = random.bytes(2**17 + 1)
    write_tar(tmp_path / "0.tar", contents)
    uris = build_manifest(str(tmp_path / "0.tar"), labelled=False)["uri"]
    lengths = [length for _, length in containers.group_runs(uris.chunks)]
    assert sum(lengths) == 800
    reads, read = [], tar._read
    monkeypatch.setattr(tar, "_read", lambda *arguments: reads.append(arguments[1:]) or read(*arguments))
    places = [uris.to_pylist()[start : start + 200] for start in range(0, 800, 200)]
    expected = [list(contents.values())[start : start + 200] for start in range(0, 800, 200)]
    lanes = [containers.Lane() for _ in places]
    for row in range(0, 200, 2):
        for lane, uris_of, data in zip(lanes, places, expected, strict=True):
            assert list(containers.encoded(uris_of[row : row + 2], lane)) == data[row : row + 2]
    # Each lane has read the blocks in which its images begin, and the large image alone.
    assert sum(length > 2**21 for _, length in reads) == 1
    assert len(reads) <= 1 + len(lengths) + len(lanes)
    file = tmp_path / "0.tar"
    file.write_bytes(file.read_bytes()[: 2**20])
    found = list(containers.encoded([places[0][0], places[3][0]], containers.Lane()))
    assert found[0] == expected[0][0]
    assert found[1].reason == "unreadable"


@pytest.mark.parametrize("processes", [1, 3])
def test_images_in_the_order_of_lanes_are_decoded(processes, tmp_path):
    """Also where one of them ends its process."""

    def png(number):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    table = pa.table({"bytes": [png(number) for number in range(200)]})
    for number in range(4):
        pyarrow.parquet.write_table(table.slice(50 * number, 50), tmp_path / f"{number}.parquet", row_group_size=20)
    manifest = build_manifest(str(tmp_path), labelled=False)
    runs = [length for _, length in containers.group_runs(manifest["uri"].chunks)]
    assert runs == [20, 20, 10] * 4
    starts = np.cumsum([0, *runs])
    shares = [
        (LanesEpoch(0, number, 200, 32, lanes=12, starts=starts), rank) for number in range(2) for rank in range(2)
    ]
    decoders = Decoders(processes, Geometry.of(8), largest_batch=32)
    try:
        streams = [
            decoders.batches(
                lambda step, one=one, rank=rank: manifest.take(one.rows(step, rank, 2)),
                one.steps,
                lambda step, one=one, rank=rank: one.lanes_of(step, rank, 2),
            )
            for one, rank in shares
        ]
        seen = []
        for number, ((one, rank), stream) in enumerate(zip(shares, streams, strict=True)):
            for step, batch in enumerate(stream):
                assert not any(batch["error"])
                assert (batch["image"] == batch["id"][:, None, None, None]).all()
                assert batch["id"].tolist() == one.rows(step, rank, 2).tolist()
                seen += batch["id"].tolist()
                if number == step == 1:
                    os.kill(decoders._processes[0]._process.pid, signal.SIGKILL)
        assert sorted(seen) == sorted([*range(200)] * 2)
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
