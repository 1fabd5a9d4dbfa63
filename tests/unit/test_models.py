import dataclasses
import itertools
import json
import pickle
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from cnnray.images.decode import BadImage
from cnnray.images.geometry import Geometry
from cnnray.models import architectures, bundle, transfer
from cnnray.models.answers import find_unusable
from cnnray.models.bundle import Bundle, BundleError, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.models.runtimes import RescaledEngine
from tests.awkward import awkward_images, bad_images

TESTED = (
    "resnet9_small", "vgg_bn", "small_cnn", "resnet50", "efficientnetb0", "vgg16", "mobilenetv2", "efficientnetv2b0",
)  # fmt: skip


def _save(folder, architecture="small_cnn", size=32, **info):
    model = architectures.build(architecture, size, 3)
    default = BundleInfo(class_names=["a", "b", "c"], image_size=size, architecture=architecture)
    bundle.save(model, dataclasses.replace(default, **info), folder)
    return model


@pytest.mark.parametrize("architecture", TESTED)
def test_architectures_build_save_load_and_predict_the_same(architecture, tmp_path):
    model = _save(tmp_path, architecture)
    loaded = Bundle.load(str(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    expected = np.asarray(model(images, training=False))
    np.testing.assert_allclose(Predictor(loaded).probabilities(images), expected, atol=1e-6)
    assert model.get_layer("logits").output.shape == (None, 3)
    assert model.input.dtype == "uint8"


def test_every_backbone_of_keras_is_known():
    functions = {name for name in dir(keras.applications) if name[0].isupper()}
    assert {function for function, _ in architectures._BACKBONES.values()} == functions


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("resnet50", "resnet"),
        ("mobilenetv2", "mobilenet_v2"),
        ("densenet121", "densenet"),
        ("efficientnetb0", "efficientnet"),
    ],
)
def test_backbones_scale_pixels_as_their_weights_expect(architecture, module):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    expected = getattr(keras.applications, module).preprocess_input(pixels.astype(np.float32))
    image = keras.Input((8, 8, 3), dtype="uint8")
    scaled = keras.Model(image, architectures._scale_pixels(image, architectures._BACKBONES[architecture][1]))
    np.testing.assert_allclose(np.asarray(scaled(pixels)), expected, atol=1e-4)


def test_vgg_bn_is_the_articles_network():
    model = architectures.build("vgg_bn", 64, 10)
    kinds = [type(layer).__name__ for layer in model.layers]
    filters = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert filters == [64, 64, 128, 128, 256, 256, 256, 512, 512]
    assert kinds.count("BatchNormalization") == 9
    assert kinds.count("MaxPooling2D") == 4
    assert [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)] == [0.25] * 4 + [0.5]
    dense = next(layer for layer in model.layers if isinstance(layer, keras.layers.Dense))
    assert (dense.units, float(dense.kernel_regularizer.l2)) == (512, pytest.approx(0.01))


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet9_small", 414_074), ("resnet9", 1_648_362), ("resnet9_large", 6_577_610)]
)
def test_resnet9_has_the_same_weights_for_all_image_sizes(name, parameters):
    shapes = set()
    for size, features in ((8, 1), (16, 2), (32, 4), (48, 6), (64, 4), (96, 6), (128, 4), (224, 7)):
        model = architectures.build(name, size, 10, head="linear")
        pooling = next(layer for layer in model.layers if isinstance(layer, keras.layers.GlobalMaxPooling2D))
        assert pooling.input.shape[1:3] == (features, features)
        shapes.add(tuple(tuple(weight.shape) for weight in model.weights))
        assert model.count_params() == parameters
    assert len(shapes) == 1


@pytest.mark.parametrize("name", ["resnet9", "vgg_bn", "small_cnn"])
def test_the_first_convolution_begins_with_edges(name):
    grounds = np.broadcast_to(np.linspace(0, 255, 5, dtype=np.uint8)[:, None, None, None], (5, 32, 32, 3))
    model = architectures.build(name, 32, 10)
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    outputs = np.asarray(keras.Model(model.input, first.output)(grounds))[:, 1:-1, 1:-1]
    np.testing.assert_allclose(outputs, 0, atol=1e-5)
    assert first.kernel.numpy().std() > 0.01


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (
            "dense",
            [("Dense", 512), ("Dropout", 0.5), ("Dense", 256), ("Dropout", 0.3), ("Dense", 3), ("Softmax", None)],
        ),
        ("linear", [("Dropout", 0.5), ("Dense", 3), ("Softmax", None)]),
    ],
)
def test_heads_of_backbones(head, expected):
    layers = architectures.build("mobilenetv2", 32, 3, head=head).layers
    start = next(i for i, layer in enumerate(layers) if isinstance(layer, keras.layers.GlobalAveragePooling2D))
    head_layers = [
        (type(layer).__name__, getattr(layer, "units", getattr(layer, "rate", None))) for layer in layers[start + 1 :]
    ]
    assert head_layers == [(kind, pytest.approx(value)) for kind, value in expected]


def test_efficientnet_scales_pixels_as_its_published_weights_expect(tmp_path):
    deviation = np.asarray([0.229, 0.224, 0.225])
    source = keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(32, 32, 3))
    layer = next(layer for layer in source.layers if isinstance(layer, keras.layers.Normalization))
    layer.adapt_mean.assign([0.485, 0.456, 0.406])
    layer.adapt_variance.assign(deviation**2)
    source.save_weights(str(tmp_path / "notop.weights.h5"))
    model = architectures.build("efficientnetb0", 32, 3)
    transfer.load(model, tmp_path / "notop.weights.h5")
    bundle.save(model, BundleInfo(class_names=["a", "b", "c"], image_size=32), tmp_path)
    for built in (model, Bundle.load(str(tmp_path)).model):
        backbone = built.get_layer("efficientnetb0")
        normalized = next(layer for layer in backbone.layers if isinstance(layer, keras.layers.Normalization))
        pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.float32)
        scaled = np.asarray(keras.Model(backbone.inputs, normalized.output)(pixels))
        # as keras.applications.efficientnet: Normalization, then Rescaling(1 / sqrt(deviation))
        expected = (pixels / 255 - [0.485, 0.456, 0.406]) / deviation / np.sqrt(deviation)
        np.testing.assert_allclose(scaled, expected, atol=1e-4)


def test_predictor_returns_a_prediction_or_an_error_for_each_image(tmp_path):
    _save(tmp_path)
    predictor = Predictor(Bundle.load(str(tmp_path)))
    awkward, bad = awkward_images(), bad_images()
    bad_data = itertools.cycle(data for data, _ in bad.values())
    mixed = [data for good in awkward.values() for data in (good, next(bad_data))]
    answers = predictor(mixed)
    assert len(answers) == len(mixed)
    for answer in answers[0::2]:
        assert answer.probabilities.sum() == pytest.approx(1, abs=1e-5)
        assert answer.top_k[0] == (answer.label, answer.confidence)
        assert [score for _, score in answer.top_k] == sorted((s for _, s in answer.top_k), reverse=True)
    assert all(isinstance(answer, BadImage) for answer in answers[1::2])
    assert predictor([]) == []
    assert [type(answer) for answer in predictor([b""])] == [BadImage]


def test_values_that_are_no_probabilities_are_errors(tmp_path):
    rows = np.asarray([[0.1, 0.9], [np.nan, 0.5], [0, 0], [np.inf, 0], [1, 0]], np.float32)
    errors = find_unusable(rows)
    assert {index: str(error) for index, error in errors.items()} == {
        1: "no probabilities: the network's output is not finite",
        2: "no probabilities: the network's output is zero for each class",
        3: "no probabilities: the network's output is not finite",
    }
    assert find_unusable(rows[:0]) == {}

    class Engine:
        classes = 2

        def __call__(self, images):
            return rows

    np.testing.assert_array_equal(RescaledEngine(Engine(), 2.0)(None)[2], [0, 0])
    model = architectures.build("small_cnn", 32, 3)
    model.get_layer("logits").bias.assign([0, np.nan, 0])
    bundle.save(model, BundleInfo(class_names=["a", "b", "c"], image_size=32), tmp_path)
    answers = Predictor(Bundle.load(str(tmp_path)))([awkward_images()["rgb.png"], b""])
    assert [answer.reason for answer in answers] == ["no probabilities", "empty"]


def test_answers_do_not_depend_on_the_grouping(tmp_path):
    _save(tmp_path)
    predictor = Predictor(Bundle.load(str(tmp_path)))
    images = np.random.default_rng(0).integers(0, 256, (150, 32, 32, 3), np.uint8)
    together = predictor.probabilities(images)
    for size in (1, 3, 64, 100):
        parts = [predictor.probabilities(images[start : start + size]) for start in range(0, 150, size)]
        np.testing.assert_allclose(np.concatenate(parts), together, atol=1e-5)


def test_temperature_softens_and_keeps_the_order(tmp_path):
    _save(tmp_path / "1")
    _save(tmp_path / "2", temperature=2.0)
    (tmp_path / "2" / "model.keras").write_bytes((tmp_path / "1" / "model.keras").read_bytes())
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    plain, soft = (Predictor(Bundle.load(str(tmp_path / name))).probabilities(images) for name in "12")
    logits = [Predictor(Bundle.load(str(tmp_path / name)), batch_size=5).all_outputs(images).logits for name in "12"]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)  # logits do not depend on the temperature
    powers = np.exp(logits[1] / 2)
    np.testing.assert_allclose(soft, powers / powers.sum(1, keepdims=True), atol=1e-6)
    expected = np.sqrt(plain) / np.sqrt(plain).sum(1, keepdims=True)
    np.testing.assert_allclose(soft, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "format_", "version"),
    [
        ({}, 1, "small_cnn-fdc267093a14"),  # as cnnray 0.2.0 computes it
        ({"image_size": "32x48"}, 2, None),
        ({"decode_size": 40}, 2, None),
    ],
)
def test_a_bundle_of_squares_that_are_not_cut_is_written_as_before(changes, format_, version, tmp_path):
    (tmp_path / "model.keras").write_bytes(b"a network")
    info = BundleInfo(class_names=["a", "b"], image_size=32, resize="crop", temperature=1.5, architecture="small_cnn")
    bundle.write_info(str(tmp_path), dataclasses.replace(info, **changes))
    assert json.loads((tmp_path / "bundle.json").read_text())["format_version"] == format_
    loaded = Bundle.load(str(tmp_path))
    assert loaded.info.geometry == Geometry.of(changes.get("image_size", 32), "crop", changes.get("decode_size"))
    assert loaded.version == version or (version is None and loaded.version != "small_cnn-fdc267093a14")


def _change_info(folder, **changes):
    path = folder / "bundle.json"
    path.write_text(
        json.dumps(
            {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
        )
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_names": ["a", "b"]}, "but there are 2 class names"),
        ({"class_names": ["a", "a", "b"]}, "holds a name twice"),
        ({"class_names": "abc"}, "not a list"),
        ({"class_names": ...}, "incomplete"),
        ({"image_size": 64}, "but image_size is 64"),
        ({"image_size": "large"}, "image_size and decode_size in bundle.json: 'large' is no size in pixels"),
        ({"decode_size": 16}, "decode_size in bundle.json: 16x16 is not between 32x32 and twice that"),
        ({"resize": "squeeze"}, "expected one of"),
        ({"temperature": 0}, "more than 0"),
        ({"format_version": 99}, "update it"),
        ({"format_version": ...}, "no format_version"),
        ({"exports": ["onnx"]}, "not a table of formats"),
    ],
)
def test_inconsistent_bundles_are_refused(changes, sentence, tmp_path):
    _save(tmp_path)
    _change_info(tmp_path, **changes)
    with pytest.raises(BundleError, match=sentence):
        _ = Bundle.load(str(tmp_path)).model


def test_incomplete_bundles_are_refused(tmp_path):
    with pytest.raises(BundleError, match="holds no bundle"):
        Bundle.load(str(tmp_path))
    _save(tmp_path)
    (tmp_path / "model.keras").write_bytes(b"PK not a model")
    with pytest.raises(BundleError, match="cannot be loaded safely: it is not a Keras archive"):
        _ = Bundle.load(str(tmp_path)).model
    (tmp_path / "model.keras").unlink()
    with pytest.raises(BundleError, match=r"holds no model\.keras"):
        _ = Bundle.load(str(tmp_path)).model
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        Bundle.load(str(tmp_path))


def test_code_in_a_bundle_is_not_run(tmp_path):
    _save(tmp_path)
    image = keras.Input((32, 32, 3), dtype="uint8")
    hidden = keras.layers.Lambda(lambda x: x * 2, output_shape=(32, 32, 3))(image)
    logits = keras.layers.Dense(3, name="logits")(keras.layers.Flatten()(hidden))
    keras.Model(image, keras.layers.Softmax()(logits)).save(tmp_path / "model.keras")
    with pytest.raises(BundleError, match="cannot be loaded safely"):
        _ = Bundle.load(str(tmp_path)).model


class _Executed:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_a_pickle_in_a_bundle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _save(tmp_path)
    (tmp_path / "model.keras").write_bytes(pickle.dumps(_Executed()))
    with pytest.raises(BundleError, match="cannot be loaded safely: it is not a Keras archive"):
        _ = Bundle.load(str(tmp_path)).model
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", ["../outside.txt", "/tmp/outside.txt", "assets/../../outside.txt"])
def test_a_path_that_climbs_out_of_a_bundle_is_refused(path, tmp_path):
    _save(tmp_path / "bundle")
    with zipfile.ZipFile(tmp_path / "bundle" / "model.keras", "a") as archive:
        archive.writestr(path, "outside")
    with pytest.raises(BundleError, match=r"cannot be loaded safely: it holds the path '.*outside\.txt'"):
        _ = Bundle.load(str(tmp_path / "bundle")).model
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}


def test_a_bundle_whose_weights_change_while_it_is_published_is_not_published(tmp_path):
    network = tmp_path / "run" / "bundle" / "model.keras"
    network.parent.mkdir(parents=True)
    network.write_bytes(b"a network")
    bundle.write_info(str(network.parent), BundleInfo(class_names=["a", "b"], image_size=32))
    source = Bundle.load(str(network.parent))
    evaluated, calibrated = source.version, dataclasses.replace(source.info, temperature=2.0)
    network.write_bytes(b"another network")
    with pytest.raises(BundleError, match=f"{source.uri} was changed in the meantime: run it again"):
        bundle.publish(source, calibrated, str(tmp_path / "new"))
    assert not (tmp_path / "new" / "bundle.json").exists()
    network.write_bytes(b"a network")
    new = bundle.publish(source, calibrated, str(tmp_path / "new"))
    assert (new.info.parent, new.info.training) == (evaluated, str(tmp_path / "run"))
    assert (new.info.temperature, new.version != evaluated) == (2.0, True)
    # The same calibration of another network is another bundle.
    network.write_bytes(b"another network")
    with pytest.raises(BundleError, match="holds another bundle"):
        bundle.publish(Bundle.load(source.uri), calibrated, str(tmp_path / "new"))
    bundle.publish(Bundle.load(source.uri), calibrated, str(tmp_path / "new"), overwrite=True)
    assert (tmp_path / "new" / "model.keras").read_bytes() == b"another network"
