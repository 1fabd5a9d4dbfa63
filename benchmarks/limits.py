"""What answers know of their limits: how often a guaranteed precision is missed, and how foreign images are found.

**Guarantee.** The held-out images of a set are the population. Of it, images are drawn with replacement to calibrate
thresholds, again and again; the precision of the answers on the whole population says each time whether the guarantee
was kept. With a certainty of 95 %, it may be missed in 5 % of the draws.

**Foreign images.** A network is trained on the first half of a set's classes. Scores of how foreign an image is to
these are compared by the area under the ROC curve (AUROC), between held-out images of these classes and foreign
images: of the other classes, noise, crops of photographs, and another set. The threshold of each score is set on half
of the held-out images, for 5 % of false alarms; the false alarms are counted among the other half.
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
import sklearn.datasets
import sklearn.metrics
import sklearn.neighbors
from PIL import Image

from benchmarks import data_sets, report, runs
from benchmarks.data_sets import SIZE
from benchmarks.trainer import make_config, train_network
from cnnray.evaluation import selective
from cnnray.models.answers import Rules

Floats = npt.NDArray[np.float64]

SEEDS = (0, 1, 2)
SETS = {"fashion": "cifar10", "cifar10": "emojis", "letters": "cifar10", "cluttered digits": "cifar10"}
"""The sets, each with the one whose images are foreign to it."""
_DRAWS, _CALIBRATION, _PRECISIONS, _CERTAINTY = 200, 1000, (0.95, 0.99), 0.95
_EPOCHS, _DRAWN, _FALSE_ALARMS = 12, 500, 0.05


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
    for quantity in ("AUROC", "found"):
        header = f"| set | foreign images ({quantity}) | {' | '.join(SCORES)} |"
        lines += ["", header, "|---|---|" + "---|" * len(SCORES)]
        for name in SETS:
            for kind in foreign[name, SEEDS[0]]:
                of_seeds = [foreign[name, seed][kind] for seed in SEEDS]
                cells = [report.mean_and_spread([row[score][quantity] for row in of_seeds]) for score in SCORES]
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
                answers = selective.measure_answers(Rules(threshold=threshold), probabilities, targets)
                measured.append(answers)
                missed += answers["precision"] is not None and answers["precision"] < precision
        means = {}
        for key in ("coverage", "candidate_coverage", "mean_candidates"):
            known = [value for row in measured if (value := row[key]) is not None]
            means[key] = float(np.mean(known)) if known else 0.0
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

    def distances(self, outputs: Outputs, neighbour: int, images: int | None = None) -> Floats:
        """Distances to the nearest embeddings of (so many of) the training images, all of length 1."""
        known = _unit(self.outputs.embeddings)
        if images is not None:
            known = known[np.random.default_rng(0).permutation(len(known))[:images]]
        found = sklearn.neighbors.NearestNeighbors(n_neighbors=neighbour).fit(known)
        return np.asarray(found.kneighbors(_unit(outputs.embeddings))[0][:, -1], np.float64)


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


SCORES: dict[str, Callable[[Outputs, Known], Floats]] = {
    # Hendrycks and Gimpel, arXiv:1610.02136.
    "1 - confidence": lambda outputs, known: 1.0 - outputs.probabilities.max(1).astype(np.float64),
    # Hendrycks et al., arXiv:1911.11132.
    "- largest logit": lambda outputs, known: -outputs.logits.max(1),
    # Liu et al., arXiv:2010.03759.
    "energy": lambda outputs, known: -scipy.special.logsumexp(outputs.logits, axis=1),
    "Mahalanobis": _mahalanobis,
    "relative Mahalanobis": _relative_mahalanobis,
    # Sun et al., arXiv:2204.06507.
    "1st neighbour": lambda outputs, known: known.distances(outputs, 1),
    "10th neighbour": lambda outputs, known: known.distances(outputs, 10),
    "1st of 1,000": lambda outputs, known: known.distances(outputs, 1, 1000),
}
"""Scores by name: larger for images that are further from the training's."""


def measure_foreign(name: str, seed: int, *, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of foreign images and score, the AUROC, and the share that is found; also the share of false alarms."""
    data, other = data_sets.load(name, folder), data_sets.load(SETS[name], folder)
    half = (int(data.train.targets.max()) + 1) // 2
    train, held_out = (part.subset(part.targets < half) for part in (data.train, data.held_out))
    trained = train_network(_config(epochs=_EPOCHS, seed=seed), train, held_out, evaluate_every=_EPOCHS)
    known = Known(_outputs(trained.model, train.images), train.targets)
    generator = np.random.default_rng(seed)
    kinds = {
        "other classes": data.held_out.subset(data.held_out.targets >= half).images,
        "noise": generator.integers(0, 256, (_DRAWN, SIZE, SIZE, 3), np.uint8),
        "photographs": _photographs(generator),
        SETS[name]: other.held_out.images,
    }
    order = generator.permutation(len(held_out.targets))
    calibrated, fresh = (held_out.images[rows] for rows in np.array_split(order, 2))
    of_fresh, of_calibrated = _outputs(trained.model, fresh), _outputs(trained.model, calibrated)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for kind, images in {"none: false alarms": fresh, **kinds}.items():
        of_kind, results[kind] = _outputs(trained.model, images), {}
        for score, of in SCORES.items():
            scores = of(of_kind, known)
            threshold = np.quantile(of(of_calibrated, known), 1 - _FALSE_ALARMS, method="higher")
            found = float((scores > threshold).mean())
            results[kind][score] = {"AUROC": _auroc(of(of_fresh, known), scores), "found": found}
    return results


def _photographs(generator: np.random.Generator) -> data_sets.Pixels:
    """Crops of scikit-learn's two photographs."""
    photos, crops = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images], []
    for number in range(_DRAWN):
        photo, side = photos[number % 2], int(generator.integers(40, 400))
        left, top = (int(generator.integers(0, length - side)) for length in photo.size)
        crops.append(np.asarray(photo.resize((SIZE, SIZE), box=(left, top, left + side, top + side), reducing_gap=3)))
    return np.stack(crops)


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
