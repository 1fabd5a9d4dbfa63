"""What a network begins with, and which of its layers are trained."""

from dataclasses import replace

import keras
import pytest

from cnnray.models import architectures, bundle, transfer
from cnnray.models.bundle import BundleInfo
from cnnray.models.transfer import WeightsError
from cnnray.training.config import TrainConfig
from cnnray.training.phases import Phase
from cnnray.training.step import Steps
from tests.networks import coloured_noise

SIZE = 32


def _backbone_weights(model):
    return [weight for layer in transfer.backbone_layers(model) for weight in layer.get_weights()]


def _same(found, expected):
    return all((a == b).all() for a, b in zip(found, expected, strict=True))


def test_weights_of_keras_applications_come_from_a_file_and_must_fit(tmp_path):
    source = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    path = tmp_path / "notop.weights.h5"
    source.save_weights(path)
    model = architectures.build("mobilenetv2", SIZE, 3)
    transfer.load(model, path)
    assert _same(_backbone_weights(model), source.get_weights())
    for other in ("vgg16", "small_cnn", "mobilenet"):
        with pytest.raises(WeightsError, match=f"does not hold weights of {other}"):
            transfer.load(architectures.build(other, SIZE, 3), path)


@pytest.mark.parametrize("architecture", ["small_cnn", "mobilenetv2"])
def test_weights_of_a_bundle_go_into_a_network_of_other_classes(architecture, tmp_path):
    source = architectures.build(architecture, SIZE, 5)
    bundle.save(source, BundleInfo(class_names=list("abcde"), image_size=SIZE), tmp_path)
    model = architectures.build(architecture, SIZE, 3)
    head = model.get_layer("logits").get_weights()
    transfer.load(model, tmp_path / bundle.MODEL)
    assert _same(_backbone_weights(model), _backbone_weights(source))
    assert _same(model.get_layer("logits").get_weights(), head)
    with pytest.raises(WeightsError, match="does not hold weights of vgg_bn: its layer 1 has"):
        transfer.load(architectures.build("vgg_bn", SIZE, 3), tmp_path / bundle.MODEL)


def test_weights_of_a_whole_network_of_ours_come_from_weights_h5(tmp_path):
    source = architectures.build("small_cnn", SIZE, 5)
    source.save_weights(tmp_path / "mine.weights.h5")
    model = architectures.build("small_cnn", SIZE, 3)
    transfer.load(model, tmp_path / "mine.weights.h5")
    assert _same(_backbone_weights(model), _backbone_weights(source))


def test_what_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="neither a file of weights nor a bundle"):
        transfer.check(str(tmp_path))
    (tmp_path / "a.keras").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be loaded safely"):
        transfer.load(architectures.build("small_cnn", SIZE, 3), tmp_path / "a.keras")
    (tmp_path / "a.weights.h5").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="does not hold weights of small_cnn"):
        transfer.load(architectures.build("small_cnn", SIZE, 3), tmp_path / "a.weights.h5")


def test_imagenet_weights_are_written_or_it_is_said_where_to_get_them(tmp_path, monkeypatch):
    # Keras's storage cannot be reached from here: what stands for it raises as Keras does, or gives a network.
    address = "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/vgg16_notop.h5"
    real = architectures.application

    def unreachable(architecture, image_size, weights):
        if weights:
            raise Exception(f"URL fetch failure on {address}: None -- [Errno -2] Name or service not known")
        return real(architecture, image_size, weights)

    monkeypatch.setattr(architectures, "application", unreachable)
    with pytest.raises(WeightsError, match=rf"{address} cannot be reached.*into ~/.keras/models.*as --weights"):
        transfer.imagenet("vgg16", SIZE, tmp_path / "a.weights.h5")
    fetched = real("mobilenetv2", SIZE, None)
    monkeypatch.setattr(architectures, "application", lambda *a: fetched if a[2] else real(*a))
    transfer.imagenet("mobilenetv2", SIZE, tmp_path / "a.weights.h5")
    monkeypatch.undo()
    model = architectures.build("mobilenetv2", SIZE, 3)
    transfer.load(model, tmp_path / "a.weights.h5")
    assert _same(_backbone_weights(model), fetched.get_weights())


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("small_cnn", "float32"),
        ("small_cnn", "bfloat16"),
        ("mobilenetv2", "float32"),
        pytest.param("mobilenetv2", "bfloat16", marks=pytest.mark.long),
    ],
)
def test_only_what_a_phase_trains_moves(architecture, precision):
    images, targets = coloured_noise(16, SIZE)
    config = TrainConfig(data="/d", output="/o", architecture=architecture, image_size=SIZE, precision=precision)
    steps = Steps(config, 3)
    layers = transfer.backbone_layers(steps.model)
    for phase in (Phase(name="head", trainable=0.0), Phase(name="top", trainable=0.2), Phase(name="all")):
        before = [layer.get_weights() for layer in layers]
        head = steps.model.get_layer("logits").get_weights()
        steps.begin(replace(config, phases=[phase], learning_rate=0.1, schedule="constant").resolved_phases[0], 3)
        for step in range(3):
            steps.train(images, targets, position=(0, step, 0))
        steps.average_statistics()
        moved = [not _same(layer.get_weights(), old) for layer, old in zip(layers, before, strict=True)]
        trained = -(-len(layers) * phase.trainable // 1)
        assert moved == [False] * int(len(layers) - trained) + [True] * int(trained)
        assert not _same(steps.model.get_layer("logits").get_weights(), head)
