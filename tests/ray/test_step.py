"""Two workers and one process, fed the same global batches, hold the same weights."""

import numpy as np
import pytest
from PIL import Image

from cnnray.training.config import TrainConfig
from tests.ray.workers import on_workers

STEPS, BATCH, SIZE, CLASSES = 10, 32, 32, 4
WEIGHTS = (0.5, 1.0, 2.0, 1.0)
# Rounding differs between one process and two, and training amplifies it: by 30 a step at a rate of 0.01 and
# batches of 8. At these rates ten steps leave 1e-6, where a wrong statistic leaves 1e-3 (`plain`).
CASES = {
    "sgd": {"architecture": "vgg16", "head": "linear", "optimizer": "sgd", "learning_rate": 1e-5},
    "sgd_synchronized": {
        "architecture": "small_cnn",
        "optimizer": "sgd",
        "learning_rate": 1e-4,
        "synchronized_batch_norm": True,
    },
    "adam": {"architecture": "small_cnn", "learning_rate": 1e-4, "synchronized_batch_norm": True},
    "plain": {"architecture": "small_cnn", "learning_rate": 1e-4},
    # All that is done with the summed gradients, and to the weights behind them.
    "recipe": {
        "architecture": "small_cnn",
        "optimizer": "sgd",
        "learning_rate": 1e-4,
        "synchronized_batch_norm": True,
        "clip_norm": 0.5,
        "accumulate": 2,
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
        "average": 0.9,
    },
    "bfloat16": {"architecture": "small_cnn", "precision": "bfloat16"},
    "float16": {"architecture": "small_cnn", "precision": "float16"},
}


def _batches():
    generator = np.random.default_rng(0)
    # The last batches are uneven over two workers.
    sizes = [BATCH] * (STEPS - 2) + [BATCH - 1, BATCH - 3]
    return [(np.stack([_smooth(generator) for _ in range(n)]), generator.integers(0, CLASSES, n)) for n in sizes]


def _smooth(generator):
    small = Image.fromarray(generator.integers(0, 256, (6, 6, 3), np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _train(rank, world, cases, batches):
    import keras
    import tensorflow as tf

    from cnnray.training.step import Steps

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    results = {}
    for name, case in cases.items():
        keras.backend.clear_session()
        config = TrainConfig(
            data="/d", output="/o", image_size=SIZE, dropout=0.0, max_workers=world, augment="none",
            schedule="constant", **{"optimizer": "adam"} | case,
        )  # fmt: skip
        with strategy.scope():
            steps = Steps(config, CLASSES, class_weights=np.asarray(WEIGHTS, np.float32))
            steps.begin(config.resolved_phases[0], STEPS)
        # Low precision is slow here, and not compared with one process.
        used = batches[:3] if "precision" in case else batches
        sums = [steps.train(x[rank::world], y[rank::world]).values for x, y in used]
        statistics = [v.numpy() for v in steps._statistics]
        steps.average_statistics()
        steps.update_inference()
        averaged = [v.numpy() for v in steps._statistics]
        weights = [v.numpy() for v in steps.model.weights]
        inference = steps.inference.get_weights()
        images, targets = batches[0]
        probabilities = np.asarray(steps.inference(images, training=False))
        before = [v.numpy() for v in steps._statistics]
        # A step in which every image of the second worker was bad.
        mine = images[: 4 if rank == 0 else 0]
        lonely = steps.train(mine, targets[: len(mine)], bad=rank * 4)
        results[name] = {
            "sums": np.asarray(sums),
            "weights": weights,
            "inference": inference,
            "statistics": statistics,
            "averaged": averaged,
            "probabilities": probabilities,
            "lonely": lonely,
            "overflow": _overflow(rank, steps, images, targets) if name == "float16" else None,
            "lonely_statistics": (before, [v.numpy() for v in steps._statistics]),
        }
    return results


def _overflow(rank, steps, images, targets):
    """A step in which the gradients of one worker alone are not finite: its loss scale, and what became of it."""
    before = [v.numpy() for v in steps.model.trainable_variables]
    scale = steps.optimizer.dynamic_scale.numpy()
    if rank == 1:
        steps.optimizer.scale_loss = lambda loss: loss * np.inf
    import tensorflow as tf

    steps._compiled_train = tf.function(steps._train, autograph=False)
    steps.train(images[rank::2], targets[rank::2])
    unmoved = all((v.numpy() == b).all() for v, b in zip(steps.model.trainable_variables, before, strict=True))
    return unmoved, float(scale), float(steps.optimizer.dynamic_scale.numpy())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    one = on_workers(_train, 1, folder, CASES, _batches())
    two = on_workers(_train, 2, folder, CASES, _batches())
    return one[0], two[0], two[1]


def _relative(found, expected):
    """The largest difference between two lists of arrays, in terms of the largest value."""
    scale = max(np.abs(values).max() for values in expected)
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) / scale


@pytest.mark.parametrize("case", ["sgd", "sgd_synchronized", "recipe"])
def test_sgd_gives_the_same_weights(trained, case):
    one, first, second = (result[case] for result in trained)
    assert _relative(first["inference"], one["inference"]) <= 1e-5
    assert _relative(first["weights"], one["weights"]) <= 1e-5
    assert _relative(second["weights"], first["weights"]) == 0
    np.testing.assert_allclose(first["sums"], one["sums"], rtol=1e-4)


def test_adam_gives_the_same_losses_and_probabilities(trained):
    one, first, _ = (result["adam"] for result in trained)
    # Adam makes steps of roundings, which are the processor's own: 1.3e-4 on a Xeon with AMX.
    np.testing.assert_allclose(first["sums"][:, 1], one["sums"][:, 1], rtol=5e-4)
    np.testing.assert_allclose(first["probabilities"], one["probabilities"], atol=1e-4)


def test_plain_batch_norm_statistics_are_averaged(trained):
    one, first, second = (result["plain"] for result in trained)
    assert _relative(first["weights"], one["weights"]) > 1e-4  # so the tests above can see such a difference
    assert _relative(first["statistics"], second["statistics"]) > 1e-4
    mean = [(a + b) / 2 for a, b in zip(first["statistics"], second["statistics"], strict=True)]
    assert _relative(first["averaged"], mean) < 1e-6
    assert _relative(first["averaged"], second["averaged"]) == 0


def test_a_worker_without_images_takes_part_and_keeps_its_statistics(trained):
    _, first, second = (result["plain"] for result in trained)
    assert first["lonely"] == second["lonely"]
    assert (first["lonely"].count, first["lonely"].bad) == (4, 4)
    assert np.isfinite(first["lonely"].loss)
    before, after = second["lonely_statistics"]
    assert _relative(after, before) == 0
    before, after = first["lonely_statistics"]
    assert _relative(after, before) > 1e-4


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
    # It computes nearly what float32 does.
    plain = trained[1]["plain"]
    np.testing.assert_allclose(first["sums"][0], plain["sums"][0], rtol=0.05)
