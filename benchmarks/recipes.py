"""The study of training recipes: networks and flags, by held-out accuracy after the same time, on nine data sets.

Networks train in this process's children, without Ray, with the same steps as on training's workers. The time of a
run is counted in the images that it sees, at its recipe's rate on all cores, so that other load changes no result.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data_sets, networks, recipe_tables, runs
from benchmarks.data_sets import DataSet, Labelled
from benchmarks.recipe_tables import Study
from benchmarks.trainer import Trained, make_config, train_network
from cnnray.models.augment import Augmentations
from cnnray.training import decisions
from cnnray.training.decided import DecidedConfig
from cnnray.training.recipe_config import Effort

SECONDS = 60
"""Time to train, on all cores."""
SEEDS = (0, 1, 2)
BEFORE, DEFAULT = "before", "resnet9_small"
"""The recipe that was the default, with ten epochs, and the one that is (see `decisions`)."""
PEERS = ("article", "timm", "airbench")
PRESETS: tuple[Effort, ...] = ("quick", "default", "accurate")
_SETS_OF_PRESETS = ("fashion", "cifar10", "emojis", "shapes")
"""Those on which the default's accuracy is not near its end."""
_EPOCHS_BEFORE = 10
_CONFIRMED = 3
"""How many changes of the default, those with the fewest errors, get all seeds."""


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
_COLOURS: dict[str, Any] = {"contrast": 0.2, "brightness": 0.1, "saturation": 0.2}

RECIPES: dict[str, Recipe] = {
    BEFORE: Recipe(
        {"architecture": "vgg_bn", **_LIGHT}, variant=lambda model, data: networks.usual_first_kernels(model)
    ),
    "resnet9_small": Recipe(_SMALL),
    "resnet9": Recipe(_SMALL | {"architecture": "resnet9"}),
    "article": Recipe(
        {"architecture": "vgg_bn", "augment": "none", "learning_rate": 0.001, "optimizer": "adam",
         "schedule": "constant",
         "augmentations": Augmentations(rotation=0.1, zoom=0.1, contrast=0.1, translation=0.1)},
        variant=lambda model, data: networks.usual_first_kernels(model),
    ),
    # timm's train.py with its defaults: SGD of 0.1 for 256 images, random crops, changed colours, half mirrored.
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
    "half as light": Recipe(
        _SMALL | {"augmentations": Augmentations(rotation=0.015, zoom=0.05, translation=0.05)}
    ),
    "light, colours": Recipe(_SMALL | {"augmentations": Augmentations(**_COLOURS)}),
    "crops, colours": Recipe(
        _SMALL | {"augment": "none", "augmentations": Augmentations(rotation=0.03, crop=0.8, **_COLOURS)}
    ),
    "label smoothing 0.1": Recipe(_SMALL | {"label_smoothing": 0.1}),
    "learning rate 0.006": Recipe(_SMALL | {"learning_rate": 0.006}),
    "warm-up 0.2": Recipe(_SMALL, warmup=0.2),
    "weight decay 0.05": Recipe(_SMALL | {"weight_decay": 0.05}),
    "average 0.99": Recipe(_SMALL | {"average": 0.99}),
    "batch 32": Recipe(_SMALL | {"batch_size": 32}),
    "Haar": Recipe(_SMALL, variant=lambda model, data: networks.haar(model)),
}  # fmt: skip


def measure(folder: Path, data: str | None = None) -> str:
    """Run what is left of the study, nine hours in all on 2 cores.

    Args:
        folder: holds npm's packages (see `data_sets.NPM`); results are kept here, and the study goes on with them;
            the chart `recipes.png` is written here.
        data: the user's labelled images. If given, only they are learned, by the default, the former one and peers.

    Returns:
        Markdown tables.
    """
    compared = [BEFORE, DEFAULT, *PEERS]
    others = [] if data else [name for name in RECIPES if name not in (BEFORE, DEFAULT, *PEERS)]
    names = dict.fromkeys([*compared, *others])
    rates = runs.complete(folder / "rates.jsonl", [(name,) for name in names], measure_rate, processes=1)
    sets = [data] if data else data_sets.NAMES
    images = {set_: len(data_sets.load(set_, folder).train.targets) for set_ in sets}
    held_out = {set_: len(data_sets.load(set_, folder).held_out.targets) for set_ in sets}

    def run(
        trainings: Iterable[tuple[str, str, int]],
        epochs: Callable[[str, str], int],
        recipe: Callable[[str], str] = lambda name: name,
    ) -> Study:
        """Train on sets, by the recipes of some names, with seeds."""
        keys = {(set_, name, seed): (set_, recipe(name), seed, epochs(set_, name)) for set_, name, seed in trainings}
        results = runs.complete(
            folder / "recipes.jsonl", keys.values(), functools.partial(measure_accuracy, npm=folder)
        )
        curves = {of: results[key]["epochs"] for of, key in keys.items()}
        return Study(curves, {name: rates[recipe(name),]["images_per_second"] for _, name, _ in keys}, held_out)

    def in_time(set_: str, name: str) -> int:
        """The number of epochs that comes nearest to the time, rounded up."""
        per_second: float = rates[name,]["images_per_second"]
        return max(1, math.ceil(SECONDS * per_second / images[set_] - 0.5))

    def as_decided(set_: str, name: str) -> int:
        return _EPOCHS_BEFORE if name == BEFORE else _decide(images[set_]).epochs

    same_time = run(itertools.product(images, compared, SEEDS), in_time)
    own_time = run(itertools.product(images, (BEFORE, DEFAULT), SEEDS), as_decided)
    recipe_tables.draw(same_time, compared, folder / "recipes.png")
    tables = [recipe_tables.accuracies(same_time), recipe_tables.times(own_time, BEFORE, DEFAULT)]
    if others:
        tried = run(itertools.product(images, (DEFAULT, *others), SEEDS[:1]), in_time)
        best = sorted(others, key=lambda name: recipe_tables.relative_error(tried, name, DEFAULT))[:_CONFIRMED]
        confirmed = run(itertools.product(images, (DEFAULT, *best, BEFORE), SEEDS), in_time)
        tables += [recipe_tables.accuracies(study) for study in (tried, confirmed)]
        tables.append(recipe_tables.leave_one_set_out(confirmed, BEFORE))
        presets = run(
            itertools.product(_SETS_OF_PRESETS, PRESETS, SEEDS[:1]),
            lambda set_, preset: _decide(images[set_], preset).epochs,
            lambda preset: _decide(max(images.values()), preset).architecture,
        )
        tables.append(recipe_tables.accuracies(presets))
    return "\n\n".join(tables)


def measure_rate(name: str) -> dict[str, Any]:
    """The rate at which a recipe trains on all threads of this process, in images/s: the best of eight epochs."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (640, data_sets.SIZE, data_sets.SIZE, 3), np.uint8)
    some = Labelled(images, np.arange(len(images)) % 10)
    passed = _train(RECIPES[name], DataSet(some, some.subset(slice(64))), 9, 0).epochs
    seconds = np.diff([each.seconds for each in passed])
    return {"images_per_second": float(len(images) / seconds.min())}


def measure_accuracy(set_: str, name: str, seed: int, epochs: int, *, npm: Path) -> dict[str, Any]:
    """Train on a set.

    Returns:
        The held-out `accuracy` of the bundle, and of each of the `epochs` the images seen so far, the training loss,
        the held-out loss and the held-out accuracy.
    """
    trained = _train(RECIPES[name], data_sets.load(set_, npm), epochs, seed)
    passed = [[each.images, each.loss, each.held_out_loss, each.accuracy] for each in trained.epochs]
    return {"accuracy": trained.accuracy, "epochs": passed}


def _train(recipe: Recipe, data: DataSet, epochs: int, seed: int) -> Trained:
    flags = dict(recipe.flags)
    if flags.get("schedule", "cosine") == "cosine":
        flags["warmup_epochs"] = recipe.warmup * epochs
    config = make_config(epochs=epochs, seed=seed, **flags)
    return train_network(config, data.train, data.held_out, variant=lambda model: recipe.variant(model, data))


def _decide(images: int, preset: str = "default") -> DecidedConfig:
    facts = decisions.DataFacts(images=images, classes=10, side=data_sets.SIZE)
    return decisions.decide(make_config(preset=preset), facts)[0]
