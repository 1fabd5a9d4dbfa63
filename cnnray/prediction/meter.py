"""What a prediction run measures, for Prometheus: each node of a Ray cluster exports it."""

import pyarrow as pa
import pyarrow.compute as pc
from ray.util import metrics

from cnnray.images import storage


class Meter:
    """The metrics `cnnray_predict_*` of Ray, each with the tag `run`.

    The driver counts images, as each comes to it once, whatever became of the workers; these count the time that
    they take.
    """

    def __init__(self, output: str) -> None:
        """
        Args:
            output: of the run; its last two parts are its name.
        """
        self._tags = {"run": storage.short_name(output)}
        self._images = metrics.Counter(
            "cnnray_predict_images",
            description="Images that have their row: ok, or error with its reason.",
            tag_keys=("run", "status", "reason"),
        )
        self._seconds = metrics.Counter(
            "cnnray_predict_seconds",
            description="Time of the workers, by stage: read (with decoding, as far as it was waited for), predict.",
            tag_keys=("run", "stage"),
        )

    def rows(self, rows: pa.Table) -> None:
        """These rows are done."""
        bad = pc.drop_null(rows["error"])
        if len(rows) > len(bad):
            self._images.inc(len(rows) - len(bad), tags=self._tags | {"status": "ok", "reason": ""})
        reasons = [error.partition(":")[0] for error in bad.to_pylist()]
        for reason in set(reasons):
            self._images.inc(reasons.count(reason), tags=self._tags | {"status": "error", "reason": reason})

    def took(self, stage: str, seconds: float) -> None:
        """A worker spent so long in a stage."""
        if seconds > 0:
            self._seconds.inc(seconds, tags=self._tags | {"stage": stage})
