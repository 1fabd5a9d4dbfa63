"""Transfer to a few images: networks that begin with random weights, and with those of other classes."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.data_sets import SIZE, load_digits
from benchmarks.trainer import make_config, train_network
from cnnray.models import bundle as bundles
from cnnray.models.bundle import BundleInfo

log = logging.getLogger(__name__)

SEEDS = (0, 1, 2)


def transfer_table(folder: Path) -> str:
    """The results of `measure_transfer` as a Markdown table."""
    results = measure_transfer(folder, SEEDS, epochs=12, fine_tuning=(5, 10, 20))
    lines = ["| digits 5 to 9 from 10 images each | begins with | accuracy, by seed | mean |", "|---|---|---|---|"]
    lines += [
        report.accuracy_line(f"small_cnn, {epochs} epochs", label, values)
        for (epochs, label), values in results.items()
    ]
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
        model = train_network(make_config(architecture="small_cnn", epochs=epochs, seed=seed), low, low).model
        source = folder / f"low-{seed}"
        bundles.save(model, BundleInfo(class_names=list("01234"), image_size=SIZE), source)
        generator = np.random.default_rng(seed)
        chosen = np.concatenate([generator.permutation(np.flatnonzero(high.targets == c))[:10] for c in range(5)])
        others = np.setdiff1d(np.arange(len(high.targets)), chosen)
        for fine_tuning_epochs in fine_tuning:
            config = make_config(architecture="small_cnn", epochs=fine_tuning_epochs, batch_size=10, seed=seed)
            for label, weights in (("random weights", None), ("digits 0 to 4", source / bundles.MODEL)):
                trained = train_network(config, high.subset(chosen), high.subset(others), weights=weights)
                accuracies.setdefault((fine_tuning_epochs, label), []).append(trained.accuracy)
                log.info("transfer, %d epochs, %s, seed %d: %.4f", fine_tuning_epochs, label, seed, trained.accuracy)
    return accuracies
