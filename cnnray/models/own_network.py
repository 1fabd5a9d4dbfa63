"""Networks of one's own: a function of image size and classes that gives a Keras model.

Its name is `package.module:function`. The size is a number of pixels, or (height, width) where the two differ. The
model takes images (N, height, width, 3) with pixels 0 to 255, and ends with a layer called `logits` that gives
(N, classes), without a softmax. Its other layers may be any of Keras's.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnray.errors import BadInputError

if TYPE_CHECKING:
    import keras

Function = Callable[[Any, int], "keras.Model"]

_LOAD = "import sys, keras; keras.saving.load_model(sys.argv[1], compile=False, safe_mode=True)"
_functions: dict[str, Function] = {}


class NetworkError(BadInputError, ValueError):
    """A network of one's own that cannot be used; the message is one sentence for the user."""


def is_own(architecture: str | None) -> bool:
    """Whether the name of an architecture is that of a function."""
    return architecture is not None and ":" in architecture


def register(function: Function) -> str:
    """Let this process use a function, and return its name."""
    name = f"{function.__module__}:{function.__qualname__}"
    _functions[name] = function
    return name


def find(architecture: str) -> Function:
    """The function of a name.

    Raises:
        NetworkError: it cannot be imported.
    """
    if architecture in _functions:
        return _functions[architecture]
    module, _, name = architecture.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise NetworkError(
            f"--architecture {architecture} cannot be imported ({error}): Python must find its module here and on "
            "the nodes, by PYTHONPATH or in the working directory of ray job submit."
        ) from None
    if not callable(function):
        raise NetworkError(f"--architecture {architecture} is no function.")
    return _functions.setdefault(architecture, function)


def build(architecture: str, pixels: "keras.KerasTensor", classes: int) -> "keras.KerasTensor":
    """The logits of a network of one's own.

    Args:
        architecture: see `is_own`.
        pixels: of the images, uint8 (N, height, width, 3).
        classes: number of classes.

    Raises:
        NetworkError: the function fails, or gives something else than it should.
    """
    import keras

    function, (height, width) = find(architecture), pixels.shape[1:3]
    try:
        model = function(height if height == width else (height, width), classes)
    except Exception as error:  # the user's code
        raise NetworkError(f"--architecture {architecture}: {type(error).__name__}: {error}") from error

    def refuse(sentence: str) -> NetworkError:
        return NetworkError(f"--architecture {architecture} {sentence}.")

    if not isinstance(model, keras.Model):
        raise refuse(f"gives no Keras model, but {type(model).__name__}")
    if not isinstance(model, keras.Sequential) and not _is_functional(model):
        raise refuse("gives a subclass of Model: build it of layers, with keras.Model(inputs, outputs) or Sequential")
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise refuse(f"has {len(model.inputs)} inputs and {len(model.outputs)} outputs, and needs one of each")
    taken, given = tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)
    expected = (None, height, width, 3)
    if (
        len(taken) != 4
        or taken[3] != 3
        or any(side not in (None, needed) for side, needed in zip(taken, expected, strict=True))
    ):
        raise refuse(f"takes {taken}, and the images are {expected}")
    if given != (None, classes):
        raise refuse(f"gives {given}, and there are {classes} classes: expected (None, {classes})")
    last = model.layers[-1]
    if last.name != "logits" or last.output is not model.outputs[0]:
        raise refuse(
            f"ends with the layer {last.name!r}: call the last one 'logits', without a softmax or sigmoid behind it"
        )
    activation = getattr(last, "activation", keras.activations.linear)
    if activation is not keras.activations.linear or isinstance(last, keras.layers.Softmax):
        raise refuse("has an activation in its layer 'logits': leave it out, as cnnray adds the softmax or sigmoid")
    if not model.trainable_variables:
        raise refuse("has no weights to train")
    scaled = keras.layers.Rescaling(1.0, name="pixels")(pixels)  # as numbers that are no integers

    def call(layer: Any, *arguments: Any, **options: Any) -> Any:
        arguments = keras.tree.map_structure(lambda value: scaled if value is pixels else value, arguments)
        return layer(*arguments, **options)

    # Copies of its layers become those of the whole network, where other parts look for them.
    functional = keras.Model(model.inputs, model.outputs)
    copied = keras.models.clone_model(functional, input_tensors=[pixels], call_function=call)
    copied.set_weights(model.get_weights())
    return copied.outputs[0]


def _is_functional(model: "keras.Model") -> bool:
    from keras.src.models import Functional

    return isinstance(model, Functional)


def why_not_loaded(model: "keras.Model") -> str | None:
    """Why a bundle of this network needs the code of its layers; None where Keras loads it without."""
    with tempfile.TemporaryDirectory(prefix="cnnray-network-") as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        done = subprocess.run([sys.executable, "-c", _LOAD, str(path)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    unknown = re.search(r"Could not locate \w+ '(\w+)'", done.stderr)
    lines = done.stderr.strip().splitlines() or ["Keras failed"]
    return f"Keras does not know {unknown[1]}." if unknown else lines[-1][:300]
