"""HTTP services on this machine: cnnray's against the article's, bare FastAPI, LitServe and BentoML."""

import contextlib
import io
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import REPOSITORY, peers
from benchmarks.load import Peak, measure_peak, read_steady, start_steady
from benchmarks.predict import BATCH, write_random_bundle
from benchmarks.report import BenchmarkError, Comparison
from cnnray.models import engines
from cnnray.models.bundle import Bundle

log = logging.getLogger(__name__)

_JOB = REPOSITORY / "jobs" / "serve.py"
CONNECTIONS = (1, 16, 64)
_COMPARED_CONNECTIONS = 16
_SECONDS = 6
_JPEG_BYTES = 68_000
_AIMS = {"flask": 15.0, "fastapi": 0.9, "litserve": 1.0, "bentoml": 1.0}
_NAMES = {
    "flask": "the article's Flask service", "fastapi": "bare FastAPI, 2 processes", "litserve": "LitServe, 2 workers",
    "bentoml": "BentoML, 2 workers",
}  # fmt: skip


def measure(folder: Path, *, rounds: int = 3) -> tuple[list[Comparison], str]:
    """Measure `vgg_bn` at 64x64 with the fastest engine on a JPEG of 68 KB. The services run one at a time, in turn.

    Args:
        folder: photos, the bundle and the peers' environment are written here.
        rounds: number of measurements of each service.

    Returns:
        The comparison of requests/s at 16 connections with each peer, and a Markdown table of all numbers of
        connections with latencies.

    Raises:
        BenchmarkError: a service does not start.
    """
    photo = folder / "photo.jpg"
    photo.write_bytes(make_photo())
    bundle = write_random_bundle(folder)
    engine = engines.choose(Bundle.load(bundle), gpus=False, batch_size=BATCH)
    python = peers.install(folder)
    peaks: dict[str, dict[int, list[Peak]]] = {}
    steady: list[Peak] = []
    for number in range(rounds):
        for name in ("ours", *peers.PEERS):
            with run_service(name, folder, bundle, engine, python) as address:
                # Only the compared number of connections is measured in every round.
                for connections in CONNECTIONS if number == 0 else (_COMPARED_CONNECTIONS,):
                    peak = measure_peak(
                        f"{address}/predict", photo, folder, connections=connections, seconds=_SECONDS
                    )
                    peaks.setdefault(name, {}).setdefault(connections, []).append(peak)
                    log.info("%s, %d connections: %.0f requests/s", name, connections, peak.rate)
                if name == "ours" and number == 0:
                    rate = peaks[name][_COMPARED_CONNECTIONS][0].rate / 2
                    steady.append(_measure_steady(f"{address}/predict", photo, rate))
                    log.info("ours at half of its peak: p50 %.1f ms, p99 %.1f ms", steady[-1].p50, steady[-1].p99)
    files = f"vgg_bn 64x64 ({engine}) over HTTP, JPEG of 68 KB, 16 connections"
    comparisons = [
        Comparison(files, _rates(peaks["ours"]), _NAMES[name], _rates(peaks[name]), aim)
        for name, aim in _AIMS.items()
    ]
    return comparisons, _table(peaks, steady)


def _measure_steady(address: str, photo: Path, rate: float) -> Peak:
    """Measure the latencies at a steady rate, in requests/s."""
    load = read_steady(start_steady(address, photo, rate, 15))
    return Peak(rate, load.percentile(0.5), load.percentile(0.99), len(load.failed_at))


def _rates(peaks: dict[int, list[Peak]]) -> list[float]:
    return [peak.rate for peak in peaks[_COMPARED_CONNECTIONS]]


def _table(peaks: dict[str, dict[int, list[Peak]]], steady: list[Peak]) -> str:
    lines = [
        "| service | connections | requests/s | p50 ms | p99 ms | not 200 |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, by_connections in peaks.items():
        for connections, rounds in by_connections.items():
            lines.append(f"| {_NAMES.get(name, 'ours, 2 replicas')} | {connections} | {_row(rounds)} |")
    lines.append(f"| ours at half of its peak | as they come | {_row(steady)} |")
    return "\n".join(lines)


def _row(rounds: list[Peak]) -> str:
    rate, p50, p99 = (statistics.median(getattr(peak, key) for peak in rounds) for key in ("rate", "p50", "p99"))
    return f"{rate:.0f} | {p50:.1f} | {p99:.1f} | {sum(peak.failed for peak in rounds):.0f}"


def make_photo() -> bytes:
    """Encode a photo as a JPEG of about 68 KB."""
    photo = Image.fromarray(load_sample_images().images[0])
    files = []
    for quality in range(60, 100):
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return min(files, key=lambda data: abs(len(data) - _JPEG_BYTES))


@contextlib.contextmanager
def run_service(
    name: str, folder: Path, bundle: str, engine: str, python: Path, replicas: int = peers.WORKERS
) -> Iterator[str]:
    """Run a service until the context ends; its value is the service's address.

    Args:
        name: `ours`, or one of `peers.PEERS`.
        folder: logs are written here.
        bundle: the bundle to serve.
        engine: the engine to use.
        python: the interpreter of the peers that have an environment of their own.
        replicas: number of replicas of `ours`.

    Raises:
        BenchmarkError: the service does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if name == "ours":
        command = [
            sys.executable, str(_JOB), "--bundle", bundle, "--engine", engine, "--port", str(port),
            "--min-replicas", str(replicas), "--max-replicas", str(replicas), "--access-log", "false",
        ]  # fmt: skip
    else:
        interpreter = str(python) if name in ("litserve", "bentoml") else sys.executable
        command = [interpreter, "-m", "benchmarks.peers", name, bundle, engine, str(port)]
    with (folder / f"{name}.log").open("w") as output:
        # Without Ray's variables, our service runs on this machine like the peers, even if the benchmark is a cluster
        # job.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = inherited | {"PEER_FOLDER": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=environment
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(address, process, folder / f"{name}.log")
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/predict", timeout=5)
        except urllib.error.HTTPError as error:
            if error.code in (400, 405, 415, 422):  # ready: it rejects a GET request
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise BenchmarkError(f"A service does not start: {log_file.read_text()[-500:]}")
