"""Comparison of training recipes by held-out accuracy over several seeds, on data sets that come with packages.

Networks train in this process, without Ray, with the same steps as on training's workers.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import few_images, report, small_networks
from benchmarks.data_sets import SIZE, Labelled, load_digits, load_small_mnist, split
from benchmarks.trainer import make_config, train_network
from cnnray.images import manifest as manifests
from cnnray.images import storage
from cnnray.images.reading import decoded_blocks
from cnnray.models import startup
from cnnray.models.augment import Augmentations

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
        few_images.transfer_table(folder),
        small_networks.measure(folder),
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
                config = make_config(architecture=network, epochs=epochs, seed=seed, **flags)
                accuracies.append(train_network(config, train, held_out).accuracy)
                log.info("%s, %s, seed %d: %.4f", name, label, seed, accuracies[-1])
            lines.append(
                report.accuracy_line(f"{name} ({len(data.targets):,}), {network}, {epochs}", label, accuracies)
            )
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
            config = make_config(architecture="small_cnn", epochs=epochs, seed=seed, **flags)
            accuracies.append(train_network(config, *split(data, seed)).accuracy)
        lines.append(report.accuracy_line(f"mnist, small_cnn, {epochs}", label, accuracies))
        log.info("%s", lines[-1])
    return "\n".join(lines)
