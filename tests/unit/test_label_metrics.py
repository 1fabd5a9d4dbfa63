"""Metrics of several labels, compared with scikit-learn."""

from collections import Counter

import numpy as np
import pytest
import sklearn.metrics

from cnnray.evaluation import label_metrics
from cnnray.evaluation.label_metrics import LabelPredictions

NAMES = ["a", "b", "c", "d", "e"]
THRESHOLDS = [0.5, 0.4, 0.6, 0.3, 0.99]


def _predictions(count, seed=0):
    """No image has "d", and few are given "e"."""
    generator = np.random.default_rng(seed)
    truth = generator.random((count, 5)) < [0.5, 0.3, 0.1, 0.0, 0.2]
    logits = generator.normal(size=(count, 5)) + 2 * truth - 1
    return LabelPredictions(NAMES, truth, 1 / (1 + np.exp(-logits)), THRESHOLDS)


@pytest.mark.parametrize("count", [1, 2, 64, 1001])
def test_figures_equal_scikit_learn(count):
    predictions = _predictions(count)
    truth, given, present = predictions.truth, predictions.given, predictions.present
    results = label_metrics.overall_metrics(predictions)
    averages = [
        sklearn.metrics.average_precision_score(truth[:, i], predictions.probabilities[:, i]) for i in present
    ]
    assert results["mean_average_precision"] == pytest.approx(np.mean(averages) if averages else 0.0)
    for average, columns in (("macro", present), ("micro", np.arange(5))):
        for name in ("precision", "recall", "f1"):
            score = getattr(sklearn.metrics, f"{name}_score")
            wanted = (
                score(truth[:, columns], given[:, columns], average=average, zero_division=0) if len(columns) else 0
            )
            assert results[f"{average}_{name}"] == pytest.approx(wanted), (average, name)
    assert results["subset_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, given))
    assert results["hamming_loss"] == pytest.approx(sklearn.metrics.hamming_loss(truth, given))
    assert results["labels_per_image"] == pytest.approx(truth.sum(1).mean())
    losses = [
        sklearn.metrics.log_loss(truth[:, i], predictions.probabilities[:, i], labels=[False, True]) for i in range(5)
    ]
    assert results["log_loss"] == pytest.approx(np.mean(losses))


def test_figures_of_each_label():
    predictions = _predictions(500)
    rows = {row["name"]: row for row in label_metrics.class_metrics(predictions)}
    for index, name in enumerate(NAMES):
        truth, given = predictions.truth[:, index], predictions.given[:, index]
        assert (rows[name]["support"], rows[name]["predicted"]) == (truth.sum(), given.sum())
        assert rows[name]["threshold"] == THRESHOLDS[index]
        if name != "d":
            assert rows[name]["f1"] == pytest.approx(sklearn.metrics.f1_score(truth, given))
            scores = predictions.probabilities[:, index]
            assert rows[name]["roc_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores))
    assert [rows["d"][name] for name in ("recall", "f1", "roc_auc", "average_precision")] == [None] * 4
    assert rows["d"]["precision"] == 0


def test_a_network_of_one_label():
    predictions = _predictions(200)
    alone = LabelPredictions(["a"], predictions.truth[:, :1], predictions.probabilities[:, :1], [0.5])
    results = label_metrics.overall_metrics(alone)
    assert results["macro_f1"] == results["micro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(alone.truth[:, 0], alone.given[:, 0])
    )  # fmt: skip
    assert len(label_metrics.class_metrics(alone)) == 1


def test_intervals_hold_the_figures_of_other_samples():
    all_of_them, inside = label_metrics.overall_metrics(_predictions(50_000, seed=1)), Counter()
    for seed in range(2, 22):
        intervals = label_metrics.confidence_intervals(_predictions(400, seed))
        inside.update({name: low <= all_of_them[name] <= high for name, (low, high) in intervals.items()})
    assert inside.keys() == {"mean_average_precision", "macro_f1", "micro_f1", "log_loss", "subset_accuracy"}
    assert min(inside.values()) >= 16, inside  # of 20, at 95 % each


def test_an_image_counts_as_often_as_a_sample_has_it():
    predictions = _predictions(300)
    rows = np.random.default_rng(5).integers(0, 300, 300)
    sample = LabelPredictions(NAMES, predictions.truth[rows], predictions.probabilities[rows], THRESHOLDS)
    expected, drawn = label_metrics.overall_metrics(sample), label_metrics._Resampled(predictions)(rows)
    names = ("mean_average_precision", "macro_f1", "micro_f1", "log_loss")
    for name, value in zip(names, drawn, strict=True):
        # scikit-learn takes all copies of an image at once.
        assert value == pytest.approx(expected[name], abs=0.01 if name == "mean_average_precision" else 1e-6), name
