"""Loading the weights of a backbone, and freezing its layers."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from cnnray.models import architectures, bundle, transfer
from cnnray.models.bundle import BundleInfo
from cnnray.models.transfer import WeightsError
from cnnray.training.phases import Phase
from cnnray.training.step import Steps
from tests.configs import decided
from tests.networks import coloured_noise

SIZE = 32


def _backbone_weights(model):
    return [weight for layer in transfer.backbone_layers(model) for weight in layer.get_weights()]


def _same(weights, expected):
    return all((a == b).all() for a, b in zip(weights, expected, strict=True))


def test_weights_of_keras_applications_are_loaded_from_a_file_and_must_fit(tmp_path):
    source = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    path = tmp_path / "notop.weights.h5"
    source.save_weights(path)
    model = architectures.build("mobilenetv2", SIZE, 3)
    transfer.load(model, path)
    assert _same(_backbone_weights(model), source.get_weights())
    for other in ("vgg16", "small_cnn", "mobilenet"):
        with pytest.raises(WeightsError, match=f"does not hold weights of {other}"):
            transfer.load(architectures.build(other, SIZE, 3), path)


@pytest.mark.parametrize("architecture", ["small_cnn", "resnet9_small", "mobilenetv2"])
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


def test_weights_of_a_whole_network_are_loaded_from_weights_h5(tmp_path):
    source = architectures.build("small_cnn", SIZE, 5)
    source.save_weights(tmp_path / "mine.weights.h5")
    model = architectures.build("small_cnn", SIZE, 3)
    transfer.load(model, tmp_path / "mine.weights.h5")
    assert _same(_backbone_weights(model), _backbone_weights(source))


def test_files_without_weights_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="neither a weights file nor a bundle"):
        transfer.check(str(tmp_path))
    (tmp_path / "a.keras").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be loaded safely"):
        transfer.load(architectures.build("small_cnn", SIZE, 3), tmp_path / "a.keras")
    (tmp_path / "a.weights.h5").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="does not hold weights of small_cnn"):
        transfer.load(architectures.build("small_cnn", SIZE, 3), tmp_path / "a.weights.h5")


def test_imagenet_weights_are_written_or_the_error_says_where_to_get_them(tmp_path, monkeypatch):
    # Tests have no network. The stub raises the error that Keras raises, or returns a network.
    address = "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/vgg16_notop.h5"
    build_backbone = architectures.build_backbone

    def unreachable(architecture, image_size, weights):
        if weights:
            raise Exception(f"URL fetch failure on {address}: None -- [Errno -2] Name or service not known")
        return build_backbone(architecture, image_size, weights)

    monkeypatch.setattr(architectures, "build_backbone", unreachable)
    with pytest.raises(WeightsError, match=rf"{address} cannot be downloaded.*into ~/.keras/models.*as --weights"):
        transfer.write_imagenet_weights("vgg16", SIZE, tmp_path / "a.weights.h5")
    downloaded = build_backbone("mobilenetv2", SIZE, None)
    monkeypatch.setattr(architectures, "build_backbone", lambda *a: downloaded if a[2] else build_backbone(*a))
    transfer.write_imagenet_weights("mobilenetv2", SIZE, tmp_path / "a.weights.h5")
    monkeypatch.undo()
    model = architectures.build("mobilenetv2", SIZE, 3)
    transfer.load(model, tmp_path / "a.weights.h5")
    assert _same(_backbone_weights(model), downloaded.get_weights())


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("small_cnn", "float32"),
        ("small_cnn", "bfloat16"),
        ("mobilenetv2", "float32"),
        pytest.param("mobilenetv2", "bfloat16", marks=pytest.mark.long),
    ],
)
def test_a_phase_changes_only_its_trainable_layers(architecture, precision):
    images, targets = coloured_noise(16, SIZE)
    config = decided(architecture=architecture, image_size=SIZE, precision=precision)
    steps = Steps(config, 3)
    layers = transfer.backbone_layers(steps.model)
    for phase in (Phase(name="head", trainable=0.0), Phase(name="top", trainable=0.2), Phase(name="all")):
        before = [layer.get_weights() for layer in layers]
        head = steps.model.get_layer("logits").get_weights()
        steps.begin(replace(config, phases=[phase], learning_rate=0.1, schedule="constant").resolved_phases[0], 3)
        for step in range(3):
            steps.start(images, targets, position=(0, step, 0)).result()
        steps.average_statistics()
        moved = [not _same(layer.get_weights(), old) for layer, old in zip(layers, before, strict=True)]
        trained = -(-len(layers) * phase.trainable // 1)
        assert moved == [False] * int(len(layers) - trained) + [True] * int(trained)
        assert not _same(steps.model.get_layer("logits").get_weights(), head)


@pytest.mark.parametrize("head", ["linear", "dense"])
def test_a_head_is_kept_by_the_names_of_its_classes(head, tmp_path):
    known, names = ["cat", "dog", "owl"], ["ant", "cat", "owl", "pig"]
    source = architectures.build("small_cnn", SIZE, 3, head=head)
    source.get_layer("logits").bias.assign([1.0, 2.0, 3.0])
    bundle.save(source, BundleInfo(class_names=known, image_size=SIZE), tmp_path)
    path = tmp_path / bundle.MODEL
    model = architectures.build("small_cnn", SIZE, 4, head=head)
    new_before = model.get_layer("logits").get_weights()
    transfer.load(model, path)
    transfer.load_head(model, path, names, known)
    kernel, bias = model.get_layer("logits").get_weights()
    old_kernel, _ = source.get_layer("logits").get_weights()
    np.testing.assert_array_equal(kernel[:, [1, 2]], old_kernel[:, [0, 2]])
    np.testing.assert_array_equal(kernel[:, [0, 3]], new_before[0][:, [0, 3]])
    assert bias.tolist() == [0, 1, 3, 0]
    # The answers to known classes are in the same proportion.
    image = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    old, new = (np.asarray(network(image, training=False))[0] for network in (source, model))
    assert new[2] / new[1] == pytest.approx(old[2] / old[0], rel=1e-4)
    other = architectures.build("small_cnn", SIZE, 4, head="linear" if head == "dense" else "dense")
    with pytest.raises(WeightsError, match="another head than this network"):
        transfer.load_head(other, path, names, known)
