"""The rows of a manifest that processes of a machine share: one copy, written once, and deleted at the end."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from cnnray.images import manifest as manifests
from cnnray.training import epoch, rows

NAMES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(rows.tempfile, "tempdir", None)
    return folder / rows._ROOT


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest of 1,000 rows in 16 row groups, and its uri."""
    monkeypatch.setattr(manifests, "_ROWS_OF_A_GROUP", 64)
    generator = np.random.default_rng(0)
    table = pa.table({
        "id": np.arange(1000),
        "uri": [f"/data/{number:04d}.jpg" for number in range(1000)],
        "label": generator.choice(NAMES, 1000),
        "split": generator.choice(["train", "validation", "test"], 1000),
    })  # fmt: skip
    uri = str(tmp_path / "manifest.parquet")
    manifests.write(table, uri)
    return table, uri


@pytest.mark.parametrize("many", [False, True])
def test_rows_are_those_of_the_manifest(manifest, root, monkeypatch, many):
    monkeypatch.setattr(rows, "_BATCH", 7)
    if many:
        monkeypatch.setattr(rows, "_MANY", 0)
    table, uri = manifest
    with rows.open_rows(uri, NAMES, "") as splits:
        for split, mapped in splits.items():
            expected = manifests.select_split(manifests.with_targets(table), split)
            assert len(mapped) == len(expected)
            assert mapped.tally.tolist() == epoch.tally(expected["id"].to_numpy()).tolist()
            some = np.random.default_rng(1).permutation(len(mapped))[:50]
            taken = mapped.take(some)
            for name in ("id", "target", "uri"):
                assert taken[name].to_pylist() == expected[name].take(pa.array(some)).to_pylist()
            assert len(mapped.take(np.empty(0, np.int64))) == 0
    assert not any(root.iterdir())


def test_the_second_process_reads_what_the_first_has_written(manifest, monkeypatch):
    _, uri = manifest
    with rows.open_rows(uri, NAMES, "") as first:
        monkeypatch.setattr(rows, "_write", None)
        with rows.open_rows(uri, NAMES, "") as second:
            assert len(second["train"]) == len(first["train"])
        assert first["train"].take(np.arange(3))["uri"].to_pylist()  # the second has not deleted it


def test_a_manifest_of_another_run_is_another_one(manifest, root):
    table, uri = manifest
    with rows.open_rows(uri, NAMES, "first") as first:
        manifests.write(table.slice(0, 10), uri)
        with rows.open_rows(uri, NAMES, "second") as second:
            assert len(second["train"]) < 10 < len(first["train"])
            assert len(list(root.iterdir())) == 2


def test_what_a_killed_process_leaves_is_deleted_by_the_next(manifest, root):
    _, uri = manifest
    program = (
        "import sys, time; from cnnray.training import rows\n"
        f"with rows.open_rows({uri!r}, {NAMES!r}, 'killed'): print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout.readline() == b"open\n"
    with rows.open_rows(uri, NAMES, "another"):
        assert len(list(root.iterdir())) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with rows.open_rows(uri, NAMES, "third"):
        assert len(list(root.iterdir())) == 1


def test_processes_that_begin_at_once_share_one_copy(manifest, root):
    _, uri = manifest
    program = (
        "import sys, time; from cnnray.training import rows\n"
        f"for _ in range(20):\n with rows.open_rows({uri!r}, {NAMES!r}, '') as splits: assert len(splits['train'])"
    )
    started = time.monotonic()
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4, time.monotonic() - started
    assert not any(root.iterdir())


def test_a_process_that_finds_no_rows_does_not_wait_for_the_use_of_those_that_another_writes(manifest, monkeypatch):
    """The workers of a run use them together: one that waited for another's use would be waited for itself."""
    _, uri = manifest
    asks_to_write, is_used, is_over = threading.Event(), threading.Event(), threading.Event()
    locks, met, flock = [], [], rows.fcntl.flock

    def slow_flock(file, operation):
        if threading.current_thread() is slow:
            locks.append(operation)
            if len(locks) == 2:
                asks_to_write.set()
                assert is_used.wait(30)
        flock(file, operation)

    def use_slowly():
        with rows.open_rows(uri, NAMES, ""):
            is_over.set()

    def use():
        assert asks_to_write.wait(30)
        with rows.open_rows(uri, NAMES, ""):
            is_used.set()
            met.append(is_over.wait(10))

    slow, other = threading.Thread(target=use_slowly), threading.Thread(target=use)
    monkeypatch.setattr(rows.fcntl, "flock", slow_flock)
    for thread in (slow, other):
        thread.start()
    for thread in (slow, other):
        thread.join()
    assert met == [True]


def test_a_process_that_comes_while_the_rows_are_deleted_writes_them_anew(manifest, monkeypatch):
    _, uri = manifest
    lengths, rmtree = [], rows.shutil.rmtree

    def use():
        with rows.open_rows(uri, NAMES, "") as splits:
            lengths.append(len(splits["train"]))

    def slow_rmtree(folder):
        monkeypatch.setattr(rows.shutil, "rmtree", rmtree)
        other = threading.Thread(target=use)
        other.start()
        other.join(20)
        rmtree(folder)

    monkeypatch.setattr(rows.shutil, "rmtree", slow_rmtree)
    with rows.open_rows(uri, NAMES, "") as splits:
        length = len(splits["train"])
    assert lengths == [length]


def test_rows_that_cannot_be_written_leave_nothing(manifest, root, monkeypatch):
    _, uri = manifest

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows.pa.ipc, "new_file", fail)
    with pytest.raises(OSError, match="No space left"), rows.open_rows(uri, NAMES, ""):
        pass
    assert not any(root.iterdir())


def test_a_manifest_that_is_gone_is_told(tmp_path, root):
    with pytest.raises(FileNotFoundError), rows.open_rows(str(tmp_path / "none.parquet"), NAMES, ""):
        pass
    assert not list(root.rglob(rows._FACTS))


def test_the_lock_of_a_folder_that_was_deleted_meanwhile_deletes_no_new_one(root, monkeypatch):
    folder = root / "rows"
    folder.mkdir(parents=True)

    def late(lock, how):
        if folder.exists() and not (folder / "new").exists():
            folder.rename(root / "deleted")
            folder.mkdir()
            for name in ("lock", "new"):
                (folder / name).touch()

    monkeypatch.setattr(rows.fcntl, "flock", late)
    rows._delete_unused(folder)
    assert (folder / "new").exists()
