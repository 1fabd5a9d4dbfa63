"""One run at a time in an output."""

import contextlib
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cnnray.images import storage

log = logging.getLogger(__name__)

LOCK = ".lock"
REFRESH_SECONDS = 10.0
_GIVEN_UP_AFTER = 3


class OutputInUseError(RuntimeError):
    """Another run has the output; the message is one sentence for the user."""


@contextlib.contextmanager
def alone(output: str) -> Iterator[None]:
    """Keep other runs out of an output for as long as this one lives.

    On a local path the system lets go of the lock with the process. On S3 the lock is an object that its holder
    writes anew every `REFRESH_SECONDS`: one that nobody refreshes for three times as long was left by a run
    that was killed, and is taken over. No clock is compared.

    Raises:
        OutputInUseError: another run has it.
    """
    with _alone_on_s3(output) if storage.is_s3(output) else _alone_locally(Path(output)):
        yield


@contextlib.contextmanager
def _alone_locally(folder: Path) -> Iterator[None]:
    if folder.exists() and not folder.is_dir():
        raise OutputInUseError(f"{folder} is a file; expected a folder.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(str(folder)) from None
        if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise _in_use(str(folder))  # its holder ended, and took it away, between the two lines above
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            # A run that was refused leaves nothing behind.
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


@contextlib.contextmanager
def _alone_on_s3(output: str) -> Iterator[None]:
    uri = storage.join(output, LOCK)
    mine, ended = secrets.token_hex(8), threading.Event()
    version = storage.write_on_s3_if(uri, f"{mine} 0".encode(), _version_of_a_killed_run(uri, output))
    if version is None:
        raise _in_use(output)

    def refresh() -> None:
        nonlocal version
        count = 0
        while not ended.wait(REFRESH_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # the next one may get through
                written = storage.write_on_s3_if(uri, f"{mine} {count}".encode(), version)
                if written is None and _is(mine, uri):
                    written = storage.version_on_s3(uri)  # the answer to an earlier write was lost on its way
                version = written
                if version is None:
                    log.error("Another run has taken over %s; end one of the two.", output)
                    return

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if version is not None and storage.version_on_s3(uri) == version:
            storage.delete_file(uri)


def _is(mine: str, uri: str) -> bool:
    try:
        return storage.read_bytes(uri).decode().startswith(mine)
    except FileNotFoundError:
        return False


def _version_of_a_killed_run(uri: str, output: str) -> str | None:
    """The version of a lock that nobody refreshes; None where there is no lock."""
    found = storage.version_on_s3(uri)
    if found is None:
        return None
    log.info("%s has the lock of another run; waiting %.0f s to see whether it lives", output,
             _GIVEN_UP_AFTER * REFRESH_SECONDS)  # fmt: skip
    for _ in range(_GIVEN_UP_AFTER):
        time.sleep(REFRESH_SECONDS)
        now = storage.version_on_s3(uri)
        if now is None:
            return None
        if now != found:
            raise _in_use(output)
    return found


def _in_use(output: str) -> OutputInUseError:
    return OutputInUseError(f"Another run is writing to {output}; wait for its end, or write elsewhere.")
