"""What a replica measures, for Prometheus: each node of a Ray cluster exports it."""

from ray.serve import metrics

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]


class Meter:
    """The metrics `cnnray_*` of Ray, with Serve's tags of deployment and replica."""

    def __init__(self) -> None:
        self._requests = metrics.Counter(
            "cnnray_requests", description="Requests answered.", tag_keys=("route", "status")
        )
        self._latency = metrics.Histogram(
            "cnnray_request_seconds",
            description="Time to answer a request.",
            boundaries=_SECONDS,
            tag_keys=("route",),
        )
        self._stages = metrics.Histogram(
            "cnnray_stage_seconds",
            description="Time of a request's stages: read, decode, predict (with the wait for the engine).",
            boundaries=_SECONDS,
            tag_keys=("stage",),
        )
        self._batches = metrics.Histogram(
            "cnnray_batch_images",
            description="Images that an engine was given at once.",
            boundaries=[1, 2, 4, 8, 16, 32, 64, 128],
        )
        self._predictions = metrics.Counter(
            "cnnray_predictions",
            description="Images classified, by the most probable class.",
            tag_keys=("model", "version", "prediction"),
        )
        self._confidences = metrics.Histogram(
            "cnnray_confidence",
            description="Probability of the most probable class.",
            boundaries=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0],
            tag_keys=("model", "version"),
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._latency.observe(seconds, tags={"route": route})

    def stage(self, name: str, seconds: float) -> None:
        """One of `read`, `decode` and `predict` of a request took so long."""
        self._stages.observe(seconds, tags={"stage": name})

    def batch(self, size: int) -> None:
        """An engine was called with so many images."""
        self._batches.observe(size)

    def answer(self, model: str, version: str, label: str, confidence: float) -> None:
        """An image was classified."""
        self._predictions.inc(tags={"model": model, "version": version, "prediction": label})
        self._confidences.observe(confidence, tags={"model": model, "version": version})
