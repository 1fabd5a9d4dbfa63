"""Starts jobs in processes of their own, and what tests of them share."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import selenium.webdriver
from selenium.webdriver.chrome.service import Service as ChromeService

from tests.conftest import REPOSITORY

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray that take a minute to notice the end of their raylet."""


class Job:
    """A job in a process of its own, which writes its output into files."""

    def __init__(self, command, folder, environment=None):
        self.out, self.err = folder / "stdout", folder / "stderr"
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env=variables | (environment or {}), preexec_fn=listen_to_ctrl_c,
            )  # fmt: skip

    def wait(self, seconds):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"not done after {seconds} s:\n{self.err.read_text()}") from None

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def driver(self):
        """The process that runs the job, a child of the one that was started (see `cnnray.supervisor`)."""
        (driver,) = psutil.Process(self.process.pid).children()
        return driver

    def named_children(self):
        """Its children and their command lines, without those that have ended meanwhile."""
        named = []
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                named.append((child, " ".join(child.cmdline()) or child.name()))
        return named

    def lose(self, name):
        """Kill one of Ray's own processes, and check that the job then ends with one sentence."""
        # Parts may appear before this job's Ray has started: workers of an earlier one may still write.
        found = until(lambda: [child for child in self.children() if child.name() == name], 60, name)
        assert kill(found) == 1
        assert self.wait(60) == 1, self.err.read_text()
        last = self.err.read_text().splitlines()[-1]
        assert last.startswith(("Error: Ray has died", "Error: The job's process died")), last
        assert "the same command goes on" in last

    def end(self):
        """End the job and all its children."""
        if self.process.poll() is None:
            kill(self.children())
            self.process.kill()
            self.process.wait()


def kill(processes):
    """Kill the processes that are still alive, and return their number."""
    killed = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            killed += 1
    return killed


def listen_to_ctrl_c():
    """For a child: where a shell runs the tests in its background, they and their children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started_jobs(tmp_path_factory):
    """Start `python jobs/NAME.py ...`; jobs that are still running at the end are ended."""
    jobs = []

    def start(name, *arguments, environment=None):
        command = [sys.executable, f"jobs/{name}.py", *map(str, arguments)]
        jobs.append(Job(command, tmp_path_factory.mktemp("job"), environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


start_job = pytest.fixture(started_jobs)


def until(condition, seconds, what):
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come in {seconds} s")


def survivors(children, seconds):
    """The named children that are still alive after a while, without Ray's agents, which are killed."""
    agents = [child for child, name in children if name.startswith(AGENTS)]
    _, alive = psutil.wait_procs([child for child, _ in children if child not in agents], timeout=seconds)
    kill(agents)
    return alive


def checkpoints(output: Path):
    return sorted((output / "checkpoints").glob("checkpoint_2*"))


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, as wide as a phone, whose log and network requests can be read."""
    options = selenium.webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=390,844",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.webdriver.Chrome(options, ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def requested_addresses(browser):
    """What pages have asked for since the last call, without the browser's own first page."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
        and not event["params"]["documentURL"].startswith(("chrome:", "chrome-untrusted:"))
    ]
