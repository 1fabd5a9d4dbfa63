"""HTTP services on this machine's cores: ours against the article's, bare FastAPI, LitServe and BentoML."""

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

from benchmarks import peers
from benchmarks.load import Peak, finished, peak, start_steady
from benchmarks.predict import BATCH, random_bundle
from benchmarks.report import BenchmarkError, Comparison
from cnnray.models import engines
from cnnray.models.bundle import Bundle

log = logging.getLogger(__name__)

_JOB = Path(__file__).parents[2] / "jobs" / "serve.py"
CONNECTIONS = (1, 16, 64)
_COMPARED = 16
_SECONDS = 6
_JPEG_BYTES = 68_000
_AIMS = {"flask": 15.0, "fastapi": 0.9, "litserve": 1.0, "bentoml": 1.0}
_NAMES = {
    "flask": "the article's Flask service", "fastapi": "bare FastAPI, 2 processes", "litserve": "LitServe, 2 workers",
    "bentoml": "BentoML, 2 workers",
}  # fmt: skip


def serve(folder: Path, *, rounds: int = 3) -> tuple[list[Comparison], str]:
    """Measure `vgg_bn` at 64x64 with the fastest engine on a JPEG of 68 KB, each service started alone, in turns.

    Args:
        folder: where photos, bundle and the peers' environment are written.
        rounds: how often each service is measured.

    Returns:
        requests/s at 16 connections against each peer, and a Markdown table of all connections with latencies.

    Raises:
        BenchmarkError: a service does not start.
    """
    photo = folder / "photo.jpg"
    photo.write_bytes(photo_of_68_kb())
    bundle = random_bundle(folder)
    engine = engines.choose(Bundle.load(bundle), gpus=False, batch_size=BATCH)
    python = peers.install(folder)
    found: dict[str, dict[int, list[Peak]]] = {}
    steady: list[Peak] = []
    for number in range(rounds):
        for name in ("ours", *peers.PEERS):
            with service(name, folder, bundle, engine, python) as address:
                # What is compared with the peers in every round; the others once.
                for connections in CONNECTIONS if number == 0 else (_COMPARED,):
                    measured = peak(f"{address}/predict", photo, folder, connections=connections, seconds=_SECONDS)
                    found.setdefault(name, {}).setdefault(connections, []).append(measured)
                    log.info("%s, %d connections: %.0f requests/s", name, connections, measured.rate)
                if name == "ours" and number == 0:
                    steady.append(_at_half(f"{address}/predict", photo, found[name][_COMPARED][0].rate))
                    log.info("ours at half of that: p50 %.1f ms, p99 %.1f ms", steady[-1].p50, steady[-1].p99)
    files = f"vgg_bn 64x64 ({engine}) over HTTP, JPEG of 68 KB, 16 connections"
    comparisons = [
        Comparison(files, _rates(found["ours"]), _NAMES[name], _rates(found[name]), aim)
        for name, aim in _AIMS.items()
    ]
    return comparisons, _table(found, steady)


def _at_half(address: str, photo: Path, rate: float) -> Peak:
    """At a steady rate of half of the peak."""
    found = finished(start_steady(address, photo, rate / 2, 15))
    return Peak(rate / 2, found.percentile(0.5), found.percentile(0.99), len(found.failed_at))


def _rates(found: dict[int, list[Peak]]) -> list[float]:
    return [one.rate for one in found[_COMPARED]]


def _table(found: dict[str, dict[int, list[Peak]]], steady: list[Peak]) -> str:
    lines = [
        "| service | connections | requests/s | p50 ms | p99 ms | not 200 |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, by_connections in found.items():
        for connections, rounds in by_connections.items():
            lines.append(f"| {_NAMES.get(name, 'ours, 2 replicas')} | {connections} | {_row(rounds)} |")
    lines.append(f"| ours at half of its peak | as they come | {_row(steady)} |")
    return "\n".join(lines)


def _row(rounds: list[Peak]) -> str:
    rate, half, most = (statistics.median(getattr(one, key) for one in rounds) for key in ("rate", "p50", "p99"))
    return f"{rate:.0f} | {half:.1f} | {most:.1f} | {sum(one.failed for one in rounds):.0f}"


def photo_of_68_kb() -> bytes:
    """A photo, as JPEG of about that size."""
    photo = Image.fromarray(load_sample_images().images[0])
    files = []
    for quality in range(60, 100):
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return min(files, key=lambda data: abs(len(data) - _JPEG_BYTES))


@contextlib.contextmanager
def service(
    name: str, folder: Path, bundle: str, engine: str, python: Path, replicas: int = peers.WORKERS
) -> Iterator[str]:
    """A service for as long as it is needed: its address.

    Args:
        name: `ours`, or a peer.
        folder: for logs.
        bundle: what it serves.
        engine: that it uses.
        python: of the peers that have an environment of their own.
        replicas: of ours.

    Raises:
        BenchmarkError: it does not start.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    if name == "ours":
        command = [
            sys.executable, str(_JOB), "--bundle", bundle, "--engine", engine, "--port", str(port),
            "--min-replicas", str(replicas), "--max-replicas", str(replicas), "--access-log", "false",
        ]  # fmt: skip
    else:
        interpreter = str(python) if name in ("litserve", "bentoml") else sys.executable
        command = [interpreter, "-m", "benchmarks.peers", name, bundle, engine, str(port)]
    with (folder / f"{name}.log").open("w") as output:
        # On this machine, as the peers are, also where the benchmark itself is a job of a cluster.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = inherited | {"PEER_FOLDER": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=environment
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, folder / f"{name}.log")
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(address: str, process: subprocess.Popen[bytes], log_file: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/predict", timeout=5)
        except urllib.error.HTTPError as error:
            if error.code in (400, 405, 415, 422):  # it answers: GET is not what it wants
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise BenchmarkError(f"A service does not start: {log_file.read_text()[-500:]}")
