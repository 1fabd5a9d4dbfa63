"""Prediction and evaluation with several networks, or several views of an image."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.job import evaluate
from cnnray.images import manifest as manifests
from cnnray.images import storage
from cnnray.models import averaging
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.job import dry_run
from cnnray.prediction.job import run as predict
from tests.networks import coloured_noise, save_unlike
from tests.runs import read_rows

SIZE, NAMES = 16, ["red", "green", "blue"]


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    return [save_unlike(folder / "a", SIZE, 0), save_unlike(folder / "b", SIZE, 1)]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    images, targets = coloured_noise(60, SIZE, seed=9)
    for number, (image, target) in enumerate(zip(images // 2 + 60, targets, strict=True)):
        (folder / NAMES[target]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / NAMES[target] / f"{number}.png")
    return folder


def _mean(members, pixels):
    views = (pixels, pixels[:, :, ::-1])
    return np.mean([Predictor(bundle).probabilities(images) for bundle in members for images in views], axis=0)


def test_a_prediction_averages_and_goes_on(members, labelled, tmp_path):
    config = PredictConfig(
        bundle=members[0].uri, input=str(labelled), output=str(tmp_path / "out"), probabilities=True,
        ensemble=[members[1].uri], tta="flips",
    )  # fmt: skip
    assert dry_run(config)["rows"] == 60
    assert not (tmp_path / "out").exists()
    predict(config)
    (folder,) = storage.folders(str(tmp_path / "out" / averaging.FOLDER))
    averaged = Bundle.load(folder)
    rows = read_rows(tmp_path / "out")
    assert {row["model"] for row in rows} == {averaged.version}
    pixels = np.stack([np.asarray(Image.open(row["uri"])) for row in rows])
    np.testing.assert_allclose([row["probabilities"] for row in rows], _mean(members, pixels), atol=1e-5)
    assert predict(config)["classified"] == 0
    assert dry_run(config)["resumed"] == 60
    # Without its folder, it is made again, and is the same.
    storage.delete_folder(str(tmp_path / "out" / averaging.FOLDER))
    Image.new("RGB", (SIZE, SIZE)).save(labelled / "red" / "one-more.png")
    again = PredictConfig(**{**config.__dict__, "update": True})
    assert predict(again)["classified"] == 1
    assert {row["model"] for row in read_rows(tmp_path / "out")} == {averaged.version}


def test_an_evaluation_says_what_averaging_gains(members, labelled, tmp_path):
    config = EvaluateConfig(
        bundle=members[0].uri, data=str(labelled), output=str(tmp_path / "report"), data_checks=False, samples=1,
        ensemble=[members[1].uri], tta="flips",
    )  # fmt: skip
    line = evaluate(config)
    averages = json.loads((tmp_path / "report" / "metrics.json").read_text())["averages"]
    rows = read_rows(tmp_path / "report" / "predictions")
    pixels = np.stack([np.asarray(Image.open(row["uri"])) for row in rows])
    truth = np.asarray([NAMES.index(row["label"]) for row in rows])
    alone = Predictor(members[0]).probabilities(pixels).argmax(1)
    assert averages["alone"] == pytest.approx(np.mean(alone == truth))
    assert averages["value"] == line["accuracy"] == pytest.approx(np.mean(_mean(members, pixels).argmax(1) == truth))
    assert averages["gain"] == pytest.approx(averages["value"] - averages["alone"])
    low, high = averages["gain_interval"]
    assert low <= averages["gain"] <= high
    assert (averages["members"], averages["views"], averages["metric"]) == (2, "flips", "accuracy")
    assert averages["times_slower"] is None  # there are too few images to say
    text = (tmp_path / "report" / "report.html").read_text()
    assert "The probabilities are means over 2 networks and the views" in text
    assert (tmp_path / "report" / "plots" / "samples_grad_cam.png").is_file()


def test_images_of_any_of_the_trainings_show_no_precision(members, labelled, tmp_path):
    """The second network was trained on the images, and the first one was not."""
    trained = tmp_path / "training" / "bundle"
    shutil.copytree(members[1].uri, trained)
    manifest = manifests.build_manifest(str(labelled), labelled=True)
    train = pa.array(["train"] * len(manifest))
    manifests.write(
        manifest.set_column(manifest.column_names.index("split"), "split", train),
        str(tmp_path / "training/manifest.parquet"),
    )
    config = EvaluateConfig(
        bundle=members[0].uri, data=str(labelled), output=str(tmp_path / "out"), ensemble=[str(trained)],
        target_precision=0.5, data_checks=False,
    )  # fmt: skip
    with pytest.raises(EvaluationError, match=r"The network was trained on 6\d of these 6\d images"):
        evaluate(config)
    assert not (tmp_path / "out").exists()
