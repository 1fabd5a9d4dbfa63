"""When a bundle answers, and its candidates where it does not; and how bundle.json keeps that."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cnnray.models import bundle as bundles
from cnnray.models import engines
from cnnray.models.answers import FLOAT32, Decision, Rules, Threshold
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.predictor import Predictor
from tests.awkward import awkward_images
from tests.networks import save_cut

ROWS = np.asarray([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.69, 0.05, 0.26]], np.float32)


def make_threshold(confidence=0.7, candidate=0.25):
    return Threshold(
        confidence=float(np.float32(confidence)),
        candidate=candidate,
        images=100,
        coverage=0.5,
        observed_precision=1.0,
    )


def make_decision(**thresholds):
    return Decision(precision=0.99, certainty=0.95, candidate_coverage=0.95, thresholds=thresholds)


def test_unsure_images_have_candidates():
    threshold = make_threshold()
    assert threshold.is_unsure(ROWS).tolist() == [False, True, True, True]
    assert [threshold.candidates(row).tolist() for row in ROWS[1:]] == [[0, 1], [0, 1], [0, 2]]
    assert threshold.is_unsure(np.zeros((0, 3), np.float32)).shape == (0,)
    answers = Rules(threshold=threshold)(ROWS)
    assert [answer.status for answer in answers] == ["ok", "unsure", "unsure", "unsure"]
    assert [answer.prediction for answer in answers] == [0, None, None, None]
    assert [answer.labels for answer in answers] == [(0,)] * 4
    assert [answer.candidates for answer in answers] == [(), (0, 1), (0, 1), (0, 2)]
    assert [answer.confidence for answer in answers] == ROWS.max(1).tolist()


def test_there_is_always_a_candidate():
    threshold = make_threshold(candidate=0.9)
    assert [threshold.candidates(row).tolist() for row in ROWS] == [[0]] * 4
    assert [answer.candidates for answer in Rules(threshold=threshold)(ROWS)] == [(), (0,), (0,), (0,)]


def test_without_a_threshold_there_is_always_an_answer():
    answers = Rules()(ROWS)
    assert [(answer.status, answer.prediction, answer.candidates) for answer in answers] == [("ok", 0, ())] * 4
    assert not Rules().is_unsure(ROWS).any()
    assert Rules()(ROWS[:0]) == []


def test_of_several_labels_an_image_may_have_none():
    answers = Rules(label_thresholds=[0.5, 0.25, 0.2])(ROWS)
    assert [answer.labels for answer in answers] == [(0,), (0, 1, 2), (1, 2), (0, 2)]
    assert [answer.prediction for answer in answers] == [0, 0, 1, 0]
    (none,) = Rules(label_thresholds=[0.9, 0.9, 0.9])(ROWS[:1])
    assert (none.labels, none.prediction, none.best, none.status) == ((), None, 0, "ok")


@pytest.fixture
def bundle(tmp_path):
    """A function that writes a bundle with a decision, and returns it."""
    save_cut(tmp_path / "bundle")
    plain = Bundle.load(str(tmp_path / "bundle"))

    def write(decision):
        bundles.write_info(plain.uri, dataclasses.replace(plain.info, decision=decision))
        return Bundle.load(plain.uri)

    return write


def test_a_decision_is_part_of_the_bundle_and_of_its_version(bundle):
    def read(bundle):
        return json.loads(Path(bundle.uri, "bundle.json").read_text())

    without = bundle(None)
    content = read(without)
    assert (content["format_version"], "decision" in content) == (2, False)  # the images are not square
    decision = make_decision(**{FLOAT32: make_threshold(), "onnx-int8": make_threshold(0.8)})
    decided = bundle(decision)
    assert decided.info.decision == decision
    assert read(decided)["format_version"] == 3
    other = bundle(make_decision(**{FLOAT32: make_threshold(0.71), "onnx-int8": make_threshold(0.8)}))
    assert len({without.version, decided.version, other.version}) == 3
    # What was measured of a threshold does not change answers.
    measured = dataclasses.replace(make_threshold(), coverage=0.4)
    same = bundle(make_decision(**{FLOAT32: measured, "onnx-int8": make_threshold(0.8)}))
    assert same.version == decided.version


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda decision: decision.pop("precision"), "is incomplete: .*'precision'"),
        (lambda decision: decision.pop("thresholds"), "is incomplete: 'thresholds'"),
        (lambda decision: decision.update(thresholds={}), "has no thresholds from 0 to 1"),
        (lambda decision: decision["thresholds"][FLOAT32].update(confidence=2), "has no thresholds from 0 to 1"),
        (lambda decision: decision["thresholds"][FLOAT32].update(candidate="x"), "has no thresholds from 0 to 1"),
        (lambda decision: decision["thresholds"].update(onnx=3), "is incomplete"),
    ],
)
def test_a_damaged_decision_is_refused(change, sentence, bundle):
    uri = bundle(make_decision(**{FLOAT32: make_threshold()})).uri
    content = json.loads(Path(uri, "bundle.json").read_text())
    change(content["decision"])
    Path(uri, "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=f"decision in bundle.json {sentence}"):
        Bundle.load(uri)


def test_a_predictor_is_unsure(bundle):
    images = [awkward_images()["rgb.png"], b"none"]
    (plain, _) = Predictor(bundle(None))(images)
    for confidence, candidate in ((plain.confidence, 0.0), (min(1.0, plain.confidence * 1.001), 0.0)):
        threshold = make_threshold(confidence, candidate)
        answer, bad = Predictor(bundle(make_decision(**{FLOAT32: threshold})))(images)
        assert bad.reason == "not an image"
        np.testing.assert_array_equal(answer.probabilities, plain.probabilities)
        assert (answer.confidence, answer.top_k) == (plain.confidence, plain.top_k)
        if confidence == plain.confidence:
            assert (answer.label, answer.candidates) == (plain.label, ())
        else:
            assert (answer.label, answer.candidates) == (None, tuple(name for name, _ in plain.top_k))


def test_an_engine_without_thresholds_does_not_answer(bundle):
    decided = bundle(make_decision(**{"onnx-int8": make_threshold()}))
    sentence = r"has no confidence threshold for keras as it is exported now \(it has those of onnx-int8\): jobs/eval"
    with pytest.raises(BundleError, match=sentence):
        Predictor(decided)
    pixels = np.zeros((1, *decided.info.geometry.image_size.shape), np.uint8)
    assert Predictor(decided, withholds=False).probabilities(pixels).shape == (1, 3)


def test_the_fastest_engine_is_one_with_thresholds():
    exports = {
        name: {"times_keras": {"1": speed, "32": speed}, "accuracy": 0.9}
        for name, speed in (("keras", 1), ("onnx", 2), ("litert-int8", 3), ("onnx-int8", 4))
    }
    info = dataclasses.replace(
        bundles.BundleInfo(class_names=["a", "b"], image_size=8), exports=exports, decision=None
    )

    def choose(decision, gpus=False):
        chosen = Bundle("/nowhere", dataclasses.replace(info, decision=decision))
        return engines.choose(chosen, gpus=gpus, batch_size=1)

    def with_export(name):
        export = engines.export_id(Bundle("/nowhere", info), name)
        return {name: dataclasses.replace(make_threshold(), export=export)}

    assert choose(None) == "onnx-int8"
    decision = make_decision(**{FLOAT32: make_threshold()})
    assert choose(decision) == "onnx"
    assert choose(decision, gpus=True) == "keras"
    assert choose(make_decision(**{FLOAT32: make_threshold()} | with_export("litert-int8"))) == "litert-int8"
    assert choose(make_decision(**with_export("onnx-int8")), gpus=True) == "onnx-int8"
    # Another export has other probabilities.
    earlier = with_export("litert-int8")
    exports["litert-int8"]["times_keras"] = {"1": 3.5, "32": 3.5}
    assert choose(make_decision(**{FLOAT32: make_threshold()} | earlier)) == "onnx"
