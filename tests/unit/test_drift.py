"""Answers against those of training: the population stability index, effect sizes, and when there is a warning."""

import collections
import json

import numpy as np
import pytest

from cnnray.models import drift
from cnnray.models.bundle import BundleInfo
from cnnray.models.drift import BINS, Distribution, SlidingWindow
from cnnray.prediction.summary import class_drift, log_summary, population_stability_index, summarize
from cnnray.prediction.tally import Tally


def test_population_stability_index():
    assert population_stability_index({"a": 10, "b": 30}, {"a": 100, "b": 300}) == pytest.approx(0, abs=1e-3)
    # By hand, without the added half images, which hardly change large counts: 2 * 0.2 * ln(0.6 / 0.4).
    index = population_stability_index({"a": 60_000, "b": 40_000}, {"a": 40_000, "b": 60_000})
    assert index == pytest.approx(2 * 0.2 * np.log(1.5), rel=1e-3)
    assert population_stability_index({"a": 50}, {"a": 25, "b": 25}) > 0.25
    assert population_stability_index({}, {"a": 1}) is None


def _tally(predicted):
    return Tally(0.5, rows=sum(predicted.values()), classes=collections.Counter(predicted))


def _info(trained, **changes):
    return BundleInfo(class_names=sorted(trained), image_size=32, class_counts=trained, **changes)


def _warns(predicted, trained, caplog):
    """Whether the log of a run with these numbers of predictions by class has a drift warning."""
    caplog.clear()
    log_summary(summarize(_tally(predicted), _info(trained)))
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
    found = class_drift(_tally(predicted), _info(trained))
    assert found["warning"]
    assert found["p_value"] <= 1e-3
    assert found["effect_size"] >= 0.5
    assert json.loads(json.dumps(found)) == found


def test_a_small_difference_gives_no_drift_warning_however_many_images_show_it(caplog):
    predicted, trained = {"a": 5_400_000, "b": 4_600_000}, {"a": 500_000, "b": 500_000}
    found = class_drift(_tally(predicted), _info(trained))
    assert found == {"effect_size": pytest.approx(0.08, abs=1e-3), "p_value": None, "warning": False}
    assert not _warns(predicted, trained, caplog)


@pytest.mark.parametrize(
    ("predicted", "trained"),
    [({"a": 99}, {"a": 50, "b": 50}), ({"a": 500}, {}), ({"a": 500}, {"a": 9, "b": 0}), ({}, {"a": 9, "b": 9})],
)
def test_too_few_images_to_look_for_drift(predicted, trained):
    assert class_drift(_tally(predicted), _info(trained)) is None


def test_the_answers_to_the_validation_images_come_before_the_labels_of_training():
    trained, predicted = {"a": 500, "b": 500}, {"a": 900, "b": 100}
    reference = Distribution(np.asarray([180, 20]), np.full(BINS, 10))
    assert class_drift(_tally(predicted), _info(trained))["warning"]
    assert class_drift(_tally(predicted), _info(trained, reference=reference.as_dict()))["effect_size"] == 0
    few = Distribution(np.asarray([9, 1]), np.full(BINS, 1))
    assert class_drift(_tally(predicted), _info(trained, reference=few.as_dict()))["warning"]


def test_a_distribution_counts_classes_and_confidences():
    logits = np.log(np.asarray([[0.98, 0.02], [0.5, 0.5], [0.26, 0.74]], np.float32))
    found = Distribution.of_logits(logits)
    assert found.classes.tolist() == [2, 1]
    assert dict(enumerate(found.confidences.tolist())) == dict.fromkeys(range(BINS), 0) | {19: 1, 10: 1, 14: 1}
    assert (found + found).images == 6
    assert Distribution.of(np.asarray([1]), np.asarray([1.0]), 2).confidences[-1] == 1
    loaded = Distribution.from_dict(json.loads(json.dumps(found.as_dict())), 2)
    assert loaded.as_dict() == found.as_dict()


@pytest.mark.parametrize(
    "values", [{}, {"classes": [1, 2]}, {"classes": [1], "confidences": [1] * BINS}, {"classes": "x"}]
)
def test_a_distribution_that_cannot_be_read_is_none(values):
    assert Distribution.from_dict(values, 2) is None


def test_logits_that_are_no_numbers_do_not_count():
    """A training whose loss is not finite ends with a sentence of its own."""
    logits = np.asarray([[np.nan, 0], [np.inf, 0], [-np.inf, 0], [0, 1]], np.float32)
    assert Distribution.of_logits(logits).classes.tolist() == [0, 1]
    assert Distribution.of_logits(logits[:1]).images == 0


def test_effect_sizes_do_not_depend_on_the_number_of_images_without_drift():
    generator = np.random.default_rng(0)
    for classes, n in ((10, 200), (1000, 1000)):
        shares = generator.dirichlet(np.ones(classes))
        squares = [
            drift.effect_size(generator.multinomial(n, shares), generator.multinomial(10 * n, shares)) ** 2
            for _ in range(200)
        ]
        assert np.mean(squares) < 0.06
    assert drift.effect_size(np.asarray([100, 0]), np.asarray([0, 100])) == pytest.approx(2, abs=0.01)
    assert drift.effect_size(np.asarray([50, 49]), np.asarray([50, 50])) is None


def test_a_gauge_of_many_classes_shows_no_drift_by_chance():
    generator = np.random.default_rng(0)
    for classes in (10, 300):
        shares = generator.dirichlet(np.ones(classes))
        largest = 0.0
        for _ in range(300):
            reference = Distribution(generator.multinomial(10 * classes, shares), np.full(BINS, 5))
            window = SlidingWindow(reference)
            answers = generator.choice(classes, max(100, classes), p=shares)
            for answer in answers:
                window.add(answer, generator.random())
            largest = max(largest, window.effect_sizes()["classes"])
        assert largest < 0.5
    few = SlidingWindow(reference)
    for answer in answers[1:]:
        few.add(answer, 0.5)
    assert few.effect_sizes() == {}


def test_a_window_slides():
    now = 1000.0
    reference = Distribution(np.asarray([50, 50]), np.full(BINS, 5))
    window = SlidingWindow(reference, seconds=60, parts=6, clock=lambda: now)
    for number in range(200):
        window.add(number % 2, (number % BINS) / BINS)
    assert window.effect_sizes() == {"classes": 0, "confidences": 0}
    now = 1030.0
    for _ in range(200):
        window.add(1, 0.99)
    both = window.effect_sizes()
    assert 0.1 < both["classes"] < both["confidences"]
    now = 1065.0  # the first ones have left
    last = window.effect_sizes()
    assert last["classes"] > both["classes"]
    now = 1100.0
    assert window.effect_sizes() == {}
