"""Transfer learning: loading the weights of a trained backbone, perhaps with its head, and freezing its layers.

The backbone is everything before the global pooling, the head everything after it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnray.errors import BadInputError
from cnnray.images import storage
from cnnray.models import architectures, bundle

if TYPE_CHECKING:
    import keras


class WeightsError(BadInputError, ValueError):
    """Weights that cannot be used; the message is one sentence for the user."""


def check(uri: str) -> None:
    """
    Raises:
        WeightsError: the path is neither a file nor a bundle.
        OSError: the storage cannot be read.
    """
    if not storage.is_file(weights_file(uri)):
        raise WeightsError(f"--weights {uri} is neither a weights file nor a bundle.")


def weights_file(uri: str) -> str:
    """The file of weights that `--weights` names: itself, or the network of a bundle."""
    return uri if storage.is_file(uri) else storage.join(uri, bundle.MODEL)


def load(model: "keras.Model", path: Path) -> None:
    """Load trained weights into the backbone of a network.

    Args:
        model: from `architectures.build`.
        path: a local file. Either the `.keras` file of a bundle, or `.weights.h5` or `.h5` of a network of the same
            architecture or of the same network of `keras.applications` without its classification layers.

    Raises:
        WeightsError: the file does not hold weights of this architecture.
    """
    from keras import layers

    if path.suffix == ".keras":
        _copy_backbone(bundle.load_model(path, str(path)), model, path)
        return
    nested = _find_nested_model(model)
    target = nested or _build_backbone_model(model)
    initial = [layer.get_weights() for layer in backbone_layers(model)]
    try:
        target.load_weights(str(path))
    except (ValueError, OSError, KeyError) as error:
        raise WeightsError(f"{path} does not hold weights of {model.name}: {str(error).splitlines()[0]}") from None
    unchanged = [
        layer.name
        for layer, old in zip(backbone_layers(model), initial, strict=True)
        if isinstance(layer, layers.Conv2D) and (layer.get_weights()[0] == old[0]).all()
    ]
    if unchanged:
        raise WeightsError(f"{path} does not hold weights of {model.name}: it has none for the layer {unchanged[0]}.")
    if nested is not None:
        architectures.scale_as_published(nested)


def load_head(model: "keras.Model", path: Path, names: Sequence[str], known: Sequence[str]) -> None:
    """Load the head of a trained network. Classes that it does not know keep what they have.

    Args:
        model: from `architectures.build`, with the logits of `names`.
        path: local `.keras` file of a bundle.
        names: classes of the model.
        known: classes of the bundle.

    Raises:
        WeightsError: the bundle has another kind of head.
    """
    source = bundle.load_model(path, str(path))
    old, new = _head_layers(source), _head_layers(model)
    before = [[weight.shape for layer in layers[:-1] for weight in layer.weights] for layers in (old, new)]
    if before[0] != before[1] or old[-1].weights[0].shape[0] != new[-1].weights[0].shape[0]:
        raise WeightsError(f"--keep-head: {path} has another head than this network: choose another --head.")
    for layer, other in zip(new[:-1], old[:-1], strict=True):
        layer.set_weights(other.get_weights())
    pairs = [(names.index(name), known.index(name)) for name in names if name in set(known)]
    places, places_before = (list(places) for places in zip(*pairs, strict=True))
    weights = new[-1].get_weights()
    for values, values_before in zip(weights, old[-1].get_weights(), strict=True):
        values[..., places] = values_before[..., places_before]
    new[-1].set_weights(weights)


def _head_layers(model: "keras.Model") -> list[Any]:
    """The head's layers that have weights, the logits last."""
    before = len(_layers_before_pooling(model))
    return [layer for layer in _flatten(list(model.layers[before:])) if layer.weights]


def backbone_layers(model: "keras.Model") -> list[Any]:
    """The backbone's layers that have weights, in the order from the image to the head."""
    return [layer for layer in _flatten(_layers_before_pooling(model)) if layer.weights]


def set_trainable(model: "keras.Model", share: float) -> None:
    """Make the head trainable, and this share of the backbone's layers that have weights, those nearest to the head.

    The other layers are frozen. Frozen batch norms use their moving statistics and do not update them.
    """
    layers = backbone_layers(model) if share < 1 else []  # networks of one's own may have none
    frozen = len(layers) - math.ceil(share * len(layers) - 1e-9)
    for layer in model._flatten_layers():
        layer.trainable = True
    for layer in layers[:frozen]:
        layer.trainable = False


def write_imagenet_weights(architecture: str, image_size: int | str, path: Path) -> None:
    """Write the ImageNet weights of a backbone from `keras.applications`, without the classification layers.

    Keras downloads them, or takes them from its cache, `~/.keras/models`.

    Args:
        architecture: one of `architectures.BACKBONES`.
        image_size: of the images, as `Size.of` takes it.
        path: the `.weights.h5` file to write.

    Raises:
        WeightsError: the download failed; the message says what to download and where to put it.
    """
    try:
        weights = architectures.build_backbone(architecture, image_size, "imagenet").get_weights()
    except Exception as error:  # Keras raises a bare Exception
        address = str(error).partition("URL fetch failure on ")[2].split(":", 2)
        url = ":".join(address[:2]).strip()
        if not url:
            raise
        raise WeightsError(
            f"--weights imagenet: {url} cannot be downloaded here; download it elsewhere and put it into "
            f"~/.keras/models on the machine that runs this job, or pass its path as --weights."
        ) from None
    backbone = architectures.build_backbone(architecture, image_size, None)
    backbone.set_weights(weights)
    backbone.save_weights(path)


def _layers_before_pooling(model: "keras.Model") -> list[Any]:
    from keras import layers

    pooling = (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D)
    for index, layer in enumerate(model.layers):
        if isinstance(layer, pooling):
            return list(model.layers[:index])
    raise WeightsError(f"{model.name} has no global pooling between its backbone and its head.")


def _flatten(layers: list[Any]) -> list[Any]:
    import keras

    return [
        leaf for layer in layers for leaf in (_flatten(layer.layers) if isinstance(layer, keras.Model) else [layer])
    ]


def _find_nested_model(model: "keras.Model") -> "keras.Model | None":
    import keras

    return next((layer for layer in _layers_before_pooling(model) if isinstance(layer, keras.Model)), None)


def _build_backbone_model(model: "keras.Model") -> "keras.Model":
    import keras

    return keras.Model(model.inputs, _layers_before_pooling(model)[-1].output)


def _copy_backbone(source: "keras.Model", target: "keras.Model", path: Path) -> None:
    old, new = backbone_layers(source), backbone_layers(target)
    for index, layer in enumerate(new):
        shapes = [tuple(weight.shape) for weight in layer.weights]
        old_shapes = [tuple(weight.shape) for weight in old[index].weights] if index < len(old) else None
        if old_shapes != shapes:
            raise WeightsError(
                f"{path} does not hold weights of {target.name}: its layer {index + 1} has "
                f"{old_shapes or 'none'}, not {shapes}."
            )
    if len(old) != len(new):
        raise WeightsError(f"{path} does not hold weights of {target.name}: {len(old)} layers, not {len(new)}.")
    for layer, other in zip(new, old, strict=True):
        layer.set_weights(other.get_weights())
