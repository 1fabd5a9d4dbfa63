"""Groups of classes: read, measured, guaranteed, and named where a bundle is unsure of the class."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from cnnray.evaluation import hierarchy
from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.metrics import Predictions
from cnnray.evaluation.selective import find_threshold, measure_answers, split
from cnnray.models import bundle as bundles
from cnnray.models.answers import FLOAT32, Decision, Rules, Threshold
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.groups import Groups
from cnnray.models.mlflow_flavor import BundleModel
from cnnray.models.predictor import Predictor
from tests.awkward import awkward_images
from tests.networks import save_cut

NAMES = ["cat", "car", "dog", "van"]
OF = {"cat": "animal", "car": "vehicle", "dog": "animal", "van": "vehicle"}
ROWS = np.asarray([[0.9, 0.1, 0, 0], [0.45, 0.05, 0.4, 0.1], [0.3, 0.3, 0.2, 0.2], [0.1, 0.5, 0, 0.4]], np.float32)


def make_threshold(confidence=0.8, group=0.84):
    return Threshold(
        confidence=confidence, candidate=0.25, group=group, group_below=confidence, images=100, coverage=0.5,
        observed_precision=1.0,
    )  # fmt: skip


def test_an_unsure_answer_names_a_group_that_is_probable_enough():
    groups = Groups.of(OF, NAMES)
    assert (groups.names, groups.of_classes) == (("animal", "vehicle"), (0, 1, 0, 1))
    np.testing.assert_allclose(groups.probabilities(ROWS), [[0.9, 0.1], [0.85, 0.15], [0.5, 0.5], [0.1, 0.9]])
    rules = Rules(threshold=make_threshold(), groups=groups)
    answers = rules(ROWS)
    assert [(answer.status, rules.group_name(answer)) for answer in answers] == [
        ("ok", None), ("unsure", "animal"), ("unsure", None), ("unsure", "vehicle"),
    ]  # fmt: skip
    lower = Rules(threshold=dataclasses.replace(make_threshold(), group_below=0.45), groups=groups)
    assert [lower.group_name(answer) for answer in lower(ROWS)] == [None] * 4  # 0.45 and 0.5 are not below it
    never = Rules(threshold=make_threshold(group=None), groups=groups)
    assert [never.group_name(answer) for answer in never(ROWS)] == [None] * 4
    assert rules.find_groups(ROWS[:0]) == []


def test_groups_are_measured():
    predictions = Predictions(NAMES, np.asarray([0, 2, 3, 0]), ROWS.astype(np.float64))
    measured = hierarchy.measure(predictions, OF)
    assert measured["group_accuracy"] == 0.5  # the tie of the third image goes to the first group
    low, high = measured["group_interval"]
    assert low < 0.5 < high
    assert measured["groups"] == [
        {"name": "animal", "classes": 2, "images": 3, "class_accuracy": 1 / 3, "recall": 2 / 3, "precision": 2 / 3},
        {"name": "vehicle", "classes": 2, "images": 1, "class_accuracy": 0, "recall": 0, "precision": 0},
    ]
    none = hierarchy.measure(predictions.take(np.asarray([0])), OF)["groups"][1]
    assert (none["images"], none["class_accuracy"], none["recall"], none["precision"]) == (0, None, None, None)


def test_the_group_accuracy_is_scikit_learns():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(4), 500)
    targets = random.integers(0, 4, 500)
    of_classes = np.asarray(Groups.of(OF, NAMES).of_classes)
    sums = np.stack([probabilities[:, of_classes == group].sum(1) for group in (0, 1)], 1)
    measured = hierarchy.measure(Predictions(NAMES, targets, probabilities), OF)
    assert measured["group_accuracy"] == sklearn.metrics.accuracy_score(of_classes[targets], sums.argmax(1))
    recalls = sklearn.metrics.recall_score(of_classes[targets], sums.argmax(1), average=None)
    assert [row["recall"] for row in measured["groups"]] == pytest.approx(recalls)
    precisions = sklearn.metrics.precision_score(of_classes[targets], sums.argmax(1), average=None)
    assert [row["precision"] for row in measured["groups"]] == pytest.approx(precisions)


def test_the_guarantee_of_groups_is_broken_no_more_often_than_it_says():
    """200 random splits of a population, of whose classes pairs are hard to tell apart."""
    random = np.random.default_rng(1)
    pairs = random.normal(size=(30_000, 5)) * random.gamma(4, 5, (30_000, 1))
    logits = np.repeat(pairs, 2, axis=1) + random.normal(size=(30_000, 10)) * random.gamma(1, 6, (30_000, 1))
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    targets = (probabilities.cumsum(1) > random.random((30_000, 1))).argmax(1)
    probabilities = probabilities.astype(np.float32)
    groups = Groups(tuple("abcde"), tuple(index // 2 for index in range(10)))
    broken = found = 0
    coverages = []
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(targets))
        calibration, test = order[:3000], order[3000:]
        threshold = find_threshold(
            probabilities[calibration], targets[calibration], precision=0.95, certainty=0.95,
            learnt=split(3000, seed), groups=groups,
        )  # fmt: skip
        if threshold is None or threshold.group is None:
            continue
        rules = Rules(threshold=threshold, groups=groups)
        measured = measure_answers(rules, probabilities[test], targets[test])
        found += 1
        broken += measured["group_precision"] < 0.95
        coverages.append(measured["group_coverage"])
        assert abs(measured["group_coverage"] - threshold.group_coverage) < 0.1
    assert found > 190
    assert broken <= scipy.stats.binom.ppf(0.999, 200, 0.05)
    assert np.mean(coverages) > 0.2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("groups.csv", "class,group\nvan,vehicle\ncat,animal\ndog,animal\ncar,vehicle\n"),
        ("GROUPS.CSV", "\ufeffgroup,note,class\nvehicle,x,van\nanimal,,cat\nanimal,,dog\nvehicle,,car\n"),
        ("groups.yaml", "cat: animal\ndog: animal\ncar: vehicle\nvan: vehicle\n"),
        ("groups.json", json.dumps(OF)),
    ],
)
def test_groups_are_read(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    read = hierarchy.read(str(tmp_path / name), NAMES)
    assert (read, list(read)) == (OF, NAMES)


def test_classes_that_are_numbers_are_texts(tmp_path):
    (tmp_path / "groups.yaml").write_text("0: small\n1: small\nno: '2'\n")
    assert hierarchy.read(str(tmp_path / "groups.yaml"), ["0", "1", "no"]) == {"0": "small", "1": "small", "no": "2"}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("g.csv", b"class,kind\ncat,animal\n", "lacks the columns class and group"),
        ("g.csv", b"", "lacks the columns class and group"),
        ("g.csv", b"class,group\ncat,a\ncat,b\n", "names the class 'cat' twice"),
        ("g.csv", b"class,group\ncat,a\ncow,b\n", "names 'cow', which is not a class of the bundle"),
        ("g.csv", b"class,group\ncat,a\ncar\n", "gives no group for the class 'car'"),
        ("g.yaml", b"cat: animal\n", "gives no group for the class 'car'"),
        ("g.yaml", b"- cat\n- dog\n", "is not a table of classes and their groups, such as `cat: animal`"),
        ("g.yaml", b"animal: [cat, dog]\n", "is not a table of classes and their groups"),
        ("g.yaml", b"cat: a\ncat: b\n", "names the class 'cat' twice"),
        ("g.yaml", b"", "is not a table of classes and their groups"),
        ("g.yaml", b"cat: [\n", "is neither YAML nor JSON"),
        ("g.json", b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_other_files_are_refused(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=f"--hierarchy .*{name} {sentence}"):
        hierarchy.read(str(tmp_path / name), NAMES)
    with pytest.raises(FileNotFoundError):
        hierarchy.read(str(tmp_path / "none.yaml"), NAMES)


@pytest.fixture
def bundle(tmp_path):
    """A function that writes a bundle of red, green and blue that is unsure of every image, and returns it."""
    save_cut(tmp_path / "bundle")
    plain = Bundle.load(str(tmp_path / "bundle"))

    def write(groups, group=0.0):
        thresholds = {FLOAT32: make_threshold(confidence=1.0, group=group)}
        decision = Decision(precision=0.99, certainty=0.95, candidate_coverage=0.95, thresholds=thresholds)
        bundles.write_info(plain.uri, dataclasses.replace(plain.info, decision=decision, groups=groups))
        return Bundle.load(plain.uri)

    return write


COLOURS = {"red": "warm", "green": "cold", "blue": "cold"}


def test_groups_are_part_of_the_bundle_and_of_its_version(bundle):
    def read(bundle):
        return json.loads(Path(bundle.uri, "bundle.json").read_text())

    without = bundle(None, group=None)
    assert (read(without)["format_version"], "groups" in read(without)) == (3, False)
    grouped = bundle(COLOURS)
    assert (read(grouped)["format_version"], grouped.info.groups) == (5, COLOURS)
    other = bundle(COLOURS, group=0.5)
    renamed = bundle(COLOURS | {"red": "hot"})
    assert len({without.version, grouped.version, other.version, renamed.version}) == 4


@pytest.mark.parametrize("groups", [{}, {"red": "warm"}, COLOURS | {"grey": "cold"}, COLOURS | {"red": 1}, ["warm"]])
def test_damaged_groups_are_refused(groups, bundle):
    uri = bundle(COLOURS).uri
    content = json.loads(Path(uri, "bundle.json").read_text())
    Path(uri, "bundle.json").write_text(json.dumps(content | {"groups": groups}))
    with pytest.raises(BundleError, match=r"groups in bundle\.json is not a table with the name of a group for each"):
        Bundle.load(uri)


def test_predictor_and_mlflow_name_groups(bundle):
    images = [*awkward_images().values(), b"none"]
    grouped = bundle(COLOURS)
    *answers, bad = Predictor(grouped)(images)
    assert bad.reason == "not an image"
    for answer in answers:
        red, green, blue = answer.probabilities
        assert answer.label is None
        assert answer.group == ("cold" if green + blue >= red else "warm")
    table = BundleModel(Predictor(grouped)).predict(images)
    assert list(table.columns) == ["prediction", "confidence", "probabilities", "error", "candidates", "group"]
    assert table["group"].tolist()[:-1] == [answer.group for answer in answers]
    assert table["group"].isna().tolist() == [False] * len(answers) + [True]
    (answer, *_) = Predictor(grouped, withholds=False)(images)
    assert (answer.label is None, answer.group) == (False, None)
