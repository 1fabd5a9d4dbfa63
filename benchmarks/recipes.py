"""Comparison of training recipes by held-out accuracy over several seeds, on data sets that come with packages.

Networks train in this process, without Ray, with the same steps as on training's workers.
"""

import gzip
import logging
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.data_sets import SIZE, Labelled, load_digits, load_small_mnist, split
from cnnray.images import manifest as manifests
from cnnray.images import storage
from cnnray.images.reading import decoded_blocks
from cnnray.models import bundle as bundles
from cnnray.models import startup
from cnnray.models.augment import Augmentations
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.training import decisions, epoch, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.phases import Phase

log = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
EPOCHS = {"digits": 12, "mnist": 5}
ARTICLE: dict[str, Any] = {
    # The article's recipe: Adam at a constant rate, and four augmentations.
    "augment": "none",
    "augmentations": Augmentations(rotation=0.1, zoom=0.1, contrast=0.1, translation=0.1),
    "optimizer": "adam",
    "schedule": "constant",
    "learning_rate": 0.001,
    "label_smoothing": 0.0,
    "average": 0.0,
    "clip_norm": None,
}


def load_user_images(source: str) -> Labelled:
    """The user's labelled images, resized to SIZE.

    Raises:
        ManifestError, OSError: there are no images, there is only one class, or an image cannot be decoded.
    """
    manifest = manifests.with_targets(manifests.build_manifest(source, labelled=True))
    blocks = list(decoded_blocks(manifest, SIZE, "stretch", 1024))
    errors = np.concatenate([block["error"] for block in blocks])
    for uri, error in zip(manifest["uri"].to_pylist(), errors, strict=True):
        if error:
            raise manifests.ManifestError(f"{uri}: {error}")
    return Labelled(*(np.concatenate([block[name] for block in blocks]) for name in ("image", "target")))


def train_network(
    config: TrainConfig, train: Labelled, held_out: Labelled, *, weights: Path | None = None, teacher: Any = None
) -> tuple[Any, float]:
    """Train like a run with one worker, with the values that it would decide for flags that are null.

    Returns:
        The network, and its accuracy on the held-out images. Its weights are those of the epoch with the lowest loss
        on these images, as in a bundle. When pruning, only epochs with the final sparsity count.
    """
    import keras

    from cnnray.training.step import Steps

    keras.backend.clear_session()
    counts = np.bincount(train.targets).tolist()
    facts = decisions.DataFacts(images=len(train.targets), classes=len(counts), side=train.images.shape[1])
    config, _ = decisions.decide(config, facts)
    steps = Steps(
        config, len(counts), weights=weights, teacher=teacher, class_weights=recipe.class_weights(config, counts)
    )
    bounds = epoch.step_bounds(len(train.targets), config.batch_size)
    per_epoch, number, zeros = len(bounds) - 1, 0, 0.0
    best: tuple[float, Any] = (np.inf, None)
    phases = config.resolved_phases
    for phase in phases:
        steps.begin(phase, per_epoch)
        for passed in range(phase.passes):
            order = epoch.order(config.seed, number, len(train.targets))
            for step in range(per_epoch):
                steps.prune_at(passed * per_epoch + step, per_epoch, phase, zeros)
                rows = order[bounds[step] : bounds[step + 1]]
                steps.train(train.images[rows], train.targets[rows], position=(number, step, 0))
            number += 1
            steps.update_inference()
            loss = steps.evaluate(held_out.images, held_out.targets, len(held_out.targets)).loss
            if phase is phases[-1] and not (phase.sparsity and passed < phase.passes / 2) and loss < best[0]:
                best = loss, steps.inference.get_weights()
        zeros = max(zeros, phase.sparsity)
    steps.inference.set_weights(best[1])
    return steps.inference, measure_accuracy(steps.inference, held_out)


def measure_accuracy(model: Any, data: Labelled) -> float:
    """Share of the images whose most probable class is the right one."""
    parts = [model(data.images[start : start + 256], training=False) for start in range(0, len(data.targets), 256)]
    return float((np.concatenate(parts).argmax(-1) == data.targets).mean())


def _config(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "data": "/none",
        "output": "/nowhere",
        "architecture": "small_cnn",
        "image_size": SIZE,
    }
    return TrainConfig(**defaults | changes)


def measure(folder: Path, data: str | None = None) -> str:
    """Measure the default recipe against the article's, transfer, and smaller networks, in half an hour on 2 cores.

    Args:
        folder: bundles are written here.
        data: the user's labelled images. If given, only the two recipes are compared, with `vgg_bn` on these images.

    Returns:
        Markdown tables.
    """
    startup.load_tensorflow(gpus=False)
    if data:
        return _compare_with_article([(storage.name(data), load_user_images(data), "vgg_bn", 5)], SEEDS[:1])
    loaders = (("digits", load_digits), ("mnist", load_small_mnist))
    data_sets = [(name, load(), "small_cnn", EPOCHS[name]) for name, load in loaders]
    tables = [
        _compare_with_article(data_sets, SEEDS),
        _compare_single_changes(),
        _transfer_table(folder),
        _compare_smaller_networks(folder),
    ]
    return "\n\n".join(tables)


def _compare_with_article(data_sets: list[tuple[str, Labelled, str, int]], seeds: tuple[int, ...]) -> str:
    """Compare the default recipe with the article's.

    Args:
        data_sets: name, images, architecture and epochs of each.
        seeds: one training each.
    """
    lines = ["| data, network, epochs | recipe | held-out accuracy, by seed | mean |", "|---|---|---|---|"]
    for name, data, network, epochs in data_sets:
        for label, flags in (("the article's", ARTICLE), ("default", {})):
            accuracies = []
            for seed in seeds:
                train, held_out = split(data, seed)
                config = _config(architecture=network, epochs=epochs, seed=seed, **flags)
                accuracies.append(train_network(config, train, held_out)[1])
                log.info("%s, %s, seed %d: %.4f", name, label, seed, accuracies[-1])
            lines.append(_line(f"{name} ({len(data.targets):,}), {network}, {epochs}", label, accuracies))
    return "\n".join(lines)


def _compare_single_changes() -> str:
    """Compare the default recipe with variants that differ in one flag, on MNIST with two seeds."""
    data, epochs = load_small_mnist(), EPOCHS["mnist"]
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "--learning-rate 0.001": {"learning_rate": 1e-3},
        "--learning-rate 0.01": {"learning_rate": 1e-2},
        "--schedule constant": {"schedule": "constant"},
        "--augment none": {"augment": "none"},
        "--augment standard": {"augment": "standard"},
        "--dropout 0.5": {"dropout": 0.5},
        "--dropout 0.2": {"dropout": 0.2},
        "--label-smoothing 0.1": {"label_smoothing": 0.1},
        "--average 0.98": {"average": 0.98},
    }
    lines = ["| data, network, epochs | default, but | held-out accuracy, by seed | mean |", "|---|---|---|---|"]
    for label, flags in changes.items():
        accuracies = []
        for seed in SEEDS[:2]:
            accuracies.append(train_network(_config(epochs=epochs, seed=seed, **flags), *split(data, seed))[1])
        lines.append(_line(f"mnist, small_cnn, {epochs}", label, accuracies))
        log.info("%s", lines[-1])
    return "\n".join(lines)


def _line(setup: str, label: str, accuracies: list[float]) -> str:
    """A table row of the accuracies by seed and their mean."""
    by_seed = ", ".join(f"{value:.4f}" for value in accuracies)
    return f"| {setup} | {label} | {by_seed} | **{statistics.mean(accuracies):.4f}** |"


# -- transfer ---------------------------------------------------------------------------------------------------


def _transfer_table(folder: Path) -> str:
    """The results of `measure_transfer` as a Markdown table."""
    results = measure_transfer(folder, SEEDS, epochs=EPOCHS["digits"], fine_tuning=(5, 10, 20))
    lines = ["| digits 5 to 9 from 10 images each | begins with | accuracy, by seed | mean |", "|---|---|---|---|"]
    lines += [_line(f"small_cnn, {epochs} epochs", label, values) for (epochs, label), values in results.items()]
    return "\n".join(lines)


def measure_transfer(
    folder: Path, seeds: tuple[int, ...], *, epochs: int, fine_tuning: tuple[int, ...]
) -> dict[tuple[int, str], list[float]]:
    """Train networks on ten images each of the digits 5 to 9, from random weights and from those of digits 0 to 4.

    Args:
        folder: bundles are written here.
        seeds: seeds of the networks, and of the choice of the ten images.
        epochs: epochs of the network that learns the digits 0 to 4.
        fine_tuning: numbers of epochs to train on the ten images of each class.

    Returns:
        By epochs and initial weights, the accuracy for each seed on all other images of the digits 5 to 9.
    """
    data = load_digits()
    low, high = data.subset(data.targets < 5), data.subset(data.targets >= 5)
    high = replace(high, targets=high.targets - 5)
    accuracies: dict[tuple[int, str], list[float]] = {}
    for seed in seeds:
        model, _ = train_network(_config(epochs=epochs, seed=seed), low, low)
        source = folder / f"low-{seed}"
        bundles.save(model, BundleInfo(class_names=list("01234"), image_size=SIZE), source)
        generator = np.random.default_rng(seed)
        chosen = np.concatenate([generator.permutation(np.flatnonzero(high.targets == c))[:10] for c in range(5)])
        others = np.setdiff1d(np.arange(len(high.targets)), chosen)
        for fine_tuning_epochs in fine_tuning:
            config = _config(epochs=fine_tuning_epochs, batch_size=10, seed=seed)
            for label, weights in (("random weights", None), ("digits 0 to 4", source / bundles.MODEL)):
                _, accuracy = train_network(config, high.subset(chosen), high.subset(others), weights=weights)
                accuracies.setdefault((fine_tuning_epochs, label), []).append(accuracy)
                log.info("transfer, %d epochs, %s, seed %d: %.4f", fine_tuning_epochs, label, seed, accuracy)
    return accuracies


# -- smaller networks -----------------------------------------------------------------------------------------


def _compare_smaller_networks(folder: Path) -> str:
    """Compare pruned networks, a small one, and a small one distilled from a large one, each in float32 and int8."""
    from cnnray.models.export import ExportConfig, export

    train, held_out = split(load_small_mnist(), 0)
    calibration = _write_images(train.subset(slice(0, 500)), folder / "calibration")
    dense = Phase(name="dense", epochs=5)
    half = Phase(name="50 % zeros", epochs=3, learning_rate=3e-4, sparsity=0.5)
    sparse = replace(half, name="80 % zeros", sparsity=0.8)

    def train_on_mnist(phases: list[Phase], architecture: str = "small_cnn", teacher: Any = None) -> Any:
        return train_network(_config(architecture=architecture, phases=phases), train, held_out, teacher=teacher)[0]

    large = train_on_mnist([dense], "vgg_bn")
    networks: dict[str, Callable[[], Any]] = {
        "vgg_bn": lambda: large,
        "vgg_bn, 50 % zeros": lambda: train_on_mnist([dense, half], "vgg_bn"),
        "vgg_bn, 80 % zeros": lambda: train_on_mnist([dense, half, sparse], "vgg_bn"),
        "small_cnn": lambda: train_on_mnist([dense]),
        "small_cnn, taught by vgg_bn": lambda: train_on_mnist([dense], teacher=large),
    }
    lines = ["| MNIST | file | gzipped bytes | held-out accuracy | images/s |", "|---|---|---|---|---|"]
    base: int | None = None
    for name, train_variant in networks.items():
        model = train_variant()
        target = folder / name.replace(" ", "_")
        bundles.save(model, BundleInfo(class_names=list("0123456789"), image_size=SIZE), target)
        export(ExportConfig(bundle=str(target), calibration=str(calibration), formats=["onnx", "onnx-int8"]))
        reports = Bundle.load(str(target)).info.exports
        for format_, file in (("onnx", "model.onnx"), ("onnx-int8", "model.int8.onnx")):
            size = len(gzip.compress((target / file).read_bytes()))
            base = base or size
            accuracy = _engine_accuracy(str(target), format_, held_out)
            rate = reports[format_]["images_per_second"]["32"]
            lines.append(
                f"| {name} | {file} | {size:,} ({base / size:.1f} times less) | {accuracy:.4f} | {rate:.0f} |"
            )
            log.info("%s", lines[-1])
    return "\n".join(lines)


def _engine_accuracy(bundle: str, engine: str, data: Labelled) -> float:
    from cnnray.models.predictor import Predictor

    probabilities = Predictor(Bundle.load(bundle), engine=engine).probabilities(data.images)
    return float((probabilities.argmax(-1) == data.targets).mean())


def _write_images(data: Labelled, folder: Path) -> Path:
    for index, (image, target) in enumerate(zip(data.images, data.targets, strict=True)):
        path = folder / str(target) / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
