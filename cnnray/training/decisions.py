"""The flags that are null: their values, decided by the training images and by the other flags.

Those that the cluster decides are in `plan`. `decide` depends on the config, a few facts about the images, and the
bundle of `weights` alone, so that a run can be explained and repeated. A run writes the values into its
`config.yaml`, and a run that goes on takes them from there.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import configs, flags
from cnnray.images import labels, reading, storage
from cnnray.images import manifest as manifests
from cnnray.images.listing import SPLITS
from cnnray.models import architectures, bundle
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DECIDED, PLANNED, DecidedConfig
from cnnray.training.recipe import RecipeError
from cnnray.training.recipe_config import DEFAULT_AUGMENT, SELECTIONS, Effort

log = logging.getLogger(__name__)

_SAMPLED = 32
"""Images whose size is looked at."""
_ARCHITECTURES: dict[Effort, str] = {"quick": "resnet9_small", "default": "resnet9_small", "accurate": "resnet9"}
_IMAGES_SEEN: dict[Effort, int] = {"quick": 20_000, "default": 60_000, "accurate": 180_000}
"""Images that all epochs together see, at least."""
_EPOCHS: dict[Effort, tuple[int, int]] = {"quick": (3, 20), "default": (10, 50), "accurate": (30, 150)}
"""Fewest and most epochs."""
_IMAGE_SIZES = ((12, 16), (48, 32))
"""Shorter sides, in pixels, up to which images are brought to a size; larger ones are brought to 64 pixels."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the decisions depend on."""

    images: int
    """Training images."""
    classes: int
    """Classes of the training images."""
    multi_label: bool = False
    """Whether images may have several labels."""
    side: int | None
    """Median over a sample of the images of their shorter side, in pixels; None where it is not known."""


def data_facts(config: TrainConfig, manifest: pa.Table) -> DataFacts:
    """Count the training images, and look at the sizes of a few where they matter.

    Raises:
        CnnrayError: storage is in trouble.
    """
    train = np.flatnonzero(manifests.split_numbers(manifest) == SPLITS.index("train"))
    side = None
    if config.image_size is None:
        # Runs of rows, because images in containers are read by the group.
        starts = np.linspace(0, len(train), 4, endpoint=False, dtype=np.int64)
        rows = np.unique(np.add.outer(starts, np.arange(_SAMPLED // 4)))
        sizes = reading.image_sizes(manifest.take(pa.array(train[rows[rows < len(train)]])))
        side = round(float(np.median([min(size) for size in sizes]))) if sizes else None
    several = manifests.is_multi_label(manifest)
    classes = len(labels.names(manifest["label"].filter(pc.equal(manifest["split"], "train"))))
    return DataFacts(images=len(train), classes=classes, multi_label=several, side=side)


def decide(config: TrainConfig, facts: DataFacts) -> tuple[DecidedConfig, dict[str, str]]:
    """Choose values for the flags that are null.

    Args:
        config: the flags.
        facts: about the images.

    Returns:
        The config, and the reason for each value that was chosen, by field.

    Raises:
        RecipeError, BundleError, OSError: a flag does not fit the values that were chosen, or the bundle of `weights`
            cannot be read; in one sentence.
    """
    reasons: dict[str, str] = {}
    values = {name: getattr(config, name) for name in DECIDED}

    def choose(name: str, value: Any, reason: str) -> None:
        if values[name] is None:
            values[name], reasons[name] = value, reason

    choose("multi_label", facts.multi_label, "labels are lists" if facts.multi_label else "labels are no lists")
    several = values["multi_label"]
    choose("select", SELECTIONS[several][0], f"images have {'several labels' if several else 'one label each'}")
    preset = f"--preset {config.preset}"
    source = _architecture_of_weights(config) if values["architecture"] is None else None
    choose("architecture", source or _ARCHITECTURES[config.preset], "that of --weights" if source else preset)
    architecture = values["architecture"]
    is_backbone = architecture in architectures.BACKBONES
    is_plain = architecture in architectures.PLAIN

    smallest = architectures.smallest_image_size(architecture)
    size = next((size for side, size in _IMAGE_SIZES if facts.side is not None and facts.side <= side), 64)
    known = "is not known" if facts.side is None else f"is about {facts.side} pixels"
    choose("image_size", max(size, smallest), f"the shorter side of the images {known}")

    if config.keep_head:
        choose("head", bundle.read_info(config.weights).config.get("head"), "that of --weights")
    choose("head", "dense" if is_backbone or is_plain else "linear", f"that of {architecture}")
    choose("dropout", 0.5 if is_backbone else 0.1 if is_plain else 0.0, f"that of {architecture}")
    choose("learning_rate", 0.001 if is_backbone else 0.003, f"that of {architecture}")
    choose("weight_decay", 0.01 if config.optimizer == "adamw" else 0.0, f"that of {config.optimizer}")
    choose("batch_size", max(64, config.most_workers), "64, or one image for each worker")
    choose("augment", DEFAULT_AUGMENT, "safe for all kinds of images: nothing is mirrored")
    choose("average", 0.0, preset)
    choose("label_smoothing", 0.0, preset)
    fewest, most = _EPOCHS[config.preset]
    epochs = min(most, max(fewest, math.ceil(_IMAGES_SEEN[config.preset] / facts.images)))
    choose("epochs", epochs, f"{preset}, and {facts.images:,} images: the fewer, the more epochs")
    try:
        return DecidedConfig(**configs.fields_of(config, TrainConfig) | values), reasons
    except ValueError as error:
        raise RecipeError(str(error)) from None


def for_images(config: TrainConfig, manifest: pa.Table) -> DecidedConfig:
    """Decide by the images of a manifest, and log what was decided.

    Raises:
        CnnrayError, OSError: as `decide` and `data_facts`.
    """
    decided, reasons = decide(config, data_facts(config, manifest))
    for name, reason in reasons.items():
        log.info("%s %s  (%s)", flags.flag_name(name), getattr(decided, name), reason)
    return decided


def as_before(config: TrainConfig, earlier: Mapping[str, Any]) -> DecidedConfig:
    """The config of a run that goes on: flags that are null take the values of the earlier run.

    Args:
        config: of this run.
        earlier: of the earlier run, by `configs.load`. Versions up to 0.2 wrote null for four flags that had a rule,
            and did not know --multi-label.
    """
    names = DECIDED + PLANNED
    values = {name: earlier.get(name) if getattr(config, name) is None else getattr(config, name) for name in names}
    is_backbone = values["architecture"] in architectures.BACKBONES
    for name, value in {
        "learning_rate": 0.001 if is_backbone else 0.003,
        "dropout": 0.5 if is_backbone else 0.1,
        "weight_decay": 0.01 if config.optimizer == "adamw" else 0.0,
        "max_workers": 2,
        "multi_label": False,
        "select": "val_accuracy",
    }.items():
        values[name] = value if values[name] is None else values[name]
    if config.max_workers is None and config.min_workers is None:
        values["min_workers"] = earlier.get("min_workers")
    return DecidedConfig(**configs.fields_of(config, TrainConfig) | values)


def _architecture_of_weights(config: TrainConfig) -> str | None:
    """The architecture of the bundle that `--weights` names; None for no weights, or a file that does not say it."""
    if config.weights in ("none", "imagenet") or storage.is_file(config.weights):
        return None
    return bundle.read_info(config.weights).architecture or None
