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
from cnnray.images.retries import patient

log = logging.getLogger(__name__)

FILE = ".lock"
HEARTBEAT_SECONDS = 10.0
"""Seconds between two renewals of a lease. Each takes at most two requests of `object_stores.QUICK_SECONDS`."""
_MISSED_HEARTBEATS = 3
"""A lease expires after this many."""
_MAX_WAIT_SECONDS = 300.0
"""The longest wait of a write for a renewal, while storage is in trouble."""
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the machine sleeps


class OutputInUseError(PermanentError, RuntimeError):
    """Another run holds the lease on the output."""


class LeaseLostError(PermanentError, RuntimeError):
    """Another run has taken over the lease of this run."""


class Lease:
    """A lease that this process holds, or has lost.

    Attributes:
        holder: the name of this holder in the lease's file, by which other processes of the run know it; empty on a
            local path, where no other run can take over a lease.
    """

    holder = ""

    def raise_if_lost(self) -> None:
        """
        Raises:
            LeaseLostError: another run holds the lease.
        """


@contextlib.contextmanager
def lease(output: str) -> Iterator[Lease]:
    """Keep other runs out of an output for as long as this one lives.

    On a local path the lease is a lock that the system releases when the process ends. In a bucket it is an object
    that its holder rewrites every `HEARTBEAT_SECONDS`. An object that does not change for three times as long was
    left by a run that was killed, and is taken over. Clocks of machines are not compared.

    While a lease in a bucket has not been renewed for two heartbeats, the writes of this process to the output wait.
    They continue when it is renewed, and raise `LeaseLostError` when another run has taken it over.

    Raises:
        OutputInUseError: another run holds the lease.
    """
    with _local_lease(Path(output)) if storage.is_local(output) else _remote_lease(output) as held:
        yield held


@contextlib.contextmanager
def _local_lease(folder: Path) -> Iterator[Lease]:
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
            yield Lease()
        finally:
            path.unlink(missing_ok=True)
            # A run that was refused leaves nothing behind.
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()


@contextlib.contextmanager
def _remote_lease(output: str) -> Iterator[Lease]:
    held, ended = _RemoteLease(output), threading.Event()
    thread = threading.Thread(target=held.keep_alive, args=[ended], daemon=True)
    thread.start()
    try:
        with storage.guarded(output, held.wait_until_renewed):
            yield held
    finally:
        ended.set()
        thread.join()
        held.release()


class _RemoteLease(Lease):
    """A lease in a bucket."""

    def __init__(self, output: str) -> None:
        """
        Raises:
            OutputInUseError: another run holds the lease.
        """
        self.holder = secrets.token_hex(8)
        self._output, self._uri = output, storage.join(output, FILE)
        self._renewed = threading.Condition()
        expired = _expired_version(self._uri, output)
        self._renewed_at = _now()
        self._version = self._write(0, expired, quick=False)
        if self._version is None:
            raise _in_use(output)

    def keep_alive(self, ended: threading.Event) -> None:
        """Renew the lease until its run has ended, or the lease is lost."""
        count = 0
        while not ended.wait(HEARTBEAT_SECONDS):
            count += 1
            started = _now()
            try:
                version = self._write(count, self._version, quick=True)
            except OSError as error:  # the next renewal may get through
                log.debug("the lease on %s was not renewed: %s", self._output, error)
                continue
            with self._renewed:
                self._version, self._renewed_at = version, started
                self._renewed.notify_all()
            if version is None:
                log.error("Another run has taken over %s: this run ends.", self._output)
                return

    def _write(self, count: int, expected: storage.Version | None, *, quick: bool) -> storage.Version | None:
        """Write the lease's file; None if it belongs to another run."""
        written = storage.write_if(self._uri, f"{self.holder} {count}".encode(), expected, quick=quick)
        if written is None:
            # If the answer to an earlier write was lost, the file is this holder's. The version is read before the
            # content: a file that is then still this holder's had this version.
            version = storage.version(self._uri, quick=quick)
            written = version if is_held_by(self.holder, self._output, quick=quick) else None
        return written

    def raise_if_lost(self) -> None:
        if self._version is None:
            raise _lost(self._output)

    def wait_until_renewed(self) -> None:
        """Return when no other run can have taken over the lease.

        Raises:
            LeaseLostError: another run has taken it over.
            UnavailableError: storage was in trouble for too long.
        """
        until = _now() + _MAX_WAIT_SECONDS
        with self._renewed:
            if self._is_uncertain():
                log.warning("waiting to write to %s: its lease could not be renewed", self._output)
            while self._is_uncertain():
                if _now() > until:
                    raise storage.UnavailableError(
                        f"The lease {self._uri} could not be renewed for {_MAX_WAIT_SECONDS:.0f} s."
                    )
                self._renewed.wait(1.0)
        self.raise_if_lost()

    def _is_uncertain(self) -> bool:
        """Whether another run may soon take over the lease."""
        return self._version is not None and _now() - self._renewed_at > (_MISSED_HEARTBEATS - 1) * HEARTBEAT_SECONDS

    def release(self) -> None:
        """Delete the lease's file, if it is still this holder's."""
        try:
            if self._version is not None and storage.version(self._uri, quick=True) == self._version:
                storage.delete_file(self._uri)
        except OSError as error:  # the next run will wait until the lease expires
            log.warning("The lease on %s could not be released: %s", self._output, error)


@patient
def check_holder(output: str, holder: str) -> None:
    """Check in another process of the run that the run still holds its lease.

    Args:
        output: of the run.
        holder: `Lease.holder`.

    Raises:
        LeaseLostError: another run has taken it over, or has ended since.
    """
    if holder and not is_held_by(holder, output):
        raise _lost(output)


def is_held_by(holder: str, output: str, *, quick: bool = False) -> bool:
    """Whether the lease's file in a bucket is that of a holder."""
    try:
        return storage.read_bytes(storage.join(output, FILE), quick=quick).decode().startswith(holder)
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


def _now() -> float:
    return time.clock_gettime(_CLOCK)


def _in_use(output: str) -> OutputInUseError:
    return OutputInUseError(f"Another run is writing to {output}; wait until it ends, or choose another output.")


def _lost(output: str) -> LeaseLostError:
    return LeaseLostError(f"Another run has taken over {output}, so this one ended without writing anything more.")
