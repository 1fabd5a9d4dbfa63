"""Load on a service: the highest possible, from wrk, and a steady one, with requests at fixed times.

As a program, python -m benchmarks.load ADDRESS FILE REQUESTS_PER_SECOND SECONDS prints a `Load` as JSON.
"""

import asyncio
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from cnnray.errors import PermanentError


@dataclass
class Load:
    """The result of a steady load."""

    statuses: dict[str, int] = field(default_factory=dict)
    """Number of responses by HTTP status, or by exception if there was no response."""
    milliseconds: list[float] = field(default_factory=list)
    """Latency of each request, from the time at which it was due to its response."""
    failed_at: list[float] = field(default_factory=list)
    """For each request without status 200, the time at which it was due, in seconds after the start."""

    def percentile(self, share: float) -> float:
        """The latency, in milliseconds, that this share of the requests does not exceed."""
        return sorted(self.milliseconds)[int(share * len(self.milliseconds))]


@dataclass(frozen=True)
class Peak:
    """The performance of a service when each connection sends a request as soon as it has its last response."""

    rate: float
    """Requests per second."""
    p50: float
    """Median latency in milliseconds."""
    p99: float
    """99th percentile of the latency in milliseconds."""
    failed: float
    """Number of requests without status 200."""


class MissingWrkError(PermanentError, RuntimeError):
    """wrk is not installed; the message is one sentence for the user."""


def require_wrk() -> None:
    """
    Raises:
        MissingWrkError: wrk is not installed.
    """
    if shutil.which("wrk") is None:
        raise MissingWrkError("The benchmark needs wrk, which is not installed (Debian's package wrk).")


def measure_peak(address: str, file: Path, folder: Path, *, connections: int, seconds: int) -> Peak:
    """Post an image as a form as fast as the service answers, after a warm-up of two seconds.

    Args:
        address: the URL to post to.
        file: the image.
        folder: wrk's script is written here.
        connections: number of connections.
        seconds: length of the measurement.
    """
    script = folder / "post.lua"
    script.write_text(_write_lua_script(file, folder / "body"))
    command = ["wrk", "-t1", f"-c{connections}", "--timeout", "30s", "-s", str(script), address]
    for duration in (2, seconds):
        completed = subprocess.run([*command, f"-d{duration}s"], capture_output=True, text=True, check=True)
    values = re.search(r"MEASURED (\S+) (\S+) (\S+) (\S+)", completed.stdout)
    assert values is not None, completed.stdout
    return Peak(*map(float, values.groups()))


def _write_lua_script(file: Path, body: Path) -> str:
    """Write the form to `body`, and return a script for wrk that posts it and prints the measurements."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{file.name}"\r\n'
    head += "Content-Type: image/jpeg\r\n\r\n"
    body.write_bytes(head.encode() + file.read_bytes() + f"\r\n--{_BOUNDARY}--\r\n".encode())
    return f"""
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*all")
wrk.headers["Content-Type"] = "multipart/form-data; boundary={_BOUNDARY}"
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("MEASURED %f %f %f %d\\n", 1e6 * summary.requests / summary.duration,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


_BOUNDARY = "cnnray-benchmark"


def start_steady(address: str, file: Path, rate: float, seconds: float) -> subprocess.Popen[str]:
    """Run `send_steady` in another process, so that it does not share the interpreter's lock with the measurement.

    `read_steady` waits for its result.
    """
    command = [sys.executable, "-m", "benchmarks.load", address, str(file), str(rate), str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def read_steady(process: subprocess.Popen[str]) -> Load:
    """Wait for a process from `start_steady`, and return its result."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return Load(**json.loads(output))


async def send_steady(address: str, file: Path, rate: float, seconds: float) -> Load:
    """Post an image as a form, `rate` times per second, whether or not earlier requests have been answered."""
    load, data = Load(), file.read_bytes()
    start = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=512)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:

        async def post(due: float) -> None:
            form = aiohttp.FormData()
            form.add_field("image", data, filename=file.name, content_type="image/jpeg")
            try:
                async with session.post(address, data=form) as response:
                    await response.read()
                    status = str(response.status)
            except (aiohttp.ClientError, TimeoutError) as error:
                status = type(error).__name__
            load.statuses[status] = load.statuses.get(status, 0) + 1
            load.milliseconds.append(1000 * (time.perf_counter() - start - due))
            if status != "200":
                load.failed_at.append(round(due, 2))

        tasks = set()
        for number in range(int(rate * seconds)):
            due = number / rate
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
            task = asyncio.create_task(post(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return load


if __name__ == "__main__":
    _, address, file, rate, seconds = sys.argv
    result = asyncio.run(send_steady(address, Path(file), float(rate), float(seconds)))
    sys.stdout.write(json.dumps(dataclasses.asdict(result)) + "\n")
