"""Statistics of two networks on the same images."""

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.stats

CONFIDENCE = 0.95
"""Level of `difference_interval`, two-sided."""

Booleans = npt.NDArray[np.bool_]


def mcnemar(correct: Booleans, other_correct: Booleans) -> dict[str, float]:
    """McNemar's exact test for two networks on the same images.

    Args:
        correct: bool (N,), which images the first network classifies correctly.
        other_correct: bool (N,), the same for the second network.

    Returns:
        `only_this` and `only_other`, the images that only one of the two classifies correctly, and `p_value`, the
        two-sided probability of two counts so different by chance (SciPy's binomial test).
    """
    only_this, only_other = int((correct & ~other_correct).sum()), int((~correct & other_correct).sum())
    p = scipy.stats.binomtest(only_this, only_this + only_other).pvalue if only_this + only_other else 1.0
    return {"only_this": only_this, "only_other": only_other, "p_value": float(p)}


def difference_interval(only_first: float, only_second: float, count: float) -> tuple[float, float]:
    """Tango's score interval of the difference of two accuracies on the same images, first minus second.

    The bounds are the differences that the score test of a paired difference does not reject (Tango, Equivalence test
    and confidence interval for the difference in proportions for the paired-sample design, Statistics in Medicine 17,
    1998, 891-908, equations 12 to 16). Unlike a bootstrap or Wald's interval it is not empty where the networks never
    differ: its bounds are then plus and minus z^2 / (count + z^2).

    Args:
        only_first: images that only the first network classifies correctly.
        only_second: images that only the second network classifies correctly.
        count: all images, at least 1.

    Returns:
        the bounds of the interval with the confidence `CONFIDENCE`, from -1 to 1.
    """
    return _lower_bound(only_first, only_second, count), -_lower_bound(only_second, only_first, count)


def _lower_bound(b: float, c: float, n: float) -> float:
    """The least difference that the score test does not reject, for `b`, `c` and `n` as in Tango's paper."""
    if c == n:
        return -1.0
    z = float(scipy.stats.norm.ppf((1 + CONFIDENCE) / 2))

    def excess(difference: float) -> float:
        """The observed difference less the hypothetical one, in images, beyond what the score test accepts."""
        # The estimate of the share of images that only the second network has right, given the difference.
        linear = -b - c + (2 * n - b + c) * difference
        product = -c * difference * (1 - difference)
        share = (np.sqrt(max(linear**2 - 8 * n * product, 0.0)) - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return float(b - c - n * difference - z * np.sqrt(max(variance, 0.0)))

    # The excess is positive at -1, and negative just below the observed difference.
    return float(scipy.optimize.brentq(excess, -1.0, (b - c) / n - 1e-12))
