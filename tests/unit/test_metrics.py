"""Metrics of an evaluation, compared with scikit-learn, or with cases by hand where it has no such metric."""

import numpy as np
import pytest
import sklearn.metrics
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from cnnray.evaluation import metrics
from cnnray.evaluation.metrics import Predictions

NAMES = ["a", "b", "c", "d"]


def _predictions(count, seed=0, sharpness=2.0, names=NAMES):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, len(names), count)
    logits = generator.normal(size=(count, len(names)))
    logits[np.arange(count), targets] += 1.0
    powers = np.exp(sharpness * logits)
    return Predictions(names, targets, metrics.normalise((powers / powers.sum(1, keepdims=True)).astype(np.float32)))


@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_overall_metrics_equal_scikit_learn(count):
    predictions = _predictions(count)
    truth, best = predictions.targets, predictions.probabilities.argmax(1)
    results, present = metrics.overall_metrics(predictions), np.unique(truth)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, best),
        "log_loss": sklearn.metrics.log_loss(truth, predictions.probabilities, labels=range(4)),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(truth, best),
        "top_3_accuracy": sklearn.metrics.top_k_accuracy_score(
            truth, predictions.probabilities, k=3, labels=range(4)
        ),
        "macro_f1": sklearn.metrics.f1_score(truth, best, labels=present, average="macro"),
        "weighted_precision": sklearn.metrics.precision_score(
            truth, best, labels=present, average="weighted", zero_division=0
        ),
    }
    if count > 4:  # all classes are present
        expected["balanced_accuracy"] = sklearn.metrics.balanced_accuracy_score(truth, best)
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-12), name
    assert "top_5_accuracy" not in results
    for name, (low, high) in metrics.confidence_intervals(predictions).items():
        value = results[name] if name in results else metrics.expected_calibration_error(predictions)
        assert 0 <= low <= high
        if count > 7:
            assert low <= value <= high
    assert {"accuracy", "top_2_accuracy"} <= metrics.confidence_intervals(predictions).keys()


def test_wilsons_interval_by_hand():
    # Wilson, 1927: 8 of 10, with z = 1.96.
    z, n, p = 1.959963984540054, 10, 0.8
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert metrics.wilson_interval(8, 10) == pytest.approx((middle - half, middle + half), rel=1e-9)


def test_class_metrics_equal_scikit_learn_and_are_none_without_images():
    predictions = _predictions(500, names=[*NAMES, "none"])
    predictions = Predictions(predictions.class_names, predictions.targets % 4, predictions.probabilities)
    rows = metrics.class_metrics(predictions)
    for index, row in enumerate(rows[:4]):
        is_class = predictions.targets == index
        assert row["roc_auc"] == pytest.approx(
            sklearn.metrics.roc_auc_score(is_class, predictions.probabilities[:, index]), rel=1e-12
        )
        assert row["recall"] == pytest.approx(predictions.correct[is_class].mean(), rel=1e-12)
        assert row["support"] == is_class.sum()
    assert [rows[4][name] for name in ("support", "recall", "f1", "roc_auc", "average_precision")] == [0, *[None] * 4]
    assert rows[4]["predicted"] == (predictions.classes == 4).sum()
    expected = np.mean([row["roc_auc"] for row in rows[:4]])
    assert metrics.macro_mean(rows, "roc_auc") == pytest.approx(expected, rel=1e-12)
    matrix = metrics.confusion_matrix(predictions)
    assert matrix.shape == (5, 5)
    assert matrix.sum() == 500
    assert np.trace(matrix) == predictions.correct.sum()


def test_a_single_class_has_no_curves():
    predictions = Predictions(["a", "b"], np.zeros(3, np.int64), np.asarray([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]]))
    assert metrics.roc_curves(predictions) == {}
    assert metrics.class_metrics(predictions)[0]["roc_auc"] is None
    assert metrics.overall_metrics(predictions)["accuracy"] == pytest.approx(2 / 3)


def test_curves_equal_scikit_learn_for_a_rare_class():
    generator = np.random.default_rng(1)
    targets = (np.arange(20_000) < 40).astype(np.int64)
    scores = np.clip(generator.normal(0.3 + 0.3 * targets, 0.12), 0.001, 0.999)
    predictions = Predictions(["most", "rare"], targets, np.stack([1 - scores, scores], 1))
    curve = metrics.precision_recall_curves(predictions)[1]
    for recall, precision in zip(curve["x"], curve["y"], strict=True):
        # The highest threshold that reaches this recall.
        order = np.argsort(-scores, kind="stable")
        hits = np.cumsum(targets[order])
        first = int(np.searchsorted(hits, np.ceil(recall * 40 - 1e-9)))
        assert precision == pytest.approx(hits[first] / (first + 1) if recall else 1.0)
    x, y, _ = sklearn.metrics.roc_curve(targets, scores)
    curve = metrics.roc_curves(predictions)[1]
    assert curve["y"][-1] == 1
    for place, height in zip(curve["x"], curve["y"], strict=True):
        assert height == y[x <= place].max()
    assert metrics.mean_curve({0: curve, 1: curve})["y"] == curve["y"]


def test_the_log_loss_lies_inside_its_interval_where_a_probability_is_zero():
    """An int8 engine rounds a probability of 0.001 to 0."""
    probabilities = np.asarray([[1.0, 0.0]] * 950 + [[0.0, 1.0]] * 50)
    predictions = Predictions(["a", "b"], np.zeros(1000, np.int64), probabilities)
    low, high = metrics.confidence_intervals(predictions)["log_loss"]
    value = metrics.overall_metrics(predictions)["log_loss"]
    assert value == pytest.approx(sklearn.metrics.log_loss(predictions.targets, probabilities, labels=[0, 1]))
    assert low < value < high


@pytest.mark.parametrize("seed", range(8))
def test_the_calibration_error_of_a_calibrated_network_lies_inside_its_interval(seed):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(10, 0.3), 500)
    targets = (probabilities.cumsum(1) > generator.random((500, 1))).argmax(1)
    predictions = Predictions([str(index) for index in range(10)], targets, probabilities)
    low, high = metrics.confidence_intervals(predictions)["expected_calibration_error"]
    assert low < metrics.expected_calibration_error(predictions) < high


def test_on_a_tie_the_first_class_is_predicted():
    equal = Predictions(["a", "b", "c"], np.asarray([0, 1, 2]), np.full((3, 3), 1 / 3))
    assert metrics.overall_metrics(equal)["accuracy"] == pytest.approx(1 / 3)
    assert metrics.overall_metrics(equal)["top_2_accuracy"] == pytest.approx(2 / 3)


def test_expected_calibration_error_by_hand():
    # In 15 bins: one prediction of 0.9 (correct), two of 0.7 (one correct).
    predictions = Predictions(["a", "b"], np.asarray([0, 0, 1]), np.asarray([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3]]))
    assert metrics.expected_calibration_error(predictions) == pytest.approx((0.1 + 2 * 0.2) / 3)
    assert [row["images"] for row in metrics.reliability_bins(predictions)] == [2, 1]


def test_a_confidence_of_one_is_in_the_last_bin():
    predictions = Predictions(["a", "b"], np.asarray([0, 1]), np.asarray([[1.0, 0.0], [1.0, 0.0]]))
    (only,) = metrics.reliability_bins(predictions)
    assert (only["high"], only["images"], only["accuracy"]) == (1.0, 2, 0.5)


def test_temperature_lowers_the_calibration_error_on_held_out_digits_and_changes_no_prediction():
    digits = load_digits()
    train, rest, targets, rest_targets = train_test_split(digits.data, digits.target, test_size=0.6, random_state=0)
    network = LogisticRegression(max_iter=300).fit(train, targets)
    # Overconfident, as networks are: logits four times as large.
    logits = 4 * network.decision_function(rest)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    names = [str(name) for name in range(10)]
    probabilities = metrics.normalise((powers / powers.sum(1, keepdims=True)).astype(np.float32))
    validation = Predictions(names, rest_targets[::2], probabilities[::2])
    held_out = Predictions(names, rest_targets[1::2], probabilities[1::2])
    temperature = metrics.fit_temperature(validation)
    assert temperature > 2
    after = metrics.apply_temperature(held_out, temperature)
    assert metrics.expected_calibration_error(after) < 0.6 * metrics.expected_calibration_error(held_out)
    np.testing.assert_array_equal(after.classes, held_out.classes)
    np.testing.assert_array_equal(metrics.cross_fit_temperature(held_out).classes, held_out.classes)


def test_the_fitted_temperature_undoes_an_applied_one():
    calibrated = _predictions(20_000, sharpness=1.0)
    targets = np.asarray(
        [np.random.default_rng(i).choice(4, p=row) for i, row in enumerate(calibrated.probabilities)]
    )
    calibrated = Predictions(NAMES, targets, calibrated.probabilities)
    for temperature in (0.5, 1.0, 3.0):
        changed = metrics.apply_temperature(calibrated, temperature)
        assert metrics.fit_temperature(changed) == pytest.approx(1 / temperature, rel=0.05)


def test_coverage_and_the_threshold_for_an_accuracy():
    confidences = np.asarray([0.99, 0.9, 0.9, 0.8, 0.6])
    targets = np.asarray([0, 0, 1, 0, 1])  # correct, correct, wrong, correct, wrong
    predictions = Predictions(["a", "b"], targets, np.stack([confidences, 1 - confidences], 1))
    curve = metrics.coverage_curve(predictions)
    assert curve["threshold"] == [0.99, 0.9, 0.8, 0.6]  # equal confidences together
    assert curve["coverage"] == pytest.approx([0.2, 0.6, 0.8, 1.0])
    assert curve["accuracy"] == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5])
    threshold = metrics.find_threshold(predictions, 0.7)
    assert threshold == pytest.approx({"threshold": 0.8, "coverage": 0.8, "accuracy": 0.75})
    assert metrics.find_threshold(predictions, 1.0)["coverage"] == pytest.approx(0.2)
    wrong = Predictions(["a", "b"], np.asarray([1]), np.asarray([[0.9, 0.1]]))
    assert metrics.find_threshold(wrong, 0.5) is None
