"""Searches on the session's cluster: their outputs, and the flags and spaces that they refuse."""

import csv
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from cnnray.images import stream
from cnnray.images.manifest import ManifestError
from cnnray.training import decisions
from cnnray.training.decided import DecidedConfig
from cnnray.tuning import job
from cnnray.tuning.config import SearchConfig
from cnnray.tuning.job import SearchError, search


def _config(digits, output, **changes):
    flags = {
        "architecture": "small_cnn", "image_size": 16, "epochs": 1, "batch_size": 32, "max_workers": 1,
        "cpus_per_worker": 0.5, "cache": "memory", "data_checks": False,
        "search": {"learning_rate": {"grid_search": [1e-2, 1e30]}}, "trials": 1, "optimizer": "sgd", "seed": 3,
    }  # fmt: skip
    return SearchConfig(data=str(digits), output=str(output), **flags | changes)


def test_the_best_trial_becomes_a_config(digits, tmp_path):
    config = _config(digits, tmp_path / "out", parallel=2)
    summary = search(config)
    rows = {float(row["learning_rate"]): row for row in csv.DictReader((tmp_path / "out" / "trials.csv").open())}
    assert summary["trials"] == len(rows) == 2
    assert rows[1e30]["state"] == "failed"
    assert rows.pop(1e30)["val_accuracy"] == ""
    assert summary["best"] == {"learning_rate": 0.01}
    assert rows[0.01]["state"] == "finished"
    assert summary["val_accuracy"] == float(rows[0.01]["val_accuracy"])
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert DecidedConfig(output="/o", **best) == decisions.as_before(
        config.trial({"learning_rate": 0.01}, "/o"), best
    )
    assert (best["head"], best["dropout"]) == ("dense", 0.1)  # decided once for all trials
    trials = list((tmp_path / "out" / "trials").iterdir())
    assert len(trials) == 2
    assert (
        [trial for trial in trials if (trial / "bundle" / "model.keras").exists()]
        == [trial for trial in trials if (trial / "summary.json").exists()]
        == [tmp_path / "out" / "trials" / rows[0.01]["trial"]]
    )
    with pytest.raises(SearchError, match=r"holds a search with --epochs 1 \(now 3\)"):
        search(_config(digits, tmp_path / "out", epochs=3))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"search": []}, "--search is needed"),
        ({"search": ["learning_rate"]}, "expected a space for each flag"),
        ({"search": ["rate=choice([1])"]}, "'rate' is no training flag"),
        ({"search": ["augmentations=choice([1])"]}, "'augmentations' is no training flag"),
        ({"search": ["augmentations.fog=choice([1])"]}, "is no training flag"),
        ({"search": ["output=choice(['/x'])"]}, "is no training flag"),
        ({"search": ["dropout=normal(0,1)"]}, "no space is called 'normal'"),
        ({"search": {"dropout": [0.1, 0.2]}}, "--search dropout: expected a space and its arguments"),
        ({"search": {"dropout": {"uniform": [0, 0.5]}, "--dropout": {"choice": [0]}}}, "--search has dropout twice"),
        ({"search": ["dropout=choice(open('/etc/passwd'))"]}, "expected a space for each flag"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"preview_augmentations": 3}, "is a flag of jobs/train.py"),
    ],
)
def test_searches_that_cannot_work_are_refused(flags, sentence, digits, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        _config(digits, tmp_path, **flags)


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ("dropout=uniform(0.5,2)", "--dropout must be at least 0 and less than 1"),
        ("augmentations.rotation=uniform(-1,0)", "--augmentations.rotation must be 0 to 1"),
        ("dropout=uniform(0.5)", "uniform"),
        ("schedule=choice(['linear'])", "--schedule"),
        ("decode_size=choice([20,64])", "--decode-size: 64x64 is not between 16x16 and twice that"),
        (
            "image_size=grid_search([16,32]) decode_size=grid_search([20,40])",
            "image_size: --decode-size: 20x20 is not",
        ),
    ],
)
def test_spaces_with_values_that_training_refuses_are_refused(space, sentence, digits, tmp_path):
    with pytest.raises(SearchError, match=sentence):
        search(_config(digits, tmp_path / "out", search=space.split()))
    assert not (tmp_path / "out").exists()
    assert _config(digits, tmp_path, search=["augmentations.zoom=choice([0,0.1])"]).trial(
        {"augmentations.zoom": 0.1}, "/o"
    ).augmentations.zoom == pytest.approx(0.1)


@pytest.fixture
def trials(monkeypatch):
    """Replaces the trials of a search by results; holds the configs that trials would have had."""
    configs = []
    rows = pd.DataFrame([{"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0}])

    def results(config, spaces, *_):
        configs.append(config)
        values = {name: config.search[name][kind][0] for name in spaces for kind in config.search[name]}
        return [SimpleNamespace(metrics={"trial_id": "a"}, metrics_dataframe=rows, error=None, config=values)]

    monkeypatch.setattr(job, "_results", results)
    return configs


def test_images_are_checked_once_for_all_trials(trials, digits, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(
        stream,
        "check",
        lambda *arguments, check=stream.check, **options: checked.append(1) or check(*arguments, **options),
    )
    config = _config(digits, tmp_path / "out", data_checks=True)
    search(config)
    assert (len(checked), [trial.data_checks for trial in trials]) == (1, [False])
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["data_checks"] is True
    search(config)  # goes on, with the same images
    assert len(checked) == 1


def test_trials_on_other_images_check_them(trials, digits, tmp_path):
    spaces = {"data": {"choice": [str(digits)]}}
    search(_config(digits, tmp_path / "out", data_checks=True, search=spaces))
    assert [trial.data_checks for trial in trials] == [True]


def test_too_many_unreadable_images_end_a_search_before_anything_is_written(trials, digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    for number in range(5):
        (data / "3" / f"damaged {number}.png").write_bytes(b"not an image")
    with pytest.raises(ManifestError, match="5 of 205 images cannot be read"):
        search(_config(data, tmp_path / "out", data_checks=True))
    assert not (tmp_path / "out").exists()
    assert not trials
