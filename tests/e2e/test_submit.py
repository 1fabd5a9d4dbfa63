"""`ray job submit` of the training job to a Ray that somebody else started, from another folder."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.e2e.conftest import free_port, kill

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head():
    """A Ray head node with ports and a folder of its own; gives the variables that a client needs."""
    # Not pytest's own: Ray puts sockets there, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="r"))
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }
    port, dashboard = free_port(), free_port()
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=3", f"--port={port}", f"--dashboard-port={dashboard}",
         "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}",
         f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}", "--disable-usage-stats"],
        env=variables, stdin=subprocess.DEVNULL, stdout=(folder / "out").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield variables | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    head = psutil.Process(process.pid)
    family = [head, *head.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    kill(alive)
    shutil.rmtree(folder, ignore_errors=True)


def _submit(head, folder, *command):
    for _ in range(30):
        listed = subprocess.run([RAY, "job", "list"], env=head, capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            break
    else:
        raise AssertionError(f"the head did not answer: {listed.stderr[-500:]}")
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", str(REPOSITORY), "--", *command],
        env=head, cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_submitted_jobs_succeed_and_fail_as_they_should(head, digits, tmp_path):
    output = tmp_path / "out"
    done = _submit(
        head, tmp_path, "python", "jobs/train.py", "--data", str(digits), "--output", str(output),
        "--architecture", "small_cnn", "--image-size", "16", "--epochs", "1", "--workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(lines[-1])["bundle"] == str(output / "bundle")
    assert (output / "bundle" / "model.keras").exists()
    assert not list(tmp_path.glob("*.keras"))

    failed = _submit(head, tmp_path, "python", "jobs/train.py", "--data", "/nowhere", "--output", str(output / "2"))
    assert failed.returncode != 0
    assert "/nowhere does not exist" in failed.stdout
