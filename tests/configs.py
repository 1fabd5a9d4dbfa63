"""Training configs for tests of parts of a training."""

from typing import Any

from cnnray.training import decisions
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DecidedConfig


def decided(*, images: int = 1000, classes: int = 10, side: int = 32, **flags: Any) -> DecidedConfig:
    """A config with every flag decided, of `small_cnn` unless `flags` say otherwise."""
    defaults = {"data": "/d", "output": "/o", "architecture": "small_cnn", "image_size": side}
    facts = decisions.DataFacts(images=images, classes=classes, side=side)
    return decisions.decide(TrainConfig(**defaults | flags), facts)[0]
