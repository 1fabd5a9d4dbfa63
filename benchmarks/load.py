"""Load on a service: as much as it takes, from wrk; and requests at fixed times, whatever the answers take.

As a program: python -m benchmarks.load ADDRESS FILE REQUESTS_A_SECOND SECONDS prints a `Load` as JSON.
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
    """What came of it."""

    statuses: dict[str, int] = field(default_factory=dict)
    """Answers by HTTP's status, or by the exception where there was none."""
    milliseconds: list[float] = field(default_factory=list)
    """From the time that a request was due to its answer."""
    failed_at: list[float] = field(default_factory=list)
    """Seconds after the start at which requests were due that did not end with 200."""

    def percentile(self, share: float) -> float:
        """Of the milliseconds."""
        return sorted(self.milliseconds)[int(share * len(self.milliseconds))]


@dataclass(frozen=True)
class Peak:
    """What a service does where each connection asks again as soon as it has its answer."""

    rate: float
    """Requests a second."""
    p50: float
    """Milliseconds."""
    p99: float
    """Milliseconds."""
    failed: float
    """Requests that did not end with 200."""


class MissingWrkError(PermanentError, RuntimeError):
    """wrk is not installed; the message is one sentence for the user."""


def require_wrk() -> None:
    """
    Raises:
        MissingWrkError: there is none.
    """
    if shutil.which("wrk") is None:
        raise MissingWrkError("The load comes from wrk, which is not installed (Debian's package wrk).")


def peak(address: str, file: Path, folder: Path, *, connections: int, seconds: int) -> Peak:
    """Post an image to `address`, as a form, from so many connections for so many seconds, after two to warm up.

    Args:
        address: that takes the form.
        file: the image.
        folder: where wrk's script is written.
        connections: at once.
        seconds: that are measured.
    """
    script = folder / "post.lua"
    script.write_text(_lua(file, folder / "body"))
    command = ["wrk", "-t1", f"-c{connections}", "--timeout", "30s", "-s", str(script), address]
    for duration in (2, seconds):
        done = subprocess.run([*command, f"-d{duration}s"], capture_output=True, text=True, check=True)
    values = re.search(r"MEASURED (\S+) (\S+) (\S+) (\S+)", done.stdout)
    assert values is not None, done.stdout
    return Peak(*map(float, values.groups()))


def _lua(file: Path, body: Path) -> str:
    """A script for wrk that posts a form, and prints what it measured."""
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
    """`steady` in a process of its own, which shares no lock with who measures; its output is for `finished`."""
    command = [sys.executable, "-m", "benchmarks.load", address, str(file), str(rate), str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> Load:
    """Wait for what `start_steady` started."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return Load(**json.loads(output))


async def steady(address: str, file: Path, rate: float, seconds: float) -> Load:
    """Post an image to `address`, as a form, `rate` times a second for so many seconds."""
    load, data = Load(), file.read_bytes()
    start = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=512)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:

        async def one(due: float) -> None:
            form = aiohttp.FormData()
            form.add_field("image", data, filename=file.name, content_type="image/jpeg")
            try:
                async with session.post(address, data=form) as answer:
                    await answer.read()
                    status = str(answer.status)
            except (aiohttp.ClientError, TimeoutError) as error:
                status = type(error).__name__
            load.statuses[status] = load.statuses.get(status, 0) + 1
            load.milliseconds.append(1000 * (time.perf_counter() - start - due))
            if status != "200":
                load.failed_at.append(round(due, 2))

        tasks = []
        for number in range(int(rate * seconds)):
            due = number / rate
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
    return load


if __name__ == "__main__":
    _, address, file, rate, seconds = sys.argv
    found = asyncio.run(steady(address, Path(file), float(rate), float(seconds)))
    sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n")
