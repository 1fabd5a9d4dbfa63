"""Work ahead of a consumer in threads, by a bounded amount, with the results in order."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_AHEAD = 4
_STREAMS_AHEAD = 2


def mapped(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result]:
    """`map` in threads. At most twice as many items as threads are taken ahead of the consumer.

    Args:
        function: called in a thread; its error is raised in the place of its result.
        items: read in the consumer's thread.
        threads: number of them.
    """
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            running = deque(pool.submit(function, item) for item in itertools.islice(items, 2 * threads))
            while running:
                yield running.popleft().result()
                running += [pool.submit(function, item) for item in itertools.islice(items, 1)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def chained(streams: Iterable[Iterator[Item]], threads: int) -> Iterator[Item]:
    """The items of one stream after another, while the next streams are read side by side.

    At most twice as many streams as threads are begun ahead of the consumer, and `_ITEMS_AHEAD` items of each. When
    the generator is closed, the threads end after the item that they wait for.

    Args:
        streams: each is read in one thread; its error is raised after its items.
        threads: number of them.
    """
    streams, closed = iter(streams), threading.Event()

    def read(stream: Iterator[Item], items: "queue.Queue[Item]") -> None:
        for item in stream:
            if closed.is_set():
                return
            items.put(item)

    def begin(stream: Iterator[Item]) -> "tuple[queue.Queue[Item | None], Future[None]]":
        items: queue.Queue[Item | None] = queue.Queue(_ITEMS_AHEAD)
        reading = pool.submit(read, stream, items)  # type: ignore[arg-type]  # a generic function
        reading.add_done_callback(lambda _: items.put(None))
        return items, reading

    with ThreadPoolExecutor(threads) as pool:
        begun = deque(begin(stream) for stream in itertools.islice(streams, _STREAMS_AHEAD * threads))
        try:
            while begun:
                items, reading = begun[0]
                while (item := items.get()) is not None:
                    yield item
                begun.popleft()
                reading.result()
                begun += [begin(stream) for stream in itertools.islice(streams, 1)]
        finally:
            closed.set()
            for items, reading in begun:
                reading.cancel()
                _drain(items)  # a thread that waits for room goes on, and sees that the consumer is gone


def _drain(items: "queue.Queue[Item]") -> None:
    try:
        while True:
            items.get_nowait()
    except queue.Empty:
        pass
