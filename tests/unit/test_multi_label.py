"""Training for several labels, by its parts: losses, metrics of validation, thresholds, and the bundle."""

import dataclasses
import itertools
import json

import keras
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import tensorflow as tf

from cnnray.images.decode import BadImage
from cnnray.models import answers, architectures, bundle, runtimes
from cnnray.models.bundle import BundleError, BundleInfo
from cnnray.models.mlflow_flavor import BundleModel
from cnnray.models.predictor import Predictor
from cnnray.training import recipe
from cnnray.training.losses import MultiLabelLosses
from cnnray.training.recipe import RecipeError
from cnnray.training.selection import LabelCounts
from tests.awkward import awkward_images
from tests.configs import decided

GENERATOR = np.random.default_rng(0)
LABELS = (GENERATOR.random((200, 4)) < [0.5, 0.3, 0.1, 0.02]).astype(np.float32)
LOGITS = (GENERATOR.normal(size=(200, 4)) * 2 + 2 * LABELS - 1).astype(np.float32)


def _config(**flags):
    return decided(multi_label=True, **flags)


def _losses(weights=None, teacher=None, **flags):
    return MultiLabelLosses(_config(**flags), 4, teacher, weights)(tf.zeros((200, 1)), LABELS, LOGITS).numpy()


# -- losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_that_of_keras(smoothing):
    wanted = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=smoothing, reduction=None)
    np.testing.assert_allclose(_losses(label_smoothing=smoothing), wanted(LABELS, LOGITS), rtol=1e-5)


@pytest.mark.parametrize("gamma", [None, 0.5, 2.0])
def test_focal_loss_is_that_of_keras(gamma):
    wanted = keras.losses.BinaryFocalCrossentropy(from_logits=True, gamma=gamma or 2.0, reduction=None)
    np.testing.assert_allclose(_losses(loss="focal", loss_gamma=gamma), wanted(LABELS, LOGITS), rtol=1e-4)


def test_asymmetric_loss_is_that_of_the_article():
    probabilities = scipy.special.expit(LOGITS.astype(np.float64))
    shifted = np.maximum(probabilities - 0.05, 0)
    each = np.where(LABELS > 0, -np.log(probabilities), -(shifted**4) * np.log(1 - shifted))
    np.testing.assert_allclose(_losses(loss="asymmetric"), each.mean(1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "gamma"), [("cross_entropy", None), *itertools.product(("focal", "asymmetric"), (0.0, 0.3, 2.0))]
)
def test_gradients_are_finite_for_any_logits(loss, gamma):
    logits = tf.constant([[-200.0, -3.0, 0.0, 200.0], [200.0, 3.0, 0.0, -200.0]])
    losses = MultiLabelLosses(_config(loss=loss, loss_gamma=gamma), 4, None, None)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        values = losses(None, tf.constant([[1.0, 0.0, 0.5, 0.0]] * 2), logits)
    assert np.isfinite(values).all()
    assert np.isfinite(tape.gradient(values, logits)).all()


def test_balanced_weights_count_what_an_image_has():
    weights = recipe.class_weights(_config(class_weights="balanced"), [100, 20, 1, 199], 200)
    np.testing.assert_allclose(weights, [1, 9, 100, 0.01], rtol=1e-6)
    everywhere = _config(class_weights="balanced")
    assert np.isfinite(recipe.guessing_loss(everywhere, [200, 20, 1, 199], 200))
    each = tf.nn.sigmoid_cross_entropy_with_logits(LABELS, LOGITS).numpy()
    wanted = (np.where(LABELS > 0, weights, 1) * each).mean(1)
    np.testing.assert_allclose(_losses(weights), wanted, rtol=1e-5)


def test_a_teacher_that_agrees_costs_nothing():
    def agrees(images, training):
        return LOGITS

    def differs(images, training):
        return -LOGITS

    assert np.abs(_losses(teacher=agrees, distillation=1.0)).max() < 1e-6
    same = _losses(teacher=differs, distillation=1.0, distillation_temperature=1.0)
    p, q = scipy.special.expit(-LOGITS.astype(np.float64)), scipy.special.expit(LOGITS.astype(np.float64))
    divergence = scipy.special.rel_entr(p, q) + scipy.special.rel_entr(1 - p, 1 - q)
    np.testing.assert_allclose(same, divergence.mean(1), rtol=1e-3, atol=1e-6)


def test_sums_count_images_of_which_each_label_is_right():
    losses = MultiLabelLosses(_config(), 4, None, None)
    weights = np.concatenate([np.ones(150), np.zeros(50)]).astype(np.float32)
    count, loss, right, other = losses.validation_sums(LOGITS, LABELS, weights).numpy()
    assert (count, other) == (150, 0)
    assert right == ((LOGITS[:150] > 0) == (LABELS[:150] > 0)).all(1).sum()
    probabilities = scipy.special.expit(LOGITS[:150]).ravel()
    wanted = sklearn.metrics.log_loss(LABELS[:150].ravel(), probabilities)
    assert loss / 150 == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("balanced", "smoothing"), [("none", 0.0), ("none", 0.1), ("balanced", 0.1)])
def test_no_constant_answer_is_better_than_guessing(balanced, smoothing):
    config, counts = _config(class_weights=balanced, label_smoothing=smoothing), LABELS.sum(0).astype(int).tolist()
    weights = recipe.class_weights(config, counts, 200)
    losses, constants = MultiLabelLosses(config, 4, None, weights), np.linspace(-6, 6, 241)
    of_constants = []
    for constant in constants:
        logits = np.full((200, 4), constant, np.float32)
        importance = 1 + (weights - 1) * LABELS
        smoothed = LABELS * (1 - smoothing) + smoothing / 2
        of_constants.append((importance * losses._of_each(smoothed, logits).numpy()).mean(0))
    lowest = np.min(of_constants, axis=0).mean()
    assert recipe.guessing_loss(config, counts, 200) == pytest.approx(lowest, rel=1e-3)


# -- metrics and thresholds -----------------------------------------------------------------------------------


def _counted(precision=None, select="mean_average_precision", labels=LABELS):
    """Counts of two workers, added up."""
    parts = [LabelCounts(select, 4, precision) for _ in range(2)]
    parts[0].add(LOGITS[:70], labels[:70])
    parts[1].add(LOGITS[70:], labels[70:])
    return parts[0], parts[0].counts + parts[1].counts


def test_metrics_are_those_of_scikit_learn():
    counts, total = _counted(select="auroc")
    metrics, given = counts.metrics(total), scipy.special.expit(LOGITS) >= counts.thresholds(total)
    average_precision = sklearn.metrics.average_precision_score(LABELS, LOGITS, average="macro")
    assert metrics["val_mean_average_precision"] == pytest.approx(average_precision, abs=1e-4)
    assert metrics["val_macro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(LABELS, given, average="macro"), abs=1e-9
    )
    assert metrics["val_micro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(LABELS, given, average="micro"), abs=1e-9
    )
    assert metrics["val_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(LABELS, LOGITS), abs=1e-4)


def test_thresholds_have_the_highest_f1():
    counts, total = _counted()
    for index, threshold in enumerate(counts.thresholds(total)):
        precision, recall, _ = sklearn.metrics.precision_recall_curve(LABELS[:, index], LOGITS[:, index])
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()
        given = scipy.special.expit(LOGITS[:, index]) >= threshold
        assert sklearn.metrics.f1_score(LABELS[:, index], given) == pytest.approx(best, abs=0.01)


def test_thresholds_keep_a_precision_and_give_as_many_labels_as_they_can():
    counts, total = _counted(0.8)
    for index, threshold in enumerate(counts.thresholds(total)):
        given = scipy.special.expit(LOGITS[:, index]) >= threshold
        precision, recall, _ = sklearn.metrics.precision_recall_curve(LABELS[:, index], LOGITS[:, index])
        reached = min(0.8, precision[:-1].max())
        assert sklearn.metrics.precision_score(LABELS[:, index], given) >= reached - 0.01
        possible = recall[:-1][precision[:-1] >= reached].max()
        assert sklearn.metrics.recall_score(LABELS[:, index], given) >= possible - 0.02


def test_images_whose_logits_are_not_finite_are_counted_nowhere():
    counts = LabelCounts("mean_average_precision", 2)
    counts.add(np.asarray([[1, np.nan], [np.inf, 0], [1, 2]], np.float32), np.ones((3, 2), np.float32))
    assert counts.counts.sum() == 2


def test_labels_that_no_validation_image_has():
    labels = LABELS.copy()
    labels[:, 2] = 0
    counts, total = _counted(labels=labels)
    assert counts.thresholds(total)[2] == 0.5
    metrics = counts.metrics(total)
    others = [0, 1, 3]
    wanted = sklearn.metrics.average_precision_score(LABELS[:, others], LOGITS[:, others], average="macro")
    assert metrics["val_mean_average_precision"] == pytest.approx(wanted, abs=1e-4)
    nothing = LabelCounts("val_loss", 4)
    assert {*nothing.metrics(nothing.counts).values()} == {0.0}
    assert nothing.thresholds(nothing.counts) == [0.5] * 4


# -- flags ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"multi_label": False, "loss": "focal"}, "--loss focal is for images with several labels"),
        ({"multi_label": False, "label_precision": 0.9}, "--label-precision 0.9 is for images with several labels"),
        ({"multi_label": False, "select": "mean_average_precision"}, "not for images with one label each"),
        ({"multi_label": True, "select": "val_accuracy"}, "with several labels; expected one of mean_"),
        ({"multi_label": True, "sampling": "balanced"}, "use --class-weights balanced"),
    ],
)
def test_flags_of_the_other_kind_are_refused(flags, sentence):
    with pytest.raises(RecipeError, match=sentence):
        recipe._check_labels(decided(**flags))


# -- the bundle -----------------------------------------------------------------------------------------------


def _save(folder, **changes):
    keras.utils.set_random_seed(1)
    model = architectures.build("small_cnn", 16, 3, multi_label=True)
    info = BundleInfo(
        class_names=["a", "b", "c"], image_size=16, architecture="small_cnn", thresholds=[0.1, 0.5, 0.9]
    )
    bundle.save(model, dataclasses.replace(info, **changes), folder)
    return bundle.Bundle.load(str(folder))


def test_a_bundle_of_several_labels(tmp_path):
    saved = _save(tmp_path / "bundle", temperature=2.0)
    assert saved.info.is_multi_label
    assert saved.info.format_version == 4
    images = GENERATOR.integers(0, 256, (5, 16, 16, 3), np.uint8)
    outputs = runtimes.KerasEngine(saved, 1).outputs_in_batches(images, 5)
    np.testing.assert_allclose(outputs.probabilities, scipy.special.expit(outputs.logits / 2), rtol=1e-5)
    np.testing.assert_allclose(saved.model.predict(images, verbose=0), scipy.special.expit(outputs.logits), rtol=1e-4)
    moved = runtimes.rescale(outputs.probabilities, 2.0, multi_label=True)
    np.testing.assert_allclose(moved, scipy.special.expit(outputs.logits), rtol=1e-4)
    other = _save(tmp_path / "other", temperature=2.0, thresholds=[0.1, 0.5, 0.8])
    assert other.version != saved.version


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 0.5, 2], "half", [0.5, 0.5, None]])
def test_thresholds_that_are_none_are_refused(thresholds, tmp_path):
    _save(tmp_path / "bundle")
    path = tmp_path / "bundle" / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thresholds": thresholds}))
    with pytest.raises(BundleError, match=r"thresholds in bundle\.json is not a list of a number"):
        bundle.Bundle.load(str(tmp_path / "bundle"))


def test_labels_are_those_at_their_thresholds_most_probable_first():
    rows = np.asarray([[0.2, 0.6, 0.95], [0.05, 0.4, 0.8], [0.0, 0.0, 0.0]], np.float32)
    found = answers.find_labels(rows, [0.1, 0.5, 0.9])
    assert [labels.tolist() for labels in found] == [[2, 1, 0], [], []]
    assert answers.find_unusable(rows, multi_label=True) == {}
    assert list(answers.find_unusable(rows)) == [2]


def test_predictor_and_mlflow_give_labels(tmp_path):
    saved = _save(tmp_path / "bundle", thresholds=[0.0, 1.0, 0.0])
    images = [*awkward_images().values(), b"none"]
    predictor = Predictor(saved)
    *answers, bad = predictor(images)
    for answer in answers:
        order = [name for name, _ in answer.top_k if name != "b"]
        assert list(answer.labels) == order
        assert answer.label == order[0]
        assert answer.confidence == answer.probabilities.max()
    assert isinstance(bad, BadImage)
    table = BundleModel(predictor).predict(images)
    assert table["labels"].tolist()[:-1] == [list(answer.labels) for answer in answers]
    assert table["prediction"].tolist()[:-1] == [answer.label for answer in answers]
    (none,) = Predictor(_save(tmp_path / "none", thresholds=[1.0] * 3))(images[:1])
    assert (none.label, none.labels) == (None, ())
