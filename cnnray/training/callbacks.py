"""The Keras callbacks of a run, and their state in checkpoints."""

import csv
import io
import logging
import time
from typing import Any

import keras

from cnnray.images import storage
from cnnray.progress import duration
from cnnray.training.config import TrainConfig

log = logging.getLogger(__name__)

MONITOR = "val_loss"
_REFRESH_SECONDS = 5.0
_SHOWN = (
    "loss", "accuracy", "subset_accuracy", "val_loss", "val_accuracy", "val_subset_accuracy", "val_top_5_accuracy",
    "val_mean_average_precision", "val_macro_f1", "val_auroc",
)  # fmt: skip
_PLAIN = (bool, int, float, str, type(None))


class ProgressLogger(keras.callbacks.Callback):
    """One log line every few seconds: epoch, step, loss, accuracy, images/s, time left."""

    def __init__(self, epochs: int, steps: int, images: int) -> None:
        """
        Args:
            epochs: passes in all.
            steps: steps of an epoch.
            images: training images of an epoch.
        """
        super().__init__()
        self._epochs, self._steps, self._images = epochs, steps, images
        self._epoch = 0
        self.phase = ""
        """Name of the phase; empty where there is only one."""
        self._shown = 0.0
        self._rate = 0.0

    @property
    def _prefix(self) -> str:
        return f"{self.phase}: " if self.phase else ""

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Remember which epoch it is."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Show a line where the last one is old enough."""
        now = time.monotonic()
        if now - self._shown < _REFRESH_SECONDS or batch + 1 == self._steps:
            return
        if not logs or not logs["images_per_second"]:
            return
        self._shown = now
        self._rate = logs["images_per_second"]
        share = (batch + 1) / self._steps
        left = self._images * (self._epochs - self._epoch - share) / max(self._rate, 1e-9)
        log.info(
            "%sepoch %d/%d  step %d/%d  %s  %.0f images/s  %s left",
            self._prefix, self._epoch + 1, self._epochs, batch + 1, self._steps,
            _shown(logs, ("loss", "accuracy", "subset_accuracy")), self._rate, duration(left),
        )  # fmt: skip

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Show the epoch's line."""
        logs = logs or {}
        left = (self._epochs - epoch - 1) * logs["seconds"]
        values = _shown(logs, _SHOWN)
        log.info(
            "%sepoch %d/%d  %s  %.0f images/s  %s left",
            self._prefix, epoch + 1, self._epochs, values, logs["images_per_second"], duration(left),
        )  # fmt: skip
        self._shown = time.monotonic()


def _shown(logs: dict[str, Any], names: tuple[str, ...]) -> str:
    return "  ".join(f"{name} {logs[name]:.4f}" for name in names if name in logs)


def deciding_callbacks(config: TrainConfig) -> list[keras.callbacks.Callback]:
    """The callbacks that change a phase of the training: they run on every worker, on the same logs."""
    callbacks: list[keras.callbacks.Callback] = []
    if config.early_stopping_patience is not None:
        callbacks.append(keras.callbacks.EarlyStopping(MONITOR, patience=config.early_stopping_patience))
    if config.schedule == "plateau":
        callbacks.append(
            keras.callbacks.ReduceLROnPlateau(MONITOR, factor=0.5, patience=config.plateau_patience, min_lr=1e-7)
        )
    return callbacks


def get_state(callbacks: list[keras.callbacks.Callback]) -> list[dict[str, Any]]:
    """The plain attributes (counters, best values) of each callback, for JSON."""
    return [
        {name: value for name, value in vars(callback).items() if isinstance(value, _PLAIN)} for callback in callbacks
    ]


def restore(callbacks: list[keras.callbacks.Callback], states: list[dict[str, Any]]) -> None:
    """Set what `get_state` gave; to be called after `on_train_begin`, which resets the callbacks."""
    for callback, state in zip(callbacks, states, strict=True):
        vars(callback).update(state)


def write_history(history: list[dict[str, Any]], uri: str) -> None:
    """Write the epochs' logs as CSV, whole or not at all."""
    if not history:
        return
    text = io.StringIO()
    # The first epochs may be of a version that wrote other columns.
    writer = csv.DictWriter(text, fieldnames=list(history[-1]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(history)
    storage.write_bytes(uri, text.getvalue().encode())
