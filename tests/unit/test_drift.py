"""Predicted classes against those of training: the population stability index, and when there is a warning."""

import collections
import json

import numpy as np
import pytest

from cnnray.models.bundle import BundleInfo
from cnnray.prediction.summary import class_drift, log_summary, population_stability_index, summarize
from cnnray.prediction.tally import Tally


def test_population_stability_index():
    assert population_stability_index({"a": 10, "b": 30}, {"a": 100, "b": 300}) == pytest.approx(0, abs=1e-3)
    # By hand, without the added half images, which hardly change large counts: 2 * 0.2 * ln(0.6 / 0.4).
    index = population_stability_index({"a": 60_000, "b": 40_000}, {"a": 40_000, "b": 60_000})
    assert index == pytest.approx(2 * 0.2 * np.log(1.5), rel=1e-3)
    assert population_stability_index({"a": 50}, {"a": 25, "b": 25}) > 0.25
    assert population_stability_index({}, {"a": 1}) is None


def _warns(predicted, trained, caplog):
    """Whether the log of a run with these numbers of predictions by class has a drift warning."""
    tally = Tally(0.5, rows=sum(predicted.values()), classes=collections.Counter(predicted))
    info = BundleInfo(class_names=sorted(trained), image_size=32, class_counts=trained)
    caplog.clear()
    log_summary(summarize(tally, info))
    return "distributed differently than in training" in caplog.text


def _draw(generator, images, shares):
    counts = generator.multinomial(images, shares)
    return {f"{number:04d}": int(count) for number, count in enumerate(counts)}


@pytest.mark.parametrize("images", [20, 100, 1000, 100_000])
@pytest.mark.parametrize(("classes", "long_tail"), [(2, False), (10, False), (10, True), (100, True), (1000, True)])
def test_undrifted_images_give_no_drift_warning(images, classes, long_tail, caplog):
    """At most in 1 of 1,000 runs; 2 in 30 then have a probability of 0.0004."""
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, classes + 1) if long_tail else np.ones(classes)
    shares /= shares.sum()
    draws = ((_draw(generator, n, shares) for n in (images, 30 * classes)) for _ in range(30))
    assert sum(_warns(*draw, caplog) for draw in draws) < 2


@pytest.mark.parametrize(
    ("predicted", "trained"),
    [
        ({"a": 100}, {"a": 50, "b": 50}),
        ({"a": 60, "b": 40}, {"a": 10, "b": 90}),
        ({"a": 1_000_000}, {str(number): 20 for number in range(9)} | {"a": 20}),
        ({f"{number:04d}": 3 for number in range(100)}, {f"{number:04d}": 50 for number in range(1000)}),
        ({"new": 100, "a": 100}, {"a": 1000, "b": 1000, "new": 0}),
        ({str(number): 2 * 10**9 for number in range(4)}, {str(number): 3 for number in range(9)}),
    ],
)
def test_a_drift_warning(predicted, trained, caplog):
    assert _warns(predicted, trained, caplog)
    drift = class_drift(predicted, trained)
    assert drift["warning"]
    assert drift["p_value"] <= 1e-3
    assert drift["effect_size"] >= 0.5
    assert json.loads(json.dumps(drift)) == drift


def test_a_small_difference_gives_no_drift_warning_however_many_images_show_it(caplog):
    predicted, trained = {"a": 5_400_000, "b": 4_600_000}, {"a": 500_000, "b": 500_000}
    drift = class_drift(predicted, trained)
    assert drift == {"effect_size": pytest.approx(0.08, abs=1e-3), "p_value": None, "warning": False}
    assert not _warns(predicted, trained, caplog)


@pytest.mark.parametrize(
    ("predicted", "trained"),
    [({"a": 99}, {"a": 50, "b": 50}), ({"a": 500}, {}), ({"a": 500}, {"a": 9, "b": 0}), ({}, {"a": 9, "b": 9})],
)
def test_too_few_images_to_look_for_drift(predicted, trained):
    assert class_drift(predicted, trained) is None
