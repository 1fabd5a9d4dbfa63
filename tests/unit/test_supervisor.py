"""A job's last word, whatever ends its process."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from cnnray import supervisor
from tests.e2e.conftest import listen_to_ctrl_c

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jobs have a process of their own on Linux")

PROGRAM = """
import atexit, os, signal, subprocess, sys, threading, time
from cnnray import supervisor
from cnnray.supervisor import Ending

supervisor._END_SECONDS, supervisor._DRAIN_SECONDS = 1.0, 0.5

def job():
{}
    return Ending(code=0, out="the result\\n")

supervisor.supervised(job, "a known line").leave()
"""


def _start(body, **options):
    program = PROGRAM.format("\n".join(f"    {line}" for line in body.splitlines()))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], preexec_fn=listen_to_ctrl_c, **pipes, **options)


def _run(body):
    started = time.monotonic()
    process = _start(body)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 15
    return process.returncode, out, err


def test_output_comes_in_order_with_the_last_word_last():
    assert _run("print('first'); print('a line', file=sys.stderr)") == (0, "first\nthe result\n", "a line\n")
    code, out, err = _run("print('first')\nreturn Ending(code=3, err='x' * 100_000)")
    assert (code, out, len(err)) == (3, "first\n", 100_000)


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        ("os._exit(0)", "(exit code 0)"),
        ("os._exit(1)", "(exit code 1)"),
        ("os.abort()", "(SIGABRT)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "(SIGSEGV)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "(SIGKILL)"),
    ],
)
def test_a_process_that_is_ended_gets_a_sentence_behind_what_it_wrote(end, sentence):
    code, out, err = _run(f"os.write(2, b'pages\\nof a log')\n{end}")
    assert (code, out) == (1, "")
    assert err.startswith("pages\nof a log")
    assert f"Error: The job's process died {sentence}, as" in err
    assert err.endswith("; the same command goes on from what was done.\n")


def test_what_is_registered_for_the_end_is_done_and_threads_are_not_waited_for():
    registered = "atexit.register(lambda: print('registered', file=sys.stderr))"
    started = time.monotonic()
    assert _run(f"{registered}\nthreading.Thread(target=time.sleep, args=[9]).start()") == (
        0,
        "the result\n",
        "registered\n",
    )
    assert time.monotonic() - started < 9


@pytest.mark.parametrize("end", ["os.abort", "lambda: os._exit(7)", "lambda: time.sleep(60)"])
def test_what_happens_behind_the_last_word_changes_nothing(end):
    assert _run(f"atexit.register({end})") == (0, "the result\n", "")


def test_processes_that_are_left_behind_are_not_waited_for():
    assert _run("subprocess.Popen(['sleep', '20'], stdout=subprocess.DEVNULL)")[0] == 0


@pytest.mark.parametrize("end", ["pass", "os.abort()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_what_its_processes_leave_in_their_temporary_folder_is_deleted(end, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    _, out, _ = _run(
        "import tempfile\n"
        "left = subprocess.run(['mktemp'], capture_output=True, text=True, check=True).stdout.strip()\n"
        f"print(left, os.environ['RAY_TMPDIR'], tempfile.gettempdir(), os.path.exists(left), flush=True)\n{end}"
    )
    left, *others = out.splitlines()[0].split()
    assert left.startswith(f"{tmp_path}/cnnray-")
    assert others == ["/tmp", str(tmp_path), "True"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("folder", "expected"), [("/scratch/me", "/scratch/me"), ("/scratch/of/someone", "/tmp")])
def test_sockets_are_in_a_folder_with_a_short_path(folder, expected, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
    assert supervisor.folder_for_sockets(11) == expected


def test_without_a_temporary_folder_there_is_a_sentence(monkeypatch):
    def full(prefix):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    ending = supervisor.supervised(lambda: None, "x")
    assert (ending.code, ending.out) == (1, "")
    assert ending.err == "Error: No temporary folder can be made: [Errno 28] No space left on device\n"


def test_known_lines_of_native_libraries_are_left_out():
    assert _run("os.write(2, b'[E] a known line of Ray\\nanother\\n')")[2] == "another\n"


def test_the_process_keeps_the_terminal():
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format("    print(sys.stderr.isatty())")],
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    assert process.communicate(timeout=30)[0] == b"True\nthe result\n"
    os.close(theirs)
    os.close(ours)


STOPPED = """
def stop(number, _):
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, supervisor.SIGNALS)
    print("ready", flush=True)
    for _ in range(600):  # a signal just before a sleep does not interrupt it
        time.sleep(0.1)
except KeyboardInterrupt:
    time.sleep(0.5)
    return Ending(code=9, err="cleaned up\\n")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_stops_the_job_once(send, number):
    process = _start(STOPPED, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    send(process.pid, number)
    assert process.communicate(timeout=30) == ("", "cleaned up\n")
    assert process.returncode == 9


def test_a_killed_parent_takes_the_job_with_it():
    process = _start("print('ready', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate(timeout=10)  # the job holds the pipes until it ends
