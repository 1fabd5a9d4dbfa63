"""Training in this process, without Ray, with the same decisions and steps as on training's workers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_sets import SIZE, Labelled
from cnnray.training import decisions, epoch, plan, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.decided import PlannedConfig
from cnnray.training.selection import epoch_score

_AT_ONCE = 500
"""Images that are evaluated at once."""


@dataclass(frozen=True)
class Passed:
    """The state of a training after an epoch."""

    images: int
    """Trained on so far."""
    seconds: float
    """Of training so far, without evaluation."""
    loss: float
    """Of the epoch's training images, in nats."""
    held_out_loss: float
    """In nats."""
    accuracy: float
    """On the held-out images."""


@dataclass(frozen=True)
class Trained:
    """A trained network."""

    model: Any
    """With the weights of the epoch that is best on the held-out images, as in a bundle."""
    accuracy: float
    """Of these weights, on the held-out images."""
    epochs: list[Passed]
    config: PlannedConfig


def make_config(**flags: Any) -> TrainConfig:
    """A config without data and output, with one worker."""
    defaults: dict[str, Any] = {"data": "/none", "output": "/nowhere", "image_size": SIZE, "max_workers": 1}
    return TrainConfig(**defaults | flags)


def train_network(
    config: TrainConfig,
    train: Labelled,
    held_out: Labelled,
    *,
    weights: Path | None = None,
    teacher: Any = None,
    evaluate_every: int = 1,
    variant: Callable[[Any], Any] = lambda model: model,
) -> Trained:
    """Train like a run with one worker. Flags that are null are decided as in a run.

    Args:
        config: the flags.
        train: training images.
        held_out: images to validate on.
        weights: file of weights that the backbone begins with.
        teacher: a network to learn from, too.
        evaluate_every: epochs between evaluations on the held-out images; the last epoch of a phase is always
            evaluated. An epoch that is not evaluated leaves no `Passed`, and cannot be the best.
        variant: gives another network in place of the one that the config describes.
    """
    import keras

    from cnnray.training.step import Steps

    class VariantSteps(Steps):
        @staticmethod
        def _build(config: PlannedConfig, classes: int, policy: str) -> Any:
            return variant(Steps._build(config, classes, policy))

    keras.backend.clear_session()
    counts = np.bincount(train.targets).tolist()
    facts = decisions.DataFacts(images=len(train.targets), classes=len(counts), side=train.images.shape[1])
    decided = plan.planned(decisions.decide(config, facts)[0])
    class_weights = recipe.class_weights(decided, counts)
    steps = VariantSteps(decided, len(counts), weights=weights, teacher=teacher, class_weights=class_weights)
    per_epoch, number, zeros, seconds = epoch.steps(len(train.targets), decided.batch_size), 0, 0.0, 0.0
    passed: list[Passed] = []
    best: tuple[float, Any] = (np.inf, None)
    phases = decided.resolved_phases
    for phase in phases:
        steps.begin(phase, per_epoch)
        for phase_epoch in range(phase.passes):
            started, losses = time.perf_counter(), 0.0
            ordered = epoch.Epoch(decided.seed, number, len(train.targets), decided.batch_size)
            for step in range(per_epoch):
                steps.prune_at(phase_epoch * per_epoch + step, per_epoch, phase, zeros)
                rows = ordered.rows(step)
                started_step = steps.start(train.images[rows], train.targets[rows], position=(number, step, 0))
                losses += started_step.result().loss
            steps.update_inference()
            seconds += time.perf_counter() - started
            number += 1
            if number % evaluate_every and phase_epoch < phase.passes - 1:
                continue
            loss, accuracy = _evaluate(steps, held_out)
            passed.append(Passed(number * len(train.targets), seconds, losses / len(train.targets), loss, accuracy))
            score = epoch_score(decided.select, {"val_accuracy": accuracy, "val_loss": loss})
            if phase is phases[-1] and not (phase.sparsity and phase_epoch < phase.passes / 2) and score < best[0]:
                best = score, steps.inference.get_weights()
        zeros = max(zeros, phase.sparsity)
    if best[1] is not None:  # no loss was a number
        steps.inference.set_weights(best[1])
    return Trained(steps.inference, _evaluate(steps, held_out)[1], passed, decided)


def _evaluate(steps: Any, data: Labelled) -> tuple[float, float]:
    """The mean loss in nats, and the accuracy."""
    count = len(data.targets)
    size = min(_AT_ONCE, count)
    parts = [
        steps.evaluate(data.images[start : start + size], data.targets[start : start + size], size)[0]
        for start in range(0, count, size)
    ]
    return sum(part.loss for part in parts) / count, sum(part.correct for part in parts) / count


def measure_accuracy(model: Any, data: Labelled) -> float:
    """Share of the images whose most probable class is the right one."""
    parts = [model(data.images[start : start + 256], training=False) for start in range(0, len(data.targets), 256)]
    return float((np.concatenate(parts).argmax(-1) == data.targets).mean())
