"""What a training run measures, for Prometheus: each node of a Ray cluster exports it."""

from ray.util import metrics

from cnnray.images import storage
from cnnray.training.sums import Sums


class Meter:
    """The metrics `cnnray_train_*` of Ray, each with the tag `run`. One process of a run, rank 0, has one."""

    def __init__(self, output: str) -> None:
        """
        Args:
            output: of the run; its last two parts are its name.
        """
        self._tags = {"run": storage.short_name(output)}
        self._images = metrics.Counter(
            "cnnray_train_images", description="Images trained on, by all workers.", tag_keys=("run",)
        )
        self._bad_images = metrics.Counter(
            "cnnray_train_bad_images",
            description="Images that could not be read, at each time that they were due.",
            tag_keys=("run",),
        )
        self._epoch = metrics.Gauge("cnnray_train_epoch", description="Epochs that are done.", tag_keys=("run",))
        self._learning_rate = metrics.Gauge(
            "cnnray_train_learning_rate", description="Learning rate at the epoch's end.", tag_keys=("run",)
        )
        self._loss = metrics.Gauge(
            "cnnray_train_loss",
            description="Mean loss: of the epoch so far (train), of the last epoch's end (validation).",
            tag_keys=("run", "split"),
        )
        self._accuracy = metrics.Gauge(
            "cnnray_train_accuracy",
            description="Accuracy: of the epoch so far (train), of the last epoch's end (validation).",
            tag_keys=("run", "split"),
        )

    def step(self, step: Sums, epoch: Sums) -> None:
        """A step was made.

        Args:
            step: over its images.
            epoch: over those of the epoch so far.
        """
        if step.count:
            self._images.inc(step.count, tags=self._tags)
        if step.bad:
            self._bad_images.inc(step.bad, tags=self._tags)
        self._show("train", epoch.metrics())

    def epoch(self, done: int, logs: dict[str, float]) -> None:
        """An epoch came to its end.

        Args:
            done: epochs so far.
            logs: `loss` and `accuracy`, the same with `val_`, and `learning_rate`.
        """
        self._epoch.set(done, tags=self._tags)
        self._learning_rate.set(logs["learning_rate"], tags=self._tags)
        self._show("train", logs)
        self._show("validation", {name: logs[f"val_{name}"] for name in ("loss", "accuracy")})

    def _show(self, split: str, found: dict[str, float]) -> None:
        tags = self._tags | {"split": split}
        self._loss.set(found["loss"], tags=tags)
        self._accuracy.set(found["accuracy"], tags=tags)
