"""Gauges that go on to be exported, and histograms that are counted in their process, for Ray's metrics."""

import functools
import logging
import math
import threading
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import ClassVar

import numpy as np

log = logging.getLogger(__name__)

Tags = tuple[tuple[str, str], ...]
"""Keys and values of the tags of a series."""
_SECONDS_BETWEEN_SETS = 5.0


class Gauge:
    """A gauge that goes on to be exported.

    Ray's agent forgets a value that is not set again within two of its exports (20 s by default), so a thread of this
    process sets all values again every five seconds.
    """

    _all: ClassVar[weakref.WeakSet["Gauge"]] = weakref.WeakSet()
    _all_lock = threading.Lock()

    def __init__(
        self,
        name: str,
        metrics: ModuleType,
        *,
        description: str,
        tag_keys: tuple[str, ...] = (),
        seconds: float = math.inf,
    ) -> None:
        """
        Args:
            name: of the metric.
            metrics: `ray.util.metrics`; or `ray.serve.metrics`, which adds the tags of the replica.
            description: of what it shows.
            tag_keys: keys of the tags that `set` is given.
            seconds: a series ends so long after its last `set`.
        """
        self._gauge = metrics.Gauge(name, description=description, tag_keys=tag_keys)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._series: dict[Tags, tuple[float, float]] = {}
        """By tags: the value, and when it was set (`time.monotonic`)."""
        with self._all_lock:
            self._all.add(self)
        _start_setting_again()

    def set(self, value: float, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        """Set the value of the series with these tags."""
        with self._lock:
            self._gauge.set(value, tags=dict(tags))
            self._series[_key(tags)] = value, time.monotonic()

    def end_others(self, kept: Collection[Mapping[str, str]]) -> None:
        """Let all series end but those with these tags. Ray exports them for up to half a minute more."""
        keys = {_key(tags) for tags in kept}
        with self._lock:
            self._series = {tags: series for tags, series in self._series.items() if tags in keys}

    def set_again(self) -> None:
        """Set the values of all series again, and let those end whose time is over."""
        oldest = time.monotonic() - self._seconds
        with self._lock:
            self._series = {tags: series for tags, series in self._series.items() if series[1] >= oldest}
            for tags, (value, _) in self._series.items():
                self._gauge.set(value, tags=dict(tags))

    @classmethod
    def set_all_again(cls) -> None:
        """Set the values of all gauges of this process again."""
        with cls._all_lock:
            gauges = list(cls._all)
        for gauge in gauges:
            try:
                gauge.set_again()
            except Exception:  # the thread must go on
                log.exception("a gauge cannot be set again")


class Histogram:
    """A Prometheus histogram that is counted in this process.

    It is exported as the gauges `_bucket`, `_sum` and `_count`, which Prometheus takes like those of any histogram.
    Ray's own histogram makes the agent of the node record each value again, 20 µs of the thread that all processes
    share, and sums the middles of the buckets (https://github.com/ray-project/ray/issues/64852).
    """

    def __init__(
        self,
        name: str,
        metrics: ModuleType,
        *,
        description: str,
        boundaries: Sequence[float],
        tag_keys: tuple[str, ...] = (),
        seconds: float = math.inf,
    ) -> None:
        """
        Args:
            name: of the metric, without `_bucket`.
            metrics: as for a `Gauge`.
            description: of what is observed.
            boundaries: inclusive upper bounds of the buckets, ascending; a last one without a bound is added.
            tag_keys: keys of the tags that `add` is given.
            seconds: a series ends so long after its last `add`.
        """
        self._boundaries = np.asarray(boundaries, float)
        self._bounds = [*map(str, self._boundaries.tolist()), "+Inf"]
        self._bucket, self._sum, self._count = (
            Gauge(f"{name}_{part}", metrics, description=description, tag_keys=keys, seconds=seconds)
            for part, keys in (("bucket", (*tag_keys, "le")), ("sum", tag_keys), ("count", tag_keys))
        )
        self._state: dict[Tags, tuple[np.ndarray, float]] = {}
        """By tags: how many values are at most each bound, and the sum of all values."""

    def add(self, values: Sequence[float], tags: Mapping[str, str]) -> None:
        """Add values to the series with these tags. One thread at a time."""
        counts, total = self._state.get(key := _key(tags), (np.zeros(len(self._bounds), int), 0.0))
        buckets = np.bincount(np.searchsorted(self._boundaries, values), minlength=len(self._bounds))
        self._state[key] = counts, total = counts + buckets.cumsum(), total + sum(values)
        for bound, count in zip(self._bounds, counts.tolist(), strict=True):
            self._bucket.set(count, {**tags, "le": bound})
        self._sum.set(total, tags)
        self._count.set(int(counts[-1]), tags)


def _key(tags: Mapping[str, str]) -> Tags:
    return tuple(sorted(tags.items()))


@functools.cache
def _start_setting_again() -> None:
    def set_again() -> None:
        while True:
            time.sleep(_SECONDS_BETWEEN_SETS)
            Gauge.set_all_again()

    threading.Thread(target=set_again, name="gauges", daemon=True).start()
