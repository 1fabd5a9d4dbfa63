"""The time that jobs take on little data, from the command on, in multiples of the time of `import tensorflow`."""

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks import REPOSITORY, photos
from benchmarks.report import BenchmarkError
from cnnray.cluster import free_port
from jobs.demo import write_digits

log = logging.getLogger(__name__)

_SECONDS = 300.0
"""The longest wait for a job."""
_AIMS = {
    "train: to the first step": 2.5,
    "train: whole": 4.0,
    "make demo": 6.0,
    "predict 100 photos": 1.2,
    "evaluate 359 images, with report": 2.5,
    "serve: until ready": 1.4,
    "export to all formats": 3.0,
}


def measure(folder: Path, *, rounds: int = 5) -> str:
    """Run each job once in each round, one at a time.

    Args:
        folder: digits, photos, and what the jobs leave.
        rounds: number of rounds.

    Returns:
        A Markdown table of medians.

    Raises:
        BenchmarkError: a job fails.
    """
    write_digits(folder / "digits")
    bundle = folder / "bundle"
    _train(folder)
    shutil.copytree(folder / "trained" / "bundle", bundle, dirs_exist_ok=True)
    _run("export", "--bundle", bundle, "--calibration", folder / "digits", "--formats", "onnx")
    images = photos.write(folder / "photos", 100)
    manifest = folder / "trained" / "manifest.parquet"
    methods: dict[str, Callable[[], dict[str, float]]] = {
        "import tensorflow": lambda: {"import tensorflow": _seconds("-c", "import tensorflow")},
        "train": lambda: _train(folder),
        "demo": lambda: {"make demo": _run("demo", "--folder", folder / "demo")},
        "predict": lambda: {
            "predict 100 photos": _run("predict", "--bundle", bundle, "--input", images, "--engine", "onnx",
                                       "--output", folder / "predicted", "--overwrite")
        },
        "evaluate": lambda: {
            "evaluate 359 images, with report": _run("evaluate", "--bundle", bundle, "--data", manifest,
                                                     "--output", _fresh(folder / "report"))
        },
        "serve": lambda: {"serve: until ready": _serve(bundle)},
        "export": lambda: {"export to all formats": _export(folder, bundle)},
    }  # fmt: skip
    seconds: dict[str, list[float]] = {}
    for number in range(rounds):
        for method in methods.values():
            for name, value in method().items():
                seconds.setdefault(name, []).append(value)
        log.info(
            "round %d of %d: %s", number + 1, rounds, {name: round(all_[-1], 1) for name, all_ in seconds.items()}
        )
    unit = seconds.pop("import tensorflow")
    lines = [
        f"T, the time of `import tensorflow`, is {statistics.median(unit):.1f} s.",
        "",
        "| job | seconds | T | aim | |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        multiple = statistics.median(value / one for value, one in zip(values, unit, strict=True))
        verdict = "reached" if multiple <= _AIMS[name] else "missed"
        lines.append(f"| {name} | {statistics.median(values):.1f} | {multiple:.1f} | {_AIMS[name]} | {verdict} |")
    return "\n".join(lines)


def _train(folder: Path) -> dict[str, float]:
    output = folder / "trained"
    started = time.time()
    whole = _run("train", "--data", folder / "digits", "--output", output, "--architecture", "small_cnn",
                 "--image-size", "32", "--epochs", "3", "--overwrite")  # fmt: skip
    # The job counts from when it has read its flags until it writes its summary.
    summary = json.loads((output / "summary.json").read_text())
    before = (output / "summary.json").stat().st_mtime - summary["seconds"] - started
    return {"train: to the first step": before + summary["seconds_to_first_step"], "train: whole": whole}


def _export(folder: Path, bundle: Path) -> float:
    copy = _fresh(folder / "exported")
    shutil.copytree(bundle, copy)
    return _run("export", "--bundle", copy, "--calibration", folder / "digits")


def _serve(bundle: Path) -> float:
    """Seconds until the service is ready; it is ended then."""
    port = free_port()
    started = time.perf_counter()
    job = str(REPOSITORY / "jobs" / "serve.py")
    command = [sys.executable, job, "--bundle", str(bundle), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while time.perf_counter() - started < _SECONDS and process.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
                        return time.perf_counter() - started
                except (urllib.error.URLError, OSError):
                    time.sleep(0.1)
            raise BenchmarkError("jobs/serve.py was not ready in time.")
        finally:
            process.terminate()
            process.wait()


def _run(job: str, *arguments: str | Path) -> float:
    """The seconds of a job from its command to its end."""
    return _seconds(REPOSITORY / "jobs" / f"{job}.py", *arguments)


def _seconds(*arguments: str | Path) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=_SECONDS
    )
    if done.returncode:
        raise BenchmarkError(f"{' '.join(map(str, arguments))} failed: {done.stderr.strip().splitlines()[-1:]}")
    return time.perf_counter() - started


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
