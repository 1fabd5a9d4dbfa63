"""Writers that begin at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor

from cnnray.images import storage

WRITERS = 8


def create_at_once(uri: str) -> list[bool]:
    """Let `WRITERS` threads create the same file, each with its number as content, and say which ones did."""
    start = threading.Barrier(WRITERS)

    def create(number):
        start.wait()
        return storage.create(uri, b"%d" % number)

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(create, range(WRITERS)))
