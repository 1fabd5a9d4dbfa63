"""Networks that begin with what others have learnt: their backbones, without the head, and which of it is trained.

The backbone is all in front of the global average pooling, the head what is behind it.
"""

import math
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
        WeightsError: there is neither a file of weights, nor a bundle.
        OSError: storage that cannot be read.
    """
    if not storage.is_file(uri) and not storage.is_file(storage.join(uri, bundle.MODEL)):
        raise WeightsError(f"--weights {uri} is neither a file of weights nor a bundle.")


def load(model: "keras.Model", path: Path) -> None:
    """Give a network's backbone the weights of another.

    Args:
        model: of `architectures.build`.
        path: a local file: `.keras`, as in a bundle, or `.weights.h5` or `.h5` of a network of the same architecture,
            or of `keras.applications`' without the classification layers.

    Raises:
        WeightsError: it does not hold weights of this architecture.
    """
    from keras import layers

    if path.suffix == ".keras":
        _copy(bundle.load_model(path, str(path)), model, path)
        return
    nested = _nested(model)
    target = nested or _backbone(model)
    before = [layer.get_weights() for layer in backbone_layers(model)]
    try:
        target.load_weights(str(path))
    except (ValueError, OSError, KeyError) as error:
        raise WeightsError(f"{path} does not hold weights of {model.name}: {str(error).splitlines()[0]}") from None
    unchanged = [
        layer.name
        for layer, old in zip(backbone_layers(model), before, strict=True)
        if isinstance(layer, layers.Conv2D) and (layer.get_weights()[0] == old[0]).all()
    ]
    if unchanged:
        raise WeightsError(f"{path} does not hold weights of {model.name}: there are none for {unchanged[0]}.")
    if nested is not None:
        architectures.scale_as_published(nested)


def backbone_layers(model: "keras.Model") -> list[Any]:
    """The backbone's layers that have weights, from the image on."""
    return [layer for layer in _flat(_in_front(model)) if layer.weights]


def set_trainable(model: "keras.Model", share: float) -> None:
    """Have the head trained, and of the backbone's layers that have weights this share, those nearest to the head.

    The others are frozen: batch norms among them use their statistics and keep them.
    """
    layers = backbone_layers(model)
    frozen = len(layers) - math.ceil(share * len(layers) - 1e-9)
    for layer in model._flatten_layers():
        layer.trainable = True
    for layer in layers[:frozen]:
        layer.trainable = False


def imagenet(architecture: str, image_size: int, path: Path) -> None:
    """Write keras.applications' ImageNet weights of a backbone, without the classification layers.

    Keras fetches them, or takes them from its own folder, `~/.keras/models`.

    Args:
        architecture: one of `architectures.BACKBONES`.
        image_size: height and width in pixels.
        path: of the `.weights.h5` to write.

    Raises:
        WeightsError: they are not there, with what to fetch and where to put it.
    """
    try:
        weights = architectures.application(architecture, image_size, "imagenet").get_weights()
    except Exception as error:  # Keras raises a bare Exception
        address = str(error).partition("URL fetch failure on ")[2].split(":", 2)
        url = ":".join(address[:2]).strip()
        if not url:
            raise
        raise WeightsError(
            f"--weights imagenet: {url} cannot be reached from here; fetch it and put it into ~/.keras/models of the "
            f"machine that runs this job, or give its path as --weights."
        ) from None
    backbone = architectures.application(architecture, image_size, None)
    backbone.set_weights(weights)
    backbone.save_weights(path)


def _in_front(model: "keras.Model") -> list[Any]:
    from keras import layers

    names = [type(layer) for layer in model.layers]
    if layers.GlobalAveragePooling2D not in names:
        raise WeightsError(f"{model.name} has no global average pooling, behind which a head begins.")
    found: list[Any] = model.layers
    return found[: names.index(layers.GlobalAveragePooling2D)]


def _flat(layers: list[Any]) -> list[Any]:
    import keras

    return [leaf for layer in layers for leaf in (_flat(layer.layers) if isinstance(layer, keras.Model) else [layer])]


def _nested(model: "keras.Model") -> "keras.Model | None":
    import keras

    return next((layer for layer in _in_front(model) if isinstance(layer, keras.Model)), None)


def _backbone(model: "keras.Model") -> "keras.Model":
    import keras

    return keras.Model(model.inputs, _in_front(model)[-1].output)


def _copy(source: "keras.Model", target: "keras.Model", path: Path) -> None:
    old, new = backbone_layers(source), backbone_layers(target)
    for index, layer in enumerate(new):
        shapes = [tuple(weight.shape) for weight in layer.weights]
        found = [tuple(weight.shape) for weight in old[index].weights] if index < len(old) else None
        if found != shapes:
            raise WeightsError(
                f"{path} does not hold weights of {target.name}: its layer {index + 1} has "
                f"{found or 'none'}, not {shapes}."
            )
    if len(old) != len(new):
        raise WeightsError(f"{path} does not hold weights of {target.name}: {len(old)} layers, not {len(new)}.")
    for layer, other in zip(new, old, strict=True):
        layer.set_weights(other.get_weights())
