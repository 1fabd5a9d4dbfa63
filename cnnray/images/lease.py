"""A lease on an output: one run at a time may write to it."""

import contextlib
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cnnray.errors import PermanentError
from cnnray.images import storage

log = logging.getLogger(__name__)

FILE = ".lock"
HEARTBEAT_SECONDS = 10.0
_MISSED_HEARTBEATS = 3
"""A lease expires after this many."""


class OutputInUseError(PermanentError, RuntimeError):
    """Another run holds the lease on the output."""


@contextlib.contextmanager
def lease(output: str) -> Iterator[None]:
    """Keep other runs out of an output for as long as this one lives.

    On a local path the lease is a lock that the system releases when the process ends. In a bucket it is an object
    that its holder rewrites every `HEARTBEAT_SECONDS`. An object that does not change for three times as long was
    left by a run that was killed, and is taken over. Clocks of machines are not compared.

    Raises:
        OutputInUseError: another run holds the lease.
    """
    with _local_lease(Path(output)) if storage.is_local(output) else _remote_lease(output):
        yield


@contextlib.contextmanager
def _local_lease(folder: Path) -> Iterator[None]:
    if folder.exists() and not folder.is_dir():
        raise OutputInUseError(f"{folder} is a file; expected a folder.")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(str(folder)) from None
        if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise _in_use(str(folder))  # its holder ended and deleted the file between the two lines above
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            # A run that was refused leaves nothing behind.
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()


@contextlib.contextmanager
def _remote_lease(output: str) -> Iterator[None]:
    uri = storage.join(output, FILE)
    holder, ended = secrets.token_hex(8), threading.Event()
    version = storage.write_if(uri, f"{holder} 0".encode(), _expired_version(uri, output))
    if version is None:
        raise _in_use(output)

    def keep_alive() -> None:
        nonlocal version
        count = 0
        while not ended.wait(HEARTBEAT_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # the next heartbeat may get through
                written = storage.write_if(uri, f"{holder} {count}".encode(), version)
                if written is None and _is_held_by(holder, uri):
                    written = storage.version(uri)  # the answer to an earlier write was lost
                version = written
                if version is None:
                    log.error("Another run has taken over %s; end one of the two.", output)
                    return

    thread = threading.Thread(target=keep_alive, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if version is not None and storage.version(uri) == version:
            storage.delete_file(uri)


def _is_held_by(holder: str, uri: str) -> bool:
    try:
        return storage.read_bytes(uri).decode().startswith(holder)
    except FileNotFoundError:
        return False


def _expired_version(uri: str, output: str) -> storage.Version | None:
    """The version of a lease that has expired; None where there is no lease.

    Raises:
        OutputInUseError: its holder is alive.
    """
    first = storage.version(uri)
    if first is None:
        return None
    log.info("another run holds the lease on %s; waiting %.0f s to see whether it is alive", output,
             _MISSED_HEARTBEATS * HEARTBEAT_SECONDS)  # fmt: skip
    for _ in range(_MISSED_HEARTBEATS):
        time.sleep(HEARTBEAT_SECONDS)
        now = storage.version(uri)
        if now is None:
            return None
        if now != first:
            raise _in_use(output)
    return first


def _in_use(output: str) -> OutputInUseError:
    return OutputInUseError(f"Another run is writing to {output}; wait until it ends, or choose another output.")
