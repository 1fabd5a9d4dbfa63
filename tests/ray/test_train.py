"""Whole training runs on the session's cluster: their outputs, the failures they survive, the input they refuse."""

import csv
import itertools
import json
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import ray.cloudpickle
import yaml

from cnnray import configs
from cnnray.cluster import ClusterError
from cnnray.images import containers, lease
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError
from cnnray.models.augment import Augmentations
from cnnray.models.bundle import Bundle
from cnnray.models.own_network import NetworkError
from cnnray.models.predictor import Predictor
from cnnray.training import decisions, job, output
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DecidedConfig
from cnnray.training.epoch import LanesEpoch
from cnnray.training.job import train
from cnnray.training.output import TrainingError
from cnnray.training.phases import Phase
from tests.awkward import bad_images
from tests.runs import final_state, largest_difference

EPOCHS = 2


def _config(digits, output, **changes):
    config = TrainConfig(
        data=str(digits),
        output=str(output),
        architecture="small_cnn",
        image_size=16,
        epochs=EPOCHS,
        batch_size=32,
        max_workers=2,
        cpus_per_worker=0.5,
        checkpoint_every_steps=2,
        cache="none",
        data_checks=False,
        average=0.9,
        phases=[Phase(name="top half", epochs=1, trainable=0.5), Phase(name="all", epochs=1)],
    )
    return replace(config, **changes)


def _simple(digits, output, max_workers=1, **changes):
    """One worker and one phase, for tests that depend on neither: it takes half of the time."""
    return _config(
        digits,
        output,
        max_workers=max_workers,
        phases=None,
        average=0.0,
        schedule="constant",
        augment="none",
        **changes,
    )


def _train_and_log_steps(assignment, log, kill, overlap):
    """Run the training loop, log the image ids of every step, and kill the worker at the position `kill`.

    Args:
        log: folder of the logs, one file a process.
        kill: epoch, step and rank; None: no worker.
        overlap: whether a step begins before the one before it has ended, as on a GPU.
    """
    from cnnray.models import startup

    startup.load_tensorflow(gpus=False)
    from cnnray.training import worker

    original, current = worker._Worker._train_epoch, {}

    def train_epoch(self, callbacks):
        current["worker"], self.overlaps = self, overlap
        original(self, callbacks)

    def tally(ids, exact=worker.epoch.tally):
        if "worker" in current:
            training = current["worker"]
            position = (training.progress.epoch, training.progress.step, training.rank)
            with Path(log, f"{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps([position, ids.tolist()]) + "\n")
            if kill == position and not Path(log, "killed").exists():
                Path(log, "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return exact(ids)

    worker._Worker._train_epoch = train_epoch
    worker.epoch.tally = tally
    return worker.run(assignment)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A function that trains and logs every step; it returns the summary, the output, and the ids by position."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def run_once(kill=None, overlap=False, **changes):
        output, log = tmp_path_factory.mktemp("run") / "out", tmp_path_factory.mktemp("log")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                job, "train_on_worker", lambda assignment: _train_and_log_steps(assignment, str(log), kill, overlap)
            )
            summary = train(_config(digits, output, **changes))
        assert (log / "killed").exists() == (kill is not None)
        steps, runs = {}, Counter()
        for file in sorted(log.glob("*.jsonl"), key=lambda path: path.stat().st_ctime):
            for line in file.read_text().splitlines():
                position, ids = json.loads(line)
                # A step that is repeated after the loss of a worker gets the same images.
                assert steps.setdefault(tuple(position), ids) == ids
                runs[tuple(position)] += 1
        if kill:
            # The run resumed from a checkpoint of this epoch: the last one, or an earlier one if the worker died
            # before Ray's controller had registered the last.
            repeated = {position for position, times in runs.items() if times > 1}
            first = min(step for _, step, _ in repeated)
            assert first % 2 == 0
            expected = {(kill[0], step, rank) for step in range(first, kill[1] + 1) for rank in (0, 1)}
            # The other worker may have been stopped before it logged its part of the last step, or have gone on to
            # the one that had begun.
            last = {(kill[0], kill[1] + number, 1 - kill[2]) for number in range(1 + overlap)}
            assert expected - last <= repeated <= expected | last
        return summary, output, steps

    return run_once


@pytest.fixture(scope="module")
def undisturbed(run):
    return run()


def _ids_by_epoch(steps):
    return [
        sorted(image_id for position, ids in steps.items() if position[0] == epoch for image_id in ids)
        for epoch in range(EPOCHS)
    ]


def test_the_outputs_of_a_run(undisturbed, digits):
    summary, output, _ = undisturbed
    assert {path.name for path in output.iterdir()} == {
        "bundle", "checkpoints", "config.yaml", "history.csv", "manifest.parquet", "summary.json", "tensorboard",
    }  # fmt: skip
    assert json.loads((output / "summary.json").read_text()) == summary
    assert set(summary) == {
        "bundle", "epochs", "has_learned", "metrics", "images_per_second", "seconds_to_first_step", "seconds",
    }  # fmt: skip
    assert summary["epochs"] == EPOCHS
    assert summary["images_per_second"] > 0
    assert 0 < summary["seconds_to_first_step"] < summary["seconds"]
    history = list(csv.DictReader((output / "history.csv").open()))
    assert [(row["epoch"], row["phase"]) for row in history] == [("1", "top half"), ("2", "all")]
    best = min(history, key=lambda row: (-float(row["val_accuracy"]), float(row["val_loss"])))
    assert summary["metrics"] == {name: float(best[name]) for name in summary["metrics"]}
    assert set(summary["metrics"]) == {"val_loss", "val_accuracy", "val_top_5_accuracy"}
    config = configs.load(TrainConfig, (output / "config.yaml").read_bytes(), "config.yaml")
    decided = DecidedConfig(**config)
    assert decided == decisions.as_before(_config(digits, output), config)
    assert (decided.head, decided.dropout, decided.learning_rate) == ("dense", 0.1, 0.003)
    assert list((output / "tensorboard").glob("*/events*"))


def test_the_bundle_reproduces_its_recorded_metrics(undisturbed):
    summary, output, _ = undisturbed
    bundle = Bundle.load(summary["bundle"])
    rows = manifests.select_split(manifests.read(str(output / "manifest.parquet")), "validation").to_pylist()
    answers = Predictor(bundle)([Path(row["uri"]).read_bytes() for row in rows])
    correct = [answer.label == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(correct) == pytest.approx(bundle.info.metrics["val_accuracy"], abs=1e-9)
    labels = [bundle.info.class_names.index(row["label"]) for row in rows]
    likelihoods = [answer.probabilities[label] for answer, label in zip(answers, labels, strict=True)]
    assert -np.log(likelihoods).mean() == pytest.approx(bundle.info.metrics["val_loss"], rel=1e-4)
    assert bundle.info.config["seed"] == 0
    assert sum(bundle.info.class_counts.values()) + len(rows) == 200


def test_each_epoch_sees_each_image_once(undisturbed):
    _, output, steps = undisturbed
    expected = manifests.select_split(manifests.read(str(output / "manifest.parquet")), "train")["id"].to_pylist()
    assert _ids_by_epoch(steps) == [sorted(expected)] * EPOCHS


@pytest.mark.parametrize(("kill", "overlap"), [((0, 3, 1), False), ((1, 2, 0), True)])
def test_a_killed_worker_does_not_change_the_result(run, undisturbed, kill, overlap):
    _, output, steps = run(kill=kill, overlap=overlap)
    _, expected, expected_steps = undisturbed
    assert steps == expected_steps
    for arrays, expected_arrays in zip(final_state(output), final_state(expected), strict=True):
        assert largest_difference(arrays, expected_arrays) <= 1e-5


@pytest.fixture(scope="module")
def in_parquet(undisturbed, tmp_path_factory):
    """The images of `undisturbed`, with their split, in row groups of 20."""
    rows = manifests.read(str(undisturbed[1] / "manifest.parquet"))
    images = [Path(uri).read_bytes() for uri in rows["uri"].to_pylist()]
    table = pa.table({"image": images, "label": rows["label"], "split": rows["split"]})
    file = tmp_path_factory.mktemp("parquet") / "digits.parquet"
    pyarrow.parquet.write_table(table, file, row_group_size=20)
    return str(file)


def test_cached_images_from_parquet_give_the_same_weights(run, undisturbed, in_parquet):
    _, expected, expected_steps = undisturbed
    _, output, steps = run(overlap=True, data=in_parquet, cache="auto", checkpoint_every_steps=None)
    assert steps == expected_steps
    for arrays, expected_arrays in zip(final_state(output), final_state(expected), strict=True):
        assert largest_difference(arrays, expected_arrays) <= 1e-5


def test_images_in_parquet_are_streamed_and_a_killed_worker_goes_on(run, undisturbed, in_parquet):
    _, output, steps = run(kill=(0, 3, 1), data=in_parquet)
    rows = manifests.select_split(manifests.read(str(output / "manifest.parquet")), "train")
    runs = [length for _, length in containers.group_runs(rows["uri"].chunks)]
    assert len(runs) == 10
    for epoch in range(EPOCHS):
        ordered = LanesEpoch(0, epoch, len(rows), 32, lanes=12, starts=np.cumsum([0, *runs]))
        for step, rank in itertools.product(range(ordered.steps), range(2)):
            assert steps[epoch, step, rank] == rows["id"].take(pa.array(ordered.rows(step, rank, 2))).to_pylist()
    assert _ids_by_epoch(steps) == _ids_by_epoch(undisturbed[2])


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_prediction_answers_as_validation_did_where_training_took_crops_of_larger_images(digits, tmp_path, cache):
    config = _simple(
        digits, tmp_path, image_size="16x20", decode_size="20x26", resize="pad", cache=cache, epochs=4,
        checkpoint_every_steps=None,
    )  # fmt: skip
    summary = train(replace(config, augment="standard"))
    bundle = Bundle.load(str(tmp_path / "bundle"))
    assert (bundle.info.image_size, bundle.info.decode_size, bundle.info.resize) == ("16x20", "20x26", "pad")
    assert bundle.model.input_shape == (None, 16, 20, 3)
    rows = manifests.select_split(manifests.read(str(tmp_path / "manifest.parquet")), "validation").to_pylist()
    answers = Predictor(bundle)([Path(row["uri"]).read_bytes() for row in rows])
    truth = [bundle.info.class_names.index(row["label"]) for row in rows]
    loss = -np.mean([np.log(answer.probabilities[index]) for answer, index in zip(answers, truth, strict=True)])
    accuracy = np.mean([answer.label == row["label"] for answer, row in zip(answers, rows, strict=True)])
    assert summary["metrics"]["val_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert summary["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_lost_image_fails_the_epoch(digits, tmp_path):
    def train_without_first_row(assignment):
        from cnnray.models import startup

        startup.load_tensorflow(gpus=False)
        from cnnray.training import worker

        original = worker.epoch.Epoch.rows

        def without_first_row(self, step, *arguments):
            return original(self, step, *arguments)[not step :]

        worker.epoch.Epoch.rows = without_first_row
        return worker.run(assignment)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "train_on_worker", train_without_first_row)
        with pytest.raises(TrainingError, match="did not see every image of the manifest once"):
            train(_simple(digits, tmp_path / "out", max_failures=0))


def test_a_finished_run_is_not_repeated(undisturbed, digits, tmp_path):
    summary, output, _ = undisturbed
    shutil.copytree(output, tmp_path / "out")
    config = _config(digits, tmp_path / "out")
    assert train(config) == summary
    for changes, sentence in (
        ({"learning_rate": 0.1}, r"--learning-rate 0.003 \(now 0.1\)"),
        ({"phases": None}, "--phases"),
        ({"augmentations": Augmentations(zoom=0.5)}, "--augmentations"),
    ):
        with pytest.raises(TrainingError, match=sentence):
            train(replace(config, **changes))
    # A run with --overwrite that cannot start leaves the finished run as it was.
    with pytest.raises(ManifestError):
        train(replace(config, overwrite=True, data="/nowhere"))
    assert train(config) == summary
    with pytest.raises(ClusterError, match="leave 0"):
        train(replace(config, overwrite=True, cpus_per_worker=2.0))
    assert train(config) == summary


def test_a_second_run_into_the_same_output_is_refused(digits, tmp_path):
    with lease.lease(str(tmp_path)), pytest.raises(lease.OutputInUseError, match="Another run is writing"):
        train(_config(digits, tmp_path))


def test_bad_images_are_listed_and_too_many_end_the_run(digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    names = ("empty.jpg", "html.jpg", "truncated.png")
    for name in names:
        (data / "3" / name).write_bytes(bad_images()[name][0])
    train(_config(data, tmp_path / "out", max_bad_fraction=0.1, phases=None, average=0.0, epochs=1))
    listed = list(csv.DictReader((tmp_path / "out" / "bad_images.csv").open()))
    assert {row["uri"].rpartition("/")[2]: row["error"].partition(":")[0] for row in listed} == {
        name: bad_images()[name][1] for name in names
    }
    with pytest.raises(TrainingError, match=r"images could not be read, .*--max-bad-fraction 0.001"):
        train(_simple(data, tmp_path / "strict", max_workers=2, max_bad_fraction=0.001))
    assert not (tmp_path / "strict" / "bundle").exists()
    with pytest.raises(ManifestError, match=r"3 of 203 images cannot be read: .* --max-bad-fraction 0.001"):
        train(_simple(data, tmp_path / "checked first", max_bad_fraction=0.001, data_checks=True))
    assert not (tmp_path / "checked first" / "config.yaml").exists()


def test_early_stopping_ends_a_run_that_gets_worse(digits, tmp_path):
    config = _simple(
        digits, tmp_path / "out", epochs=40, learning_rate=0.03, cache="memory", early_stopping_patience=1,
        checkpoint_every_steps=100, max_workers=2,
    )  # fmt: skip
    summary = train(config)
    assert summary["epochs"] < 40
    history = list(csv.DictReader((tmp_path / "out" / "history.csv").open()))
    losses = [float(row["val_loss"]) for row in history]
    assert losses[-1] >= min(losses[:-1])
    assert summary["metrics"]["val_accuracy"] == max(float(row["val_accuracy"]) for row in history)


def test_a_loss_that_is_not_finite_ends_the_run(digits, tmp_path):
    config = _simple(digits, tmp_path / "out", optimizer="sgd", learning_rate=1e30)
    with pytest.raises(
        TrainingError, match=r"The loss became .* in epoch 1: begin anew, .* a lower --learning-rate"
    ) as e:
        train(config)
    assert not (tmp_path / "out" / "bundle").exists()
    # What the sentence advises works, and needs what it names.
    lower = replace(config, learning_rate=0.01)
    with pytest.raises(TrainingError, match=r"holds a run with --learning-rate"):
        output.earlier_run(lower)
    assert "--overwrite" in str(e.value)
    assert output.earlier_run(replace(lower, overwrite=True)) is None
    assert "--precision" not in str(e.value)


def test_a_run_goes_on_from_a_bundle_with_a_new_class(digits, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(digits, fewer, ignore=shutil.ignore_patterns("9"))
    flags = {"cache": "memory", "checkpoint_every_steps": None, "select": "auroc"}
    first = train(_simple(fewer, tmp_path / "first", epochs=12, **flags))
    assert first["metrics"]["val_auroc"] > 0.8
    flags |= {
        "weights": str(tmp_path / "first" / "bundle"), "keep_head": True, "optimizer": "sgd", "learning_rate": 1e-12,
        "epochs": 1, "sampling": "balanced", "select": "macro_f1", "architecture": None,
    }  # fmt: skip
    second = train(_simple(digits, tmp_path / "second", max_workers=2, **flags))
    accuracies = [summary["metrics"]["val_accuracy"] for summary in (first, second)]
    assert accuracies[1] > 0.6 * accuracies[0] > 0.4  # the network has learned nothing that it did not know before
    (epoch,) = csv.DictReader((tmp_path / "second" / "history.csv").open())
    assert float(epoch["val_macro_f1"]) == pytest.approx(second["metrics"]["val_macro_f1"])
    other = tmp_path / "other"
    for name in ("cat", "dog"):
        shutil.copytree(digits / "1", other / name)
    with pytest.raises(ValueError, match="knows none of the classes"):
        train(_simple(other, tmp_path / "third", **flags))


def test_an_output_with_other_files_is_refused(digits, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious").touch()
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match=r"holds checkpoints, but no config\.yaml of a run"):
            train(_config(digits, tmp_path, overwrite=overwrite))
    assert (tmp_path / "checkpoints" / "precious").exists()


def test_a_run_killed_before_its_manifest_was_written_starts_again(digits, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def raise_killed(*_):
        raise KilledError

    monkeypatch.setattr(job.manifests, "write", raise_killed)
    with pytest.raises(KilledError):
        train(_config(digits, tmp_path / "out"))
    # The same command gets as far as before: it does not take its own files for those of another program.
    with pytest.raises(KilledError):
        train(_config(digits, tmp_path / "out"))


def test_an_output_inside_the_data_is_refused(digits):
    with pytest.raises(ValueError, match="would be taken for classes"):
        _config(digits, digits / "out")


def test_bad_input_creates_no_output(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    with pytest.raises(ManifestError):
        train(_config(tmp_path / "data", tmp_path / "out" / "deep"))
    assert not (tmp_path / "out").exists()


def test_a_network_of_ones_own_trains_on_workers(digits, tmp_path, caplog):
    def tiny(image_size, classes):
        import keras

        class Doubled(keras.layers.Layer):
            def call(self, values):
                return 2 * values

        return keras.Sequential([
            keras.Input((image_size, image_size, 3)), keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, activation="relu"), Doubled(), keras.layers.Flatten(),
            keras.layers.Dense(classes, name="logits"),
        ])  # fmt: skip

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = _simple(digits, tmp_path, max_workers=2, epochs=8, cache="memory", checkpoint_every_steps=None)
    summary = train(replace(config, architecture=None), architecture=tiny)
    assert summary["metrics"]["val_accuracy"] > 0.5
    assert "will not be loaded by cnnray's jobs" in caplog.text
    assert "Keras does not know Doubled." in caplog.text
    name = "tests.ray.test_train:test_a_network_of_ones_own_trains_on_workers.<locals>.tiny"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["architecture"] == name
    with pytest.raises(NetworkError, match=r"gives \(None, 3\), and there are 10 classes"):
        train(replace(config, overwrite=True), architecture=lambda image_size, _: tiny(image_size, 3))
