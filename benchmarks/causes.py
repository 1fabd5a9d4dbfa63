"""What stops a network from learning: one thing changed at a time, where only the shape tells the class.

The data are scikit-learn's digits in random colours on random grounds (`data_sets.load_coloured_digits`).
"""

import logging
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.data_sets import load_coloured_digits, split
from benchmarks.trainer import make_config, train_network
from cnnray.models import startup

log = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
EPOCHS = 16
_BEFORE: dict[str, Any] = {"augment": "light", "epochs": EPOCHS, "learning_rate": 0.003, "weight_decay": 0.01}


def measure() -> str:
    """Measure the held-out accuracy of each change, with three seeds.

    Returns:
        A Markdown table.
    """
    startup.load_tensorflow(gpus=False)
    data = load_coloured_digits()
    lines = ["| network | one thing changed | held-out accuracy, by seed | mean |", "|---|---|---|---|"]
    for network, changes in _CHANGES.items():
        for name, (variant, flags) in changes.items():
            accuracies = []
            for seed in SEEDS:
                config = make_config(**{"architecture": network, "seed": seed} | _BEFORE | flags)
                accuracies.append(train_network(config, *split(data, seed), variant=variant).accuracy)
            by_seed = ", ".join(f"{value:.3f}" for value in accuracies)
            lines.append(f"| `{network}` | {name} | {by_seed} | **{statistics.mean(accuracies):.3f}** |")
            log.info("%s", lines[-1])
    return "\n".join(lines)


# -- variants of networks -------------------------------------------------------------------------------------


def _same(model: Any) -> Any:
    return model


def _usual_kernels(model: Any) -> Any:
    """Random first kernels as Keras draws them, whose mean is not zero."""
    import keras

    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    first.kernel.assign(first.kernel_initializer(first.kernel.shape, first.kernel.dtype))
    return model


def _with(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The network with other layers; each new layer begins with the weights of the one that it takes the place of.

    Args:
        change: gives a layer's replacement, or None to keep the layer.
    """

    def variant(model: Any) -> Any:
        import keras

        def clone(layer: Any) -> Any:
            return change(layer) or layer.__class__.from_config(layer.get_config())

        cloned = keras.models.clone_model(model, clone_function=clone)
        for layer, original in zip(cloned.layers, model.layers, strict=True):
            if layer.weights and [w.shape for w in layer.weights] == [w.shape for w in original.weights]:
                layer.set_weights(original.get_weights())
        return cloned

    return variant


def _replaced(kind: str, **changes: Any) -> Callable[[Any], Any]:
    """Other settings for the layers of a kind."""

    def change(layer: Any) -> Any:
        if type(layer).__name__ != kind:
            return None
        return layer.__class__.from_config(layer.get_config() | changes)

    return _with(change)


def _pooling(kind: str) -> Callable[[Any], Any]:
    """Another global pooling."""

    def change(layer: Any) -> Any:
        import keras

        return getattr(keras.layers, kind)(name=layer.name) if type(layer).__name__.startswith("Global") else None

    return _with(change)


def _removed(kind: str) -> Callable[[Any], Any]:
    """Without the layers of a kind; of several inputs, the last one is passed on."""

    def change(layer: Any) -> Any:
        import keras

        class PassOn(keras.layers.Layer):
            def call(self, inputs: Any, mask: Any = None) -> Any:
                return inputs[-1] if isinstance(inputs, list) else inputs

        return PassOn(name=layer.name) if type(layer).__name__ == kind else None

    return _with(change)


def _activation(name: str) -> Callable[[Any], Any]:
    """Another activation in place of ReLU."""

    def change(layer: Any) -> Any:
        import keras

        return keras.layers.Activation(name, name=layer.name) if isinstance(layer, keras.layers.ReLU) else None

    return _with(change)


def _then(*variants: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def variant(model: Any) -> Any:
        for each in variants:
            model = each(model)
        return model

    return variant


_PLAIN_CHANGES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "as it was: usual first kernels": (_usual_kernels, {}),
    "first kernels of mean zero (as it is)": (_same, {}),
    "as it was, with global max pooling": (_then(_pooling("GlobalMaxPooling2D"), _usual_kernels), {}),
    "as it was, with a linear head": (_usual_kernels, {"head": "linear"}),
    "as it was, without dropout": (_usual_kernels, {"dropout": 0.0}),
    "as it was, without augmentation": (_usual_kernels, {"augment": "none"}),
    "as it was, learning rate 0.001": (_usual_kernels, {"learning_rate": 0.001}),
    "mean zero, and global max pooling": (_pooling("GlobalMaxPooling2D"), {}),
    "mean zero, and a linear head": (_same, {"head": "linear"}),
    "mean zero, and no dropout": (_same, {"dropout": 0.0}),
}
_CHANGES: dict[str, dict[str, tuple[Callable[[Any], Any], dict[str, Any]]]] = {
    "small_cnn": _PLAIN_CHANGES,
    "vgg_bn": dict(list(_PLAIN_CHANGES.items())[:2]),
    "resnet9_small": {
        "nothing": (_same, {}),
        "usual first kernels": (_usual_kernels, {}),
        "global average pooling": (_pooling("GlobalAveragePooling2D"), {}),
        "no batch norm": (_removed("BatchNormalization"), {}),
        "batch norm with momentum 0.99": (_replaced("BatchNormalization", momentum=0.99), {}),
        "no shortcuts": (_removed("Add"), {}),
        "GELU": (_activation("gelu"), {}),
        "pixels in -1 to 1": (_replaced("Rescaling", scale=1 / 127.5, offset=-1.0), {}),
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
