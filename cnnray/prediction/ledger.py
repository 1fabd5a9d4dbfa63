"""Counts how often each task was started without finishing, to find tasks that crash their worker."""

from collections import Counter
from typing import Any

MAX_CRASHES = 2
"""How often a task may crash its worker before it is handled differently."""


class Ledger:
    """Unfinished attempts by task name. One actor of this class serves a run."""

    def __init__(self) -> None:
        self._unfinished: Counter[str] = Counter()

    def start(self, task: str) -> int:
        """Record an attempt, and return how many earlier attempts at this task did not finish."""
        self._unfinished[task] += 1
        return self._unfinished[task] - 1

    def finish(self, task: str) -> None:
        """Forget a task that has finished."""
        del self._unfinished[task]


def create_ledger() -> Any:
    """Start a ledger as an actor that reserves no CPU."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger).remote()


def start_attempt(ledger: Any, task: str) -> int:
    """Call `Ledger.start` of an actor; 0 where `ledger` is None."""
    if ledger is None:
        return 0
    import ray

    return int(ray.get(ledger.start.remote(task)))


def finish_attempt(ledger: Any, task: str) -> None:
    """Call `Ledger.finish` of an actor; nothing where `ledger` is None."""
    if ledger is not None:
        ledger.finish.remote(task)
