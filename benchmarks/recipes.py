"""The study of training recipes: networks and flags, by held-out accuracy after the same time, on nine data sets.

Networks train in this process's children, without Ray, with the same steps as on training's workers. A run is told by
the images that it sees in the time, at the rate of its recipe on all cores, so that other load does not change results.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data_sets, networks, runs
from benchmarks.data_sets import DataSet
from benchmarks.trainer import Trained, make_config, train_network
from cnnray.models.augment import Augmentations

log = logging.getLogger(__name__)

SECONDS = 60
"""Time to train, on all cores."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained."""

    flags: dict[str, Any]
    """Of jobs/train.py, except the epochs."""
    warmup: float = 0.1
    """Share of the steps."""
    variant: Callable[[Any, DataSet], Any] = field(default=lambda model, data: model)
    """Gives another network in place of the one of the flags."""


_LIGHT: dict[str, Any] = {"augment": "light", "learning_rate": 0.003, "weight_decay": 0.01, "batch_size": 64}
_SMALL = {"architecture": "resnet9_small", **_LIGHT}
_COLOURS = {"contrast": 0.2, "brightness": 0.1, "saturation": 0.2}
_PHOTOGRAPHS = {"rotation": 0.03, "crop": 0.8, **_COLOURS}

RECIPES: dict[str, Recipe] = {
    "before": Recipe({"architecture": "vgg_bn", **_LIGHT}, variant=lambda model, data: networks.usual_first_kernels(model)),
    "resnet9_small": Recipe(_SMALL),
    "resnet9": Recipe({"architecture": "resnet9", **_LIGHT}),
    "article": Recipe(
        {"architecture": "vgg_bn", "augment": "none", "learning_rate": 0.001, "optimizer": "adam",
         "schedule": "constant",
         "augmentations": Augmentations(rotation=0.1, zoom=0.1, contrast=0.1, translation=0.1)},
        variant=lambda model, data: networks.usual_first_kernels(model),
    ),
    # timm's train.py with its defaults: SGD of 0.1 for 256 images, five epochs of warm-up, random crops, half mirrored.
    "timm": Recipe(
        {"architecture": "resnet9", "augment": "none", "optimizer": "sgd", "learning_rate": 0.025,
         "weight_decay": 2e-5, "label_smoothing": 0.1,
         "augmentations": Augmentations(
             crop=0.08, horizontal_flip=True, contrast=0.4, brightness=0.4, saturation=0.4)},
    ),
    # airbench94 (Jordan 2024), for batches of 64 instead of 1,024, its learning rate in proportion.
    "airbench": Recipe(
        {"architecture": "resnet9", "augment": "none", "optimizer": "sgd", "learning_rate": 0.1,
         "weight_decay": 0.005, "label_smoothing": 0.2, "average": 0.99,
         "augmentations": Augmentations(translation=0.0625, horizontal_flip=True)},
        warmup=0.2,
        variant=lambda model, data: networks.airbench(data.train.images, model.output_shape[1]),
    ),
    "no augmentation": Recipe(_SMALL | {"augment": "none"}),
    "shifts": Recipe(_SMALL | {"augment": "none", "augmentations": Augmentations(translation=0.1)}),
    "light, colours": Recipe(_SMALL | {"augmentations": Augmentations(**_COLOURS)}),
    "crops, colours": Recipe(_SMALL | {"augment": "none", "augmentations": Augmentations(**_PHOTOGRAPHS)}),
    "label smoothing 0.1": Recipe(_SMALL | {"label_smoothing": 0.1}),
    "learning rate 0.006": Recipe(_SMALL | {"learning_rate": 0.006}),
    "warm-up 0.2": Recipe(_SMALL, warmup=0.2),
    "weight decay 0.05": Recipe(_SMALL | {"weight_decay": 0.05}),
    "average 0.99": Recipe(_SMALL | {"average": 0.99}),
    "batch 32": Recipe(_SMALL | {"batch_size": 32}),
    "Haar": Recipe(_SMALL, variant=lambda model, data: networks.haar(model)),
}  # fmt: skip


@functools.lru_cache(maxsize=None)
def _load(name: str, npm: str) -> DataSet:
    return data_sets.load(name, Path(npm))


def _train(recipe: Recipe, data: DataSet, epochs: int, seed: int) -> Trained:
    flags = dict(recipe.flags)
    if flags.get("schedule", "cosine") == "cosine":
        flags["warmup_epochs"] = recipe.warmup * epochs
    config = make_config(epochs=epochs, seed=seed, **flags)
    return train_network(config, data.train, data.held_out, variant=lambda model: recipe.variant(model, data))


def measure_rate(name: str) -> dict[str, Any]:
    """The rate at which a recipe trains on all threads of this process, in images/s: the best of eight epochs."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (640, data_sets.SIZE, data_sets.SIZE, 3), np.uint8)
    some = data_sets.Labelled(images, np.arange(len(images)) % 10)
    passed = _train(RECIPES[name], DataSet(some, some.subset(slice(64))), 9, 0).epochs
    seconds = np.diff([each.seconds for each in passed])
    return {"images_per_second": float(len(images) / seconds.min())}


def measure_accuracy(set_: str, name: str, seed: int, epochs: int, *, npm: str) -> dict[str, Any]:
    """Train on a set, and give the accuracy of the bundle, and what stood after each epoch."""
    trained = _train(RECIPES[name], _load(set_, npm), epochs, seed)
    passed = [[each.images, each.loss, each.held_out_loss, each.accuracy] for each in trained.epochs]
    return {"accuracy": trained.accuracy, "epochs": passed}


def epochs_in(seconds: float, images_per_second: float, images: int) -> int:
    """The epochs that fill the time, at least one."""
    return max(1, math.ceil(seconds * images_per_second / images - 0.5))


def measure(folder: Path) -> str:
    """Run what is left of the study.

    Args:
        folder: holds npm's packages (see `data_sets.NPM`); results are kept here, and the study goes on with them.

    Returns:
        Markdown tables.
    """
    rates = runs.complete(folder / "rates.jsonl", [(name,) for name in RECIPES], measure_rate, processes=1)
    keys = []
    for seed in SEEDS:
        for name in RECIPES:
            for set_ in data_sets.NAMES:
                images = len(_load(set_, str(folder)).train.targets)
                epochs = epochs_in(SECONDS, rates[name,]["images_per_second"], images)
                keys.append((set_, name, seed, epochs))
    runs.complete(folder / "recipes.jsonl", keys, functools.partial(measure_accuracy, npm=str(folder)))
    return ""
