"""Recipes: schedules, phases, optimizers, losses, class weights, pruning."""

import keras
import numpy as np
import pytest
import sklearn.utils
import tensorflow as tf

from cnnray import configs
from cnnray.images import manifest as manifests
from cnnray.models import architectures, bundle
from cnnray.models.augment import Augmentations
from cnnray.models.bundle import BundleInfo
from cnnray.training import recipe
from cnnray.training.decided import differences
from cnnray.training.phases import Phase, prunes_at, sparsity_at
from cnnray.training.recipe import RecipeError
from cnnray.training.step import Steps
from tests.configs import decided
from tests.networks import coloured_noise


def _config(**changes):
    return decided(**{"epochs": 10} | changes)


def _rates(config, per_epoch):
    phase = config.resolved_phases[0]
    rate = recipe.learning_rate(config, phase, per_epoch)
    return [float(rate(step)) for step in range(phase.passes * per_epoch + 1)]


@pytest.mark.parametrize(
    ("flags", "warmup", "decay"),
    [
        ({}, 10, 90),  # 10 epochs of 10 steps: a tenth
        ({"epochs": 100}, 50, 950),  # five epochs at most
        ({"warmup_epochs": 2.5}, 25, 75),
        ({"warmup_steps": 7, "decay_epochs": 3}, 7, 30),
        ({"warmup_steps": 0, "decay_steps": 100}, 0, 100),
        ({"decay_steps": 95}, 5, 95),
        ({"epochs": 1, "decay_epochs": 1}, 0, 10),
    ],
)
def test_cosine_rises_during_warm_up_and_falls_during_decay(flags, warmup, decay):
    config = _config(schedule="cosine", learning_rate=0.5, **flags)
    assert recipe.lengths(config, config.resolved_phases[0], 10) == (warmup, decay)
    rates = _rates(config, 10)
    assert rates[warmup] == max(rates) == pytest.approx(0.5)
    assert (np.diff(rates[: warmup + 1]) > 0).all()
    assert (np.diff(rates[warmup : warmup + decay + 1]) < 0).all()
    assert rates[warmup + decay] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "flags",
    [{"warmup_epochs": 11}, {"decay_steps": 101}, {"warmup_steps": 60, "decay_epochs": 5}, {"decay_steps": 0}],
)
def test_warm_up_and_decay_that_do_not_fit_the_phase_are_refused(flags):
    config = _config(schedule="cosine", **flags)
    with pytest.raises(RecipeError, match="do not fit into the 100 steps of 10 epochs"):
        recipe.lengths(config, config.resolved_phases[0], 10)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"schedule": "plateau", "warmup_epochs": 1}, "--warmup-epochs is of --schedule cosine, not of plateau"),
        ({"schedule": "constant", "decay_steps": 1}, "--decay-steps is of --schedule cosine"),
        ({"warmup_epochs": 1, "warmup_steps": 1}, "--warmup-epochs and --warmup-steps say the same"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "adam with it is --optimizer adamw"),
        ({"weight_decay": -1}, "--weight-decay must be at least 0"),
        ({"phases": []}, "--phases is empty"),
        ({"label_smoothing": 1}, "--label-smoothing must be at least 0 and less than 1"),
        ({"average": 1}, "--average must be at least 0 and less than 1"),
        ({"clip_norm": 0}, "--clip-norm must be more than 0"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"distillation": 1.5}, "--distillation must be 0 to 1"),
        ({"weights": "imagenet"}, "there are none of small_cnn"),
        ({"augmentations": Augmentations(one_of=["noise"])}, "one-of names noise, which is off"),
    ],
)
def test_combinations_that_cannot_work_are_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        _config(**flags)


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ({"name": ""}, "each needs a name"),
        ({"epochs": 0}, "has 0 epochs"),
        ({"learning_rate": 0}, "has the learning rate 0"),
        ({"trainable": 1.5}, "must be 0 to 1"),
        ({"sparsity": 1}, "less than 1"),
    ],
)
def test_impossible_phases_are_refused(phase, sentence):
    with pytest.raises(ValueError, match=sentence):
        Phase(**{"name": "a"} | phase)


def test_presets_and_listed_phases_are_resolved():
    article = _config(phases="article", epochs=4).resolved_phases
    assert [(p.learning_rate, p.trainable, p.epochs) for p in article] == [
        (1e-3, 0, 4),
        (1e-4, 0.2, 4),
        (1e-5, 0.5, 4),
    ]
    listed = _config(phases=[Phase(name="a", epochs=2), Phase(name="b", learning_rate=0.5)], learning_rate=0.1)
    assert [(p.learning_rate, p.epochs) for p in listed.resolved_phases] == [(0.1, 2), (0.5, 10)]
    assert listed.all_epochs == 12
    assert [p.sparsity for p in _config(phases="prune").resolved_phases] == [0, 0.5, 0.8]
    pruned = _config(phases=[Phase(name="zeros", sparsity=0.5), Phase(name="tune")])
    assert [p.sparsity for p in pruned.resolved_phases] == [0.5, 0.5]


def test_more_epochs_prevent_a_resume_only_if_they_change_earlier_steps():
    for flags, same in (
        ({"schedule": "constant"}, True),
        ({"schedule": "cosine"}, False),
        ({"schedule": "cosine", "decay_epochs": 2}, False),  # the warm-up is a fraction of all epochs
        ({"schedule": "cosine", "warmup_epochs": 1, "decay_epochs": 2}, True),
        ({"schedule": "plateau", "phases": "article"}, False),
    ):
        earlier = configs.as_dict(_config(epochs=10, **flags))
        assert (differences(_config(epochs=20, **flags), earlier) == []) == same


def test_class_weights_equal_those_of_scikit_learn():
    labels = np.repeat([0, 1, 2], [50, 7, 143])
    expected = sklearn.utils.class_weight.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = recipe.class_weights(_config(class_weights="balanced"), [50, 7, 143])
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(weights, [200 / 150, 200 / 21, 200 / 429], rtol=1e-6)
    assert (recipe.class_weights(_config(), [50, 7, 143]) == 1).all()


def test_weight_decay_applies_to_kernels_only():
    config = _config(optimizer="adamw", weight_decay=0.5, schedule="constant", learning_rate=0.1)
    model = architectures.build("small_cnn", 32, 3)
    optimizer = recipe.optimizer(config, config.resolved_phases[0], 1)
    optimizer.build(model.trainable_variables)
    before = [variable.numpy() + 1.0 for variable in model.trainable_variables]
    for variable, value in zip(model.trainable_variables, before, strict=True):
        variable.assign(value)
    optimizer.apply([tf.zeros_like(v.value) for v in model.trainable_variables], model.trainable_variables)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        factor = 0.95 if variable.name == "kernel" else 1.0
        np.testing.assert_allclose(variable.numpy(), value * factor, rtol=1e-5)


def test_sparsity_grows_until_the_middle_of_a_phase():
    steps = 100
    schedule = [(step, sparsity_at(step, steps, 0.5, 0.8)) for step in range(steps) if prunes_at(step, steps)]
    values = [value for _, value in schedule]
    assert values[0] == 0.5
    assert schedule[-1] == (50, 0.8)
    assert (np.diff(values) > 0).all()
    assert 15 < len(values) < 30
    assert [step for step in range(2) if prunes_at(step, 2)] == [0, 1]
    assert sparsity_at(1, 2, 0.0, 0.5) == 0.5


@pytest.mark.parametrize("flags", [{}, {"average": 0.9}, {"precision": "bfloat16"}])
def test_pruned_weights_stay_zero_while_others_learn(flags):
    images, targets = coloured_noise(16, 32)
    config = _config(phases="prune", **flags)
    steps = Steps(config, 3)
    steps.begin(config.resolved_phases[1], 4)
    steps.prune_at(20, 4, config.resolved_phases[1], 0.0)  # half of ten epochs
    zeros = [weight == 0 for weight in steps.model.get_weights()]
    kernels = [index for index, weight in enumerate(steps.model.get_weights()) if weight.ndim > 1]
    before = steps.model.get_weights()
    for step in range(3):
        steps.start(images, targets, position=(0, step, 0)).result()
    steps.update_inference()
    for model in (steps.model, steps.inference):
        after = model.get_weights()
        for index in kernels:
            assert zeros[index].mean() == pytest.approx(0.5, abs=0.01)
            assert (after[index][zeros[index]] == 0).all()
            assert (after[index][~zeros[index]] != before[index][~zeros[index]]).mean() > 0.9
    # The next phase keeps these zeros, also after a checkpoint.
    steps.begin(config.resolved_phases[2], 4)
    steps.start(images, targets).result()
    assert all((steps.model.get_weights()[index][zeros[index]] == 0).all() for index in kernels)


def test_the_inference_network_holds_the_average(tmp_path):
    images, targets = coloured_noise(16, 32)
    config = _config(average=0.5, schedule="constant", optimizer="sgd", learning_rate=0.01)
    steps = Steps(config, 3)
    steps.begin(config.resolved_phases[0], 4)
    expected = steps.model.get_weights()
    for step in range(3):
        steps.start(images, targets, position=(0, step, 0)).result()
        momentum = min(0.5, (2 + step) / (11 + step))
        current = steps.model.get_weights()
        expected = [momentum * old + (1 - momentum) * new for old, new in zip(expected, current, strict=True)]
    for weight, mean in zip(steps.inference.get_weights(), expected, strict=True):
        np.testing.assert_allclose(weight, mean, rtol=1e-4, atol=1e-6)
    state, weights = steps.state(), steps.model.get_weights()
    steps.inference.save(tmp_path / "model.keras")
    restored = Steps(config, 3)
    restored.begin(config.resolved_phases[0], 4)
    restored.load(str(tmp_path / "model.keras"), state, optimizer=True)
    for weight, saved in zip(restored.model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, saved)
    losses = [each.start(images, targets, position=(1, 0, 0)).result().loss for each in (steps, restored)]
    assert losses[0] == losses[1]


def test_accumulated_gradients_are_those_of_one_larger_batch():
    images, targets = coloured_noise(16, 32)
    flags = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "dropout": 0.0, "augment": "none"}
    weights = []
    for accumulate, parts in ((1, [slice(0, 16)]), (2, [slice(0, 8), slice(8, 16)])):
        steps = Steps(_config(accumulate=accumulate, **flags), 3)
        # The batch norms of a trained backbone would get other batches.
        steps.begin(Phase(name="head", epochs=1, learning_rate=0.1, trainable=0.0), 2)
        for part in parts:
            steps.start(images[part], targets[part]).result()
        weights.append(steps.model.get_weights())
    for first, second in zip(*weights, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_the_loss_combines_smoothed_weighted_labels_with_the_teacher():
    images, targets = coloured_noise(12, 32)
    teacher = architectures.build("small_cnn", 32, 3)
    config = _config(
        label_smoothing=0.1, augment="none", dropout=0.0, distillation=0.3, distillation_temperature=2.0,
        class_weights="balanced",
    )  # fmt: skip
    importance = np.asarray([0.5, 1.0, 2.0], np.float32)
    steps = Steps(config, 3, teacher=teacher, class_weights=importance)
    steps.begin(config.resolved_phases[0], 4)
    logits = np.asarray(steps._network(images, training=True), np.float64)
    teacher_logits = np.asarray(keras.Model(teacher.inputs, teacher.get_layer("logits").output)(images), np.float64)
    sums = steps.start(images, targets).result()

    def log_softmax(values):
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    labels = np.eye(3)[targets] * 0.9 + 0.1 / 3
    label_loss = importance[targets] * -(labels * log_softmax(logits)).sum(1)
    teacher_probabilities = np.exp(log_softmax(teacher_logits / 2))
    log_ratios = log_softmax(teacher_logits / 2) - log_softmax(logits / 2)
    divergence = (teacher_probabilities * log_ratios).sum(1).mean() * 4
    assert sums.loss / 12 == pytest.approx((0.7 * label_loss + 0.3 * divergence).mean(), rel=1e-4)


def test_recipes_that_do_not_fit_the_images_are_refused(tmp_path):
    rows = [{"uri": f"/{n}.png", "label": "ab"[n % 2], "split": "train"} for n in range(20)]
    manifest = manifests.pa.Table.from_pylist([{"id": n} | row for n, row in enumerate(rows)])
    recipe.check(_config(batch_size=10), manifest)
    with pytest.raises(RecipeError, match="--accumulate 21 is more than all 20 steps"):
        recipe.check(_config(batch_size=10, accumulate=21), manifest)
    info = BundleInfo(class_names=["a", "c"], image_size=32)
    bundle.save(architectures.build("small_cnn", 32, 2), info, tmp_path / "other")
    with pytest.raises(RecipeError, match="knows other classes"):
        recipe.check(_config(teacher=str(tmp_path / "other")), manifest)
    info = BundleInfo(class_names=["a", "b"], image_size=16)
    bundle.save(architectures.build("small_cnn", 16, 2), info, tmp_path / "small")
    with pytest.raises(RecipeError, match="takes images of 16x16 pixels, not of 32x32"):
        recipe.check(_config(teacher=str(tmp_path / "small")), manifest)
