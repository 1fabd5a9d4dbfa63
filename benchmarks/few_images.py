"""Few images of each class: networks that begin with random weights, and with those of other data sets.

For each set, a backbone is trained on all sets that show other things. The set's classes are then learned from a few
images each, by all weights or by a linear head on the frozen backbone.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data_sets, report, runs
from benchmarks.data_sets import SIZE, Labelled
from benchmarks.trainer import make_config, train_network
from cnnray.models import bundle as bundles
from cnnray.models.bundle import BundleInfo
from cnnray.training.phases import PRESETS, Phase

SEEDS = (0, 1, 2)
IMAGES_OF_CLASS = (10, 30, 100, 300)
SETS = ("fashion", "cifar10", "emojis", "coloured digits", "letters", "shapes")
_DIGITS = ("digits", "mnist", "coloured digits", "cluttered digits")
"""Sets that show the same things; none of them is in the backbone of another."""
_BACKBONE_SEES = 150_000
"""Images, over all epochs."""
_SEEN = 20_000
"""Images that each training on few images sees, over all epochs."""
STARTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "random weights": (False, {}),
    "all of the other sets' weights": (True, {}),
    "the same, learning rate 0.001": (True, {"learning_rate": 0.001}),
    "a linear head on them": (True, {"phases": [Phase(name="head", trainable=0.0)]}),
    "the head, then all": (True, {"phases": list(PRESETS["head-first"])}),
}
"""By name, whether a training begins with the backbone, and its flags."""


def measure(folder: Path) -> str:
    """Measure the held-out accuracy for each number of images and each start.

    Args:
        folder: holds npm's packages (see `data_sets.NPM`); backbones and results are kept here, and the measurement
            goes on with them.

    Returns:
        A Markdown table: rows of sets and numbers of images, the mean and the standard deviation over the seeds.
    """
    runs.complete(
        folder / "backbones.jsonl", [(name,) for name in SETS], functools.partial(train_backbone, folder=folder)
    )
    rows = [
        (name, count)
        for name in SETS
        for count in IMAGES_OF_CLASS
        if np.median(np.bincount(data_sets.load(name, folder).train.targets)) >= count
    ]
    keys = [(name, count, start, seed) for seed in SEEDS for name, count in rows for start in STARTS]
    results = runs.complete(folder / "few_images.jsonl", keys, functools.partial(measure_accuracy, folder=folder))
    lines = [f"| set | images of a class | {' | '.join(STARTS)} |", "|---|---|" + "---|" * len(STARTS)]
    for name, count in rows:
        cells = [
            report.mean_and_spread([results[name, count, start, seed]["accuracy"] for seed in SEEDS])
            for start in STARTS
        ]
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def train_backbone(name: str, *, folder: Path) -> dict[str, Any]:
    """Train a network on all classes of the sets that show other things than the named one, and keep its bundle."""
    alike = _DIGITS if name in _DIGITS else (name,)
    others = [data_sets.load(other, folder) for other in data_sets.NAMES if other not in alike]
    train, held_out = (join([getattr(each, part) for each in others]) for part in ("train", "held_out"))
    config = make_config(architecture="resnet9_small", epochs=max(1, round(_BACKBONE_SEES / len(train.targets))))
    trained = train_network(config, train, held_out)
    names = [str(number) for number in range(int(train.targets.max()) + 1)]
    bundles.save(trained.model, BundleInfo(class_names=names, image_size=SIZE), _backbone(folder, name))
    return {"accuracy": trained.accuracy, "images": len(train.targets), "classes": len(names)}


def measure_accuracy(name: str, images_of_class: int, start: str, seed: int, *, folder: Path) -> dict[str, Any]:
    """Train on a few images of each class, and give the accuracy on the held-out images."""
    data = data_sets.load(name, folder)
    generator = np.random.default_rng(seed)
    classes = range(int(data.train.targets.max()) + 1)
    chosen = np.concatenate(
        [generator.permutation(np.flatnonzero(data.train.targets == c))[:images_of_class] for c in classes]
    )
    transfers, flags = STARTS[start]
    epochs = max(1, round(_SEEN / len(chosen) / len(flags.get("phases", [None]))))
    config = make_config(architecture="resnet9_small", **{"epochs": epochs, "seed": seed} | flags)
    weights = _backbone(folder, name) / bundles.MODEL if transfers else None
    trained = train_network(config, data.train.subset(chosen), data.held_out, weights=weights, evaluate_every=epochs)
    return {"accuracy": trained.accuracy}


def join(sets: list[Labelled]) -> Labelled:
    """All images of several sets, each with classes of its own."""
    counts = [int(data.targets.max()) + 1 for data in sets]
    firsts = np.cumsum([0, *counts[:-1]])
    targets = [data.targets + first for data, first in zip(sets, firsts, strict=True)]
    return Labelled(np.concatenate([data.images for data in sets]), np.concatenate(targets))


def _backbone(folder: Path, name: str) -> Path:
    return folder / "backbones" / name.replace(" ", "-")
