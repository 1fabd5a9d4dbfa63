"""Flags that are null: what they become, and why."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cnnray import configs
from cnnray.models import architectures, bundle
from cnnray.models.bundle import BundleInfo
from cnnray.training import data, decisions
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DECIDED, DecidedConfig, differences
from cnnray.training.decisions import DataFacts
from cnnray.training.recipe import RecipeError
from tests.configs import decided


def _decide(*, images=5000, classes=10, side=400, **flags):
    facts = DataFacts(images=images, classes=classes, side=side)
    return decisions.decide(TrainConfig(data="/d", output="/o", **flags), facts)


def test_every_flag_that_is_null_is_decided_and_has_a_reason():
    config, reasons = _decide()
    assert isinstance(config, DecidedConfig)
    assert set(reasons) == set(DECIDED)
    assert all(getattr(config, name) is not None for name in DECIDED)


def test_flags_that_are_given_are_kept():
    values = dataclasses.asdict(decided(architecture="small_cnn", epochs=7, augment="none", learning_rate=0.5))
    given = {name: values[name] for name in DECIDED}
    config, reasons = _decide(**given)
    assert {name: getattr(config, name) for name in DECIDED} == given
    assert reasons == {}


def test_fewer_images_are_seen_more_often():
    epochs = [_decide(images=images)[0].epochs for images in (20, 500, 2000, 10_000, 10**6)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > 2 * epochs[-1]
    efforts = [_decide(preset=preset)[0].epochs for preset in ("quick", "default", "accurate")]
    assert efforts == sorted(efforts)
    assert efforts[0] < efforts[-1]


@pytest.mark.parametrize(
    ("architecture", "side", "image_size"),
    [
        (None, 8, 16), (None, 12, 16), (None, 28, 32), (None, 48, 32), (None, 64, 64), (None, 4000, 64),
        (None, None, 64), ("inceptionv3", 28, 75), ("resnet50", 28, 32), ("vgg_bn", 28, 32),
    ],
)  # fmt: skip
def test_images_are_brought_to_a_size_near_their_own(architecture, side, image_size):
    assert _decide(architecture=architecture, side=side)[0].image_size == image_size


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet9", ("linear", 0.0, 0.003)),
        ("vgg_bn", ("dense", 0.1, 0.003)),
        ("small_cnn", ("dense", 0.1, 0.003)),
        ("resnet50", ("dense", 0.5, 0.001)),
    ],
)
def test_the_recipe_is_that_of_the_network(architecture, expected):
    config = _decide(architecture=architecture)[0]
    assert (config.head, config.dropout, config.learning_rate) == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"image_size": 4}, "--image-size must be 8 to 4096 pixels for resnet9_small, not 4"),
        ({"max_workers": 3, "batch_size": 2}, "at least --max-workers 3"),
    ],
)
def test_a_flag_that_does_not_fit_the_chosen_values_gets_a_sentence(flags, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        _decide(**flags)
    if "image_size" in flags:  # not known before the network was chosen
        assert isinstance(raised.value, RecipeError)


def test_a_batch_has_an_image_for_each_worker():
    assert _decide(max_workers=200)[0].batch_size == 200
    assert _decide(min_workers=100)[0].batch_size == 100
    assert _decide()[0].batch_size == 64


def test_a_run_that_goes_on_keeps_its_workers():
    earlier = {**configs.as_dict(decided()), "min_workers": 2, "max_workers": 8, "gpus_per_worker": 1.0}
    earlier["precision"] = "bfloat16"
    again = decisions.as_before(TrainConfig(data="/d", output="/o"), earlier)
    assert (again.min_workers, again.max_workers, again.gpus_per_worker, again.precision) == (2, 8, 1, "bfloat16")


def test_nothing_is_mirrored_by_default():
    from cnnray.models import augment

    for preset in ("quick", "default", "accurate"):
        config = _decide(preset=preset)[0]
        settings = augment.resolve(config.augment, config.augmentations)
        assert not settings.horizontal_flip
        assert not settings.vertical_flip


def test_the_network_is_that_of_the_weights(tmp_path):
    info = BundleInfo(class_names=["a", "b"], image_size=32, architecture="small_cnn")
    bundle.save(architectures.build("small_cnn", 32, 2), info, tmp_path)
    config, reasons = _decide(weights=str(tmp_path))
    assert config.architecture == "small_cnn"
    assert reasons["architecture"] == "that of --weights"


def test_a_run_that_goes_on_keeps_its_values():
    earlier = configs.as_dict(decided(images=100))
    config = TrainConfig(data="/d", output="/o")
    assert differences(config, earlier) == []
    assert configs.as_dict(decisions.as_before(config, earlier)) == earlier
    assert differences(TrainConfig(data="/d", output="/o", architecture="vgg_bn"), earlier) == [
        "--architecture small_cnn (now vgg_bn)"
    ]


@pytest.mark.parametrize(("architecture", "expected"), [("vgg_bn", (0.003, 0.1)), ("resnet50", (0.001, 0.5))])
def test_null_of_earlier_versions_means_what_it_meant(architecture, expected):
    earlier = configs.as_dict(_decide(architecture=architecture)[0])
    earlier |= {"learning_rate": None, "dropout": None, "weight_decay": None}
    config = decisions.as_before(TrainConfig(data="/d", output="/o"), earlier)
    assert (config.learning_rate, config.dropout) == expected
    assert config.weight_decay == 0.01


def test_sizes_are_those_of_a_sample_of_the_images(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(30):
            pixels = np.full((40 + index % 2, 90, 3), index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
        (tmp_path / label / "broken.png").write_bytes(b"nothing")
    config = TrainConfig(data=str(tmp_path), output="/o", max_workers=1)
    manifest = data.build_run_manifest(config)
    facts = decisions.data_facts(config, manifest)
    assert facts.classes == 2
    assert facts.side in (40, 41)
    assert decisions.data_facts(dataclasses.replace(config, image_size=32), manifest).side is None
