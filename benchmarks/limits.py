"""What answers know of their limits: how often a guaranteed precision is missed, and how foreign images are found.

**Guarantee.** The held-out images of a set are the population. Of it, images are drawn with replacement to calibrate
thresholds, again and again; the precision of the answers on the whole population says each time whether the guarantee
was kept. With a certainty of 95 %, it may be missed in 5 % of the draws.

**Foreign images.** A network is trained on the first five classes of a set. Scores of how far an image is from these
are compared by the area under the ROC curve (AUROC), between held-out images of the five classes and foreign images:
of the other classes, noise, and those of another set.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.special
import scipy.stats
import sklearn.covariance
import sklearn.metrics
import sklearn.neighbors

from benchmarks import data_sets, report, runs
from benchmarks.data_sets import SIZE
from benchmarks.trainer import make_config, train_network
from cnnray.evaluation import selective

Floats = npt.NDArray[np.float64]

SEEDS = (0, 1, 2)
SETS = {"fashion": "cifar10", "cifar10": "emojis", "letters": "cifar10", "cluttered digits": "cifar10"}
"""The sets, each with the one whose images are foreign to it."""
_DRAWS, _CALIBRATION, _PRECISIONS, _CERTAINTY = 200, 1000, (0.95, 0.99), 0.95
_EPOCHS, _NOISE = 12, 500
_NEIGHBOURS = 10


# -- guarantee ------------------------------------------------------------------------------------------------


def measure(folder: Path) -> str:
    """Measure both.

    Args:
        folder: holds npm's packages (see `data_sets.NPM`); results are kept here, and the measurement goes on with
            them.

    Returns:
        Two Markdown tables.
    """
    guarantees = runs.complete(
        folder / "guarantees.jsonl", [(name,) for name in SETS], functools.partial(measure_guarantee, folder=folder)
    )
    allowed = scipy.stats.binom.ppf(0.975, _DRAWS, 1 - _CERTAINTY) / _DRAWS
    lines = [
        f"| set | accuracy | precision asked for | a threshold in | missed (chance: up to {allowed:.1%}) | coverage "
        "| candidates hold the class | candidates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name,), result in guarantees.items():
        for row in result["rows"]:
            cells = [f"{row[key]:.1%}" for key in ("found", "missed", "coverage", "candidate_coverage")]
            lines.append(
                f"| {name} | {result['accuracy']:.3f} | {row['precision']} | {' | '.join(cells)} | "
                f"{row['mean_candidates']:.1f} |"
            )
    keys = [(name, seed) for seed in SEEDS for name in SETS]
    foreign = runs.complete(folder / "foreign.jsonl", keys, functools.partial(measure_foreign, folder=folder))
    lines += ["", f"| set | foreign images | {' | '.join(SCORES)} |", "|---|---|" + "---|" * len(SCORES)]
    for name in SETS:
        for kind in foreign[name, SEEDS[0]]:
            cells = [report.mean_and_spread([foreign[name, seed][kind][score] for seed in SEEDS]) for score in SCORES]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_guarantee(name: str, *, folder: Path) -> dict[str, Any]:
    """Calibrate thresholds on many draws from the held-out images of a set."""
    data = data_sets.load(name, folder)
    # Not at its best: a network that is always right has nothing to withhold.
    trained = train_network(_config(epochs=4), data.train, data.held_out, evaluate_every=4)
    probabilities, targets = _outputs(trained.model, data.held_out.images).probabilities, data.held_out.targets
    rows = []
    for precision in _PRECISIONS:
        measured, missed = [], 0
        for seed in range(_DRAWS):
            drawn = np.random.default_rng(seed).integers(0, len(targets), _CALIBRATION)
            threshold = selective.find_threshold(
                probabilities[drawn], targets[drawn], precision=precision, certainty=_CERTAINTY
            )
            if threshold is not None:
                answers = selective.measure_answers(threshold, probabilities, targets)
                measured.append(answers)
                missed += answers["precision"] is not None and answers["precision"] < precision
        means = {
            key: float(np.mean([row[key] for row in measured if row[key] is not None]))
            for key in ("coverage", "candidate_coverage", "mean_candidates")
        }
        rows.append({"precision": precision, "found": len(measured) / _DRAWS, "missed": missed / _DRAWS} | means)
    return {"accuracy": trained.accuracy, "rows": rows}


# -- foreign images -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """What a network gives for N images."""

    logits: Floats
    """float64 (N, classes)."""
    embeddings: Floats
    """float64 (N, features)."""

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """float32 (N, classes)."""
        return np.asarray(scipy.special.softmax(self.logits, axis=1), np.float32)


@dataclass(frozen=True)
class Known:
    """What a network gives for its training images."""

    outputs: Outputs
    targets: npt.NDArray[np.int64]

    @functools.cached_property
    def centres(self) -> Floats:
        """The mean embedding of each class."""
        return np.stack([self.outputs.embeddings[self.targets == c].mean(0) for c in np.unique(self.targets)])

    @functools.cached_property
    def precision(self) -> Floats:
        """Inverse of the covariance of the embeddings around the centres of their classes, by Ledoit and Wolf."""
        return _inverse_covariance(self.outputs.embeddings - self.centres[self.targets])

    @functools.cached_property
    def whole(self) -> tuple[Floats, Floats]:
        """Mean of all embeddings, and the inverse of their covariance."""
        mean = self.outputs.embeddings.mean(0)
        return mean, _inverse_covariance(self.outputs.embeddings - mean)

    @functools.cached_property
    def neighbours(self) -> sklearn.neighbors.NearestNeighbors:
        """Finds the nearest embeddings, of length 1."""
        return sklearn.neighbors.NearestNeighbors(n_neighbors=_NEIGHBOURS).fit(_unit(self.outputs.embeddings))


def _inverse_covariance(centred: Floats) -> Floats:
    return np.asarray(sklearn.covariance.LedoitWolf(assume_centered=True).fit(centred).precision_)


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float64)


def _squared_distances(vectors: Floats, precision: Floats) -> Floats:
    return np.asarray(np.einsum("ni,ij,nj->n", vectors, precision, vectors), np.float64)


def _mahalanobis(outputs: Outputs, known: Known) -> Floats:
    """Lee et al., arXiv:1807.03888: squared distance to the nearest class, on the last layer's input alone."""
    distances = [_squared_distances(outputs.embeddings - centre, known.precision) for centre in known.centres]
    return np.asarray(np.min(distances, axis=0), np.float64)


def _relative_mahalanobis(outputs: Outputs, known: Known) -> Floats:
    """Ren et al., arXiv:2106.09022: less the distance to all classes together."""
    mean, precision = known.whole
    return _mahalanobis(outputs, known) - _squared_distances(outputs.embeddings - mean, precision)


def _nearest(outputs: Outputs, known: Known) -> Floats:
    """Sun et al., arXiv:2204.06507: distance to the k-th nearest training image."""
    distances, _ = known.neighbours.kneighbors(_unit(outputs.embeddings))
    return np.asarray(distances[:, -1], np.float64)


SCORES: dict[str, Callable[[Outputs, Known], Floats]] = {
    # Hendrycks and Gimpel, arXiv:1610.02136.
    "1 - confidence": lambda outputs, known: 1.0 - outputs.probabilities.max(1).astype(np.float64),
    # Hendrycks et al., arXiv:1911.11132.
    "- largest logit": lambda outputs, known: -outputs.logits.max(1),
    # Liu et al., arXiv:2010.03759.
    "energy": lambda outputs, known: -scipy.special.logsumexp(outputs.logits, axis=1),
    "Mahalanobis": _mahalanobis,
    "relative Mahalanobis": _relative_mahalanobis,
    f"{_NEIGHBOURS}th neighbour": _nearest,
}
"""Scores by name: larger for images that are further from the training's."""


def measure_foreign(name: str, seed: int, *, folder: Path) -> dict[str, dict[str, float]]:
    """The AUROC of each score for each kind of foreign images."""
    data, other = data_sets.load(name, folder), data_sets.load(SETS[name], folder)
    train, held_out = (part.subset(part.targets < 5) for part in (data.train, data.held_out))
    trained = train_network(_config(epochs=_EPOCHS, seed=seed), train, held_out, evaluate_every=_EPOCHS)
    known = Known(_outputs(trained.model, train.images), train.targets)
    noise = np.random.default_rng(seed).integers(0, 256, (_NOISE, SIZE, SIZE, 3), np.uint8)
    kinds = {
        "the other classes": data.held_out.subset(data.held_out.targets >= 5).images,
        "noise": noise,
        SETS[name]: other.held_out.images,
    }
    of_known = _outputs(trained.model, held_out.images)
    return {
        kind: {score: _auroc(of(of_known, known), of(_outputs(trained.model, images), known))
               for score, of in SCORES.items()}
        for kind, images in kinds.items()
    }  # fmt: skip


def _auroc(known: Floats, foreign: Floats) -> float:
    truth = np.repeat([0, 1], [len(known), len(foreign)])
    return float(sklearn.metrics.roc_auc_score(truth, np.concatenate([known, foreign])))


def _config(**flags: Any) -> Any:
    return make_config(architecture="resnet9_small", **flags)


def _outputs(model: Any, images: data_sets.Pixels) -> Outputs:
    import keras

    last = model.get_layer("logits")
    network = keras.Model(model.inputs, [last.output, last.input])
    logits, embeddings = network.predict(images, batch_size=256, verbose=0)
    return Outputs(logits.astype(np.float64), embeddings.astype(np.float64))
