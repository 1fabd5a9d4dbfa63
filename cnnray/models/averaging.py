"""One network of several, or of several views of an image, whose probabilities are the mean of theirs.

Averaging over networks is a deep ensemble (Lakshminarayanan, Pritzel and Blundell, arXiv:1612.01474), over views
test-time augmentation. Both become a bundle of their own: every job, export and protocol takes it like any other.
"""

import itertools
import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cnnray import flags
from cnnray.images import storage
from cnnray.models import bundle as bundles
from cnnray.models import startup
from cnnray.models.bundle import Bundle, BundleError, BundleInfo

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

Views = Literal["flips", "crops"]
FOLDER = "averaged"
"""Folder of averaged bundles, in the output of a job that makes one."""
_MEMBER = "member_{}"
"""Names of the networks inside the model: its layers."""
_KEPT = 7 / 8
"""Share of the height and of the width that a crop keeps."""


def plan(first: Bundle, others: Sequence[str], views: Views | None, target: str) -> Bundle:
    """The bundle that averages others, which `write` writes.

    Args:
        first: one of them.
        others: addresses of the others. All have the same classes and sizes. Each has its own temperature inside;
            confidence thresholds and groups do not go over, and thresholds of labels become their means.
        views: None: the images as they are; flips: also mirrored left to right; crops: also the four corners, each
            7/8 of the height and width, enlarged.
        target: folder of the new bundle.

    Raises:
        BundleError: the bundles do not fit each other.
        OSError: the storage cannot be read.
    """
    members, info = [first, *map(Bundle.load, others)], first.info
    for other in members[1:]:
        _check_alike(first, other)
    averaged = {
        "bundles": [bundle.uri for bundle in members],
        "versions": [bundle.version for bundle in members],
        "trainings": [training for bundle in members for training in bundle.trainings],
        "views": views,
    }
    planned = BundleInfo(
        class_names=info.class_names,
        image_size=info.image_size,
        resize=info.resize,
        decode_size=info.decode_size,
        architecture="averaged",
        thresholds=_mean_thresholds(members),
        averaged=averaged,
        training=first.training,
        data_fingerprint=info.data_fingerprint,
        class_counts=info.class_counts,
        training_images=info.training_images,
    )
    return Bundle(target, planned)


def write(bundle: Bundle) -> Bundle:
    """Write a bundle of `plan`, unless it is there already, with exports that it may have got since.

    A process of its own makes the network, so that this one can still choose whether TensorFlow sees GPUs.

    Args:
        bundle: whose folder's lease the caller has, or that of a folder around it.

    Raises:
        BundleError: the folder holds something else, or a network cannot be loaded.
        OSError: the storage cannot be read or written.
    """
    if storage.is_file(storage.join(bundle.uri, bundles.INFO)):
        earlier = Bundle.load(bundle.uri)
        if earlier.version != bundle.version:
            raise BundleError(f"{bundle.uri} holds another bundle, {earlier.version}: give another --output.")
        return earlier
    if others := _some_names(bundle.uri) - {bundles.MODEL}:  # which a copy that was not completed leaves
        raise BundleError(f"{bundle.uri} holds {min(others)}, and no bundle: give another --output.")
    averaged = bundle.info.averaged
    assert averaged is not None
    with tempfile.TemporaryDirectory(prefix="cnnray-averaged-") as folder:
        made = subprocess.run(
            [sys.executable, "-m", "cnnray.models.averaging", folder, json.dumps(averaged)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            reason = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
            raise BundleError(f"The networks cannot be averaged: {reason[:300]}")
        if Bundle(folder, bundles.read_info(folder)).version != bundle.version:
            raise BundleError(f"One of {', '.join(averaged['bundles'])} was changed in the meantime: run it again.")
        bundles.replace(bundle.uri, folder)
    log.info("%s averages %s, views %s", bundle.uri, ", ".join(averaged["bundles"]), averaged["views"] or "none")
    return Bundle.load(bundle.uri)


def _some_names(folder: str) -> set[str]:
    """The names of the folders in a folder, and of some of its files."""
    if not storage.exists(folder):
        return set()
    files = itertools.islice(storage.walk(folder), 2)
    return {storage.name(file.uri) for file in files} | set(map(storage.name, storage.folders(folder)))


def explained_network(model: "keras.Model") -> "keras.Model":
    """The network that heat maps are made of: of several, the first."""
    import keras

    while any(layer.name == _MEMBER.format(0) for layer in model.layers):
        member = model.get_layer(_MEMBER.format(0))
        # Without the list that a network inside another one takes its inputs as.
        model = keras.Model(member.inputs[0], member.outputs[0])
    return model


def _mean_thresholds(members: Sequence[Bundle]) -> list[float] | None:
    of_members = [bundle.info.thresholds for bundle in members]
    of_labels = zip(*[thresholds for thresholds in of_members if thresholds is not None], strict=True)
    return [sum(values) / len(members) for values in of_labels] if members[0].info.is_multi_label else None


def _check_alike(first: Bundle, other: Bundle) -> None:
    differences = {
        "other classes": first.info.class_names != other.info.class_names,
        "other image sizes or resize rules": first.info.geometry != other.info.geometry,
        "one label for an image, and several": first.info.is_multi_label != other.info.is_multi_label,
    }
    for difference, is_there in differences.items():
        if is_there:
            raise BundleError(f"{first.uri} and {other.uri} have {difference}, and so cannot be averaged.")


def average(members: Sequence[Bundle], views: Views | None) -> "keras.Model":
    """The network whose probabilities are the mean of those of networks for views.

    Its logits are such that their softmax, or sigmoid, is that mean: its logarithm, or the difference of the
    logarithms of the mean and of 1 minus the mean.

    Args:
        members, views: see `plan`.

    Returns:
        uint8 (N, height, width, 3) to probabilities, float32 (N, classes), with a layer `logits`.
    """
    import keras

    info = members[0].info
    image = keras.Input((*info.geometry.image_size.shape,), dtype="uint8", name="image")
    logits = []
    for number, bundle in enumerate(members):
        model = bundle.load_model()
        network = keras.Model(model.inputs, model.get_layer("logits").output, name=_MEMBER.format(number))
        for view in _views(image, views):
            logits.append(keras.ops.cast(network(view), "float32") / bundle.info.temperature)
    if info.is_multi_label:
        inside = [keras.ops.log_sigmoid(values) for values in logits]
        outside = [keras.ops.log_sigmoid(-values) for values in logits]
        mean = _log_mean(inside) - _log_mean(outside)
    else:
        mean = _log_mean([keras.ops.log_softmax(values) for values in logits])
    mean = keras.layers.Activation("linear", dtype="float32", name="logits")(mean)
    return keras.Model(image, keras.layers.Activation(info.activation, dtype="float32", name="probabilities")(mean))


def _log_mean(logarithms: list[Any]) -> Any:
    import keras

    return keras.ops.logsumexp(keras.ops.stack(logarithms, axis=1), axis=1) - math.log(len(logarithms))


def _views(image: Any, views: Views | None) -> list[Any]:
    import keras

    if views is None:
        return [image]
    if views == "flips":
        return [image, keras.ops.flip(image, axis=2)]
    height, width = image.shape[1:3]
    kept = round(height * _KEPT), round(width * _KEPT)
    corners = [(top, left) for top in (0, height - kept[0]) for left in (0, width - kept[1])]
    crops = [image[:, top : top + kept[0], left : left + kept[1]] for top, left in corners]
    resized = [keras.ops.image.resize(keras.ops.cast(crop, "float32"), (height, width)) for crop in crops]
    return [image, *[keras.ops.cast(keras.ops.round(crop), "uint8") for crop in resized]]


def split_uris(flag: str, bundle: str | None, values: Sequence[str] | str | None) -> list[str]:
    """The absolute addresses of bundles that are averaged with another one, from the value of a flag.

    Args:
        flag: its field in the config.
        bundle: the other one.
        values: an address, or several with commas between them, or a list of such; None: there are none.

    Raises:
        ValueError, OSError: a bundle is named twice, or see `flags.absolute`.
    """
    values = [values] if isinstance(values, str) else values or []
    named = [uri.strip() for value in values for uri in str(value).split(",")]
    others = [flags.absolute(flag, uri) for uri in named if uri]
    if len({bundle, *others}) <= len(others):
        raise ValueError(f"{flags.flag_name(flag)} names a bundle twice, or that of --bundle: give the others, once.")
    return others


def _main(folder: str, averaged: str) -> int:
    """Write the bundle of a mean to a local folder."""
    values = json.loads(averaged)
    startup.load_tensorflow(gpus=False)
    try:
        first, *others = values["bundles"]
        planned = plan(Bundle.load(first), others, values["views"], folder)
        members = [Bundle.load(uri) for uri in values["bundles"]]
        bundles.save(average(members, values["views"]), planned.info, Path(folder))
    except (BundleError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
