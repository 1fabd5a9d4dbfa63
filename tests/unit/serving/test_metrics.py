"""What replicas count, and when Ray gets it."""

import threading
from collections import Counter

import pytest

from cnnray.tracking import prometheus
from cnnray.tracking.prometheus import ServingMetrics


class Recorded:
    """Stands for a metric of Ray."""

    def __init__(self):
        self.values = []

    def inc(self, value, tags=None):
        assert value > 0  # as Ray's
        self.values.append((value, tags))

    def set(self, value, tags=None):
        self.values.append((value, tags))

    def add(self, values, tags):
        self.values += [(value, tags) for value in values]

    def end_others(self, kept):
        self.values = [(value, tags) for value, tags in self.values if tags in kept]


@pytest.fixture
def metrics(monkeypatch):
    metrics = ServingMetrics(lambda: (3, 4000), dict)
    for name in (
        "_requests",
        "_latency",
        "_stages",
        "_batches",
        "_predictions",
        "_confidences",
        "_images_held",
        "_bytes_held",
        "_cached_images",
        "_drift",
    ):
        monkeypatch.setattr(metrics, name, Recorded())
    return metrics


def test_counts_are_summed_and_values_are_kept_until_they_are_given_to_ray(metrics, monkeypatch):
    timers = []
    monkeypatch.setattr(threading, "Timer", lambda *arguments: timers.append(arguments) or threading.Thread())
    for status in (200, 200, 503):
        metrics.record_request("/predict", status, 0.5)
    metrics.record_batch([0.1, 0.2])
    metrics.record_stage("decode", [0.3])
    metrics.record_prediction("cats", "v1", ["tabby"], 0.75)
    metrics.record_cache(hits=0, misses=3)
    assert not metrics._requests.values
    ((seconds, flush),) = timers
    assert seconds == 1
    flush()
    counted = Counter({tags["status"]: value for value, tags in metrics._requests.values})
    assert counted == {"200": 2, "503": 1}
    assert metrics._latency.values == [(0.5, {"route": "/predict"})] * 3
    assert metrics._batches.values == [(2, {})]
    assert metrics._stages.values == [
        (0.1, {"stage": "wait"}), (0.2, {"stage": "wait"}), (0.3, {"stage": "decode"}),
    ]  # fmt: skip
    assert metrics._cached_images.values == [(3, {"hit": "false"})]
    tags = {"model": "cats", "version": "v1"}
    assert metrics._predictions.values == [(1, tags | {"prediction": "tabby"})]
    assert metrics._confidences.values == [(0.75, tags)]
    assert (metrics._images_held.values, metrics._bytes_held.values) == ([(3, None)], [(4000, None)])
    metrics.flush()
    assert len(metrics._latency.values) == 3  # nothing is given twice
    metrics.record_stage("read", [1.0])
    assert len(timers) == 2


def test_a_series_of_drift_ends_with_what_it_is_about(metrics, monkeypatch):
    monkeypatch.setattr(prometheus, "_DRIFT_SECONDS", 0.0)
    found = [{("cats", "v1"): {"classes": 0.2, "confidences": 0.1}}, {("cats", "v1"): {"classes": 0.3}}, {}, {}]
    monkeypatch.setattr(metrics, "_find_drift", lambda: found.pop(0))
    classes, confidences = ({"model": "cats", "version": "v1", "of": of} for of in ("classes", "confidences"))
    for values in ([(0.2, classes), (0.1, confidences)], [(0.2, classes), (0.3, classes)], [], []):
        metrics.flush()
        assert metrics._drift.values == values


def test_nothing_is_lost_between_threads(metrics):
    def count():
        for _ in range(2000):
            metrics.record_request("/predict", 200, 0.1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.flush()
    metrics.flush()
    assert sum(value for value, _ in metrics._requests.values) == 8000
    assert len(metrics._latency.values) == 8000
