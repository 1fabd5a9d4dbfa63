"""The guarantee of a confidence threshold holds as often as it says."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from cnnray.evaluation import metrics
from cnnray.evaluation.metrics import Predictions
from cnnray.evaluation.selective import (
    Guarantee,
    candidate_threshold,
    find_guarantee,
    find_threshold,
    images_needed,
    measure_answers,
    split,
)
from cnnray.models.answers import Rules, Threshold

_DRAWS, _POPULATION = 200, 200_000


def _calibrated(confidences):
    return confidences


def _too_sure(confidences):
    return np.minimum(confidences, 0.6 + 0.4 * confidences**4)


def _dip(confidences):
    """The surest answers are not those that are most often right."""
    return np.where(confidences > 0.9999, 0.985, np.where(confidences > 0.95, 0.999, confidences))


def _population(accuracy_at):
    """Confidences, whether the answers are right, and the precision from each confidence on, surest first."""
    random = np.random.default_rng(3)
    confidences = -np.sort(-1 / (1 + np.exp(-np.abs(random.normal(6, 3, _POPULATION)))))
    accuracies = accuracy_at(confidences)
    precisions = np.cumsum(accuracies) / np.arange(1, _POPULATION + 1)
    return confidences, random.random(_POPULATION) < accuracies, precisions


@pytest.mark.parametrize("accuracy_at", [_calibrated, _too_sure, _dip])
@pytest.mark.parametrize("images", [1000, 8000])
def test_the_guarantee_is_broken_no_more_often_than_it_says(images, accuracy_at):
    confidences, correct, precisions = _population(accuracy_at)

    def is_broken(threshold):
        return precisions[np.searchsorted(-confidences, -threshold, side="right") - 1] < 0.99

    broken = naive_broken = found = 0
    for draw in range(_DRAWS):
        rows = np.random.default_rng(draw).integers(0, _POPULATION, images)
        guarantee = find_guarantee(confidences[rows], correct[rows], precision=0.99, learnt=split(images, draw))
        found += guarantee is not None
        broken += guarantee is not None and is_broken(guarantee.threshold)
        right = np.stack([1 - confidences[rows], confidences[rows]], 1)
        naive = metrics.find_threshold(Predictions(["no", "yes"], correct[rows].astype(np.int64), right), 0.99)
        naive_broken += naive is not None and is_broken(naive["threshold"])
    most = scipy.stats.binom.ppf(0.999, _DRAWS, 0.05)
    assert broken <= most
    assert naive_broken > 2 * most  # the lowest threshold that was good enough for these images
    if images == 8000 and accuracy_at is not _too_sure:
        assert found > 0.9 * _DRAWS


def test_the_figures_are_those_of_the_tested_images():
    random = np.random.default_rng(0)
    confidences = random.uniform(0.5, 1, 4000)
    correct = confidences > 0.6
    guarantee = find_guarantee(confidences, correct, precision=0.9)
    assert isinstance(guarantee, Guarantee)
    assert guarantee.images == 3000
    assert 0.55 < guarantee.threshold < 0.6
    tested = np.random.default_rng(0).permutation(4000)[:3000]
    kept = confidences[tested] >= guarantee.threshold
    assert guarantee.coverage == kept.mean()
    assert guarantee.observed_precision == pytest.approx(correct[tested][kept].mean())
    assert (guarantee.precision, guarantee.certainty) == (0.9, 0.95)
    # All answers of one confidence count, or none.
    whole = find_guarantee(np.full(1000, 0.7), np.ones(1000, bool), precision=0.99)
    assert whole is not None
    assert (whole.threshold, whole.coverage, whole.observed_precision) == (0.7, 1, 1)


@pytest.mark.parametrize(("precision", "certainty"), [(0.99, 0.95), (0.9, 0.9), (0.999, 0.99)])
def test_the_number_of_images_needed(precision, certainty):
    count = images_needed(precision, certainty)

    def found(images):
        return find_guarantee(np.ones(images), np.ones(images, bool), precision=precision, certainty=certainty)

    assert found(count) is not None
    assert found(count - 1) is None


@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_hardly_any_images_give_no_guarantee(images):
    assert find_guarantee(np.ones(images), np.ones(images, bool), precision=0.5, certainty=0.95) is None


@pytest.mark.parametrize(("precision", "expected"), [(0.0, True), (1.0, False)])
def test_the_ends_of_the_precision(precision, expected):
    correct = np.arange(1000) % 10 > 0
    guarantee = find_guarantee(np.linspace(0, 1, 1000), correct, precision=precision)
    assert (guarantee is not None) == expected


def _digits_like(images, seed):
    """Probabilities of ten classes, and true classes: a network that is right as often as it says, but for noise."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(images, 10)) * random.gamma(2, 2, (images, 1))
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    targets = (probabilities.cumsum(1) > random.random((images, 1))).argmax(1)
    return probabilities.astype(np.float32), targets


def test_the_promise_of_answers_and_candidates_is_kept():
    """200 random splits of one population into calibration and test: precision at 95 %, candidates on average."""
    probabilities, targets = _digits_like(30_000, 5)
    broken, coverages, candidate_coverages, found = 0, [], [], 0
    for seed in range(_DRAWS):
        order = np.random.default_rng(seed).permutation(len(targets))
        calibration, test = order[:3000], order[3000:]
        threshold = find_threshold(probabilities[calibration], targets[calibration], precision=0.95, certainty=0.95)
        if threshold is None:
            continue
        found += 1
        seen = measure_answers(Rules(threshold=threshold), probabilities[test], targets[test])
        broken += seen["precision"] < 0.95
        coverages.append(seen["coverage"])
        candidate_coverages.append(seen["candidate_coverage"])
    assert found > 0.95 * _DRAWS
    assert broken <= scipy.stats.binom.ppf(0.999, _DRAWS, 0.05)
    assert np.mean(coverages) > 0.1
    assert 0.945 < np.mean(candidate_coverages) < 0.96


def test_candidates_of_few_images_are_all_classes():
    assert candidate_threshold(np.full(18, 0.5, np.float32), 0.95) == 0
    assert candidate_threshold(np.full(19, 0.5, np.float32), 0.95) == 0.5
    assert candidate_threshold(np.zeros(0, np.float32), 0.95) == 0


def test_what_answers_are_on_labelled_images():
    probabilities = np.asarray([[0.9, 0.1, 0], [0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.4, 0.35, 0.25]], np.float32)
    threshold = Threshold(
        confidence=float(np.float32(0.8)), candidate=0.28, images=4, coverage=0.5, observed_precision=1.0
    )
    assert measure_answers(Rules(threshold=threshold), probabilities, np.asarray([0, 1, 1, 2])) == {
        "threshold": threshold.confidence, "unsure": 2, "coverage": 0.5, "precision": 0.5, "candidate_coverage": 0.5,
        "mean_candidates": 2.0,
    }  # fmt: skip
    always = Rules(threshold=dataclasses.replace(threshold, confidence=0.0))
    sure = measure_answers(always, probabilities, np.asarray([0, 0, 0, 0]))
    assert (sure["unsure"], sure["precision"], sure["candidate_coverage"], sure["mean_candidates"]) == (
        0,
        1,
        None,
        None,
    )
