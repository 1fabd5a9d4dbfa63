"""--sanity and --find-learning-rate."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cnnray import commandline
from cnnray.images.manifest import ManifestError
from cnnray.training import probes, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.output import TrainingError
from tests.configs import decided
from tests.networks import coloured_noise

CLASSES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, (pixels, target) in enumerate(zip(*coloured_noise(90, 16), strict=True)):
        path = folder / CLASSES[target] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def _config(data, output, **flags):
    return TrainConfig(
        data=str(data), output=str(output), architecture="resnet9_small", image_size=16, batch_size=16, **flags
    )


@pytest.mark.parametrize(
    "flags", [{}, {"precision": "bfloat16"}, {"schedule": "constant", "accumulate": 2, "min_workers": 1}]
)
def test_a_network_learns_a_few_images_by_heart(images, tmp_path, flags):
    result = probes.check_sanity(_config(images, tmp_path / "out", **flags))
    assert result["images"] == 64
    assert result["steps"] < 100
    assert result["loss"] < 0.1 * result["guessing_loss"]
    assert not (tmp_path / "out").exists()


def test_images_that_contradict_one_another_are_named(images, tmp_path):
    shutil.copytree(images, tmp_path / "data")
    for file in [*(tmp_path / "data" / "red").iterdir()]:
        shutil.copy(file, tmp_path / "data" / "blue" / f"copy-{file.name}")
    with pytest.raises(TrainingError, match=r"the same image has other labels elsewhere .*--check-data"):
        probes.check_sanity(_config(tmp_path / "data", tmp_path / "out"))


def test_a_learning_rate_that_is_too_high_is_named(images, tmp_path):
    with pytest.raises(TrainingError, match=r"--learning-rate \(it was 1e\+06; --find-learning-rate"):
        probes.check_sanity(_config(images, tmp_path / "out", learning_rate=1e6, optimizer="sgd"))


def test_images_that_are_all_alike_are_named(tmp_path):
    for label in CLASSES:
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(20):
            # Not the same bytes, and not the same pixels, but nothing to tell them apart by.
            pixels = np.zeros((16, 16, 3), np.uint8)
            pixels[index // 16, index % 16] = CLASSES.index(label)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{index}.png")
    with pytest.raises(TrainingError, match="the images are all alike"):
        probes.check_sanity(_config(tmp_path / "data", tmp_path / "out", learning_rate=1e-6))


def test_images_that_cannot_be_read_are_named(images, tmp_path):
    for label in CLASSES:
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(5):
            (tmp_path / "data" / label / f"{index}.png").write_bytes(b"nothing")
    for probe in (probes.check_sanity, probes.find_learning_rate):
        with pytest.raises(ManifestError, match="None of the first 12 training images can be read: not an image"):
            probe(_config(tmp_path / "data", tmp_path / "out"))


def test_the_learning_rate_is_found_where_the_loss_falls(images, tmp_path):
    result = probes.find_learning_rate(_config(images, tmp_path / "out"))
    assert 1e-5 < result["learning_rate"] < 0.1
    assert result["learning_rate"] <= (result["highest_learning_rate"] or 1)
    with Image.open(result["plot"]) as plot:
        assert plot.format == "PNG"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [probes.PLOT]


def test_no_learning_rate_is_suggested_where_none_helps(images, tmp_path):
    generator = np.random.default_rng(0)
    for label in CLASSES:
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(200):
            pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{index}.png")
    result = probes.find_learning_rate(_config(tmp_path / "data", tmp_path / "out"))
    assert result["learning_rate"] is None


@pytest.mark.parametrize("flag", ["--sanity", "--find-learning-rate"])
def test_they_are_flags_of_the_job(flag):
    config = commandline.parse(TrainConfig, "jobs/train.py", ["--data", "/d", "--output", "/o", flag])
    assert getattr(config, flag.removeprefix("--").replace("-", "_")) is True


@pytest.mark.parametrize(
    ("counts", "flags", "expected"),
    [
        ([5, 5, 5, 5], {}, np.log(4)),
        ([30, 10], {}, -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))),
        ([30, 10], {"class_weights": "balanced"}, np.log(2)),
        ([30, 10, 0], {"label_smoothing": 0.3}, None),
    ],
)
def test_the_loss_of_guessing_is_the_lowest_of_any_constant_answer(counts, flags, expected):
    config = decided(**flags)
    smoothing = config.label_smoothing
    weights = recipe.class_weights(config, counts) if min(counts) else np.ones(len(counts))
    labels = np.eye(len(counts)) * (1 - smoothing) + smoothing / len(counts)

    def loss(answer):
        return sum(
            count * weight * -(label * np.log(answer)).sum()
            for count, weight, label in zip(counts, weights, labels, strict=True)
        ) / sum(counts)

    guessing = recipe.guessing_loss(config, counts)
    if expected is not None:
        assert guessing == pytest.approx(expected, abs=1e-6)
    answers = np.random.default_rng(0).dirichlet(np.ones(len(counts)), 2000)
    losses = [loss(answer) for answer in answers]
    assert min(losses) >= guessing - 1e-9
    assert min(losses) < guessing + 0.02


def test_a_network_has_learned_below_the_loss_of_guessing():
    config = decided()
    assert not recipe.has_learned(config, np.log(4), [5] * 4)
    assert not recipe.has_learned(config, 3.0, [5] * 4)
    assert recipe.has_learned(config, 0.9 * np.log(4), [5] * 4)
    assert recipe.has_learned(decided(teacher="/t"), 3.0, [5] * 4)
    assert "--architecture resnet9" in recipe.advice(decided(architecture="vgg_bn"))
    assert "--architecture" not in recipe.advice(decided(architecture="resnet9"))


def test_the_result_of_a_probe_is_json(images, tmp_path):
    result = probes.check_sanity(_config(images, tmp_path / "out"))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
