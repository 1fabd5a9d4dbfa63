"""What stops a network from learning: one thing changed at a time, where only the shape tells the class.

The data are scikit-learn's digits in random colours on random grounds (`data_sets.load_coloured_digits`).
"""

from pathlib import Path
from typing import Any

from benchmarks import networks, report, runs
from benchmarks.data_sets import load_coloured_digits, split
from benchmarks.networks import Variant, usual_first_kernels
from benchmarks.trainer import make_config, train_network

SEEDS = (0, 1, 2)
_RECIPE: dict[str, Any] = {"augment": "light", "epochs": 16, "learning_rate": 0.003, "weight_decay": 0.01}


def measure(folder: Path) -> str:
    """Measure the held-out accuracy of each change, with three seeds.

    Args:
        folder: results are kept here, and the measurement goes on with them.

    Returns:
        A Markdown table.
    """
    changes = [(network, change) for network, changes in _CHANGES.items() for change in changes]
    keys = [(network, change, seed) for network, change in changes for seed in SEEDS]
    results = runs.complete(folder / "causes.jsonl", keys, measure_accuracy)
    lines = ["| network | one thing changed | held-out accuracy, by seed | mean |", "|---|---|---|---|"]
    for network, change in changes:
        accuracies = [results[network, change, seed]["accuracy"] for seed in SEEDS]
        lines.append(report.accuracy_line(f"`{network}`", change, accuracies))
    return "\n".join(lines)


def measure_accuracy(network: str, change: str, seed: int) -> dict[str, Any]:
    """The held-out accuracy of one training."""
    variant, flags = _CHANGES[network][change]
    config = make_config(**{"architecture": network, "seed": seed} | _RECIPE | flags)
    return {"accuracy": train_network(config, *split(load_coloured_digits(), seed), variant=variant).accuracy}


def _same(model: Any) -> Any:
    return model


def _max_pooling_then_usual(model: Any) -> Any:
    return usual_first_kernels(networks.with_pooling("GlobalMaxPooling2D")(model))


_PLAIN_CHANGES: dict[str, tuple[Variant, dict[str, Any]]] = {
    "as it was: usual first kernels": (usual_first_kernels, {}),
    "first kernels of mean zero (as it is)": (_same, {}),
    "as it was, with global max pooling": (_max_pooling_then_usual, {}),
    "as it was, with a linear head": (usual_first_kernels, {"head": "linear"}),
    "as it was, without dropout": (usual_first_kernels, {"dropout": 0.0}),
    "as it was, without augmentation": (usual_first_kernels, {"augment": "none"}),
    "as it was, learning rate 0.001": (usual_first_kernels, {"learning_rate": 0.001}),
    "mean zero, and global max pooling": (networks.with_pooling("GlobalMaxPooling2D"), {}),
    "mean zero, and a linear head": (_same, {"head": "linear"}),
    "mean zero, and no dropout": (_same, {"dropout": 0.0}),
}
_CHANGES: dict[str, dict[str, tuple[Variant, dict[str, Any]]]] = {
    "small_cnn": _PLAIN_CHANGES,
    "vgg_bn": dict(list(_PLAIN_CHANGES.items())[:2]),
    "resnet9_small": {
        "nothing": (_same, {}),
        "usual first kernels": (usual_first_kernels, {}),
        "global average pooling": (networks.with_pooling("GlobalAveragePooling2D"), {}),
        "no batch norm": (networks.without("BatchNormalization"), {}),
        "batch norm with momentum 0.99": (networks.with_settings("BatchNormalization", momentum=0.99), {}),
        "no shortcuts": (networks.without("Add"), {}),
        "GELU": (networks.with_activation("gelu"), {}),
        "pixels in -1 to 1": (networks.with_settings("Rescaling", scale=1 / 127.5, offset=-1.0), {}),
        "dropout 0.2": (_same, {"dropout": 0.2}),
        "dense head": (_same, {"head": "dense"}),
        "learning rate 0.001": (_same, {"learning_rate": 0.001}),
        "learning rate 0.01": (_same, {"learning_rate": 0.01}),
        "constant learning rate": (_same, {"schedule": "constant"}),
        "no warm-up": (_same, {"warmup_steps": 0}),
        "no augmentation": (_same, {"augment": "none"}),
        "Adam": (_same, {"optimizer": "adam", "weight_decay": 0.0}),
        "SGD, 0.1": (_same, {"optimizer": "sgd", "learning_rate": 0.1}),
    },
}
