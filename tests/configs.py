"""Training configs for tests of parts of a training."""

from typing import Any

from cnnray.training import decisions, plan
from cnnray.training.config import TrainConfig
from cnnray.training.decided import PlannedConfig


def decided(*, images: int = 1000, classes: int = 10, side: int = 32, **flags: Any) -> PlannedConfig:
    """A config with every flag decided, of `small_cnn` unless `flags` say otherwise."""
    defaults = {"data": "/d", "output": "/o", "architecture": "small_cnn", "image_size": side}
    facts = decisions.DataFacts(images=images, classes=classes, side=side)
    return plan.planned(decisions.decide(TrainConfig(**defaults | flags), facts)[0])
