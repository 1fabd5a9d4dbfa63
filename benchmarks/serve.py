"""HTTP services on this machine: cnnray's against the article's, bare FastAPI, LitServe and BentoML."""

import contextlib
import io
import logging
import os
import signal
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
from benchmarks.load import Peak, measure_peak
from benchmarks.predict import BATCH, write_random_bundle
from benchmarks.report import BenchmarkError, Comparison
from cnnray.cluster import free_port
from cnnray.models import engines
from cnnray.models.bundle import Bundle

log = logging.getLogger(__name__)

_JOB = REPOSITORY / "jobs" / "serve.py"
CONNECTIONS = (1, 16, 64, 256, 512)
NETWORKS = {"small_cnn": 32, "vgg_bn": 64}
"""A light network, where the framework shows, and a heavy one; by name, with the size of its images."""
_SECONDS, _SETTLING_SECONDS = 6, 45
"""Of a measurement, and of the load before those with default flags, under which the autoscaler adds replicas."""
_JPEG_BYTES = 68_000
_NAMES = {
    "ours": "ours, 2 replicas", "default": "ours, default flags", "flask": "the article's Flask service",
    "fastapi": "bare FastAPI, 2 processes",
    "litserve": "LitServe, 2 workers", "bentoml": "BentoML, 2 workers",
}  # fmt: skip
_AIMS = {("ours", "fastapi"): 1.0, ("ours", "litserve"): 1.0, ("ours", "bentoml"): 1.0, ("default", "fastapi"): 1.0}
"""Aims of the rate of a service of ours against that of a peer."""
_ONE_CONNECTION = 1 / 1.3
"""Aim of the rate with one connection against FastAPI: HAProxy's hop has its price."""
_TAIL = 4.0
"""Aim of p99 / p50: at most."""


def measure(folder: Path, *, rounds: int = 3, whole: bool = True) -> tuple[list[Comparison], str]:
    """Measure services on a JPEG of 68 KB, with the fastest engine. They run one at a time, in turn.

    Args:
        folder: photos, the bundles and the peers' environment are written here.
        rounds: number of measurements of each service.
        whole: both networks and all numbers of connections; else the heavy network at 16 connections.

    Returns:
        The comparisons of requests/s, and a Markdown table with latencies.

    Raises:
        BenchmarkError: a service does not start.
    """
    photo = folder / "photo.jpg"
    photo.write_bytes(make_photo())
    python = peers.install(folder)
    comparisons, rows = [], []
    for architecture, size in NETWORKS.items():
        if not whole and architecture != "vgg_bn":
            continue
        bundle = write_random_bundle(folder, architecture=architecture, size=size)
        engine = engines.choose(Bundle.load(bundle), gpus=False, batch_size=BATCH)
        numbers = CONNECTIONS if whole else (16,)
        peaks: dict[tuple[str, int], list[Peak]] = {}
        for number in range(rounds):
            for name in ("ours", "default", *peers.PEERS) if whole else ("ours", *peers.PEERS):
                # The article's service is far behind; once is enough.
                if name == "flask" and (number or architecture != "vgg_bn"):
                    continue
                with run_service(name, folder, bundle, engine, python) as address:
                    if name == "default":
                        measure_peak(f"{address}/predict", photo, folder, connections=64, seconds=_SETTLING_SECONDS)
                    for connections in (16,) if name == "flask" else numbers:
                        peak = measure_peak(
                            f"{address}/predict", photo, folder, connections=connections, seconds=_SECONDS
                        )
                        peaks.setdefault((name, connections), []).append(peak)
                        log.info(
                            "%s, %s, %d connections: %.0f requests/s", architecture, name, connections, peak.rate
                        )
        title = f"{architecture} {size}x{size} ({engine})"
        rows += [
            f"| {title} | {_NAMES[name]} | {connections} | {_row(measured)} |"
            for (name, connections), measured in peaks.items()
        ]
        comparisons += [
            Comparison(
                f"{title}, {_NAMES[own]}, {connections} connection(s)",
                [peak.rate for peak in peaks[own, connections]],
                _NAMES[peer],
                [peak.rate for peak in peaks[peer, connections]],
                _ONE_CONNECTION if (peer, connections) == ("fastapi", 1) else aim,
            )
            for connections in numbers
            for (own, peer), aim in _AIMS.items()
            if (own, connections) in peaks
        ]
    titles = (
        f"| network | service | connections | requests/s | p50 ms | p99 ms | p99 / p50 (aim {_TAIL:g}) | not 200 |"
    )
    head = [titles, "|---|---|---|---|---|---|---|---|"]
    return comparisons, "\n".join(head + rows)


def _row(rounds: list[Peak]) -> str:
    rate, p50, p99 = (statistics.median(getattr(peak, key) for peak in rounds) for key in ("rate", "p50", "p99"))
    tail = statistics.median(peak.p99 / peak.p50 for peak in rounds)
    missed = " missed" if tail > _TAIL else ""
    return f"{rate:.0f} | {p50:.1f} | {p99:.1f} | {tail:.1f}{missed} | {sum(peak.failed for peak in rounds):.0f}"


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
        name: `ours`; `default`, which is ours with default flags; or one of `peers.PEERS`.
        folder: logs are written here.
        bundle: the bundle to serve.
        engine: the engine to use.
        python: the interpreter of the peers that have an environment of their own.
        replicas: number of replicas of `ours`.

    Raises:
        BenchmarkError: the service does not start.
    """
    port = free_port()
    if name in ("ours", "default"):
        command = [sys.executable, str(_JOB), "--bundle", bundle, "--port", str(port)]
        if name == "ours":
            command += [
                "--engine", engine, "--min-replicas", str(replicas), "--max-replicas", str(replicas),
                "--access-log", "none",
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
