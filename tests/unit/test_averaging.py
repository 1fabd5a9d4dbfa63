"""Several networks, or several views of an image, as one network."""

import dataclasses
import functools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from cnnray.evaluation.config import EvaluateConfig
from cnnray.models import averaging, grad_cam
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.export import ExportConfig, export
from cnnray.models.predictor import Predictor
from cnnray.prediction.config import PredictConfig
from tests.networks import coloured_noise, save_unlike

SIZE, NAMES = 16, ["red", "green", "blue"]
IMAGES = np.random.default_rng(3).integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three bundles whose answers differ, also between views of an image."""
    folder = tmp_path_factory.mktemp("members")
    return [
        save_unlike(folder / name, SIZE, seed, temperature=1.0 + seed) for seed, name in enumerate(("a", "b", "c"))
    ]


def _probabilities(bundle, images):
    return Predictor(bundle).probabilities(images).astype(np.float64)


def _average(members, views=None):
    """The mean network as a function of images."""
    network = averaging.average(members, views)
    return lambda images: np.asarray(network(images), np.float64)


def test_an_ensemble_gives_the_mean_of_the_probabilities(members):
    each = [_probabilities(bundle, IMAGES) for bundle in members]
    assert np.abs(np.diff(each, axis=0)).max() > 0.05
    np.testing.assert_allclose(_average(members)(IMAGES), np.mean(each, axis=0), atol=1e-6)


def _flipped(images):
    return images[:, :, ::-1]


def _corner(images, top, left):
    crops = [Image.fromarray(image).crop((left, top, left + 14, top + 14)) for image in images]
    return np.stack([np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for crop in crops])


@pytest.mark.parametrize(
    ("views", "seen"),
    [
        ("flips", [_flipped]),
        ("crops", [functools.partial(_corner, top=top, left=left) for top in (0, 2) for left in (0, 2)]),
    ],
)
def test_views_are_averaged(views, seen, members):
    each = [_probabilities(members[0], view(IMAGES)) for view in (lambda images: images, *seen)]
    average = _average(members[:1], views)
    # Pillow's pixels are within one level of these.
    np.testing.assert_allclose(average(IMAGES), np.mean(each, axis=0), atol=1e-6 if views == "flips" else 0.02)
    assert np.abs(np.mean(each, axis=0) - each[0]).max() > 0.05
    if views == "flips":
        np.testing.assert_allclose(average(_flipped(IMAGES)), average(IMAGES), atol=1e-6)


def test_of_several_labels_each_probability_is_averaged(tmp_path):
    members = [
        save_unlike(tmp_path / name, SIZE, seed, thresholds=thresholds)
        for seed, (name, thresholds) in enumerate({"a": [0.25, 0.5, 0.75], "b": [0.75, 0.5, 0.25]}.items())
    ]
    seen = [_probabilities(bundle, images) for bundle in members for images in (IMAGES, _flipped(IMAGES))]
    np.testing.assert_allclose(_average(members, "flips")(IMAGES), np.mean(seen, axis=0), atol=1e-6)
    planned = averaging.plan(members[0], [members[1].uri], "flips", str(tmp_path / "out"))
    assert planned.info.thresholds == [0.5, 0.5, 0.5]


def test_a_mean_is_written_once_and_nothing_else_is_overwritten(members, tmp_path):
    first, *others = members
    target = tmp_path / "out"
    planned = averaging.plan(first, [bundle.uri for bundle in others], None, str(target))
    assert not target.exists()
    written = averaging.write(planned)
    assert (written.info, written.version) == (planned.info, planned.version)
    assert json.loads((target / "bundle.json").read_text())["format_version"] == 5
    assert written.info.averaged == {
        "bundles": [bundle.uri for bundle in members],
        "versions": [bundle.version for bundle in members],
        "trainings": [bundle.training for bundle in members],
        "views": None,
    }
    each = [_probabilities(bundle, IMAGES) for bundle in members]
    np.testing.assert_allclose(_probabilities(written, IMAGES), np.mean(each, axis=0), atol=1e-6)
    before = (target / "model.keras").stat()
    assert averaging.write(planned).version == written.version
    assert (target / "model.keras").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(BundleError, match=r"holds another bundle, averaged-\w+: give another --output"):
        averaging.write(averaging.plan(first, [], "flips", str(target)))
    # Each mean has a folder of its own in the output of a job, and the one that is asked for otherwise.
    output = str(tmp_path / "job")
    config = PredictConfig(bundle=first.uri, input="/i", output=output, tta="flips")
    in_output = config.averaged_bundle(first, output)
    assert in_output.uri == f"{output}/{averaging.FOLDER}/{in_output.version}"
    named = averaging.plan(first, [], "flips", str(tmp_path / averaging.FOLDER))
    assert named.uri == str(tmp_path / averaging.FOLDER)
    # What was not completed is made again, and a folder of something else is left alone.
    (target / "bundle.json").unlink()
    assert averaging.write(planned).version == written.version
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"holds notes\.txt, and no bundle: give another --output"):
        averaging.write(averaging.plan(first, [], "flips", str(tmp_path / "mine")))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_network_that_cannot_be_loaded_is_said_in_one_sentence(members, tmp_path):
    damaged = save_unlike(tmp_path / "damaged", SIZE, 5)
    Path(damaged.uri, "model.keras").write_bytes(b"none")
    planned = averaging.plan(members[0], [damaged.uri], None, str(tmp_path / "out"))
    with pytest.raises(
        BundleError, match=r"cannot be averaged: .*damaged: model\.keras cannot be loaded safely: it is"
    ):
        averaging.write(planned)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("averaged", [[], {}, {"bundles": "a", "versions": [], "trainings": [], "views": None}])
def test_a_bundle_that_does_not_say_what_it_averages_is_refused(averaged, members, tmp_path):
    uri = save_unlike(tmp_path / "bundle", SIZE, 6).uri
    content = json.loads(Path(uri, "bundle.json").read_text())
    Path(uri, "bundle.json").write_text(json.dumps(content | {"averaged": averaged}))
    with pytest.raises(BundleError, match=r"averaged in bundle\.json does not say what the network averages"):
        Bundle.load(uri)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"class_names": NAMES[::-1]}, "other classes"),
        ({"resize": "crop"}, "other image sizes or resize rules"),
        ({"thresholds": [0.5] * 3}, "one label for an image, and several"),
    ],
)
def test_bundles_that_do_not_fit_are_refused(change, sentence, members, tmp_path):
    first, other = members[:2]
    changed = Bundle(first.uri, dataclasses.replace(first.info, **change))
    with pytest.raises(BundleError, match=f"have {sentence}, and so cannot be averaged"):
        averaging.plan(changed, [other.uri], None, str(tmp_path / "out"))


def test_heat_maps_are_those_of_the_first_network(members, tmp_path):
    classes = np.zeros(len(IMAGES), np.int64)
    expected = grad_cam.heat_maps(members[0], IMAGES, classes)
    planned = averaging.plan(members[0], [members[1].uri], "flips", str(tmp_path / "mean"))
    bundles.save(averaging.average(members[:2], "flips"), planned.info, tmp_path / "mean")
    mean = Bundle.load(planned.uri)
    np.testing.assert_allclose(grad_cam.heat_maps(mean, IMAGES, classes), expected, atol=1e-5)
    of_means = averaging.plan(mean, [], "flips", str(tmp_path / "of-means"))
    bundles.save(averaging.average([mean], "flips"), of_means.info, tmp_path / "of-means")
    assert keras.saving.load_model(tmp_path / "of-means" / "model.keras", compile=False).count_params() > 0
    np.testing.assert_allclose(grad_cam.heat_maps(Bundle.load(of_means.uri), IMAGES, classes), expected, atol=1e-5)


def test_merging_exports_one_file(members, tmp_path):
    images, targets = coloured_noise(60, SIZE, seed=9)
    for number, (image, target) in enumerate(zip(images // 2 + 60, targets, strict=True)):
        (tmp_path / "data" / NAMES[target]).mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(tmp_path / "data" / NAMES[target] / f"{number}.png")
    output = tmp_path / "merged"
    config = ExportConfig(
        bundle=members[0].uri, merge=[f"{members[1].uri},{members[2].uri}"], tta="flips", output=str(output),
        calibration=str(tmp_path / "data"), formats=["onnx", "litert", "litert-int8"], max_accuracy_drop=0.2,
    )  # fmt: skip
    exported = export(config)
    assert exported["bundle"] == str(output)
    merged = Bundle.load(str(output))
    each = [_probabilities(bundle, images) for bundle in members for images in (IMAGES, _flipped(IMAGES))]
    for engine, tolerance in (("onnx", 1e-4), ("litert", 1e-4), ("litert-int8", 0.3)):
        probabilities = Predictor(merged, engine=engine).probabilities(IMAGES)
        np.testing.assert_allclose(probabilities, np.mean(each, axis=0), atol=tolerance)
    assert members[0].info.exports == Bundle.load(members[0].uri).info.exports == {}
    export(dataclasses.replace(config, formats=["saved_model"]))  # goes into the same bundle
    assert Bundle.load(str(output)).info.exports.keys() > {"saved_model", "onnx"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: PredictConfig(bundle="/b", input="/i", output="/o", tta="flips", engine="onnx"),
            "--engine onnx has no file of what --ensemble and --tta average",
        ),
        (
            lambda: EvaluateConfig(bundle="/b", data="/i", output="/o", ensemble=["/c"], engine="litert"),
            "--engine litert has no file of what --ensemble and --tta average",
        ),
        (
            lambda: PredictConfig(bundle="/b", input="/i", output="/o", ensemble=["/c,/b"]),
            "--ensemble names a bundle twice, or that of --bundle",
        ),
        (lambda: EvaluateConfig(bundle="/b", output="/o", drift="/l", tta="flips"), "--tta does not go with --drift"),
        (lambda: ExportConfig(bundle="/b", calibration="/c", merge=["/d"]), "--merge and --tta need --output, and"),
        (lambda: ExportConfig(bundle="/b", calibration="/c", output="/d"), "--output needs one of them"),
        (
            lambda: ExportConfig(bundle="/b", calibration="/c", merge=["/d"], output="/d"),
            "--output /d holds /d: give another folder",
        ),
        (
            lambda: ExportConfig(bundle="/runs/a/bundle", calibration="/c", tta="flips", output="/runs/a"),
            "--output /runs/a holds /runs/a/bundle: give another folder",
        ),
    ],
)
def test_flags_that_do_not_go_together(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("value", [["/c, /d", "/e"], "/c,/d,/e", ["/c", "/d", "/e"]])
def test_addresses_have_commas_between_them(value):
    config = PredictConfig(bundle="/b", input="/i", output="/o", ensemble=value)
    assert config.ensemble == ["/c", "/d", "/e"]
    assert PredictConfig(bundle="/b", input="/i", output="/o", ensemble=None).ensemble == []
