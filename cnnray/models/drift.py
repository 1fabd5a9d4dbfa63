"""Drift: whether a network's answers are distributed as those that it gave to the validation images."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

BINS = 20
"""Bins of the confidence, of the same width, from 0 to 1."""
LEAST_IMAGES = 100
"""Answers below which they are not compared."""
LARGE_EFFECT = 0.5
"""Effect size below which there is no warning, however many images show it: "large" in Cohen's table."""
FALSE_ALARMS = 0.001
"""Largest share of comparisons without drift that give a warning."""
_SELDOM = 3.0
"""Standard deviations of what chance adds to a square that a gauge leaves out: nobody tests what it shows."""
_LEAST_EXPECTED = 5
"""Expected images of each bin from which chi-square's distribution holds (Cochran, The chi-square test of goodness of
fit, 1952)."""
_MOST_IMAGES = 10_000_000
"""Images of a row of a table of which random tables are made; larger rows are scaled to it."""


@dataclass(frozen=True)
class Distribution:
    """How often each class was the most probable one, and how often its probability lay in each bin."""

    classes: Ints
    """(classes,), in the order of the bundle's class names."""
    confidences: Ints
    """(`BINS`,)."""

    @classmethod
    def empty(cls, classes: int) -> Self:
        """The distribution of no answers of a network with so many classes."""
        return cls(np.zeros(classes, np.int64), np.zeros(BINS, np.int64))

    @classmethod
    def of(cls, answers: Ints, confidences: npt.NDArray[np.floating[Any]], classes: int) -> Self:
        """The distribution of these answers.

        Args:
            answers: most probable classes, (n,).
            confidences: their probabilities, (n,).
            classes: number of classes.
        """
        bins = np.minimum((confidences * BINS).astype(np.int64), BINS - 1)
        return cls(
            np.bincount(answers, minlength=classes).astype(np.int64),
            np.bincount(bins, minlength=BINS).astype(np.int64),
        )

    @classmethod
    def of_logits(cls, logits: npt.NDArray[np.float32]) -> Self:
        """The distribution of the answers that these logits, (n, classes), stand for; without those that are none."""
        finite = logits[np.isfinite(logits).all(1)].astype(np.float64)
        confidences = 1 / np.exp(finite - finite.max(1, keepdims=True)).sum(1)
        return cls.of(finite.argmax(1), confidences, logits.shape[1])

    @classmethod
    def from_dict(cls, values: dict[str, list[int]], classes: int) -> Self | None:
        """What `as_dict` gave; None where that is not of a network with so many classes."""
        try:
            known = cls(np.asarray(values["classes"], np.int64), np.asarray(values["confidences"], np.int64))
        except (KeyError, TypeError, ValueError):
            return None
        return known if known.classes.shape == (classes,) and known.confidences.shape == (BINS,) else None

    def as_dict(self) -> dict[str, list[int]]:
        """As plain values, for JSON."""
        return {"classes": self.classes.tolist(), "confidences": self.confidences.tolist()}

    @property
    def images(self) -> int:
        """Number of answers."""
        return int(self.classes.sum())

    def __add__(self, other: "Distribution") -> "Distribution":
        return Distribution(self.classes + other.classes, self.confidences + other.confidences)

    def drift_from(self, reference: "Distribution") -> dict[str, dict[str, Any] | None]:
        """See `compare`, of `classes` and of `confidences`."""
        return {
            "classes": compare(self.classes, reference.classes),
            "confidences": compare(self.confidences, reference.confidences),
        }


def effect_size(counts: Ints, others: Ints, deviations: float = 0.0) -> float | None:
    """How far two histograms of the same bins are apart: Cohen's w, less what chance adds to its square on average.

    Its square is the sum over the bins of (p - q)^2 / r, where p and q are the shares in `counts` and `others`, and r
    those of both together. Cohen (Statistical Power Analysis for the Behavioral Sciences, 1988) calls 0.1 small, 0.3
    medium and 0.5 large. The squares are close to the population stability index: its thresholds, 0.1 and 0.25, are
    0.32 and 0.5 here.

    Args:
        counts: of the answers.
        others: of the reference.
        deviations: standard deviations of what chance adds that are taken off, too, so that it is seldom more than 0
            without a difference.

    Returns:
        None for less than `LEAST_IMAGES` in `counts`, and where there are no others, or only one bin.
    """
    n, m, together = int(counts.sum()), int(others.sum()), (counts + others).astype(np.float64)
    used = together > 0
    if n < LEAST_IMAGES or not m or np.count_nonzero(used) < 2:
        return None
    shares = together[used] / (n + m)
    square = float(((counts[used] / n - others[used] / m) ** 2 / shares).sum())
    freedom = np.count_nonzero(used) - 1  # of a chi-square distribution, which has twice as much variance
    chance = (freedom + deviations * np.sqrt(2 * freedom)) * (1 / n + 1 / m)
    return float(np.sqrt(max(square - chance, 0.0)))


def compare(counts: Ints, others: Ints) -> dict[str, Any] | None:
    """Test whether two histograms of the same bins are samples of one distribution.

    The test is Pearson's chi-square test of homogeneity (SciPy's), which takes both numbers of images into account.
    Where few images of a bin are expected, the p-value is exact for any numbers of images: it is the rank of the
    chi-square among those of 999 random tables with the same totals.

    A network whose mistakes favour some classes differs from its training images without any drift. That is why a
    significant difference alone gives no warning.

    Args:
        counts: of the answers.
        others: of the reference.

    Returns:
        `effect_size`; `p_value`, None where the effect is below `LARGE_EFFECT`; and `warning`, whether the effect is
        at least that, and p at most `FALSE_ALARMS`. None where there is no effect size.
    """
    effect = effect_size(counts, others)
    if effect is None or effect < LARGE_EFFECT:
        return None if effect is None else {"effect_size": effect, "p_value": None, "warning": False}
    import scipy.stats  # takes a second

    table = np.stack([counts, others])
    table = table[:, table.any(0)]
    test = scipy.stats.chi2_contingency(table, correction=False)
    if test.expected_freq.min() < _LEAST_EXPECTED:
        tables = round(1 / FALSE_ALARMS) - 1  # the smallest number that can give this p-value
        # The same counts give the same p-value, but a fixed seed would give all runs the same random error.
        rng = np.random.default_rng(table.ravel())
        method = scipy.stats.MonteCarloMethod(n_resamples=tables, batch=64, rng=rng)
        # SciPy's random tables take long for more images, and crash from 2^31 on; fewer images only make p larger.
        table = (table * np.minimum(1, _MOST_IMAGES / table.sum(1, keepdims=True))).astype(np.int64)
        table = table[:, table.any(0)]
        test = scipy.stats.chi2_contingency(table, correction=False, method=method)
    p = float(test.pvalue)
    return {"effect_size": effect, "p_value": p, "warning": p <= FALSE_ALARMS}


class SlidingWindow:
    """The answers of the last time, compared with a reference. One thread adds, and others may read."""

    def __init__(
        self,
        reference: Distribution,
        seconds: float = 3600.0,
        parts: int = 12,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            reference: the answers to the validation images.
            seconds: length of the window.
            parts: in so many steps, old answers leave it.
            clock: the time in seconds.
        """
        self._reference, self._clock = reference, clock
        self._seconds, self._parts = seconds / parts, parts
        self._counts: deque[tuple[int, Distribution]] = deque()
        """By number of a part since the clock's start, its answers; older ones first."""

    def add(self, answer: int, confidence: float) -> None:
        """Add the answer to an image: its most probable class, and that one's probability."""
        part = self._part()
        if not self._counts or self._counts[-1][0] != part:
            self._counts.append((part, Distribution.empty(len(self._reference.classes))))
            while self._counts[0][0] <= part - self._parts:
                self._counts.popleft()
        counts = self._counts[-1][1]
        counts.classes[answer] += 1
        counts.confidences[min(int(confidence * BINS), BINS - 1)] += 1

    def effect_sizes(self) -> dict[str, float]:
        """The effect sizes of `classes` and `confidences`, less what chance seldom exceeds.

        Empty for less than `LEAST_IMAGES` answers, or less than there are classes.
        """
        window, oldest = Distribution.empty(len(self._reference.classes)), self._part() - self._parts
        for part, counts in list(self._counts):
            if part > oldest:
                window += counts
        if window.images < len(window.classes):  # chance would be anything
            return {}
        effects = {
            "classes": effect_size(window.classes, self._reference.classes, _SELDOM),
            "confidences": effect_size(window.confidences, self._reference.confidences, _SELDOM),
        }
        return {name: effect for name, effect in effects.items() if effect is not None}

    def _part(self) -> int:
        return int(self._clock() / self._seconds)
