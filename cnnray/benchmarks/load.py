"""A steady load: requests at fixed times, whatever the answers take, as many users make it.

As a program: python -m cnnray.benchmarks.load ADDRESS FILE REQUESTS_A_SECOND SECONDS prints a `Load` as JSON.
"""

import asyncio
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp


@dataclass
class Load:
    """What came of it."""

    statuses: dict[str, int] = field(default_factory=dict)
    """Answers by HTTP's status, or by the exception where there was none."""
    milliseconds: list[float] = field(default_factory=list)
    """From the time that a request was due to its answer."""
    failed_at: list[float] = field(default_factory=list)
    """Seconds after the start of requests that did not end with 200."""


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
