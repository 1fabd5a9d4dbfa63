"""The access log: lines that are written by themselves, and that have a bound."""

import json
import logging
import threading

import pytest

from cnnray.serving import access_log as module
from cnnray.serving.access_log import AccessLog


@pytest.fixture
def disk(monkeypatch):
    """Where the lines are written: hangs until `free` is set."""

    class Disk(logging.Handler):
        def __init__(self):
            super().__init__()
            self.records, self.free, self.written = [], threading.Event(), threading.Semaphore(0)

        def emit(self, record):
            self.written.release()
            assert self.free.wait(20)
            self.records.append([json.loads(line) for line in record.getMessage().split("\n")])

    disk = Disk()
    monkeypatch.setattr(module._lines, "handlers", [disk])
    monkeypatch.setattr(module._lines, "propagate", False)
    monkeypatch.setattr(module._lines, "level", logging.INFO)
    yield disk
    disk.free.set()


def test_lines_are_written_together_and_by_themselves(disk, monkeypatch):
    monkeypatch.setattr(module, "_PERIOD", 0.05)
    log = AccessLog()
    disk.free.set()
    for number in range(3):
        log.record(f"id {number}", "GET", "/" + 5000 * "a", 200, 0.0012345, None)
    assert disk.written.acquire(timeout=20)
    log.flush()  # waits for the write that has begun
    assert [line["request_id"] for record in disk.records for line in record] == ["id 0", "id 1", "id 2"]
    line = disk.records[0][0]
    assert (line["milliseconds"], len(line["path"])) == (1.23, 1000)


def test_a_disk_that_hangs_takes_no_memory_and_holds_nobody(disk, monkeypatch):
    monkeypatch.setattr(module, "_PERIOD", 0.05)
    monkeypatch.setattr(module, "_MOST_LINES", 2)
    log = AccessLog()
    log.record("first", "GET", "/", 200, 0.1, None)
    assert disk.written.acquire(timeout=20)
    threads = threading.active_count()
    for number in range(5):
        log.record(f"id {number}", "GET", "/", 200, 0.1, None)
    assert threading.active_count() == threads
    disk.free.set()
    assert disk.written.acquire(timeout=20)
    log.flush()
    assert [line["request_id"] for line in disk.records[0]] == ["first"]
    assert [line["request_id"] for line in disk.records[1][:-1]] == ["id 0", "id 1"]
    assert disk.records[1][-1]["left_out"] == 3
