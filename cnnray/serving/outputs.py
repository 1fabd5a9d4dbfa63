"""The outputs that only some models have, in the protocols that answer with tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnray.models.answers import Answer, Rules


@dataclass(frozen=True)
class Output:
    """An output of booleans or texts."""

    is_text: bool
    is_per_class: bool
    """Whether it is (N, classes) for N images, and not (N,)."""
    values: Callable[[Sequence[Answer], int], npt.NDArray[Any]]
    """Makes it, of bool or of object with str, from the answers and the number of classes."""


def outputs_of(rules: Rules) -> dict[str, Output]:
    """The outputs of a model that answers by these rules, by name."""
    if rules.multi_label:
        return {"labels": Output(False, True, _labels)}
    if not rules.threshold:
        return {}
    outputs = {"unsure": Output(False, False, _unsure), "candidates": Output(False, True, _candidates)}
    if rules.groups:
        outputs["group"] = Output(
            True, False, lambda answers, _: np.asarray([rules.group_name(answer) or "" for answer in answers], object)
        )
    return outputs


def _labels(answers: Sequence[Answer], classes: int) -> npt.NDArray[np.bool_]:
    return _masks([answer.labels for answer in answers], classes)


def _unsure(answers: Sequence[Answer], classes: int) -> npt.NDArray[np.bool_]:
    return np.asarray([answer.status == "unsure" for answer in answers])


def _candidates(answers: Sequence[Answer], classes: int) -> npt.NDArray[np.bool_]:
    """Of an answer that is not unsure, its class alone."""
    return _masks([answer.candidates or answer.labels for answer in answers], classes)


def _masks(indices: Sequence[Sequence[int]], classes: int) -> npt.NDArray[np.bool_]:
    masks = np.zeros((len(indices), classes), np.bool_)
    for mask, row in zip(masks, indices, strict=True):
        mask[list(row)] = True
    return masks
