"""From probabilities to answers: the ranking of the classes, and whether an image has an answer.

A bundle whose `BundleInfo.decision` is None answers with a class for every image. `jobs/evaluate.py
--target-precision` publishes bundles that are unsure of some, and name candidates for them. `Rules` makes the
answers of both kinds, and those with several labels, for all protocols; the rows of a prediction run, many at once,
are made of its parts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cnnray.images.decode import BadImage
from cnnray.models.groups import Groups

NO_PROBABILITIES = "no probabilities"
"""`BadImage.reason` of an image for which a network gives values that are no probabilities."""
FLOAT32 = "float32"
"""Key of thresholds for the engines whose probabilities differ by the order of their sums only."""

Probabilities = npt.NDArray[np.float32]
Status = Literal["ok", "unsure"]


def find_unusable(probabilities: Probabilities, *, multi_label: bool = False) -> dict[int, BadImage]:
    """Find the rows that are no probabilities: a value is not finite, or all are zero.

    Damaged weights give such rows, or float16 arithmetic that overflows. They must not become answers.

    Args:
        probabilities: float32 (N, classes), from an engine.
        multi_label: whether an image may have no label, and all its probabilities be zero.

    Returns:
        By index of the row, an error with the reason `NO_PROBABILITIES`. Usually empty.
    """
    unusable = ~np.isfinite(probabilities).all(axis=1)
    if not multi_label:
        unusable |= ~probabilities.any(axis=1)
    return {
        int(index): BadImage(
            NO_PROBABILITIES,
            f"the network's output is {'not finite' if probabilities[index].any() else 'zero for each class'}",
        )
        for index in np.flatnonzero(unusable)
    }


def find_labels(probabilities: Probabilities, thresholds: Sequence[float]) -> list[npt.NDArray[np.int64]]:
    """The labels of each image of a bundle with several labels, most probable first: indices of classes, often none.

    Args:
        probabilities: float32 (N, classes).
        thresholds: `BundleInfo.thresholds`.
    """
    has = label_masks(probabilities, thresholds)
    order = rank_classes(probabilities, probabilities.shape[1])
    return [row[has_label[row]] for row, has_label in zip(order, has, strict=True)]


def label_masks(probabilities: Probabilities, thresholds: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Which labels images have: bool (N, classes), for arguments as of `find_labels`."""
    return np.asarray(probabilities >= np.asarray(thresholds, np.float32), np.bool_)


def rank_classes(probabilities: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.int64]:
    """Rank the classes of each image by probability, highest first. Ties keep the order of the class names.

    Args:
        probabilities: float32 (N, classes).
        top_k: number of classes to return, at most all.

    Returns:
        int64 (N, min(top_k, classes)), indices of classes.
    """
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The thresholds of an engine, and what was measured of them on labelled images."""

    confidence: float
    """Lowest probability of the most probable class with which it is an answer."""
    candidate: float
    """Lowest probability with which a class is a candidate, where there is no answer."""
    group: float | None = None
    """Lowest probability of a group (see `BundleInfo.groups`) with which it is named; None: none is."""
    group_below: float = 0.0
    """The confidence below which a group is named: at most `confidence`."""
    images: int
    """Number of images that `confidence` was tested on."""
    coverage: float
    """Share of these that have an answer."""
    observed_precision: float
    """Share of these answers that are right."""
    group_coverage: float = 0.0
    """Share of the images below `group_below` whose group is named."""
    export: str = ""
    """`engines.export_id` of the file that gave the confidences."""

    def is_unsure(self, probabilities: Probabilities) -> npt.NDArray[np.bool_]:
        """Whether images have no answer: bool (N,), from probabilities, float32 (N, classes)."""
        return np.asarray(probabilities.max(1, initial=0) < self.confidence, np.bool_)

    def candidates(self, row: Probabilities) -> npt.NDArray[np.int64]:
        """The candidates of an image without an answer, most probable first: indices of classes, at least one.

        Args:
            row: its probabilities, float32 (classes,).
        """
        (order,) = rank_classes(row[None], max(1, int((row >= self.candidate).sum())))
        return np.asarray(order, np.int64)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a bundle says of an image. Classes are their indices in `BundleInfo.class_names`."""

    probabilities: Probabilities
    """float32 (classes,)."""
    labels: tuple[int, ...]
    """The most probable class, also of an unsure answer; with several labels, those that the image has, most probable
    first."""
    status: Status = "ok"
    candidates: tuple[int, ...] = ()
    """Of an unsure answer, the classes that the image may have, most probable first."""
    group: int | None = None
    """Of an unsure answer, the index of its group in `Groups.names`; None: that is unsure, too."""

    @property
    def prediction(self) -> int | None:
        """The class of the image, or its most probable label; None: the answer is unsure, or there is no label."""
        return self.labels[0] if self.labels and self.status == "ok" else None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, about."""
        return self.probabilities.nbytes + 36 * (len(self.labels) + len(self.candidates))

    @property
    def best(self) -> int:
        """The most probable class."""
        return int(self.probabilities.argmax())

    @property
    def confidence(self) -> float:
        """Its probability."""
        return float(self.probabilities.max())


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the probabilities that an engine gives become answers (see `engines.find_rules`)."""

    threshold: Threshold | None = None
    """Below which an answer is unsure; None: none is."""
    label_thresholds: Sequence[float] | None = None
    """`BundleInfo.thresholds`."""
    groups: Groups | None = None
    """The groups of the classes, which unsure answers may name; None: there are none."""

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.label_thresholds is not None

    def is_unsure(self, probabilities: Probabilities) -> npt.NDArray[np.bool_]:
        """Of which images the answer is unsure: bool (N,), from probabilities, float32 (N, classes)."""
        if self.threshold is None:
            return np.zeros(len(probabilities), np.bool_)
        return self.threshold.is_unsure(probabilities)

    def __call__(self, probabilities: Probabilities) -> list[Answer]:
        """The answers to images; those to rows that `find_unusable` finds mean nothing.

        Args:
            probabilities: float32 (N, classes).
        """
        if self.label_thresholds is not None:
            found = find_labels(probabilities, self.label_thresholds)
            return [Answer(row, _plain(labels)) for row, labels in zip(probabilities, found, strict=True)]
        best = probabilities.argmax(1).tolist()
        answers = [Answer(row, (index,)) for row, index in zip(probabilities, best, strict=True)]
        if self.threshold is not None:
            unsure = np.flatnonzero(self.threshold.is_unsure(probabilities))
            groups = self.find_groups(probabilities[unsure])
            for index, group in zip(unsure, groups, strict=True):
                row = probabilities[index]
                candidates = _plain(self.threshold.candidates(row))
                answers[index] = Answer(row, answers[index].labels, "unsure", candidates, group)
        return answers

    def group_name(self, answer: Answer) -> str | None:
        """The name of an answer's group."""
        return None if self.groups is None or answer.group is None else self.groups.names[answer.group]

    def find_groups(self, probabilities: Probabilities) -> list[int | None]:
        """The index of the group of each image whose class is unsure; None: that is unsure, too.

        Args:
            probabilities: float32 (N, classes), of such images.
        """
        if self.groups is None or self.threshold is None or self.threshold.group is None:
            return [None] * len(probabilities)
        of_groups = self.groups.probabilities(probabilities)
        named = (of_groups.max(1, initial=0) >= self.threshold.group) & (
            probabilities.max(1, initial=0) < self.threshold.group_below
        )
        return [
            index if is_named else None for index, is_named in zip(of_groups.argmax(1).tolist(), named, strict=True)
        ]


def _plain(indices: npt.NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(indices.tolist())


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The guaranteed precision of a bundle's answers, and the thresholds that give it.

    Of the answers of each engine, by itself, to images like those that it was tested on, at least the share
    `precision` is right. This fails with a probability of at most 1 - `certainty`, over the drawing of these images.
    """

    precision: float
    certainty: float
    candidate_coverage: float
    """Share of the images without an answer whose class is among the candidates: on average, and about, since the
    threshold was chosen on the same images."""
    thresholds: dict[str, Threshold]
    """By `engines.arithmetic` of an engine, since rounding changes confidences."""

    @classmethod
    def from_dict(cls, values: Any) -> "Decision | None":
        """Read what `dataclasses.asdict` made of a decision; None stays None.

        Raises:
            ValueError: they are something else; in words that follow "decision ".
        """
        if values is None:
            return None
        try:
            thresholds = {
                str(name): Threshold(**_known(Threshold, threshold))
                for name, threshold in values["thresholds"].items()
            }
            decision = cls(**_known(cls, values) | {"thresholds": thresholds})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is incomplete: {error}") from None
        numbers = [decision.precision, decision.certainty, decision.candidate_coverage]
        for rule in thresholds.values():
            numbers += [rule.confidence, rule.candidate, rule.group_below]
            numbers += [] if rule.group is None else [rule.group]
        if not thresholds or not all(isinstance(number, int | float) and 0 <= number <= 1 for number in numbers):
            raise ValueError("has no thresholds from 0 to 1")
        return decision

    @property
    def settings(self) -> list[Any]:
        """All of it that determines the answers, for a hash."""
        return [
            [name, rule.confidence, rule.candidate, *([] if rule.group is None else [rule.group, rule.group_below])]
            for name, rule in sorted(self.thresholds.items())
        ]


def _known(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names}
