"""What runs and replicas measure, for Prometheus: each node of a Ray cluster exports it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cnnray.images import storage
from cnnray.tracking.gauges import Gauge, Histogram, Tags


class TrainingMetrics:
    """The metrics `cnnray_train_*` of Ray, each with the tag `run`. One process of a run, rank 0, has one."""

    def __init__(self, output: str) -> None:
        """
        Args:
            output: of the run; its last two parts are its name.
        """
        from ray.util import metrics  # slow to import

        self._tags = {"run": storage.short_name(output)}
        self._images = metrics.Counter(
            "cnnray_train_images", description="Images trained on, by all workers.", tag_keys=("run",)
        )
        self._bad_images = metrics.Counter(
            "cnnray_train_bad_images",
            description="Images that could not be read, at each time that they were due.",
            tag_keys=("run",),
        )
        self._epoch = Gauge("cnnray_train_epoch", metrics, description="Epochs that are done.", tag_keys=("run",))
        self._learning_rate = Gauge(
            "cnnray_train_learning_rate", metrics, description="Learning rate at the epoch's end.", tag_keys=("run",)
        )
        self._loss = Gauge(
            "cnnray_train_loss",
            metrics,
            description="Mean loss: of the epoch so far (train), of the last epoch's end (validation).",
            tag_keys=("run", "split"),
        )
        self._accuracy = Gauge(
            "cnnray_train_accuracy",
            metrics,
            description="Accuracy: of the epoch so far (train), of the last epoch's end (validation).",
            tag_keys=("run", "split"),
        )

    def step(self, images: float, bad_images: float, epoch: dict[str, float]) -> None:
        """Count one step.

        Args:
            images: that were trained on.
            bad_images: that could not be read.
            epoch: `loss` and `accuracy` of the epoch so far.
        """
        if images:
            self._images.inc(images, tags=self._tags)
        if bad_images:
            self._bad_images.inc(bad_images, tags=self._tags)
        self._set("train", epoch)

    def epoch(self, finished: int, logs: dict[str, float]) -> None:
        """Set the figures of an epoch that has ended.

        Args:
            finished: epochs so far.
            logs: `loss` and `accuracy` (or `subset_accuracy`), the same with `val_`, and `learning_rate`.
        """
        self._epoch.set(finished, tags=self._tags)
        self._learning_rate.set(logs["learning_rate"], tags=self._tags)
        self._set("train", logs)
        self._set("validation", {name.removeprefix("val_"): logs[name] for name in logs if name.startswith("val_")})

    def _set(self, split: str, values: dict[str, float]) -> None:
        tags = self._tags | {"split": split}
        self._loss.set(values["loss"], tags=tags)
        self._accuracy.set(values["accuracy" if "accuracy" in values else "subset_accuracy"], tags=tags)


class PredictionMetrics:
    """The metrics `cnnray_predict_*` of Ray, each with the tag `run`.

    The driver counts images, because it gets one receipt of each range even when workers are lost. The workers count
    the time that they take.
    """

    def __init__(self, output: str) -> None:
        """
        Args:
            output: folder of the run; its last two parts are the value of the tag `run`.
        """
        from ray.util import metrics  # slow to import

        self._tags = {"run": storage.short_name(output)}
        self._images = metrics.Counter(
            "cnnray_predict_images",
            description="Images with a row in the output: ok, unsure, or error with its reason.",
            tag_keys=("run", "status", "reason"),
        )
        self._seconds = metrics.Counter(
            "cnnray_predict_seconds",
            description="Time of the workers by stage: read (waiting for reading and decoding), predict.",
            tag_keys=("run", "stage"),
        )

    def add(self, *, ok: int, unsure: int, reasons: Mapping[str, int]) -> None:
        """Count images of a range that was committed.

        Args:
            ok: images with a prediction.
            unsure: images of which the bundle is unsure.
            reasons: images with an error, by its reason.
        """
        for status, images in (("ok", ok), ("unsure", unsure)):
            if images:
                self._images.inc(images, tags=self._tags | {"status": status, "reason": ""})
        for reason, images in reasons.items():
            self._images.inc(images, tags=self._tags | {"status": "error", "reason": reason})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add the time that a worker spent in a stage, `read` or `predict`."""
        if seconds > 0:
            self._seconds.inc(seconds, tags=self._tags | {"stage": stage})


_VERSION_SECONDS = 3600.0
"""How long the histograms of a version are set again after its last request: over years there are many versions."""
_DRIFT_SECONDS = 10.0
"""Between two looks at the drift."""
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]


class ServingMetrics:
    """The metrics `cnnray_*` in Ray, with Serve's tags for deployment and replica. Each replica has one instance.

    They are collected here, and given to Ray once a second by a thread: Ray takes some microseconds for each value.
    """

    def __init__(
        self, held: Callable[[], tuple[int, int]], drift: Callable[[], dict[tuple[str, str], dict[str, float]]]
    ) -> None:
        """
        Args:
            held: what the replica holds at the time: images, and bytes of bodies.
            drift: by name and version of a model, how far its answers have drifted; see `SlidingWindow.effect_sizes`.
        """
        from ray.serve import metrics  # slow to import; adds the tags of the replica

        self._held, self._find_drift = held, drift
        self._next_drift = 0.0
        self._images_held = Gauge(
            "cnnray_images_held",
            metrics,
            description="Images that wait or are computed, and requests whose body is read.",
        )
        self._bytes_held = Gauge("cnnray_bytes_held", metrics, description="Bytes of request bodies that are held.")

        self._lock, self._one_flush = threading.Lock(), threading.Lock()
        self._counts: Counter[tuple[Any, Tags]] = Counter()
        self._values: dict[tuple[Any, Tags], list[float]] = {}
        self._is_due = False
        self._requests = metrics.Counter(
            "cnnray_requests", description="Requests answered.", tag_keys=("route", "status")
        )
        self._latency = Histogram(
            "cnnray_request_seconds",
            metrics,
            description="Time to answer a request.",
            boundaries=_SECONDS,
            tag_keys=("route",),
        )
        self._stages = Histogram(
            "cnnray_stage_seconds",
            metrics,
            description="Time of a request's body (read), and of an image: wait (for a thread), decode, predict (its "
            "micro-batch).",
            boundaries=_SECONDS,
            tag_keys=("stage",),
        )
        self._batches = Histogram(
            "cnnray_batch_images",
            metrics,
            description="Images in a micro-batch.",
            boundaries=[1, 2, 4, 8, 16, 32, 64, 128],
        )
        self._predictions = metrics.Counter(
            "cnnray_predictions",
            description="Images classified, by the most probable class.",
            tag_keys=("model", "version", "prediction"),
        )
        self._unsure = metrics.Counter(
            "cnnray_unsure_images",
            description="Images of these of which the model is unsure.",
            tag_keys=("model", "version"),
        )
        self._confidences = Histogram(
            "cnnray_confidence",
            metrics,
            description="Probability of the most probable class.",
            boundaries=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0],
            tag_keys=("model", "version"),
            seconds=_VERSION_SECONDS,
        )

        self._cached_images = metrics.Counter(
            "cnnray_cached_images",
            description="Images by whether their answer was known (hit), with --cache-mebibytes.",
            tag_keys=("hit",),
        )
        self._version_seconds = Histogram(
            "cnnray_version_seconds",
            metrics,
            description="Time from a request's arrival at the queue of a version to its answer.",
            boundaries=_SECONDS,
            tag_keys=("model", "version"),
            seconds=_VERSION_SECONDS,
        )
        self._failed_requests = metrics.Counter(
            "cnnray_failed_requests",
            description="Requests of a version without an answer: its engine failed, or took too long.",
            tag_keys=("model", "version"),
        )
        self._compared_images = metrics.Counter(
            "cnnray_compared_images",
            description="Images that a canary and the version before it have both answered.",
            tag_keys=("model", "version", "agree"),
        )
        self._verdict = Gauge(
            "cnnray_canary_verdict",
            metrics,
            description="What was decided about a canary: 1 promote, -1 roll back, 0 wait.",
            tag_keys=("model", "version"),
        )
        self._drift = Gauge(
            "cnnray_drift",
            metrics,
            description="Effect size (0.5: large) of the difference between the answers of the last hour and those "
            "to the validation images, of their classes or confidences, less what chance seldom exceeds.",
            tag_keys=("model", "version", "of"),
        )
        self._logged_images = metrics.Counter(
            "cnnray_logged_images",
            description="Images of the request log, with --log-requests: written, or lost.",
            tag_keys=("outcome",),
        )
        self._change_failed = Gauge(
            "cnnray_change_failed", metrics, description="1 while the last change of the models has failed, else 0."
        )

    def record_change(self, *, failed: bool) -> None:
        """Record whether the last change of the models failed."""
        self._change_failed.set(float(failed))

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record an answered request.

        Args:
            route: path template of the route, such as /v1/models/{model}.
            status: HTTP status.
            seconds: time to answer.
        """
        self._count(self._requests, route=route, status=str(status))
        self._observe(self._latency, [seconds], route=route)

    def record_stage(self, name: str, seconds: Sequence[float]) -> None:
        """Record the times of a stage: `read` of each request; `wait`, `decode` and `predict` of each image."""
        self._observe(self._stages, seconds, stage=name)

    def record_batch(self, waits: Sequence[float]) -> None:
        """Record a micro-batch: the seconds that each of its images waited for it."""
        self._observe(self._batches, [len(waits)])
        self.record_stage("wait", waits)

    def record_prediction(
        self, model: str, version: str, labels: Sequence[str], confidence: float, *, unsure: bool = False
    ) -> None:
        """Record the most probable class of an image, or its labels, the highest probability, and whether it was held
        back."""
        for label in labels:
            self._count(self._predictions, model=model, version=version, prediction=label)
        if unsure:
            self._count(self._unsure, model=model, version=version)
        self._observe(self._confidences, [confidence], model=model, version=version)

    def record_request_of_version(self, model: str, version: str, seconds: float, *, failed: bool) -> None:
        """Record a request of a version: the time of its answer, or that it failed."""
        if failed:
            self._count(self._failed_requests, model=model, version=version)
        else:
            self._observe(self._version_seconds, [seconds], model=model, version=version)

    def record_comparison(self, model: str, version: str, *, agree: bool) -> None:
        """Record an image that this canary and the version before it have answered."""
        self._count(self._compared_images, model=model, version=version, agree=str(agree).lower())

    def record_cache(self, hits: int, misses: int) -> None:
        """Record images whose answer was known, and others."""
        self._count(self._cached_images, hits, hit="true")
        self._count(self._cached_images, misses, hit="false")

    def record_log(self, written: int = 0, lost: int = 0) -> None:
        """Record images that the request log has written, or left out."""
        self._count(self._logged_images, written, outcome="written")
        self._count(self._logged_images, lost, outcome="lost")

    def record_verdict(self, model: str, version: str, verdict: int) -> None:
        """Record what was decided about a canary: 1 promote, -1 roll back, 0 wait."""
        self._verdict.set(verdict, tags={"model": model, "version": version})

    def end_other_verdicts(self, versions: Collection[tuple[str, str]]) -> None:
        """Record no more what was decided about versions other than these, each with the name of its model."""
        self._verdict.end_others([{"model": model, "version": version} for model, version in versions])

    def flush(self) -> None:
        """Give Ray what has been collected."""
        with self._one_flush:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
            values, self._values = self._values, {}
            self._is_due = False
        for (counter, tags), count in counts.items():
            counter.inc(count, tags=dict(tags))
        for (histogram, tags), observed in values.items():
            histogram.add(observed, dict(tags))
        # Without requests, checks of a replica's health come here, too: they are micro-batches.
        images, held_bytes = self._held()
        self._images_held.set(images)
        self._bytes_held.set(held_bytes)
        if (now := time.monotonic()) >= self._next_drift:
            self._next_drift = now + _DRIFT_SECONDS
            found = [
                ({"model": model, "version": version, "of": of}, effect)
                for (model, version), effects in self._find_drift().items()
                for of, effect in effects.items()
            ]
            self._drift.end_others([of_series for of_series, _ in found])
            for of_series, effect in found:
                self._drift.set(effect, of_series)

    def _count(self, counter: Any, number: int = 1, **tags: str) -> None:
        if not number:  # Ray's counters refuse 0
            return
        with self._lock:
            self._counts[counter, tuple(tags.items())] += number
        self._flush_later()

    def _observe(self, histogram: Any, values: Sequence[float], **tags: str) -> None:
        with self._lock:
            self._values.setdefault((histogram, tuple(tags.items())), []).extend(values)
        self._flush_later()

    def _flush_later(self) -> None:
        if not self._is_due:
            self._is_due = True
            timer = threading.Timer(1.0, self.flush)
            timer.daemon = True
            timer.start()
