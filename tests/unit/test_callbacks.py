"""Callbacks that decide: they resume where they were, and show readable durations."""

import logging

import keras
import pytest

from cnnray.training import callbacks
from cnnray.training.config import TrainConfig


def _start_callbacks(config):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.001))
    model.stop_training = False
    deciding = callbacks.deciding_callbacks(config)
    keras_callbacks = keras.callbacks.CallbackList(deciding, model=model)
    keras_callbacks.on_train_begin()
    return keras_callbacks, deciding, model


def test_restored_callbacks_decide_as_if_uninterrupted():
    config = TrainConfig(data="/d", output="/o", early_stopping_patience=4, schedule="plateau", plateau_patience=2)
    losses = [1.0, 0.9, 0.95, 0.96, 0.97, 0.98, 0.5]
    decisions = {}
    for interrupted in (False, True):
        keras_callbacks, deciding, model = _start_callbacks(config)
        stops_and_rates = []
        for epoch, loss in enumerate(losses):
            keras_callbacks.on_epoch_end(epoch, {"val_loss": loss})
            rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
            stops_and_rates.append((model.stop_training, rate))
            if interrupted:
                state = callbacks.get_state(deciding)
                keras_callbacks, deciding, model = _start_callbacks(config)
                callbacks.restore(deciding, state)
                model.stop_training = stops_and_rates[-1][0]
                model.optimizer.learning_rate = rate  # a run restores it with the optimizer's variables
        decisions[interrupted] = stops_and_rates
    assert decisions[True] == decisions[False]
    assert [stop for stop, _ in decisions[False]] == [False] * 5 + [True] * 2
    assert decisions[False][-1][1] == pytest.approx(0.00025)


def test_the_line_of_an_epoch_has_a_top_5_accuracy_where_there_is_one(caplog):
    logs = {"loss": 1, "accuracy": 0.5, "val_loss": 2, "val_accuracy": 0.25, "images_per_second": 9, "seconds": 1}
    with caplog.at_level(logging.INFO, "cnnray"):
        callbacks.ProgressLogger(2, 1, 9).on_epoch_end(0, logs)
        callbacks.ProgressLogger(2, 1, 9).on_epoch_end(0, logs | {"val_top_5_accuracy": 1})
    first, second = (record.message for record in caplog.records)
    assert "loss 1.0000  accuracy 0.5000  val_loss 2.0000  val_accuracy 0.2500  9 images/s" in first
    assert "val_accuracy 0.2500  val_top_5_accuracy 1.0000  9 images/s" in second


def test_a_history_continues_with_other_columns(tmp_path):
    uri = str(tmp_path / "history.csv")
    rows = [{"epoch": 1, "loss": 2, "top_5_accuracy": 1}, {"epoch": 2, "loss": 1, "workers": 2}]
    callbacks.write_history(rows, uri)
    assert (tmp_path / "history.csv").read_text().split() == ["epoch,loss,workers", "1,2,", "2,1,2"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (45, "45s"), (190, "3m10s"), (7500, "2h05m"), (float("inf"), "?")]
)
def test_durations_are_readable(seconds, text):
    assert callbacks.duration(seconds) == text
