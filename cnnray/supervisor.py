"""A job in a child process, so that the job's last word is said whatever ends that process.

The C++ libraries of Ray end the process that uses them where something fails below them: with `_Exit(1)` or `abort`
when the cluster has died, and at times with `terminate` while the interpreter ends. No handler inside that process
runs then. The parent process runs nothing but this module. It also reads what such libraries write to stderr.
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that the parent passes on. They are blocked when the job begins."""
_END_SECONDS = 60.0
"""How long the child may take to end after its last word."""
_DRAIN_SECONDS = 2.0
"""How long the parent reads on after the child's end, where processes that the child has left hold the pipes open."""
_LONGEST_RAY_FOLDER = 107 - len("/ray/session_2026-12-31_23-59-59_123456_1234567/sockets/dash_MetricsHead")
"""Linux takes paths of sockets of up to 107 characters."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ends."""

    code: int
    """Exit code."""
    out: str = ""
    """The last of stdout."""
    err: str = ""
    """The last of stderr."""

    def leave(self) -> NoReturn:
        """Write the last lines, and end the process.

        Raises:
            SystemExit: with the exit code.
        """
        for stream, text in ((sys.stderr, self.err), (sys.stdout, self.out)):
            stream.write(text)
            stream.flush()
        sys.exit(self.code)


def supervised(job: Callable[[], Ending], noise: str) -> Ending:
    """Run a job in a child process, and return its ending in this one.

    On Linux only; elsewhere the job runs in this process, because a child cannot be tied to its parent's life, and
    system libraries of macOS do not work in a forked process.

    `SIGNALS` are passed on. If this process is killed, so is the child. The processes that the job starts get a
    temporary folder, which is deleted with what they leave there: Ray's dashboard and workers that are killed do not
    clean up. (Ray's own session, with its logs, is where it would be otherwise.)

    Args:
        job: run by the child, before threads and clients of object stores exist. It unblocks `SIGNALS` once it can
            be stopped.
        noise: regular expression of lines that native libraries write and nobody needs.
    """
    if sys.platform != "linux":
        return job()
    try:
        folder = tempfile.mkdtemp(prefix="cnnray-")
    except OSError as error:
        return Ending(code=1, err=f"Error: No temporary folder can be made: {error}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    (ending_in, ending_out), (native_in, native_out) = os.pipe(), os.pipe()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # NumPy's idle threads are no risk
        child = os.fork()
    if not child:
        os.close(ending_in)
        os.close(native_in)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        _redirect_native_stderr(native_out)
        os.environ.setdefault("RAY_TMPDIR", folder_for_sockets(_LONGEST_RAY_FOLDER))
        os.environ["TMPDIR"] = folder  # not for this process, in which tempfile knows its folder already
        ending = job()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        sys.stdout.flush()
        with os.fdopen(ending_out, "w") as file:
            file.write(json.dumps(asdict(ending)) + "\n")
        # What is registered for the end is done, but the interpreter does not free what it holds: of TensorFlow that
        # takes a second, and libraries whose threads live on may abort meanwhile.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code)
    os.close(ending_out)
    os.close(native_out)
    try:
        return _watch(child, ending_in, native_in, noise)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def folder_for_sockets(longest: int) -> str:
    """The temporary folder, or /tmp where its path has more characters than leave room for the sockets below it."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= longest or not os.access("/tmp", os.W_OK) else "/tmp"


def _redirect_native_stderr(native: int) -> None:
    """Let native libraries write to another file than this process's Python code, which keeps stderr."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    os.dup2(native, 2)
    os.close(native)


def _watch(child: int, ending_in: int, native_in: int, noise: str) -> Ending:
    """Pass signals and native output on until the child has ended."""
    endings: list[Ending] = []
    # Jobs that a shell runs in its background ignore Ctrl-C.
    waited_for = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]

    def pass_signals_on() -> None:
        # They stay blocked: a handler would not run if its signal came just before `waitpid`.
        while waited_for:
            _kill(child, signal.sigwait(waited_for))

    def receive() -> None:
        with os.fdopen(ending_in) as file:
            if text := file.readline():
                endings.append(Ending(**json.loads(text)))
                timer = threading.Timer(_END_SECONDS, _kill, (child, signal.SIGKILL))
                timer.daemon = True
                timer.start()

    def pass_output_on() -> None:
        with os.fdopen(native_in, errors="replace") as file:
            for line in file:
                if not re.search(noise, line):
                    sys.stderr.write(line)
                    sys.stderr.flush()

    threading.Thread(target=pass_signals_on, daemon=True).start()
    readers = [threading.Thread(target=target, daemon=True) for target in (receive, pass_output_on)]
    for reader in readers:
        reader.start()
    _, status = os.waitpid(child, 0)
    for reader in readers:
        reader.join(_DRAIN_SECONDS)
    return endings[0] if endings else _lost(os.waitstatus_to_exitcode(status))


def _kill(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _lost(code: int) -> Ending:
    """The ending of a child that did not say how it ended."""
    by = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    sentence = f"The job's process died ({by}), as it does where memory runs out or Ray's own processes end"
    return Ending(code=1, err=f"Error: {sentence}; the same command goes on from what was done.\n")
