"""Processes that decode into shared memory: batches in order, ahead of their use, and whatever a process meets."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pytest

from cnnray.images import containers, decoders, reading, storage
from cnnray.images.decoders import Decoders
from cnnray.images.geometry import Geometry
from cnnray.images.turns import Stream
from tests.awkward import awkward_images, bad_images
from tests.poisoned_decoder import BUG, POISON

SIZE = 24
GEOMETRY = Geometry.of(SIZE)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """60 images, some of them bad."""
    folder = tmp_path_factory.mktemp("images")
    contents = [*awkward_images().values(), *(data for data, _ in bad_images().values())]
    contents = [contents[number % len(contents)] for number in range(60)]
    for number, data in enumerate(contents):
        (folder / f"{number:02d}").write_bytes(data)
    return pa.table({"id": range(60), "uri": [str(folder / f"{number:02d}") for number in range(60)]})


@pytest.fixture
def started():
    """Start decoders, which are ended after the test."""
    running = []

    def start(*arguments, **options):
        running.append(Decoders(*arguments, **options))
        return running[-1]

    yield start
    for one in running:
        one.close()


def parts(table, sizes):
    """The arguments of `Decoders.batches` for a table in batches of these sizes."""
    starts = np.cumsum([0, *sizes]).tolist()
    return lambda number: table.slice(starts[number], sizes[number]), len(sizes)


def copied(batches):
    return [batch | {"image": batch["image"].copy()} for batch in batches]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_batches_are_those_of_one_process(processes, manifest, started):
    (expected,) = reading.decoded_blocks(manifest, GEOMETRY, len(manifest))
    decoding = started(processes, GEOMETRY, largest_batch=20)
    assert (expected["error"] != "").any()
    for sizes in ([20, 20, 20], [1, 0, 7, 20, 20, 11, 1], [5] * 12):
        batches = copied(decoding.batches(*parts(manifest, sizes)))
        assert [len(batch["image"]) for batch in batches] == sizes
        for name in ("id", "uri", "image", "error"):
            np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), expected[name])


def test_images_are_decoded_before_their_batch_is_asked_for(manifest, started):
    decoding = started(2, GEOMETRY, largest_batch=8)
    first, second = (decoding.batches(*parts(manifest.slice(start, 16), [8, 8])) for start in (0, 16))
    deadline = time.monotonic() + 20
    while len(decoding._batches) < 4 or any(batch.turns_left for batch in decoding._batches.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [batch["id"][0] for batch in (*first, *second)] == [0, 8, 16, 24]


def test_the_pixels_of_a_batch_stay_until_the_next_but_one(manifest, started):
    decoding = started(2, GEOMETRY, largest_batch=4)
    (expected,) = reading.decoded_blocks(manifest, GEOMETRY, len(manifest))
    before = None
    for number, batch in enumerate(decoding.batches(*parts(manifest, [4] * 15))):
        time.sleep(0.02)  # what can be decoded meanwhile is
        if before is not None:
            np.testing.assert_array_equal(before, expected["image"][4 * number - 4 : 4 * number])
        before = batch["image"]


def test_streams_that_are_given_up_make_room(manifest, started):
    decoding = started(2, GEOMETRY, largest_batch=8)
    for _ in range(20):
        stream = decoding.batches(*parts(manifest, [8] * 7))
        next(stream)
        stream.close()
    assert sum(len(batch["id"]) for batch in decoding.batches(*parts(manifest, [8] * 7))) == 56


def test_processes_that_are_killed_are_replaced(manifest, started):
    decoding = started(2, GEOMETRY, largest_batch=8)
    (expected,) = reading.decoded_blocks(manifest, GEOMETRY, len(manifest))
    seen = []
    for number, batch in enumerate(decoding.batches(*parts(manifest, [4] * 15))):
        seen.append(batch["image"].copy())
        if number in (0, 5, 9):
            decoding._processes[0]._process.kill()
    np.testing.assert_array_equal(np.concatenate(seen), expected["image"])


def test_images_that_end_their_process_have_an_error(tmp_path, monkeypatch, started):
    good = awkward_images()["rgb.png"]
    for number in range(20):
        (tmp_path / f"{number:02d}").write_bytes(POISON if number in (3, 4, 12) else good)
    table = pa.table({"id": range(20), "uri": [str(tmp_path / f"{number:02d}") for number in range(20)]})
    monkeypatch.setattr(decoders, "_PROGRAM", "tests.poisoned_decoder")
    (batch,) = started(2, GEOMETRY, largest_batch=20).batches(*parts(table, [20]))
    assert [number for number in range(20) if batch["error"][number]] == [3, 4, 12]
    assert batch["error"][3] == decoders.CRASHED
    assert not batch["image"][[3, 4, 12]].any()
    assert batch["image"][[2, 5, 13]].any()


def test_storage_in_trouble_ends_the_stream_or_is_an_error_of_the_image(manifest, monkeypatch, started):
    monkeypatch.setenv("CNNRAY_STORAGE_RETRY_SECONDS", "0")
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    table = pa.table({"id": [0, 1], "uri": [manifest["uri"][0].as_py(), "s3://nowhere/b.png"]})
    with pytest.raises(storage.UnavailableError):
        list(started(1, GEOMETRY, largest_batch=2).batches(*parts(table, [2])))
    (batch,) = started(1, GEOMETRY, largest_batch=2, keep_unavailable=True).batches(*parts(table, [2]))
    assert [error[:11] for error in batch["error"]] == ["", "unavailable"]


def test_a_process_that_cannot_start_is_an_error(manifest, monkeypatch, started):
    monkeypatch.setattr(decoders, "_PROGRAM", "tests.no_such_module")
    stream = started(1, GEOMETRY, largest_batch=8).batches(*parts(manifest, [8]))
    with pytest.raises(decoders.DecoderError, match="end when they start, with exit code 1"):
        next(stream)


@pytest.fixture
def joined():
    """Start processes that join as those of other machines do; they are ended after the test."""
    running = []

    def start(invitation):
        program = "import sys; from cnnray.images import decoder_process as d; d.join(*eval(sys.argv[1]))"
        running.append(subprocess.Popen([sys.executable, "-c", program, repr(invitation)], stderr=subprocess.PIPE))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("here", [0, 1])
@pytest.mark.parametrize("loss", ["killed", "silent"])
def test_processes_of_other_machines_take_turns(here, loss, manifest, started, joined, monkeypatch):
    monkeypatch.setattr(decoders, "_PATIENCE", 2)
    (expected,) = reading.decoded_blocks(manifest, GEOMETRY, len(manifest))
    decoding = started(here, GEOMETRY, largest_batch=60, elsewhere=2)
    address, key = decoding.invite("127.0.0.1")
    others = [joined((address, key)) for _ in range(2)]
    assert b"AuthenticationError" in joined((address, b"wrong")).communicate()[1]
    batches = []
    for number, batch in enumerate(decoding.batches(*parts(manifest, [4] * 15))):
        batches.append(batch | {"image": batch["image"].copy()})
        if number == 2:  # its turn goes to another one
            others[0].send_signal(signal.SIGKILL if loss == "killed" else signal.SIGSTOP)
    for name in ("id", "image", "error"):
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), expected[name])
    decoding.close()
    assert others[1].wait(20) == 0


def test_a_stream_that_is_dropped_before_anything_is_decoded_does_not_stop_the_next(manifest, started, monkeypatch):
    streams = []
    monkeypatch.setattr(decoders, "Stream", lambda *arguments: streams.append(Stream(*arguments)) or streams[-1])
    decoding = started(1, GEOMETRY, largest_batch=4)
    first = decoding.batches(*parts(manifest, [4] * 15))
    second = decoding.batches(*parts(manifest, [4] * 15))
    decoding._drop(streams[0], [])
    assert sum(len(batch["id"]) for batch in second) == 60
    first.close()


def test_an_error_that_is_none_of_ours_ends_the_process_and_the_image_is_at_fault(tmp_path, monkeypatch, started):
    (tmp_path / "a").write_bytes(BUG)
    monkeypatch.setattr(decoders, "_PROGRAM", "tests.poisoned_decoder")
    table = pa.table({"id": [0], "uri": [str(tmp_path / "a")]})
    (batch,) = started(1, GEOMETRY, largest_batch=1).batches(*parts(table, [1]))
    assert batch["error"].tolist() == [decoders.CRASHED]


def test_a_consumer_that_waits_is_told_of_the_end(manifest, started):
    decoding = started(0, GEOMETRY, largest_batch=8)
    stream = decoding.batches(*parts(manifest, [8]))
    threading.Timer(0.5, decoding.close).start()
    with pytest.raises(decoders.DecoderError, match="were ended"):
        next(stream)


def test_processes_end_with_the_one_that_started_them(manifest):
    program = f"""
import sys, time, pyarrow as pa
from cnnray.images.decoders import Decoders
from cnnray.images.geometry import Geometry
table = pa.table({{"id": range(60), "uri": {manifest["uri"].to_pylist()!r}}})
stream = Decoders(2, Geometry.of({SIZE}), largest_batch=8).batches(lambda number: table.slice(8 * number, 8), 7)
next(stream)
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        found = psutil.Process(process.pid).children()
        assert len(found) == 2
        os.kill(process.pid, signal.SIGKILL)
    assert not psutil.wait_procs(found, timeout=20)[1]


def test_neighbours_are_read_together():
    def tar(*members, file="a.tar"):
        return [f"/d/{file}#{offset:012d}-{size:09d}-{offset}.png" for offset, size in members]

    near, far = tar((512, 100), (1536, 100), (2560, 9)), tar((2 * 2**20, 100), (512, 100))
    groups = [f"/d/p.parquet#{group:06d}-{row:09d}" for group, row in ((0, 2), (0, 5), (0, 4), (0, 99), (1, 100))]
    loose = ["/d/1.png", "/d/2.png"]
    uris = [*near, *far, *loose, *groups, *tar((512, 1), file="b.tar"), *tar((1536, 1))]
    expected = [near, far[:1], far[1:], *([uri] for uri in loose), groups[:4], groups[4:]]
    expected += [[uri] for uri in uris[-2:]]
    assert list(containers.neighbours(uris)) == expected
    assert list(containers.neighbours([])) == []
