"""Outputs of version 0.1.0 can be read and resumed: a bundle, finished runs and interrupted runs.

`tests/compatibility/0.1.0.tar.xz` was made by the jobs of commit fba1f0d in /tmp/compat/v1, on 73 images of three
digits (one of them broken), `small_cnn` at 16x16 with one worker, batches of 16, constant schedule:

    run                 train.py --epochs 1, then export.py --formats onnx,litert; without its checkpoints
    undisturbed         train.py --epochs 4: the run `killed` without the interruption
    killed              train.py --epochs 4, killed by SIGKILL after its first epoch
    predictions         predict.py --rows-per-part 16 --engine onnx --probabilities
    predictions-killed  predict.py --rows-per-part 16 --engine keras, killed by SIGKILL after its first part
    report              evaluate.py of the held-out images; without its pictures
    search-killed       tune.py --epochs 2 --trials 3, killed by SIGKILL in its second trial
"""

import csv
import json
import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cnnray import commandline, configs
from cnnray.configs import NewerFormatError
from cnnray.evaluation.config import EvaluateConfig
from cnnray.evaluation.job import evaluate
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.prediction import earlier as earlier_versions
from cnnray.prediction import job as prediction
from cnnray.prediction import parts, resume
from cnnray.prediction.config import PredictConfig
from cnnray.training.config import TrainConfig
from cnnray.training.job import train
from cnnray.tuning.config import SearchConfig
from cnnray.tuning.job import SearchError, search
from tests.conftest import REPOSITORY
from tests.runs import read_rows

MADE_IN = "/tmp/compat/v1"


@pytest.fixture
def earlier(tmp_path):
    """A folder with the outputs of 0.1.0, in which their paths point to this folder."""
    with tarfile.open(REPOSITORY / "tests/compatibility/0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*"):
        if path.suffix in (".yaml", ".json", ".csv", ".jsonl"):
            path.write_bytes(path.read_bytes().replace(MADE_IN.encode(), str(tmp_path).encode()))
        elif path.suffix == ".parquet":
            table = pq.read_table(path)
            uris = [uri.replace(MADE_IN, str(tmp_path)) for uri in table["uri"].to_pylist()]
            pq.write_table(table.set_column(table.column_names.index("uri"), table.field("uri"), [uris]), path)
    return tmp_path


def _config(config_class, output: Path):
    return commandline.parse(config_class, "test", ["--config", str(output / "config.yaml")])


@pytest.mark.parametrize("engine", ["keras", "onnx", "litert"])
def test_the_bundle_gives_the_same_answers(engine, earlier):
    rows = [row for row in read_rows(earlier / "predictions") if row["status"] == "ok"]
    predictor = Predictor(Bundle.load(str(earlier / "run/bundle")), engine=engine)
    answers = predictor([Path(row["uri"]).read_bytes() for row in rows])
    assert [answer.label for answer in answers] == [row["prediction"] for row in rows]
    expected = [row["probabilities"] for row in rows]
    np.testing.assert_allclose([answer.probabilities for answer in answers], expected, atol=1e-5)


def test_finished_runs_are_not_repeated(earlier):
    summary = json.loads((earlier / "run/summary.json").read_text())
    assert train(_config(TrainConfig, earlier / "run")) == summary
    before = {path.name: path.read_bytes() for path in (earlier / "predictions").iterdir()}
    summary = prediction.run(_config(PredictConfig, earlier / "predictions"))
    assert (summary["rows"], summary["ok"], summary["errors"], summary["resumed"]) == (73, 72, 1, 73)
    assert summary["classified"] == 0
    assert {path.name: path.read_bytes() for path in (earlier / "predictions").iterdir()} == before
    config = _config(EvaluateConfig, earlier / "report")
    rows = (earlier / "report/predictions/part-000000.parquet").read_bytes()
    assert evaluate(config)["accuracy"] == json.loads((earlier / "report/metrics.json").read_text())["accuracy"]
    assert (earlier / "report/predictions/part-000000.parquet").read_bytes() == rows


def test_the_interrupted_training_is_resumed(earlier, caplog):
    with caplog.at_level(logging.INFO, "cnnray"):
        summary = train(_config(TrainConfig, earlier / "killed"))
    assert "going on with the run" in caplog.text
    assert summary["epochs"] == 4
    with (
        (earlier / "killed/history.csv").open() as continued,
        (earlier / "undisturbed/history.csv").open() as expected,
    ):
        continued, expected = list(csv.DictReader(continued)), list(csv.DictReader(expected))
    assert [row["images"] for row in continued] == [row["images"] for row in expected] == ["57.0"] * 4
    assert continued[0]["val_loss"] == expected[0]["val_loss"]  # not trained again
    # Other versions augment in other ways: the network goes on from its weights, but does not see the same images.
    losses, expected_losses = ([float(row["loss"]) for row in rows] for rows in (continued, expected))
    assert losses[0] == expected_losses[0]
    assert losses[1:] == pytest.approx(expected_losses[1:], rel=0.5)
    assert max(losses[1:]) < losses[0]
    assert "broken.png" in (earlier / "killed/bad_images.csv").read_text()
    # The resumed run has the format of this version.
    assert yaml.safe_load((earlier / "killed/config.yaml").read_text())["cnnray"]["config"] == configs.CONFIG_FORMAT


def _same_rows(output, expected):
    """Check that the rows of two outputs have the same ids, uris and predictions."""
    rows, expected_rows = (read_rows(folder) for folder in (output, expected))
    assert [(row["id"], row["uri"], row["prediction"]) for row in rows] == [
        (row["id"], row["uri"], row["prediction"]) for row in expected_rows
    ]


def test_the_interrupted_prediction_is_resumed(earlier):
    output = earlier / "predictions-killed"
    part = pq.read_table(output / "part-000000.parquet")
    config = _config(PredictConfig, output)
    summary = prediction.run(replace(config, verify=True))
    assert (summary["rows"], summary["ok"], summary["errors"], summary["resumed"]) == (73, 72, 1, 16)
    assert summary["classified"] == 73 - 16
    # It is an output of this version, with the rows that were there.
    assert pq.read_table(output / "part-000000000000-0.0.parquet").equals(part)
    assert sorted(path.name for path in output.glob("part-*")) == [
        f"part-{first:012d}-0.0.parquet" for first in range(0, 73, 16)
    ]
    assert [path.name for path in output.glob("manifest*")] == ["manifest"]
    assert yaml.safe_load((output / "config.yaml").read_text())["cnnray"]["generation"] == 0
    _same_rows(output, earlier / "predictions")
    assert prediction.run(config)["resumed"] == 73


@pytest.mark.parametrize(
    ("module", "place", "resumed"),
    [(parts, "write", 16), (resume, "set_generation", 16), (earlier_versions, "delete_manifest", 73)],
)
def test_a_conversion_that_is_cut_off_is_done_again(module, place, resumed, earlier, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    output = earlier / "predictions-killed"
    with monkeypatch.context() as patch:
        patch.setattr(module, place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prediction.run(_config(PredictConfig, output))
    summary = prediction.run(replace(_config(PredictConfig, output), verify=True))
    assert (summary["rows"], summary["ok"], summary["resumed"]) == (73, 72, resumed)
    assert not (output / "manifest.parquet").exists()
    _same_rows(output, earlier / "predictions")


@pytest.mark.parametrize("name", ["predictions", "predictions-killed"])
def test_a_prediction_that_is_overwritten_leaves_none_of_its_files(name, earlier):
    for path in (earlier / name).glob(".*"):  # of a write that was cut off
        path.unlink()
    config = replace(_config(PredictConfig, earlier / name), overwrite=True, top_k=1)
    summary = prediction.run(config)
    assert (summary["rows"], summary["resumed"], summary["classified"]) == (73, 0, 73)
    names = {path.name for path in (earlier / name).iterdir()}
    parts_of_today = {f"part-{first:012d}-0.0.parquet" for first in range(0, 73, 16)}
    others = {"config.yaml", "errors.csv", "manifest", "summary.json"}
    assert {name for name in names if not name.startswith("errors-")} == parts_of_today | others
    assert {len(row["top_k_labels"]) for row in read_rows(earlier / name) if row["top_k_labels"]} == {1}


def test_a_finished_prediction_is_checked_and_updated(earlier):
    output = earlier / "predictions"
    config = _config(PredictConfig, output)
    expected = read_rows(output)
    for flag in ("verify", "retry_errors"):
        summary = prediction.run(replace(config, **{flag: True}))
        assert (summary["rows"], summary["ok"], summary["classified"]) == (73, 72, 0)
        assert read_rows(output) == expected
    with (output / "errors.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["uri"].endswith("broken.png")
    # Versions of the files were not known then.
    Path(row["uri"]).unlink()
    summary = prediction.run(replace(config, update=True, verify=True))
    assert (summary["rows"], summary["errors"], summary["classified"]) == (72, 0, 72)
    for row, wanted in zip(read_rows(output), (row for row in expected if not row["error"]), strict=True):
        assert (row["id"], row["uri"], row["prediction"]) == (wanted["id"], wanted["uri"], wanted["prediction"])
    assert not (output / "errors.csv").exists()


def test_the_interrupted_search_is_refused_or_replaced(earlier, monkeypatch):
    config = _config(SearchConfig, earlier / "search-killed")
    with pytest.raises(SearchError, match="holds a search of another version of cnnray that cannot be continued"):
        search(config)
    assert (earlier / "search-killed/trials").exists()

    def interrupt(fit):
        raise KeyboardInterrupt

    # Else its trials would go on, and take CPUs from the tests that follow.
    monkeypatch.setattr("cnnray.waiting.in_background", lambda fit: fit)
    monkeypatch.setattr("cnnray.waiting.interruptible", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(replace(config, overwrite=True))
    assert not (earlier / "search-killed/trials").exists()


def test_outputs_of_a_later_version_are_refused(earlier):
    path = earlier / "killed/config.yaml"
    config = _config(TrainConfig, earlier / "killed")
    for part in ("config", "output"):
        values = yaml.safe_load(configs.dump(config))
        values["cnnray"] |= {"version": "9.0.0", part: 99}
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(
            NewerFormatError, match=rf"killed/config.yaml was written by cnnray 9.0.0 \({part} format 99\)"
        ):
            train(config)
    manifest = manifests.read(str(earlier / "killed/manifest.parquet"))
    pq.write_table(manifest.replace_schema_metadata({"cnnray.manifest_format": "4"}), earlier / "m.parquet")
    with pytest.raises(ManifestError, match=r"m.parquet has format 4, and this cnnray reads up to 3: update cnnray"):
        manifests.read(str(earlier / "m.parquet"))


def test_a_config_of_a_later_version_is_refused_on_the_command_line(tmp_path, capsys):
    values = yaml.safe_load(configs.dump(TrainConfig(data="/d", output="/o")))
    values["cnnray"]["config"] = 99
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit):
        commandline.parse(TrainConfig, "jobs/train.py", ["--config", str(tmp_path / "config.yaml")])
    assert "config format 99" in capsys.readouterr().err
