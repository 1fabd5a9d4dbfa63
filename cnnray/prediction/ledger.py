"""Which work ends its workers: known by what was begun again and again, and never ended."""

from collections import Counter
from typing import Any

TRIES = 2
"""So often work may end its worker before it is treated otherwise."""


class Ledger:
    """Counts work that was begun and not ended. One actor of it serves a run."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def begin(self, work: str) -> int:
        """Begin some work: how often it was begun before without an end."""
        self._open[work] += 1
        return self._open[work] - 1

    def end(self, work: str) -> None:
        """End it."""
        del self._open[work]


def start() -> Any:
    """A ledger as an actor that takes no CPU of a cluster's."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote()


def begin(ledger: Any, work: str) -> int:
    """`Ledger.begin` of an actor; 0 without one."""
    import ray

    return int(ray.get(ledger.begin.remote(work))) if ledger is not None else 0


def end(ledger: Any, work: str) -> None:
    """`Ledger.end` of an actor."""
    if ledger is not None:
        ledger.end.remote(work)
