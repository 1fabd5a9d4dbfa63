"""Which epoch is the best one: the metrics of the validation images that need more than sums over images."""

import numpy as np
import numpy.typing as npt

from cnnray.training.epoch import Ints
from cnnray.training.recipe_config import Selection

_BINS, _LARGEST = 2**11, 10.0
"""Of the inverse hyperbolic sine of log-odds: a bin, whose order is not seen, is 0.01 of log-odds near 0, and a
hundredth of those that are large."""


class ClassCounts:
    """Counts over the validation images that a worker has seen; those of all workers add up."""

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
            places = np.clip(np.arcsinh(_log_odds(logits)) / _LARGEST, -1, 1)
            bins = np.minimum((_BINS * (places + 1) / 2).astype(np.int64), _BINS - 1)
            is_class = (targets[:, None] == np.arange(self._classes)).astype(np.int64)
            flat = np.ravel_multi_index((np.arange(self._classes), is_class, bins), self.counts.shape)
            self.counts += np.bincount(flat.ravel(), minlength=self.counts.size).reshape(self.counts.shape)

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
            areas = [_area(negative, positive) for negative, positive in counts if positive.any() and negative.any()]
            return {"val_auroc": float(np.mean(areas)) if areas else 0.5}
        return {}


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
