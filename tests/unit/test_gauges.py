"""Gauges that go on to be exported, and histograms."""

import time
import weakref

import pytest
from ray.util import metrics

from cnnray.tracking.gauges import Gauge, Histogram


class Recorded:
    """Stands for a gauge of Ray: the last value of each series, by the values of its tags."""

    def __init__(self):
        self.values = {}

    def set(self, value, tags):
        self.values[tuple(tags.values())] = value


@pytest.fixture
def gauge(monkeypatch):
    gauge = Gauge("cnnray_test", metrics, description="For a test.", tag_keys=("of",), seconds=100)
    assert (gauge._gauge.info["name"], gauge._gauge.info["tag_keys"]) == ("cnnray_test", ("of",))
    monkeypatch.setattr(gauge, "_gauge", Recorded())
    return gauge


def _set_again(gauge):
    """What is set when the thread sets the values of all gauges again."""
    gauge._gauge.values.clear()
    Gauge.set_all_again()
    return dict(gauge._gauge.values)


def test_values_are_set_again_until_their_series_ends(gauge, monkeypatch):
    gauge.set(1, {"of": "a"})
    gauge.set(2, {"of": "b"})
    gauge.set(3, {"of": "a"})
    assert gauge._gauge.values == {("a",): 3, ("b",): 2}
    assert _set_again(gauge) == _set_again(gauge) == {("a",): 3, ("b",): 2}
    gauge.end_others([{"of": "b"}, {"of": "unknown"}])
    assert _set_again(gauge) == {("b",): 2}
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 101)
    gauge.set(4, {"of": "c"})
    assert _set_again(gauge) == {("c",): 4}


def test_a_gauge_without_an_owner_is_no_longer_set():
    gauge = Gauge("cnnray_test", metrics, description="For a test.")
    reference = weakref.ref(gauge)
    assert gauge in Gauge._all
    del gauge
    end = time.monotonic() + 10
    while reference() is not None:  # the thread may set it at this moment
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_gauge_that_cannot_be_set_does_not_keep_others_from_it(gauge, monkeypatch):
    class Broken:
        def set(self, value, tags):
            raise TypeError("no number")

    broken = Gauge("cnnray_broken", metrics, description="For a test.")
    broken.set(1)
    monkeypatch.setattr(broken, "_gauge", Broken())
    with pytest.raises(TypeError):
        broken.set(2)
    assert [value for value, _ in broken._series.values()] == [1]
    gauge.set(1, {"of": "a"})
    assert _set_again(gauge) == {("a",): 1}


def test_a_histogram_is_exported_as_prometheus_has_it(monkeypatch):
    histogram = Histogram(
        "cnnray_test_seconds", metrics, description="For a test.", boundaries=[0.5, 1, 10], tag_keys=("route",)
    )
    parts = {"bucket": histogram._bucket, "sum": histogram._sum, "count": histogram._count}
    for part, gauge in parts.items():
        assert gauge._gauge.info["name"] == f"cnnray_test_seconds_{part}"
        assert gauge._gauge.info["tag_keys"] == (("route", "le") if part == "bucket" else ("route",))
        monkeypatch.setattr(gauge, "_gauge", Recorded())
    for values, route in (([0.5, 0.6, 11], "/a"), ([2], "/b"), ([0.1, 1.0], "/a")):
        histogram.add(values, {"route": route})
    assert parts["bucket"]._gauge.values == {
        ("/a", "0.5"): 2, ("/a", "1.0"): 4, ("/a", "10.0"): 4, ("/a", "+Inf"): 5,
        ("/b", "0.5"): 0, ("/b", "1.0"): 0, ("/b", "10.0"): 1, ("/b", "+Inf"): 1,
    }  # fmt: skip
    assert parts["count"]._gauge.values == {("/a",): 5, ("/b",): 1}
    assert parts["sum"]._gauge.values == {("/a",): pytest.approx(13.2), ("/b",): 2}
