"""Micro-batches of images of many requests."""

import asyncio
import threading
import time

import numpy as np
import pytest

from cnnray.serving.batching import Batcher


def test_batches_grow_while_the_engine_is_busy():
    sizes, busy = [], threading.Event()

    def run(images):
        busy.wait(5)
        return images.reshape(len(images), -1)[:, :1].astype(np.float32)

    async def ask():
        batcher = Batcher(run, 4, sizes.append)
        images = [np.full((2, 2, 3), number, np.uint8) for number in range(11)]
        first = asyncio.create_task(batcher(images[0]))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(batcher(image)) for image in images[1:]]
        await asyncio.sleep(0.05)
        others[2].cancel()
        busy.set()
        return [await first, *await asyncio.gather(*others, return_exceptions=True)]

    results = asyncio.run(ask())
    assert sizes == [1, 4, 4, 1]
    assert isinstance(results.pop(3), asyncio.CancelledError)
    assert [float(row[0]) for row in results] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_an_engine_that_fails_fails_its_batch_and_no_other():
    def run(images):
        if images[0, 0, 0, 0] == 0:
            raise RuntimeError("broken")
        if images[0, 0, 0, 0] == 2:
            return np.ones((len(images) + 1, 2), np.float32)
        return np.ones((len(images), 2), np.float32)

    async def ask(value):
        batcher = Batcher(run, 4, lambda size: None)
        image = np.full((2, 2, 3), value, np.uint8)
        with pytest.raises(RuntimeError, match="broken"):
            await batcher(np.zeros((2, 2, 3), np.uint8))
        with pytest.raises(ValueError, match="longer"):
            await batcher(np.full((2, 2, 3), 2, np.uint8))
        return await batcher(image)

    assert asyncio.run(ask(1)).tolist() == [1, 1]


def test_a_batcher_says_how_long_its_engine_has_been_at_a_batch():
    def run(images):
        time.sleep(0.1)
        return np.ones((len(images), 2), np.float32)

    async def ask():
        batcher, seconds = Batcher(run, 4, lambda size: None), []
        assert batcher.seconds_at_work == 0
        tasks = [asyncio.create_task(batcher(np.zeros((2, 2, 3), np.uint8))) for _ in range(20)]
        for _ in range(20):
            await asyncio.sleep(0.02)
            seconds.append(batcher.seconds_at_work)
        await asyncio.gather(*tasks)
        return seconds, batcher.seconds_at_work

    seconds, at_the_end = asyncio.run(ask())
    assert 0 < max(seconds) < 0.3  # of one batch, not of the queue
    assert at_the_end == 0
