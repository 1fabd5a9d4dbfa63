"""jobs/export.py as its users run it: mistakes are reported in one sentence before TensorFlow is imported."""

import time

import pytest

from cnnray.models import architectures
from cnnray.models import bundle as bundles
from cnnray.models.bundle import BundleInfo

MISTAKES = {
    "mistyped flag": (["--bundle", "{bundle}", "--calibration", "{digits}", "--format", "onnx"], "--format"),
    "unknown format": (["--bundle", "{bundle}", "--calibration", "{digits}", "--formats", "onx"], "expected some of"),
    "no bundle": (["--bundle", "{empty}", "--calibration", "{digits}"], "is not a bundle"),
    "missing bundle": (
        ["--bundle", "/nowhere", "--calibration", "{digits}"],
        "/nowhere is not a bundle: it does not",
    ),
    "no images": (["--bundle", "{bundle}", "--calibration", "{empty}"], "holds no images"),
    "other classes": (
        ["--bundle", "{bundle}", "--calibration", "{digits}"],
        "has the label '2', which is not a class",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_sentence_at_once(mistake, start_job, digits, tmp_path):
    (tmp_path / "empty").mkdir()
    bundle = tmp_path / "bundle"
    bundles.save(architectures.build("small_cnn", 16, 2), BundleInfo(class_names=["0", "1"], image_size=16), bundle)
    arguments, sentence = MISTAKES[mistake]
    places = {"bundle": bundle, "digits": digits, "empty": tmp_path / "empty"}
    started = time.monotonic()
    job = start_job("export", *(argument.format(**places) for argument in arguments))
    assert job.wait(60) != 0
    assert time.monotonic() - started < 15  # about 1 on a quiet machine
    errors = job.err.read_text()
    assert sentence in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert job.out.read_text() == ""
    assert {path.name for path in bundle.iterdir()} == {"bundle.json", "model.keras"}
