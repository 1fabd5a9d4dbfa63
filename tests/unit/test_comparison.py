"""Two evaluations of the same images: the interval of the loss of accuracy, what is not compared, the decision."""

import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from cnnray.evaluation import comparison, paired
from cnnray.evaluation.comparison import EvaluationError, OtherEvaluation, UndecidedError

CLASSES = ("a", "b")
LIMITS = {"max_drop": 0.01, "max_error_fraction": 0.01}


# -- intervals and tests --------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    this = np.asarray([True, *[False] * 9, True, False])
    other = np.asarray([False, *[True] * 9, True, False])
    result = paired.mcnemar(this, other)
    assert (result["only_this"], result["only_other"]) == (1, 9)
    assert result["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired.mcnemar(this, this)["p_value"] == 1.0


def _score(b, c, n, difference):
    """The score statistic of a paired difference, with the likelihood maximised numerically."""

    def loss(share):
        cells = (b, share + difference), (c, share), (n - b - c, 1 - 2 * share - difference)
        return -sum(scipy.special.xlogy(count, max(p, 1e-300)) for count, p in cells)

    bounds = (max(0, -difference), (1 - difference) / 2)
    share = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-14}).x
    return (b - c - n * difference) / np.sqrt(n * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(
    ("b", "c", "n"), [(1, 7, 21), (6, 16, 161), (40, 20, 160), (25, 28, 618), (0, 9, 1000), (1, 4000, 1_000_000)]
)
def test_the_score_test_just_accepts_the_bounds_of_the_interval(b, c, n):
    low, high = paired.difference_interval(b, c, n)
    z = scipy.stats.norm.ppf(0.975)
    assert -1 < low < (b - c) / n < high < 1
    assert (_score(b, c, n, low), _score(b, c, n, high)) == pytest.approx((z, -z), abs=1e-4)
    assert paired.difference_interval(c, b, n) == pytest.approx((-high, -low), abs=1e-12)


def test_intervals_at_the_ends():
    # Published for the first data set above (Fagerland et al., Statistics in Medicine 33, 2014): -0.517 to -0.026.
    assert paired.difference_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    assert paired.difference_interval(0, 0, 100) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)))
    assert paired.difference_interval(50, 0, 50) == pytest.approx(((50 - z2) / (50 + z2), 1))
    assert paired.difference_interval(0, 50, 50) == pytest.approx((-1, -(50 - z2) / (50 + z2)))
    for b, c, n in itertools.product((0, 1, 10**7), (0, 1, 10**7), (2 * 10**7, 10**9)):
        low, high = paired.difference_interval(b, c, n)
        assert low < (b - c) / n < high


@pytest.mark.parametrize("images", [comparison.MIN_IMAGES, 200])
@pytest.mark.parametrize(("max_drop", "gain"), [(0.01, 0.0), (0.02, 0.002), (0.05, 0.02), (0.3, 0.0)])
def test_a_network_whose_loss_is_the_accepted_one_seldom_passes_or_fails(images, max_drop, gain):
    """The exact probability, over all numbers of images that only one of the networks has right."""
    only_other, only_this = np.indices((images + 1, min(images, 30) + 1)).reshape(2, -1)
    cells = np.stack([only_other, only_this, images - only_other - only_this], 1)
    probabilities = scipy.stats.multinomial.pmf(cells, images, [max_drop + gain, gain, 1 - max_drop - 2 * gain])
    likely = probabilities > 1e-6
    assert probabilities[likely].sum() > 0.999
    bounds = [paired.difference_interval(b, c, images) for b, c, _ in cells[likely].tolist()]
    low, high = np.asarray(bounds).T
    assert probabilities[likely][high <= max_drop].sum() < 0.032
    assert probabilities[likely][low > max_drop].sum() < 0.055


# -- evaluations ----------------------------------------------------------------------------------------------


def _rows(correct, errors=(), labels=None):
    """Rows of an evaluation: `correct` says for each image whether it is, `errors` which have no prediction."""
    labels = labels or [CLASSES[number % 2] for number in range(len(correct))]
    wrong = {"a": "b", "b": "a"}
    return pa.table(
        {
            "uri": [f"/{number}.png" for number in range(len(correct))],
            "label": labels,
            "prediction": pa.array(
                [
                    None if number in errors else label if good else wrong[label]
                    for number, (good, label) in enumerate(zip(correct, labels, strict=True))
                ],
                pa.string(),
            ),
            "error": pa.array(
                ["throttled: slow down" if number in errors else None for number in range(len(correct))], pa.string()
            ),
        }
    )  # fmt: skip


def _other(rows, classes=CLASSES):
    results = {"model": "m", "classes": [{"name": name} for name in classes], "accuracy": 0.5, "log_loss": 1.0}
    return OtherEvaluation("/other/metrics.json", results, rows)


def _compare(this, other, **limits):
    return comparison.compare(this, {"accuracy": 0.25, "top_2_accuracy": 1.0}, _other(other), **LIMITS | limits)


def test_a_comparison_of_equal_networks():
    rows = _rows([number % 10 > 0 for number in range(1000)])
    result = _compare(rows.take(pa.array(np.arange(1000)[::-1])), rows)
    assert (result["images"], result["accuracy"], result["other_accuracy"], result["drop"]) == (1000, 0.9, 0.9, 0)
    assert (result["only_this_has"], result["only_other_has"]) == (0, 0)
    assert result["drop_interval"] == pytest.approx([-0.0038, 0.0038], abs=1e-4)
    assert result["figures"] == {"accuracy": [0.25, 0.5]}
    assert result["decision"] == "passed"
    comparison.check(result)
    json.dumps(result)


@pytest.mark.parametrize(
    ("images", "only_this", "only_other", "max_drop", "decision", "sentence"),
    [
        (1000, 0, 0, 0.01, "passed", "a loss of 0.0000 (95 % confidence interval -0.0038 to 0.0038), not more than"),
        (1000, 0, 0, 0.0, "undecided", "the loss is too near to it: give another --max-drop"),
        (1000, 30, 2, 0.0, "passed", "a loss of -0.0280"),
        (1000, 2, 50, 0.01, "failed", "a loss of 0.0480 (95 % confidence interval 0.0356 to 0.0635), more than"),
        (1000, 10, 15, 0.01, "undecided", "evaluate both on about 5 times as many images"),
        (300, 0, 0, 0.01, "undecided", "evaluate both on about 2 times as many images"),
        (29, 0, 0, 1.0, "undecided", "at least 30 images are needed to compare with /other/metrics.json, not 29"),
        (1, 0, 0, 1.0, "undecided", "at least 30 images are needed to compare with /other/metrics.json, not 1"),
        (30, 0, 0, 1.0, "passed", "not more than --max-drop 1"),
    ],
)  # fmt: skip
def test_the_interval_decides(images, only_this, only_other, max_drop, decision, sentence):
    this, other = np.zeros((2, images), bool)
    this[:only_this], other[only_this : only_this + only_other] = True, True
    result = _compare(_rows(this), _rows(other), max_drop=max_drop)
    assert result["decision"] == decision
    assert sentence in result["sentence"]
    if decision == "passed":
        comparison.check(result)
    else:
        with pytest.raises(EvaluationError, match=re.escape(sentence)) as raised:
            comparison.check(result)
        assert isinstance(raised.value, UndecidedError) == (decision == "undecided")
        assert raised.value.exit_code == (3 if decision == "undecided" else 1)


def test_an_image_without_a_prediction_here_counts_as_wrong():
    """A network that gives none for what it would have wrong, or right, does not become better by it."""
    good = [True] * 1000
    result = _compare(_rows(good, errors=range(9)), _rows(good))
    assert (result["images"], result["accuracy"], result["drop"]) == (1000, 0.991, pytest.approx(0.009))
    assert (result["only_this_has"], result["only_other_has"]) == (0, 9)
    assert result["decision"] == "undecided"
    # What the other has no prediction for is left out.
    result = _compare(_rows(good), _rows(good, errors=range(9)))
    assert (result["images"], result["accuracy"], result["drop"]) == (991, 1, 0)
    assert (result["only_this_has"], result["only_other_has"], result["decision"]) == (9, 0, "passed")


@pytest.mark.parametrize("errors", [11, 999, 1000])
def test_too_many_errors_are_refused_on_either_side(errors):
    good, throttled = _rows([True] * 1000), _rows([True] * 1000, errors=range(errors))
    result = _compare(throttled, good, max_drop=1.0)
    sentence = f"{errors} of 1000 images have no prediction, more than --max-error-fraction 0.01, for example /0.png"
    assert result["decision"] == "refused"
    with pytest.raises(EvaluationError, match=sentence) as raised:
        comparison.check(result)
    assert raised.value.exit_code == 1
    with pytest.raises(EvaluationError, match=f"metrics.json cannot be compared with: there {sentence}"):
        comparison.check_comparable(_other(throttled), good, CLASSES, 0.01)
    comparison.check_comparable(_other(throttled), good, CLASSES, 1.0)


def test_other_images_labels_and_classes_are_refused():
    rows = _rows([True] * 40)

    def refused(rows_here, sentence, other=None, classes=CLASSES):
        with pytest.raises(EvaluationError, match=sentence):
            comparison.check_comparable(other or _other(rows), rows_here, classes, 0.01)

    comparison.check_comparable(_other(rows), rows.take(pa.array(np.arange(40)[::-1])), CLASSES[::-1], 0.01)
    refused(rows.slice(0, 39), "of other images: 0 of 39 are only in this evaluation, 1 of 40 only in that one, for "
            "example /39.png")  # fmt: skip
    refused(rows, "of other images: 39 of 40 are only in this evaluation, 0 of 1 only", _other(rows.slice(3, 1)))
    refused(rows, "of other images: 0 of 40 .* 0 of 41 only", _other(pa.concat_tables([rows, rows.slice(0, 1)])))
    refused(rows, "of other images: 40 of 40 .* 0 of 0 only", _other(rows.slice(0, 0)))
    # Tables of other programs have other types of strings.
    large = rows.cast(pa.schema({name: pa.large_string() for name in rows.column_names}))
    comparison.check_comparable(
        _other(rows), large.set_column(1, "label", large["label"].dictionary_encode()), CLASSES, 0
    )
    labels = ["b", *rows["label"].to_pylist()[1:]]
    changed = rows.set_column(1, "label", [labels])
    refused(changed, "other labels for 1 of 40 images, for example /0.png: 'b' here, 'a' there")
    refused(rows, "a network with other classes: only this one has 'c'", classes=("a", "b", "c"))
    refused(rows, "a network with other classes: only that one has 'c'", _other(rows, ("a", "b", "c")))


def test_an_evaluation_is_read_or_refused(tmp_path):
    uri = str(tmp_path / "metrics.json")
    results = _other(_rows([True])).results
    pyarrow.parquet.write_table(_rows([True, False]), tmp_path / "predictions.parquet")
    (tmp_path / "metrics.json").write_text(json.dumps(results))
    other = comparison.read_evaluation(uri)
    assert (other.results, len(other.rows)) == (results, 2)
    for text in ("", "[]", "{}", json.dumps({"model": "m"}), json.dumps({"model": "m", "classes": [1]})):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(EvaluationError, match="of an evaluation"):
            comparison.read_evaluation(uri)
    (tmp_path / "metrics.json").write_text(json.dumps(results))
    pyarrow.parquet.write_table(_rows([True]).drop_columns(["error"]), tmp_path / "predictions.parquet")
    with pytest.raises(EvaluationError, match="of an evaluation"):
        comparison.read_evaluation(uri)
    (tmp_path / "predictions.parquet").unlink()
    with pytest.raises(EvaluationError, match="of an evaluation"):
        comparison.read_evaluation(uri)
