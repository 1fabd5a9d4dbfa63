import keras
import pytest

from cnnray.training import callbacks
from cnnray.training.config import TrainConfig


def _list(config):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.001))
    model.stop_training = False
    deciding = callbacks.deciding_callbacks(config)
    keras_callbacks = keras.callbacks.CallbackList(deciding, model=model)
    keras_callbacks.on_train_begin()
    return keras_callbacks, deciding, model


def test_callbacks_go_on_where_they_were():
    config = TrainConfig(data="/d", output="/o", early_stopping_patience=4, schedule="plateau", plateau_patience=2)
    losses = [1.0, 0.9, 0.95, 0.96, 0.97, 0.98, 0.5]
    decisions = {}
    for interrupted in (False, True):
        keras_callbacks, deciding, model = _list(config)
        seen = []
        for epoch, loss in enumerate(losses):
            keras_callbacks.on_epoch_end(epoch, {"val_loss": loss})
            rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
            seen.append((model.stop_training, rate))
            if interrupted:
                state = callbacks.get_state(deciding)
                keras_callbacks, deciding, model = _list(config)
                callbacks.restore(deciding, state)
                model.stop_training = seen[-1][0]
                model.optimizer.learning_rate = rate  # in a run the optimizer's own variables bring it back
        decisions[interrupted] = seen
    assert decisions[True] == decisions[False]
    assert [stop for stop, _ in decisions[False]] == [False] * 5 + [True] * 2
    assert decisions[False][-1][1] == pytest.approx(0.00025)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0s"), (45, "45s"), (190, "3m10s"), (7500, "2h05m"), (float("inf"), "?")]
)
def test_durations_are_readable(seconds, shown):
    assert callbacks.duration(seconds) == shown
