"""Micro-batches of images of many requests."""

import asyncio
import threading

import pytest

from cnnray.serving.batching import Batcher, batch_sizes


def test_batches_grow_while_the_engine_is_busy():
    waits, busy = [], threading.Event()

    def run(values):
        busy.wait(5)
        return values

    async def ask():
        batcher = Batcher(run, 4, waits.append)
        first = batcher.submit(0)
        await asyncio.sleep(0.05)
        others = [batcher.submit(number) for number in range(1, 11)]
        await asyncio.sleep(0.05)
        others[2].cancel()
        busy.set()
        return [await first, *await asyncio.gather(*others, return_exceptions=True)]

    results = asyncio.run(ask())
    assert [len(batch) for batch in waits] == [1, 4, 4, 1]
    assert waits[0][0] < 0.05 <= min(min(batch) for batch in waits[1:])
    assert isinstance(results.pop(3), asyncio.CancelledError)
    assert results == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]


def test_few_sizes_of_micro_batches_come():
    assert batch_sizes(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert batch_sizes(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert batch_sizes(1) == [1]
    waits, busy = [], threading.Event()

    async def ask():
        batcher = Batcher(lambda values: busy.wait(5) and values, 32, waits.append)
        first = batcher.submit(0)
        await asyncio.sleep(0.05)
        others = [batcher.submit(number) for number in range(1, 24)]
        busy.set()
        return await asyncio.gather(first, *others)

    assert asyncio.run(ask()) == list(range(24))
    assert [len(batch) for batch in waits] == [1, 16, 6, 1]


def test_what_comes_in_one_turn_of_the_loop_is_one_batch():
    waits = []

    async def ask():
        batcher = Batcher(lambda values: values, 4, waits.append)
        return await asyncio.gather(*(batcher.submit(number) for number in range(3)))

    assert asyncio.run(ask()) == [0, 1, 2]
    assert [len(batch) for batch in waits] == [3]


def test_a_second_thread_takes_what_comes_while_the_first_works():
    both, waits = threading.Barrier(2), []

    def run(values):
        both.wait(5)
        return values

    async def ask():
        batcher = Batcher(run, 4, waits.append, threads=2)
        first = batcher.submit(0)
        await asyncio.sleep(0.05)
        return await asyncio.gather(first, batcher.submit(1))

    assert asyncio.run(ask()) == [0, 1]


def test_a_batch_that_fails_fails_no_other():
    def run(values):
        if values[0] == "bad":
            raise RuntimeError("broken")
        return values

    async def ask():
        batcher = Batcher(run, 4, lambda waits: None)
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.submit("bad")
        return await batcher.submit("good")

    assert asyncio.run(ask()) == "good"


@pytest.mark.parametrize("run", [lambda values: values[1:], lambda values: next(iter([]))])
def test_a_batch_that_fails_in_an_odd_way_holds_no_thread(run):
    async def ask():
        batcher = Batcher(run, 4, lambda waits: None)
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError)):
                await asyncio.wait_for(batcher.submit(1), 5)
        assert not batcher.is_busy

    asyncio.run(ask())
