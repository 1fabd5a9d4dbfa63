"""Two workers and a single process train the same weights from the same global batches."""

import functools

import numpy as np
import pytest
from PIL import Image

from tests.configs import decided
from tests.ray.workers import run_on_workers
from tests.runs import largest_difference

STEPS, BATCH, SIZE, CLASSES = 10, 32, 32, 4
PARTS = 3
WEIGHTS = (0.5, 1.0, 2.0, 1.0)
# One process and two round differently, and training amplifies the difference: by 30 per step at a learning rate of
# 0.01 and batches of 8. At these rates it is 1e-6 after ten steps; a wrong statistic makes it 1e-3 (`plain`).
_PLAIN = {"architecture": "tests:plain", "optimizer": "sgd", "learning_rate": 1e-3}
_RECIPE = {"clip_norm": 0.5, "accumulate": 2, "weight_decay": 0.1, "label_smoothing": 0.1, "average": 0.9}
CASES = {
    "sgd": {"architecture": "vgg16", "head": "linear", "optimizer": "sgd", "learning_rate": 1e-5},
    "plain network": _PLAIN,
    "plain network in parts": _PLAIN,
    "whole recipe": _PLAIN | _RECIPE,
    "whole recipe in parts": _PLAIN | _RECIPE,
    "sgd_synchronized": {
        "architecture": "small_cnn",
        "optimizer": "sgd",
        "learning_rate": 1e-4,
        "synchronized_batch_norm": True,
    },
    "adam": {"architecture": "small_cnn", "learning_rate": 1e-4, "synchronized_batch_norm": True},
    "plain": {"architecture": "small_cnn", "learning_rate": 1e-4},
    "residual": {"architecture": "resnet9_small", "learning_rate": 1e-4, "synchronized_batch_norm": True},
    # Everything that is applied to the summed gradients, and to the weights after the update.
    "recipe": {
        "architecture": "small_cnn",
        "optimizer": "sgd",
        "learning_rate": 1e-4,
        "synchronized_batch_norm": True,
        **_RECIPE,
    },
    "several labels": _PLAIN | _RECIPE | {"multi_label": True, "loss": "asymmetric"},
    "several labels in parts": _PLAIN | _RECIPE | {"multi_label": True, "loss": "asymmetric"},
    "synchronized in parts": {"architecture": "small_cnn", "synchronized_batch_norm": True},
    "float32": {"architecture": "tests:normalized"},
    "bfloat16": {"architecture": "tests:normalized", "precision": "bfloat16"},
    # A processor has no fast float16: small_cnn would take half a minute.
    "float16": {"architecture": "tests:normalized", "precision": "float16"},
    "float16 in parts": {"architecture": "tests:plain", "precision": "float16"},
}


def _batches():
    generator = np.random.default_rng(0)
    # The last batches cannot be divided evenly between two workers.
    sizes = [BATCH] * (STEPS - 2) + [BATCH - 1, BATCH - 3]
    return [(np.stack([_smooth(generator) for _ in range(n)]), generator.integers(0, CLASSES, n)) for n in sizes]


def _several(classes):
    """Label sets in place of classes: for each image its class and the next one, or none."""
    hot = np.eye(CLASSES, dtype=np.float32)
    return (hot[classes] + hot[(classes + 1) % CLASSES]) * (classes > 0)[:, None].astype(np.float32)


def _smooth(generator):
    small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _plain(image_size, classes):
    """A network without batch norm, whose micro-batches give the gradients of the whole."""
    import keras

    return keras.Sequential([
        keras.Input((image_size, image_size, 3)), keras.layers.Rescaling(1 / 127.5, -1),
        keras.layers.Conv2D(16, 3, strides=2, activation="relu"), keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(classes, name="logits"),
    ])  # fmt: skip


def _normalized(image_size, classes):
    """The smallest network with batch norm."""
    import keras

    return keras.Sequential([
        keras.Input((image_size, image_size, 3)), keras.layers.Rescaling(1 / 127.5, -1),
        keras.layers.Conv2D(8, 3, strides=2, use_bias=False), keras.layers.BatchNormalization(),
        keras.layers.ReLU(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(classes, name="logits"),
    ])  # fmt: skip


def _train(rank, world, cases, batches):
    import keras
    import tensorflow as tf

    from cnnray.models import own_network
    from cnnray.training.step import Steps

    own_network._functions |= {"tests:plain": _plain, "tests:normalized": _normalized}
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    results = {}
    for name, case in cases.items():
        keras.backend.clear_session()
        config = decided(
            image_size=SIZE, max_workers=world, augment="none", schedule="constant",
            **{"optimizer": "adam", "dropout": 0.0} | case,
        )  # fmt: skip
        with strategy.scope():
            steps = Steps(config, CLASSES, class_weights=np.asarray(WEIGHTS, np.float32))
            steps.begin(config.resolved_phases[0], STEPS)
        # Low precision is slow here, and not compared with one process.
        used = batches[:3] if "precision" in case else batches
        if config.multi_label:
            used = [(x, _several(y)) for x, y in used]
        parts = PARTS if "in parts" in name else 1
        sums = [steps.start(x[rank::world], y[rank::world], parts=parts).result().values for x, y in used]
        statistics = [v.numpy() for v in steps._statistics]
        steps.average_statistics()
        steps.update_inference()
        averaged = [v.numpy() for v in steps._statistics]
        weights = [v.numpy() for v in steps.model.weights]
        inference = steps.inference.get_weights()
        images, targets = used[0]
        probabilities = np.asarray(steps.inference(images, training=False))
        before = [v.numpy() for v in steps._statistics]
        # A step in which every image of the second worker was bad.
        good = images[: 4 if rank == 0 else 0]
        one_sided = steps.start(good, targets[: len(good)], bad=rank * 4, parts=parts).result()
        results[name] = {
            "sums": np.asarray(sums),
            "weights": weights,
            "inference": inference,
            "statistics": statistics,
            "averaged": averaged,
            "probabilities": probabilities,
            "one_sided": one_sided,
            "overflow": _overflow(rank, steps, images, targets) if name == "float16" else None,
            "one_sided_statistics": (before, [v.numpy() for v in steps._statistics]),
        }
    return results


def _overflow(rank, steps, images, targets):
    """Train a step in which only the gradients of rank 1 are not finite.

    Returns:
        Whether the weights stayed as they were, and the loss scale before and after the step.
    """
    before = [v.numpy() for v in steps.model.trainable_variables]
    scale = steps.optimizer.dynamic_scale.numpy()
    if rank == 1:
        steps.optimizer.scale_loss = lambda loss: loss * np.inf
    import tensorflow as tf

    steps._compiled[True, False] = tf.function(functools.partial(steps._train, False), autograph=False)
    steps.start(images[rank::2], targets[rank::2]).result()
    unmoved = all((v.numpy() == b).all() for v, b in zip(steps.model.trainable_variables, before, strict=True))
    return unmoved, float(scale), float(steps.optimizer.dynamic_scale.numpy())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    single = run_on_workers(_train, 1, folder, CASES, _batches())
    pair = run_on_workers(_train, 2, folder, CASES, _batches())
    return single[0], pair[0], pair[1]


@pytest.mark.parametrize("case", ["sgd", "sgd_synchronized", "recipe"])
def test_sgd_gives_the_same_weights(trained, case):
    single, first, second = (result[case] for result in trained)
    assert largest_difference(first["inference"], single["inference"]) <= 1e-5
    assert largest_difference(first["weights"], single["weights"]) <= 1e-5
    assert largest_difference(second["weights"], first["weights"]) == 0
    np.testing.assert_allclose(first["sums"], single["sums"], rtol=1e-4)


@pytest.mark.parametrize("case", ["plain network", "whole recipe", "several labels"])
def test_micro_batches_give_the_same_weights(trained, case):
    for result in trained:
        whole, parts = result[case], result[f"{case} in parts"]
        assert largest_difference(parts["weights"], whole["weights"]) <= 1e-5
        assert largest_difference(parts["inference"], whole["inference"]) <= 1e-5
        np.testing.assert_allclose(parts["sums"], whole["sums"], rtol=1e-4)
        assert parts["one_sided"].values == pytest.approx(whole["one_sided"].values, rel=1e-4)
    single, first, second = (result[f"{case} in parts"] for result in trained)
    assert largest_difference(first["weights"], single["weights"]) <= 1e-5
    assert largest_difference(second["weights"], first["weights"]) == 0


@pytest.mark.parametrize("case", ["synchronized in parts", "float16 in parts"])
def test_micro_batches_train_every_network(trained, case):
    _, first, second = (result[case] for result in trained)
    assert largest_difference(second["weights"], first["weights"]) == 0
    assert np.isfinite(first["sums"]).all()
    assert first["sums"][-1, 1] < first["sums"][0, 1] or "float16" in case
    assert first["one_sided"] == second["one_sided"]


@pytest.mark.parametrize("case", ["adam", "residual"])
def test_adam_gives_the_same_losses_and_probabilities(trained, case):
    single, first, _ = (result[case] for result in trained)
    # Adam amplifies rounding errors, which depend on the processor: 1.3e-4 on a Xeon with AMX.
    np.testing.assert_allclose(first["sums"][:, 1], single["sums"][:, 1], rtol=5e-4)
    np.testing.assert_allclose(first["probabilities"], single["probabilities"], atol=1e-4)


def test_plain_batch_norm_statistics_are_averaged(trained):
    single, first, second = (result["plain"] for result in trained)
    # The tests above can detect such a difference.
    assert largest_difference(first["weights"], single["weights"]) > 1e-4
    assert largest_difference(first["statistics"], second["statistics"]) > 1e-4
    mean = [(a + b) / 2 for a, b in zip(first["statistics"], second["statistics"], strict=True)]
    assert largest_difference(first["averaged"], mean) < 1e-6
    assert largest_difference(first["averaged"], second["averaged"]) == 0


def test_a_worker_without_images_takes_part_and_keeps_its_statistics(trained):
    _, first, second = (result["plain"] for result in trained)
    assert first["one_sided"] == second["one_sided"]
    assert (first["one_sided"].count, first["one_sided"].bad) == (4, 4)
    assert np.isfinite(first["one_sided"].loss)
    before, after = second["one_sided_statistics"]
    assert largest_difference(after, before) == 0
    before, after = first["one_sided_statistics"]
    assert largest_difference(after, before) > 1e-4


def test_all_workers_skip_a_step_that_overflows_on_one(trained):
    for result in trained[1:]:
        unmoved, before, after = result["float16"]["overflow"]
        assert unmoved
        assert after == before / 2


@pytest.mark.parametrize("case", ["bfloat16", "float16"])
def test_low_precision_trains_and_leaves_a_float32_network(trained, case):
    _, first, _ = (result[case] for result in trained)
    assert np.isfinite(first["sums"]).all()
    assert first["probabilities"].dtype == np.float32
    assert all(values.dtype == np.float32 for values in first["inference"])
    # Its results are close to those of float32.
    np.testing.assert_allclose(first["sums"][0], trained[1]["float32"]["sums"][0], rtol=0.05)
