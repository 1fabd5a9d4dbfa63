"""Figures of an evaluation against scikit-learn, and what scikit-learn does not have against hand-made cases."""

import numpy as np
import pytest
import sklearn.metrics
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from cnnray.evaluation import metrics
from cnnray.evaluation.metrics import Answers

NAMES = ["a", "b", "c", "d"]


def _answers(count, seed=0, sharpness=2.0, names=NAMES):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, len(names), count)
    logits = generator.normal(size=(count, len(names)))
    logits[np.arange(count), targets] += 1.0
    powers = np.exp(sharpness * logits)
    return Answers(names, targets, metrics.normalised((powers / powers.sum(1, keepdims=True)).astype(np.float32)))


@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_headline_equals_scikit_learn(count):
    answers = _answers(count)
    truth, best = answers.targets, answers.probabilities.argmax(1)
    found, there = metrics.headline(answers), np.unique(truth)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, best),
        "log_loss": sklearn.metrics.log_loss(truth, answers.probabilities, labels=range(4)),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(truth, best),
        "top_3_accuracy": sklearn.metrics.top_k_accuracy_score(truth, answers.probabilities, k=3, labels=range(4)),
        "macro_f1": sklearn.metrics.f1_score(truth, best, labels=there, average="macro"),
        "weighted_precision": sklearn.metrics.precision_score(
            truth, best, labels=there, average="weighted", zero_division=0
        ),
    }
    if count > 4:  # where all classes are there
        expected["balanced_accuracy"] = sklearn.metrics.balanced_accuracy_score(truth, best)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert "top_5_accuracy" not in found
    for name, (low, high) in metrics.intervals(answers).items():
        figure = found[name] if name in found else metrics.expected_calibration_error(answers)
        assert 0 <= low <= high
        if count > 7:
            # The calibration error of a sample is larger than that of all, so that its interval lies above.
            assert low <= figure + 0.01
            assert figure <= high
    assert {"accuracy", "top_2_accuracy"} <= metrics.intervals(answers).keys()


def test_wilsons_interval_by_hand():
    # Wilson, 1927: of 8 of 10, with z = 1.96.
    z, n, p = 1.959963984540054, 10, 0.8
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert metrics.interval(8, 10) == pytest.approx((middle - half, middle + half), rel=1e-9)


def test_classes_equal_scikit_learn_and_those_without_images_have_no_figures():
    answers = _answers(500, names=[*NAMES, "none"])
    answers = Answers(answers.class_names, answers.targets % 4, answers.probabilities)
    rows = metrics.by_class(answers)
    for index, row in enumerate(rows[:4]):
        mine = answers.targets == index
        assert row["roc_auc"] == pytest.approx(
            sklearn.metrics.roc_auc_score(mine, answers.probabilities[:, index]), rel=1e-12
        )
        assert row["recall"] == pytest.approx(answers.correct[mine].mean(), rel=1e-12)
        assert row["support"] == mine.sum()
    assert [rows[4][name] for name in ("support", "recall", "f1", "roc_auc", "average_precision")] == [0, *[None] * 4]
    assert rows[4]["predicted"] == (answers.predictions == 4).sum()
    wanted = np.mean([row["roc_auc"] for row in rows[:4]])
    assert metrics.macro_mean(rows, "roc_auc") == pytest.approx(wanted, rel=1e-12)
    matrix = metrics.confusion(answers)
    assert matrix.shape == (5, 5)
    assert matrix.sum() == 500
    assert np.trace(matrix) == answers.correct.sum()


def test_one_class_alone_has_no_curves():
    answers = Answers(["a", "b"], np.zeros(3, np.int64), np.asarray([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]]))
    assert metrics.roc_curves(answers) == {}
    assert metrics.by_class(answers)[0]["roc_auc"] is None
    assert metrics.headline(answers)["accuracy"] == pytest.approx(2 / 3)


def test_curves_are_those_of_scikit_learn_also_of_a_rare_class():
    generator = np.random.default_rng(1)
    targets = (np.arange(20_000) < 40).astype(np.int64)
    scores = np.clip(generator.normal(0.3 + 0.3 * targets, 0.12), 0.001, 0.999)
    answers = Answers(["most", "rare"], targets, np.stack([1 - scores, scores], 1))
    found = metrics.precision_recall_curves(answers)[1]
    for recall, precision in zip(found["x"], found["y"], strict=True):
        # The highest threshold that reaches this recall.
        order = np.argsort(-scores, kind="stable")
        hits = np.cumsum(targets[order])
        first = int(np.searchsorted(hits, np.ceil(recall * 40 - 1e-9)))
        assert precision == pytest.approx(hits[first] / (first + 1) if recall else 1.0)
    x, y, _ = sklearn.metrics.roc_curve(targets, scores)
    found = metrics.roc_curves(answers)[1]
    assert found["y"][-1] == 1
    for place, height in zip(found["x"], found["y"], strict=True):
        assert height == y[x <= place].max()
    assert metrics.macro_curve({0: found, 1: found})["y"] == found["y"]


def test_answers_that_int8_rounds_away_are_no_numbers_lost():
    rows = metrics.normalised(np.asarray([[0, 0, 0], [0.5, 0.25, 0.25]], np.float32))
    np.testing.assert_allclose(rows, [[1 / 3] * 3, [0.5, 0.25, 0.25]])
    # Of equal ones that which comes first, as in the answers themselves.
    equal = Answers(["a", "b", "c"], np.asarray([0, 1, 2]), np.full((3, 3), 1 / 3))
    assert metrics.headline(equal)["accuracy"] == pytest.approx(1 / 3)
    assert metrics.headline(equal)["top_2_accuracy"] == pytest.approx(2 / 3)


def test_expected_calibration_error_by_hand():
    # Of 15 bins: one answer of 0.9 (right), two of 0.7 (one right).
    answers = Answers(["a", "b"], np.asarray([0, 0, 1]), np.asarray([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3]]))
    assert metrics.expected_calibration_error(answers) == pytest.approx((0.1 + 2 * 0.2) / 3)
    assert [one["images"] for one in metrics.reliability(answers)] == [2, 1]


def test_a_confidence_of_one_is_in_the_last_bin():
    answers = Answers(["a", "b"], np.asarray([0, 1]), np.asarray([[1.0, 0.0], [1.0, 0.0]]))
    (only,) = metrics.reliability(answers)
    assert (only["high"], only["images"], only["accuracy"]) == (1.0, 2, 0.5)


def test_temperature_lowers_the_calibration_error_on_held_out_digits_and_changes_no_answer():
    digits = load_digits()
    train, rest, targets, rest_targets = train_test_split(digits.data, digits.target, test_size=0.6, random_state=0)
    network = LogisticRegression(max_iter=300).fit(train, targets)
    # Too sure of itself, as networks are: logits four times as large.
    logits = 4 * network.decision_function(rest)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    names = [str(name) for name in range(10)]
    probabilities = metrics.normalised((powers / powers.sum(1, keepdims=True)).astype(np.float32))
    validation = Answers(names, rest_targets[::2], probabilities[::2])
    held_out = Answers(names, rest_targets[1::2], probabilities[1::2])
    temperature = metrics.fitted_temperature(validation)
    assert temperature > 2
    after = metrics.tempered(held_out, temperature)
    assert metrics.expected_calibration_error(after) < 0.6 * metrics.expected_calibration_error(held_out)
    np.testing.assert_array_equal(after.predictions, held_out.predictions)
    np.testing.assert_array_equal(metrics.cross_tempered(held_out).predictions, held_out.predictions)


def test_the_fitted_temperature_is_that_which_the_answers_were_made_with():
    honest = _answers(20_000, sharpness=1.0)
    drawn = np.asarray([np.random.default_rng(i).choice(4, p=row) for i, row in enumerate(honest.probabilities)])
    honest = Answers(NAMES, drawn, honest.probabilities)
    for temperature in (0.5, 1.0, 3.0):
        warm = metrics.tempered(honest, temperature)
        assert metrics.fitted_temperature(warm) == pytest.approx(1 / temperature, rel=0.05)


def test_coverage_and_the_threshold_for_an_accuracy():
    confidences = np.asarray([0.99, 0.9, 0.9, 0.8, 0.6])
    targets = np.asarray([0, 0, 1, 0, 1])  # right, right, wrong, right, wrong
    answers = Answers(["a", "b"], targets, np.stack([confidences, 1 - confidences], 1))
    curve = metrics.coverage_curve(answers)
    assert curve["threshold"] == [0.99, 0.9, 0.8, 0.6]  # equal ones together
    assert curve["coverage"] == pytest.approx([0.2, 0.6, 0.8, 1.0])
    assert curve["accuracy"] == pytest.approx([1, 2 / 3, 3 / 4, 3 / 5])
    chosen = metrics.threshold_for(answers, 0.7)
    assert chosen == pytest.approx({"threshold": 0.8, "coverage": 0.8, "accuracy": 0.75})
    assert metrics.threshold_for(answers, 1.0)["coverage"] == pytest.approx(0.2)
    wrong = Answers(["a", "b"], np.asarray([1]), np.asarray([[0.9, 0.1]]))
    assert metrics.threshold_for(wrong, 0.5) is None


def test_mcnemar_by_hand():
    this = np.asarray([True, *[False] * 9, True, False])
    other = np.asarray([False, *[True] * 9, True, False])
    found = metrics.mcnemar(this, other)
    assert (found["only_this"], found["only_other"]) == (1, 9)
    assert found["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert metrics.mcnemar(this, this)["p_value"] == 1.0
