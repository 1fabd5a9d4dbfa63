"""Every architecture trains on two workers, and predicts the same after saving and loading."""

import numpy as np
import pytest

from cnnray.models import architectures
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from tests.configs import decided
from tests.ray.workers import run_on_workers

CLASSES = 3
QUICK = ("small_cnn", "resnet9_small")
GIANTS = ("convnextxlarge",)
"""Networks for which two workers need 24 GiB: 350 million weights with gradients, momenta, and copies of them."""


def _images(size):
    return np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8), np.asarray([0, 1, 2, 0])


def _step(rank, world, architecture, size, folder):
    from pathlib import Path

    import tensorflow as tf

    from cnnray.models import bundle
    from cnnray.models.bundle import BundleInfo
    from cnnray.training.step import Steps

    # SGD, because with Adam's two moments the largest network would not fit into memory twice. Gradients are clipped,
    # because they explode where many batch norms divide by the variance of only two images.
    config = decided(
        architecture=architecture, image_size=size, optimizer="sgd", max_workers=world,
        epochs=1, schedule="constant", learning_rate=0.1, clip_norm=1.0,
    )  # fmt: skip
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        steps = Steps(config, CLASSES)
        steps.begin(config.resolved_phases[0], 1)
    images, targets = _images(size)
    before = [v.numpy().sum() for v in steps.model.trainable_variables]
    loss = steps.start(images[rank::world], targets[rank::world]).result().loss
    moved = np.mean([v.numpy().sum() != old for v, old in zip(steps.model.trainable_variables, before, strict=True)])
    steps.average_statistics()
    steps.update_inference()
    if rank == 0:
        names = [str(number) for number in range(CLASSES)]
        bundle.save(steps.inference, BundleInfo(class_names=names, image_size=size), Path(folder))
    return loss, moved, np.asarray(steps.inference(images, training=False))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "architecture",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in architectures.NAMES],
)
def test_trains_on_two_workers_and_predicts_the_same_after_loading(architecture, tmp_path):
    size = architectures.smallest_image_size(architecture)
    workers = 1 if architecture in GIANTS else 2
    results = run_on_workers(_step, workers, tmp_path, architecture, size, str(tmp_path / "bundle"))
    loss, moved, first = results[0]
    assert np.isfinite(loss)
    assert moved > 0.5
    for _, _, other in results[1:]:
        np.testing.assert_allclose(first, other, atol=1e-5)
    loaded = Predictor(Bundle.load(str(tmp_path / "bundle"))).probabilities(_images(size)[0])
    np.testing.assert_allclose(loaded, first, atol=1e-5)
