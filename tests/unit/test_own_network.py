"""Networks that a function of the user's gives: what they may be, and a sentence for each thing that is wrong."""

import keras
import numpy as np
import pytest

from cnnray.models import architectures, bundle, grad_cam, own_network, transfer
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.own_network import NetworkError
from cnnray.training.config import TrainConfig
from cnnray.training.phases import Phase
from cnnray.training.step import Steps
from tests.configs import decided

SIZE, CLASSES = 16, 3
HERE = "tests.unit.test_own_network"


def functional(image_size, classes):
    pixels = keras.Input((image_size, image_size, 3))
    hidden = keras.layers.Rescaling(1 / 255)(pixels)
    hidden = keras.layers.Conv2D(8, 3, padding="same")(hidden)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = hidden + keras.layers.Conv2D(8, 1)(keras.layers.ReLU()(hidden))
    hidden = keras.layers.GlobalAveragePooling2D()(hidden)
    return keras.Model(pixels, keras.layers.Dense(classes, name="logits")(hidden))


def sequential(image_size, classes):
    return keras.Sequential([
        keras.Input((image_size, image_size, 3)),
        keras.layers.Conv2D(4, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(classes, name="logits"),
    ])  # fmt: skip


class Halved(keras.layers.Layer):
    """A layer of the user's that Keras does not know."""

    def call(self, values):
        return values / 2


def with_unknown_layer(image_size, classes):
    return keras.Sequential([
        keras.Input((None, None, 3)), Halved(), keras.layers.GlobalMaxPooling2D(),
        keras.layers.Dense(classes, name="logits"),
    ])  # fmt: skip


@pytest.mark.parametrize("function", [functional, sequential])
def test_a_network_gives_the_same_as_the_users_model(function):
    name = f"{HERE}:{function.__name__}"
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    keras.utils.set_random_seed(1)
    model = architectures.build(name, SIZE, CLASSES)
    keras.utils.set_random_seed(1)
    alone = function(SIZE, CLASSES)
    expected = keras.ops.softmax(alone(images.astype(np.float32), training=False))
    np.testing.assert_allclose(model(images, training=False), expected, rtol=1e-5, atol=1e-6)
    assert model.name == function.__name__
    assert [variable.shape for variable in model.trainable_variables] == [
        variable.shape for variable in alone.trainable_variables
    ]


@pytest.mark.parametrize("flags", [{}, {"precision": "bfloat16", "synchronized_batch_norm": True}])
@pytest.mark.parametrize("function", [functional, sequential])
def test_it_trains_and_its_bundle_answers(function, flags, tmp_path):
    config = decided(architecture=f"{HERE}:{function.__name__}", image_size=SIZE, augment="none", **flags)
    assert (config.head, config.dropout) == ("linear", 0)
    steps = Steps(config, CLASSES)
    steps.begin(Phase(name="all", epochs=1, learning_rate=0.01), 20)
    generator = np.random.default_rng(0)
    targets = generator.integers(0, CLASSES, 32)
    images = np.clip(80 * targets[:, None, None, None] + generator.integers(0, 80, (32, SIZE, SIZE, 3)), 0, 255)
    losses = [
        steps.start(images.astype(np.uint8), targets, position=(0, step, 0)).result().loss for step in range(20)
    ]
    assert losses[-1] < losses[0]
    steps.update_inference()
    info = BundleInfo(class_names=["a", "b", "c"], image_size=SIZE, architecture=config.architecture)
    bundle.save(steps.inference, info, tmp_path)
    loaded = Bundle.load(str(tmp_path))
    np.testing.assert_allclose(loaded.model(images), steps.inference(images), atol=1e-5)
    assert loaded.version.startswith(f"{config.architecture}-")
    if function is functional:
        assert grad_cam.heat_maps(loaded, images[:2].astype(np.uint8), targets[:2]).shape == (2, SIZE, SIZE)
        assert len(transfer.backbone_layers(steps.model)) == 3


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda size, classes: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda size: size, "TypeError: .* positional arguments? but 2 were given"),
        (lambda size, classes: "network", "gives no Keras model, but str"),
        (lambda size, classes: sequential(size, 7), r"gives \(None, 7\), and there are 3 classes"),
        (lambda size, classes: sequential(32, classes), r"takes \(None, 32, 32, 3\), and the images are \(None, 16"),
        (
            lambda size, classes: keras.Sequential([sequential(size, classes), keras.layers.Softmax()]),
            r"ends with the layer 'softmax\w*': call the last one 'logits', without a softmax",
        ),
        (
            lambda size, classes: keras.Sequential([
                keras.Input((size, size, 3)), keras.layers.Flatten(),
                keras.layers.Dense(classes, activation="softmax", name="logits"),
            ]),
            "has an activation in its layer 'logits': leave it out",
        ),
        (
            lambda size, classes: keras.Sequential([
                keras.Input((size, size, 3)), keras.layers.GlobalMaxPooling2D(),
                keras.layers.Identity(name="logits"),
            ]),
            "has no weights to train",
        ),
        (
            lambda size, classes: keras.Model(
                [one := keras.Input((size, size, 3)), keras.Input((2,))],
                keras.layers.Dense(classes, name="logits")(keras.layers.Flatten()(one)),
            ),
            "has 2 inputs and 1 outputs, and needs one of each",
        ),
        (lambda size, classes: type("Own", (keras.Model,), {})(), "gives a subclass of Model: build it of layers"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_network_is_a_sentence(function, sentence, monkeypatch):
    monkeypatch.setitem(own_network._functions, "mine:network", function)
    with pytest.raises(NetworkError, match=f"^--architecture mine:network:? {sentence}"):
        architectures.build("mine:network", SIZE, CLASSES)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:network", r"cannot be imported \(No module named 'no_such_module'\): Python must find"),
        (f"{HERE}:nothing", "cannot be imported .*has no attribute 'nothing'"),
        (":network", "cannot be imported"),
        (f"{HERE}:SIZE", "is no function"),
    ],
)
def test_a_function_that_is_not_found_is_a_sentence(name, sentence):
    with pytest.raises(NetworkError, match=f"--architecture {name} {sentence}"):
        own_network.find(name)


@pytest.mark.parametrize("flags", [{"head": "dense"}, {"dropout": 0.5}])
def test_flags_of_other_networks_are_refused(flags):
    with pytest.raises(ValueError, match=r"is for cnnray's networks: yours has its own layers"):
        TrainConfig(data="/d", output="/o", architecture="mine:network", **flags)
    with pytest.raises(ValueError, match=r"functions of your own as package\.module:function"):
        TrainConfig(data="/d", output="/o", architecture="resnet")


def test_bundles_that_need_code_are_known():
    assert own_network.why_not_loaded(architectures.build(f"{HERE}:functional", SIZE, CLASSES)) is None
    reason = own_network.why_not_loaded(architectures.build(f"{HERE}:with_unknown_layer", SIZE, CLASSES))
    assert reason == "Keras does not know Halved."
