"""The metrics that choose the best epoch."""

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.metrics import f1_score, roc_auc_score

from cnnray.training.selection import ClassCounts, epoch_score

CLASSES = 6


@pytest.fixture(params=[1, 20])
def answers(request):
    """Logits of unsure and of very sure networks, and targets; the last class has no images."""
    generator = np.random.default_rng(0)
    targets = generator.choice(CLASSES - 1, 500, p=[0.6, 0.2, 0.1, 0.05, 0.05])
    logits = generator.normal(size=(500, CLASSES)) + 1.5 * (targets[:, None] == np.arange(CLASSES))
    return (request.param * logits).astype(np.float32), targets


def _counted(select, logits, targets):
    """The metrics of two workers, the second of which has a batch without images."""
    workers = [ClassCounts(select, CLASSES) for _ in range(2)]
    for start in range(0, 500, 50):
        workers[start // 50 % 2].add(logits[start : start + 50], targets[start : start + 50])
    workers[1].add(logits[:0], targets[:0])
    return workers[0].metrics(workers[0].counts + workers[1].counts)


def test_macro_f1_is_that_of_scikit_learn(answers):
    logits, targets = answers
    expected = f1_score(targets, logits.argmax(1), labels=np.arange(CLASSES - 1), average="macro")
    assert _counted("macro_f1", logits, targets) == {"val_macro_f1": pytest.approx(expected)}


def test_auroc_is_that_of_scikit_learn(answers):
    logits, targets = answers
    logits = logits.astype(np.float64)
    odds = [logits[:, number] - logsumexp(np.delete(logits, number, 1), axis=1) for number in range(CLASSES - 1)]
    areas = [roc_auc_score(targets == number, odds[number]) for number in range(CLASSES - 1)]
    assert _counted("auroc", logits, targets) == {"val_auroc": pytest.approx(np.mean(areas), abs=2e-3)}


def test_other_metrics_need_no_counts(answers):
    for select in ("val_accuracy", "val_loss"):
        assert _counted(select, *answers) == {}
        assert not ClassCounts(select, CLASSES).counts.size


def test_one_class_alone_has_no_area():
    counts = ClassCounts("auroc", 2)
    counts.add(np.zeros((3, 2), np.float32), np.zeros(3, np.int64))
    assert counts.metrics(counts.counts) == {"val_auroc": 0.5}
    extreme = ClassCounts("auroc", 2)
    extreme.add(np.asarray([[1e4, -1e4], [-1e4, 1e4]], np.float32), np.asarray([0, 1]))
    assert extreme.metrics(extreme.counts) == {"val_auroc": 1.0}


@pytest.mark.parametrize(
    ("better", "worse"),
    [((0.91, 5.0), (0.90, 0.1)), ((0.9, 0.1), (0.9, 0.2)), ((1 - 1 / 10**7, 1e6), (1 - 2 / 10**7, 0.0))],
    ids=["accuracy first", "then the loss", "one image of ten million"],
)
def test_the_best_epoch_has_the_highest_accuracy_and_then_the_lowest_loss(better, worse):
    for select in ("val_accuracy", "macro_f1", "auroc"):
        name = select if select.startswith("val_") else f"val_{select}"
        scores = [epoch_score(select, {name: value, "val_loss": loss}) for value, loss in (better, worse)]
        assert scores[0] < scores[1]


def test_the_loss_chooses_where_it_is_told_to():
    assert epoch_score("val_loss", {"val_accuracy": 0.1, "val_loss": 0.2}) == 0.2
