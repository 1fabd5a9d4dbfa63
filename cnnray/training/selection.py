"""Which epoch is the best one: the metrics of the validation images that need more than sums over images."""

import numpy as np
import numpy.typing as npt

from cnnray.training.epoch import Ints
from cnnray.training.recipe_config import Selection

_BINS, _LARGEST = 2**11, 10.0
"""Of the inverse hyperbolic sine of log-odds: a bin, whose order is not seen, is 0.01 of log-odds near 0, and a
hundredth of those that are large."""
_FINEST, _BINS_OF_ALL = 2**18, 2**21
"""Most bins of a label, 0.0001 of a logit near 0, and of all labels together, if they are not too many: 32 MiB."""


class ClassCounts:
    """Counts over the validation images that a worker has seen; those of all workers add up.

    Of images of one label each. `LabelCounts` are those of several.
    """

    def __init__(self, select: Selection, classes: int) -> None:
        """
        Args:
            select: metric that chooses the best epoch.
            classes: number of classes.
        """
        self._select, self._classes = select, classes
        shape = {"macro_f1": (classes, 3), "auroc": (classes, 2, _BINS)}.get(select, (0,))
        self.counts: Ints = np.zeros(shape, np.int64)

    def add(self, logits: npt.NDArray[np.float32], targets: Ints) -> None:
        """Count images.

        Args:
            logits: float32 (n, classes).
            targets: class indices, int64 (n,).
        """
        if self._select == "macro_f1":
            answers = logits.argmax(1)
            for column, classes in enumerate((answers, targets, targets[answers == targets])):
                self.counts[:, column] += np.bincount(classes, minlength=self._classes)
        elif self._select == "auroc":
            is_class = targets[:, None] == np.arange(self._classes)
            np.add.at(self.counts.reshape(-1), _places(_log_odds(logits), is_class, self.counts.shape), 1)

    def metrics(self, counts: Ints) -> dict[str, float]:
        """`val_macro_f1` or `val_auroc`, where one of them chooses; else nothing.

        Both are means over the classes that have validation images. The area under the ROC curve is that of a class
        against all others; where all images are of one class, it is 0.5.

        Args:
            counts: of all workers together.
        """
        if self._select == "macro_f1":
            answered, present, right = counts[counts[:, 1] > 0].T
            return {"val_macro_f1": float((2 * right / (answered + present)).mean())}
        if self._select == "auroc":
            return {"val_auroc": _mean_area(counts)}
        return {}

    def thresholds(self, counts: Ints) -> None:
        """None: the most probable class is the answer."""
        return


class LabelCounts:
    """Counts over validation images with several labels, by label and bin of its logit."""

    def __init__(self, select: Selection, classes: int, precision: float | None = None) -> None:
        """
        Args:
            select: metric that chooses the best epoch.
            classes: number of classes.
            precision: that the thresholds are fitted to; None: they have the highest F1.
        """
        self._select, self._precision = select, precision
        self._bins = min(max(_BINS, _BINS_OF_ALL // classes), _FINEST)
        self.counts: Ints = np.zeros((classes, 2, self._bins), np.int64)

    def add(self, logits: npt.NDArray[np.float32], targets: npt.NDArray[np.float32]) -> None:
        """Count images.

        Args:
            logits: float32 (n, classes).
            targets: 1 for each class that an image has, else 0, float32 (n, classes).
        """
        flat = _places(logits.astype(np.float64), targets > 0, self.counts.shape)
        np.add.at(self.counts.reshape(-1), flat, 1)

    def metrics(self, counts: Ints) -> dict[str, float]:
        """`val_mean_average_precision`; `val_macro_f1` and `val_micro_f1`, at the `thresholds`, which are fitted to
        the same images; and `val_auroc`, where it chooses.

        Means are over the labels that validation images have. Logits of a bin count as equal.

        Args:
            counts: of all workers together.
        """
        right, given, has = _at_each_threshold(counts)
        present, best = has > 0, self._places(counts)
        if not present.any():
            return {"val_mean_average_precision": 0.0, "val_macro_f1": 0.0, "val_micro_f1": 0.0}
        precisions = right / np.maximum(given, 1)
        gained = -np.diff(right, axis=1, append=0) / np.maximum(has, 1)[:, None]
        rows = np.arange(len(has))
        at_best, given_at_best = right[rows, best], given[rows, best]
        values = {
            "val_mean_average_precision": float((precisions * gained).sum(1)[present].mean()),
            "val_macro_f1": float((2 * at_best / np.maximum(given_at_best + has, 1))[present].mean()),
            "val_micro_f1": float(2 * at_best.sum() / (given_at_best.sum() + has.sum())),
        }
        return values | ({"val_auroc": _mean_area(counts)} if self._select == "auroc" else {})

    def thresholds(self, counts: Ints) -> list[float]:
        """The lowest probability with which an image has each label; 0.5 for labels that no validation image has.

        Args:
            counts: of all workers together.
        """
        logits = np.sinh(_LARGEST * (2 * self._places(counts) / self._bins - 1))
        probabilities = np.where(counts[:, 1].any(1), 1 / (1 + np.exp(-np.clip(logits, -80, 80))), 0.5)
        return [float(value) for value in probabilities]

    def _places(self, counts: Ints) -> Ints:
        """The bins from which on images have each label, int64 (classes,): where several are as good, the middle of
        the first ones that follow one another."""
        right, given, has = _at_each_threshold(counts)
        precisions = right / np.maximum(given, 1)
        if self._precision is None:
            value = 2 * right / np.maximum(given + has[:, None], 1)
        else:
            # As many as possible with the precision, or else with the highest that there is.
            wanted = np.minimum(self._precision, precisions.max(1, keepdims=True))
            value = np.where(precisions >= wanted, right, -1)
        first = value.argmax(1)
        is_worse = (value < value.max(1, keepdims=True)) & (np.arange(self._bins) > first[:, None])
        after = np.where(is_worse.any(1), is_worse.argmax(1), self._bins)
        return np.asarray((first + after) // 2, np.int64)


def _at_each_threshold(counts: Ints) -> tuple[Ints, Ints, Ints]:
    """By label and the bin from which on images have it: those that have it rightly, and all of them, int64 (classes,
    bins); and the images that have it in truth, int64 (classes,)."""
    right = np.cumsum(counts[:, 1, ::-1], 1)[:, ::-1]
    return right, right + np.cumsum(counts[:, 0, ::-1], 1)[:, ::-1], counts[:, 1].sum(1)


def _places(
    scores: npt.NDArray[np.float64], has: npt.NDArray[np.bool_], shape: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Where counts of this shape, (classes, 2, bins), count images: by class, whether they have it, and bin of its
    score. Images without scores, because the loss has become infinite, are counted nowhere.

    Args:
        scores: of each class, (n, classes).
        has: bool (n, classes).
        shape: of the counts.

    Returns:
        places in the flat counts, int64 (m,).
    """
    finite, bins = np.isfinite(scores).all(1), shape[2]
    places = np.clip(np.arcsinh(scores[finite]) / _LARGEST, -1, 1)
    in_bins = np.minimum((bins * (places + 1) / 2).astype(np.int64), bins - 1)
    flat = np.ravel_multi_index((np.arange(shape[0]), has[finite].astype(np.int64), in_bins), shape)
    return np.asarray(flat.ravel(), np.int64)


def _log_odds(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Of each class against all others: (n, classes). Probabilities near 1 would be equal by rounding."""
    rows, largest = np.arange(len(logits)), logits.argmax(1)
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    scores = np.exp(shifted)
    others = scores.sum(1, keepdims=True) - scores
    scores[rows, largest] = 0.0
    others[rows, largest] = scores.sum(1)
    odds: npt.NDArray[np.float64] = shifted - np.log(np.maximum(others, 1e-300))
    return odds


def _mean_area(counts: Ints) -> float:
    areas = [_area(negative, positive) for negative, positive in counts if positive.any() and negative.any()]
    return float(np.mean(areas)) if areas else 0.5


def _area(negative: Ints, positive: Ints) -> float:
    """The area under the ROC curve: the share of pairs in the right order, of equal ones half (Mann and Whitney)."""
    below = np.cumsum(negative) - negative
    return float(((below + negative / 2) * positive).sum() / (negative.sum() * positive.sum()))


def epoch_score(select: Selection, metrics: dict[str, float]) -> float:
    """What the best epoch has least of: the loss, or what another metric lacks of 1; where that is equal, the loss.

    By default, the loss itself does not choose, because a network that trains for long gives wrong answers with ever
    more confidence, and so a higher loss, while its accuracy still rises.

    Args:
        select: the metric.
        metrics: of the validation images, with `val_loss` in nats.
    """
    loss = metrics["val_loss"]
    if select == "val_loss":
        return loss
    name = select if select.startswith("val_") else f"val_{select}"
    return 1.0 - metrics[name] + 1e-9 * loss / (1.0 + loss)
