"""What an evaluation publishes: temperatures and thresholds, by engine."""

import dataclasses

import numpy as np
import pytest

from cnnray import cluster
from cnnray.evaluation import selective
from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.publishing import check_images, other_engines, published_info
from cnnray.evaluation.rows import Measured
from cnnray.models import engines
from cnnray.models.answers import FLOAT32
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.drift import BINS

IMAGES = 2000
INFO = BundleInfo(class_names=["a", "b", "c"], image_size=8, temperature=2.0)
CONFIG = EvaluateConfig(bundle="/b", data="/d", output="/o")


def make_measured(engine="keras", seed=0, scale=4.0):
    """A network that is right as often as it says at `scale` 4."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(IMAGES, 3)) * 4
    truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = (truth.cumsum(1) > random.random((IMAGES, 1))).argmax(1)
    said = np.exp(logits * scale / 4)
    return Measured(
        engine=engine,
        ids=np.arange(IMAGES),
        probabilities=(said / said.sum(1, keepdims=True)).astype(np.float32),
        targets=targets,
    )


def publish(*measured, info=INFO, of_training=False, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return published_info(config, Bundle("/b", info), measured, IMAGES, of_training=of_training)


def test_each_arithmetic_has_its_thresholds():
    keras, rounded = make_measured(), make_measured("onnx-int8", seed=1)
    info = publish(keras, rounded, target_precision=0.95)
    assert (info.temperature, info.decision.precision, info.decision.certainty) == (2.0, 0.95, 0.95)
    assert info.decision.thresholds.keys() == {FLOAT32, "onnx-int8"}
    for measured in (keras, rounded):
        threshold = info.decision.thresholds[engines.arithmetic(measured.engine)]
        export = engines.export_id(Bundle("/b", INFO), measured.engine)
        assert bool(export) == (measured.engine == "onnx-int8")
        assert dataclasses.replace(threshold, export="") == selective.find_threshold(
            measured.probabilities, measured.targets, precision=0.95, certainty=0.95
        )
        answered = ~threshold.is_unsure(measured.probabilities)
        assert 0.5 < threshold.coverage < 1
        assert (measured.probabilities.argmax(1) == measured.targets)[answered].mean() > 0.95


def test_an_engine_that_cannot_keep_the_promise_is_left_out(caplog):
    wrong = make_measured("litert-int8")
    wrong = dataclasses.replace(wrong, targets=(wrong.targets + 1) % 3)
    info = publish(make_measured(), wrong, target_precision=0.95)
    assert info.decision.thresholds.keys() == {FLOAT32}
    assert "no threshold gives litert-int8 that precision" in caplog.text
    with pytest.raises(EvaluationError, match=r"No threshold shows a precision of 0\.95 on these 2000 images"):
        publish(wrong, make_measured(), target_precision=0.95)


def test_a_temperature_is_fitted_to_images_that_do_not_test_the_thresholds():
    measured = make_measured(scale=12.0)  # three times too sure
    info = publish(measured, calibrate=True, target_precision=0.95)
    assert info.temperature == pytest.approx(6.0, rel=0.15)
    tested = np.flatnonzero(~selective.split(IMAGES))
    assert len(tested) == 0.75 * IMAGES
    others = dataclasses.replace(measured, targets=measured.targets.copy())
    others.targets[tested[:5]] = (others.targets[tested[:5]] + 1) % 3
    assert publish(others, calibrate=True, target_precision=0.95).temperature == info.temperature
    # The thresholds are of the probabilities at the new temperature.
    powers = measured.probabilities.astype(np.float64) ** (2.0 / info.temperature)
    rescaled = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    threshold = info.decision.thresholds[FLOAT32]
    assert np.isclose(rescaled.max(1), threshold.confidence, atol=1e-6).any()
    assert threshold.coverage == pytest.approx((~threshold.is_unsure(rescaled)).mean(), abs=0.03)
    # By itself, the temperature is fitted to all images.
    assert publish(others, calibrate=True).temperature != publish(measured, calibrate=True).temperature


def test_a_new_temperature_makes_thresholds_void(caplog):
    info = publish(make_measured(), target_precision=0.95)
    assert publish(make_measured(scale=8.0), info=info, calibrate=True).decision is None
    assert "the thresholds of /b are void" in caplog.text


def test_an_engine_that_lacks_some_predictions_is_tested_on_the_same_images():
    whole = make_measured()
    kept = np.flatnonzero(np.arange(IMAGES) % 7 != 0)
    part = Measured(
        engine="onnx-int8", ids=kept, probabilities=whole.probabilities[kept], targets=whole.targets[kept]
    )
    threshold = publish(whole, part, target_precision=0.95).decision.thresholds["onnx-int8"]
    assert threshold.images == (~selective.split(IMAGES))[kept].sum()


def test_images_of_the_training_show_nothing(caplog):
    wanted = dataclasses.replace(CONFIG, target_precision=0.9)
    with pytest.raises(EvaluationError, match="The network was trained on 3 of these 500 images"):
        check_images(500, {"train": 3}, wanted)
    check_images(500, {}, wanted)
    check_images(10, {"train": 3}, CONFIG)
    assert not caplog.text
    check_images(500, {"validation": 500}, wanted)
    assert "Training chose its weights by 500 of these 500 images" in caplog.text


def test_the_reference_for_drift_follows_the_temperature():
    info = dataclasses.replace(INFO, reference={"classes": [1, 2, 3], "confidences": [6, *[0] * (BINS - 1)]})
    for of_training, known in ((True, IMAGES), (False, 0)):
        reference = publish(make_measured(), info=info, calibrate=True, of_training=of_training).reference
        assert (reference["classes"], sum(reference["confidences"])) == ([1, 2, 3], known)


def test_which_engines_are_measured(monkeypatch):
    monkeypatch.setattr(cluster, "may_have_gpus", lambda: False)
    monkeypatch.setattr(engines, "why_unavailable", lambda name: "no" if name == "openvino-bfloat16" else "")
    names = (
        "keras", "onnx", "litert", "keras-bfloat16", "onnx-int8", "litert-float16", "openvino-bfloat16",
        "saved_model",
    )  # fmt: skip
    bundle = Bundle("/b", dataclasses.replace(INFO, exports={name: {} for name in names}))
    wanted = dataclasses.replace(CONFIG, target_precision=0.9)
    assert other_engines(wanted, bundle, "keras") == ["onnx-int8", "litert-float16"]
    assert other_engines(dataclasses.replace(wanted, engine="onnx-int8"), bundle, "onnx-int8") == []
    assert other_engines(CONFIG, bundle, "keras") == []
    monkeypatch.setattr(cluster, "may_have_gpus", lambda: True)
    assert "keras-bfloat16" in other_engines(wanted, bundle, "keras")
