"""`jobs/predict.py` from its start to its end, with a network that costs little, against a bare loop."""

import json
import logging
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from benchmarks.photos import write as write_photos
from benchmarks.predict import LIGHT_ENGINE, LIGHT_SIZE, bare_loop, write_random_bundle
from benchmarks.report import BenchmarkError, Comparison
from cnnray.cpus import usable_cpus

log = logging.getLogger(__name__)

_JOB = Path(__file__).parents[1] / "jobs" / "predict.py"
IMAGES = 150_000
_DIFFERENT = 10_000
"""How many photos are written; each has hard links beside it, so that the folder holds as many files as asked for."""


def measure(folder: Path, *, images: int = IMAGES, rounds: int = 3) -> Comparison:
    """Measure `small_cnn` at 32x32, Ray's start and the summary included, on this machine alone.

    Args:
        folder: photos, bundle and outputs are written here.
        images: number of images.
        rounds: in each, the bare loop goes through two fifths of the images before and after the command.

    Raises:
        BenchmarkError: a command failed.
    """
    photos = write_photos(folder / "photos", min(images, _DIFFERENT))
    source = _write_links(photos, folder / f"linked-{images}", images)
    bundle = write_random_bundle(folder, architecture="small_cnn", size=LIGHT_SIZE, formats=(LIGHT_ENGINE,))
    paths = sorted(str(path) for path in source.iterdir())[: images * 2 // 5]
    processes = usable_cpus()
    shares = [(bundle, LIGHT_ENGINE, paths[first::processes]) for first in range(processes)]
    ours, theirs = [], []
    for number in range(rounds):
        before = _run_bare_loops(shares)
        ours.append(_run_command(bundle, source, folder / f"predicted-{number}", images))
        theirs.append((before + _run_bare_loops(shares)) / 2)
        log.info("the whole command %.0f images/s, the bare loop %.0f", ours[-1], theirs[-1])
    name = f"`small_cnn` 32x32 on {images:,} JPEG 500x375, {LIGHT_ENGINE}, the whole command"
    return Comparison(name, ours, f"a bare loop in {processes} processes, the same engine", theirs, 0.85)


def _write_links(photos: Path, folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    files = sorted(photos.rglob("*.jpg"))[:_DIFFERENT]
    for number in range(count):
        copy, index = divmod(number, len(files))
        link = folder / f"{copy:03d}_{files[index].name}"
        if not link.exists():
            os.link(files[index], link)
    return folder


def _run_bare_loops(shares: list[tuple[str, str, list[str]]]) -> float:
    """The images/s of all processes together."""
    with get_context("spawn").Pool(len(shares)) as pool:
        return sum(pool.starmap(bare_loop, shares, chunksize=1))


def _run_command(bundle: str, source: Path, output: Path, images: int) -> float:
    """The images/s of the whole command."""
    command = [
        sys.executable, str(_JOB), "--bundle", bundle, "--input", str(source), "--output", str(output),
        "--engine", LIGHT_ENGINE, "--overwrite",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    start = time.perf_counter()
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - start
    if completed.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {completed.stderr[-2000:]}")
    predicted = json.loads(completed.stdout.splitlines()[-1])["rows"]
    if predicted != images:
        raise BenchmarkError(f"{output}: {predicted:,} images were predicted, not {images:,}.")
    return images / seconds
