"""Selective classification: from which confidence on the answers are right as often as asked for, with a guarantee.

The guarantee is that of Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test: Calibrating
Predictive Algorithms to Achieve Risk Control", arXiv:2110.01052): it holds for any network and any distribution of
images, with a finite number of them. The only assumption is that later images are drawn as these were.

The candidates of an image without an answer are a conformal set (Sadinle, Lei and Wasserman, "Least Ambiguous
Set-Valued Classifiers With Bounded Error Levels", arXiv:1609.00451), calibrated on the images without an answer, as
Mondrian conformal prediction does for groups (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World",
2005, section 4.5).
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

from cnnray.models.answers import Probabilities, Rules, Threshold
from cnnray.models.groups import Groups

CERTAINTY = 0.95
"""Default certainty of a guarantee."""
SATURATED = np.float32(0.9999)
"""Highest threshold of a confidence."""
_LEARNT = 0.25
"""Share of the images that choose which thresholds are tested, and in which order."""
_CANDIDATES = 200
"""Thresholds at most, at equal numbers of images."""


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """A confidence threshold, and what was shown of it."""

    threshold: float
    """Lowest confidence of an answer that counts."""
    precision: float
    """At least this share of such answers is right, ..."""
    certainty: float
    """... which is false with a probability of at most 1 - certainty over the drawing of the images."""
    coverage: float
    """Share of the tested images with at least this confidence."""
    observed_precision: float
    """Share of these that were right."""
    images: int
    """Number of images tested."""
    lowest_tested: float
    """Lowest threshold that was tested: the first that failed, or this one."""


def images_needed(precision: float, certainty: float = CERTAINTY) -> int:
    """The number of images without which nothing can be shown, even if all answers are right.

    n right answers in a row show it where precision^n is at most 1 - certainty. More are needed with wrong ones.

    Args:
        precision: above 0 and below 1.
        certainty: above 0 and below 1.
    """
    tested = math.ceil(math.log(1 - certainty) / math.log(precision))
    return math.ceil(tested / (1 - _LEARNT))


def find_guarantee(
    confidences: npt.NDArray[np.float64],
    correct: npt.NDArray[np.bool_],
    *,
    precision: float,
    certainty: float = CERTAINTY,
    learnt: npt.NDArray[np.bool_] | None = None,
) -> Guarantee | None:
    """Find the lowest confidence threshold with a guaranteed precision.

    Fixed-sequence testing, with a sequence that is learnt from a part of the images. This part, drawn at random,
    gives the candidate thresholds and the one to begin with, which looks surest. The rest of the images tests the
    candidates one after the other, each lower than the one before, until one fails. A candidate passes if the
    binomial p-value of "its precision is lower than asked for" is at most 1 - certainty. The sequence does not depend
    on the images that test it. So the guarantee is false only if the first candidate whose precision is too low
    passes, and the number of candidates does not matter.

    Args:
        confidences: of the answers, (N,).
        correct: whether they are right, (N,).
        precision: asked for, above 0 and below 1.
        certainty: of the guarantee, above 0 and below 1.
        learnt: which images choose the candidates, (N,); None: see `split`.

    Returns:
        The guarantee; None where no threshold has one: too many of the confident answers are wrong, or there are
        too few images (see `images_needed`).
    """
    if learnt is None:
        learnt = split(len(confidences))
    tested = ~learnt
    if not learnt.any() or not tested.any():
        return None
    # From the highest down, so that each includes the images of those before it.
    count = int(learnt.sum())
    ranks = np.unique(np.linspace(0, count - 1, min(_CANDIDATES, count)).round().astype(np.int64))
    candidates = np.unique(np.sort(confidences[learnt])[::-1][ranks])[::-1]
    scale = tested.sum() / learnt.sum()
    kept, wrong = _counts(confidences[learnt], correct[learnt], candidates)
    first = int(np.argmin(_p_values(np.round(kept * scale), np.round(wrong * scale), precision)))
    candidates = candidates[first:]
    kept, wrong = _counts(confidences[tested], correct[tested], candidates)
    rejected = _p_values(kept, wrong, precision) <= 1 - certainty
    shown = len(rejected) if rejected.all() else int(np.argmin(rejected))
    if not shown:
        return None
    last = shown - 1
    return Guarantee(
        threshold=float(candidates[last]),
        precision=precision,
        certainty=certainty,
        coverage=float(kept[last] / tested.sum()),
        observed_precision=float(1 - wrong[last] / kept[last]),
        images=int(tested.sum()),
        lowest_tested=float(candidates[min(shown, len(candidates) - 1)]),
    )


def split(images: int, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Which images something is learnt from, at random; the others test it: bool (images,)."""
    learnt = np.ones(images, np.bool_)
    learnt[np.random.default_rng(seed).permutation(images)[: int((1 - _LEARNT) * images)]] = False
    return learnt


def find_threshold(
    probabilities: Probabilities,
    targets: npt.NDArray[np.int64],
    *,
    precision: float,
    certainty: float,
    learnt: npt.NDArray[np.bool_] | None = None,
    groups: Groups | None = None,
) -> Threshold | None:
    """Find thresholds with a guarantee: see `find_guarantee`, and for the candidates `candidate_threshold`.

    The candidates are calibrated as if the confidence threshold had been given: that it was chosen by the same images
    is left out of account. Confidences above `SATURATED` are alike: where a network is that sure, the order of its
    sums decides.

    Groups are named with a guarantee of their own, of the same precision and certainty, below the lowest confidence
    threshold that was tested: the images there had no part in choosing one.

    Args:
        probabilities: float32 (N, classes), as the engine gives them: they are compared with the thresholds.
        targets: int64 (N,), the true classes.
        precision: asked for, above 0 and below 1.
        certainty: of it, above 0 and below 1; and the share of the images without an answer whose class is to be
            among the candidates.
        learnt: see `find_guarantee`.
        groups: of the classes; None: there are none.

    Returns:
        None where no confidence threshold has the guarantee.
    """
    learnt = split(len(targets)) if learnt is None else learnt
    guarantee = find_guarantee(
        np.minimum(probabilities.max(1), SATURATED).astype(np.float64),
        probabilities.argmax(1) == targets,
        precision=precision,
        certainty=certainty,
        learnt=learnt,
    )
    if guarantee is None:
        return None
    threshold = Threshold(
        confidence=guarantee.threshold,
        candidate=0.0,
        images=guarantee.images,
        coverage=guarantee.coverage,
        observed_precision=guarantee.observed_precision,
    )
    unsure = threshold.is_unsure(probabilities)
    of_target = probabilities[unsure, targets[unsure]]
    threshold = dataclasses.replace(threshold, candidate=candidate_threshold(of_target, certainty))
    if groups is None:
        return threshold
    below = np.minimum(probabilities.max(1), SATURATED) < guarantee.lowest_tested
    of_groups = groups.probabilities(probabilities[below])
    named = find_guarantee(
        np.minimum(of_groups.max(1, initial=0), SATURATED).astype(np.float64),
        of_groups.argmax(1) == np.asarray(groups.of_classes)[targets[below]],
        precision=precision,
        certainty=certainty,
        learnt=learnt[below],
    )
    if named is None:
        return threshold
    return dataclasses.replace(
        threshold, group=named.threshold, group_below=guarantee.lowest_tested, group_coverage=named.coverage
    )


def candidate_threshold(of_target: npt.NDArray[np.float32], coverage: float) -> float:
    """The largest probability from which on classes are candidates, for the true class to be one often enough.

    Of N + 1 images that are drawn alike, the last is among the floor((N + 1) (1 - coverage)) that have the smallest
    probability of their class with a probability of at most 1 - coverage.

    Args:
        of_target: the probability of the true class, of images without an answer, float32 (N,).
        coverage: the share of such images whose class is to be among the candidates.

    Returns:
        0, with which all classes are, where there are too few images to leave any out.
    """
    left_out = math.floor((len(of_target) + 1) * (1 - coverage))
    return float(np.sort(of_target)[left_out - 1]) if left_out else 0.0


def measure_answers(
    rules: Rules, probabilities: Probabilities, targets: npt.NDArray[np.int64]
) -> dict[str, float | int | None]:
    """What the answers with a threshold are on labelled images.

    Args:
        rules: of the engine that gave the probabilities, with a threshold.
        probabilities: float32 (N, classes).
        targets: int64 (N,), the true classes.

    Returns:
        `threshold`; `unsure`, the number of images without an answer; `coverage`, the share of the others, and
        `precision`, the share of their answers that are right; of the images without an answer, `candidate_coverage`,
        the share whose class is among the candidates, and `mean_candidates`, their number; and, of a bundle with
        groups, `group_coverage`, the share whose group is named, and `group_precision`, the share of these whose
        group is right. None where there are no such images.
    """
    threshold = rules.threshold
    assert threshold is not None
    unsure = threshold.is_unsure(probabilities)
    correct = (probabilities.argmax(1) == targets)[~unsure]
    candidates = [threshold.candidates(row) for row in probabilities[unsure]]
    hits = [target in found for target, found in zip(targets[unsure], candidates, strict=True)]
    groups: dict[str, float | int | None] = {}
    if rules.groups is not None:
        of_classes, found_groups = rules.groups.of_classes, rules.find_groups(probabilities[unsure])
        named = [
            group == of_classes[target]
            for group, target in zip(found_groups, targets[unsure], strict=True)
            if group is not None
        ]
        groups["group_coverage"] = len(named) / len(found_groups) if found_groups else None
        groups["group_precision"] = float(np.mean(named)) if named else None
    return groups | {
        "threshold": threshold.confidence,
        "unsure": int(unsure.sum()),
        "coverage": float((~unsure).mean()),
        "precision": float(correct.mean()) if len(correct) else None,
        "candidate_coverage": float(np.mean(hits)) if hits else None,
        "mean_candidates": float(np.mean([len(found) for found in candidates])) if candidates else None,
    }


def _counts(
    confidences: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], thresholds: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """For each threshold, how many answers have at least its confidence, and how many of these are wrong."""
    order = np.argsort(-confidences, kind="stable")
    kept = np.searchsorted(-confidences[order], -thresholds, side="right")
    wrong = np.concatenate([[0], np.cumsum(~correct[order])])[kept]
    return kept.astype(np.float64), wrong.astype(np.float64)


def _p_values(
    kept: npt.NDArray[np.float64], wrong: npt.NDArray[np.float64], precision: float
) -> npt.NDArray[np.float64]:
    """Probability of at most so many wrong answers, if the precision were only just too low; 1 without answers."""
    return np.asarray(scipy.stats.binom.cdf(wrong, kept, 1 - precision))
