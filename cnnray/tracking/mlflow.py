"""A training run on an MLflow server: its flags, the metrics of each epoch, and the bundle as a registered model.

Only the driver speaks with the server. It compares what the server has with the run's output, and sends what is
missing, every few seconds. So a server that is away for a while misses nothing, a run that was killed and goes on is
one run there, too, and training never waits.
"""

import contextlib
import csv
import importlib.util
import io
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from cnnray.errors import PermanentError
from cnnray.images import storage
from cnnray.models import mlflow_flavor
from cnnray.models.bundle import Bundle
from cnnray.tracking.config import TrackingConfig

log = logging.getLogger(__name__)

RECORD = "mlflow.json"
"""File in the output: which run of which server it is."""
_TOKEN = "cnnray.token"
"""Tag of a run, written to the output before the run is created."""
_LOOK_SECONDS = 4.0
"""Seconds between two looks at the output: less than the 5 after which MLflow's server closes an idle connection."""
_MOST_PARAMS = 100
"""Parameters that MLflow accepts in one request."""
_VARIABLES = {
    # `Tracker` retries by itself, after a look at what has arrived: MLflow would register a model twice if the answer
    # was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow would send usage data to its makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow would add a lock file that it finds in the working directory to the model.
    "MLFLOW_UV_AUTO_DETECT": "false",
    # Stdout holds the job's JSON line only.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_WAITS = (1.0, 4.0, 10.0, 20.0)
"""Seconds between attempts at the end of a run."""
_AT_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class TrackingError(PermanentError, RuntimeError):
    """An MLflow server that cannot be used; the message is one sentence for the user."""


class Tracker:
    """Sends one run to a server."""

    def __init__(
        self, config: TrackingConfig, output: str, params: dict[str, str], history: str, parent: str | None = None
    ) -> None:
        """
        Args:
            config: with `mlflow`.
            output: of the run, where `RECORD` is kept.
            params: the run's parameters.
            history: uri of the CSV file with a row for each epoch, which need not be there yet.
            parent: id of the run that this one belongs to.

        Raises:
            TrackingError: MLflow is not installed.
        """
        assert config.mlflow is not None
        if importlib.util.find_spec("mlflow") is None:
            raise TrackingError("--mlflow needs MLflow's client: pip install 'mlflow-skinny>=3'.")
        for name, value in _VARIABLES.items():
            os.environ.setdefault(name, value)
        self._config, self._parent = config, parent
        self._output, self._history_uri = output, history
        self.params = params
        """The run's parameters; they may change until `following`."""
        self._client: Any = None
        self._run_id: str | None = None
        self._sent: set[int] = set()
        """Epochs that the server has."""
        self._failures = 0
        """Failed attempts in a row."""

    def reach(self) -> None:
        """Check that the server answers.

        Raises:
            TrackingError: it does not, at once.
        """
        with _variables(_AT_ONCE):
            try:
                self._connect()
                experiment = self._client.get_experiment_by_name(self._config.mlflow_experiment)
            except Exception as error:  # MLflow's, those of its HTTP and database libraries, of missing packages
                raise TrackingError(f"No MLflow server at {self._config.mlflow}: {reason(error)}") from None
        if experiment and experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"The experiment {experiment.name} was deleted at {self._config.mlflow}: restore it, or give another "
                "--mlflow-experiment."
            )

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Send each epoch as it ends, for as long as this context lasts; an exception marks the run as failed."""
        ended = threading.Event()

        def follow() -> None:
            while True:
                self._try_sync()
                if ended.wait(_LOOK_SECONDS):
                    return

        thread = threading.Thread(target=follow, name="mlflow", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            ended.set()
            thread.join(1.0)
            if self._run_id and not thread.is_alive():
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
                with _variables(_AT_ONCE), contextlib.suppress(Exception):
                    self.sync()
                    self.end(status)
            raise
        ended.set()
        thread.join()

    def finish(self, summary: dict[str, Any]) -> None:
        """Send all that the server lacks of a finished run, and the bundle; warn where that fails.

        Args:
            summary: of the run: `bundle`, `epochs`, `metrics`.
        """
        bundle = Bundle.load(summary["bundle"])
        if self._run_id is None and self._record().get("finished") == [summary["epochs"], bundle.version]:
            return
        try:
            self._retry(lambda: self._send_end(bundle, summary))
        except Exception as error:
            missing = [epoch for epoch in range(1, summary["epochs"] + 1) if epoch not in self._sent]
            log.warning(
                "MLflow at %s lacks %sthe end of the run (%s). Run the same command again to send it.",
                self._config.mlflow, f"epochs {missing[0]} to {missing[-1]} and " if missing else "", reason(error),
            )  # fmt: skip

    def _retry(self, send_end: Callable[[], None]) -> None:
        """Send the rest and the end, in several attempts if need be."""
        for seconds in (*_WAITS, None):
            try:
                self.sync()
                send_end()
            except Exception:
                self._forget()
                if seconds is None:
                    raise
                time.sleep(seconds)
            else:
                return

    # -- what is sent ----------------------------------------------------------------------------------

    def _try_sync(self) -> None:
        try:
            self.sync()
        except Exception as error:
            self._failures += 1
            if self._failures == 2:  # a single failure is a connection that was closed meanwhile
                log.warning(
                    "MLflow at %s cannot be reached (%s); training goes on, and it is tried again.",
                    self._config.mlflow, reason(error),
                )  # fmt: skip
            self._forget()
        else:
            if self._failures >= 2:
                log.info("MLflow at %s answers again.", self._config.mlflow)
            self._failures = 0

    def _forget(self) -> None:
        """Ask the server again what it has at the next attempt: what was sent may have arrived, or not."""
        self._run_id = None

    def sync(self) -> None:
        """Send the epochs that the server lacks."""
        self._begin()
        for row in self._history():
            if row["epoch"] not in self._sent:
                self._log(row["epoch"], {name: value for name, value in row.items() if name != "epoch"})
                self._sent.add(row["epoch"])

    def end(self, status: str) -> None:
        """Set the run's status: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self._run_id, status)

    def _send_end(self, bundle: Bundle, summary: dict[str, Any]) -> None:
        name = self._config.mlflow_model or self._config.mlflow_experiment
        versions = self._client.search_model_versions(f"run_id = '{self._run_id}'")
        known = [version for version in versions if version.tags.get(mlflow_flavor.BUNDLE_TAG) == bundle.version]
        if known:
            version, model_id = known[0].version, known[0].model_id
        else:
            version, model_id = mlflow_flavor.log(bundle, run_id=self._run_id or "", name=name)
        metrics = summary["metrics"]
        best = [row["epoch"] for row in self._history() if all(row.get(k, v) == v for k, v in metrics.items())]
        step = best[0] if best else summary["epochs"]
        self._log_best(step, metrics, model_id)
        self.end("FINISHED")
        self._keep(finished=[summary["epochs"], bundle.version])
        log.info("MLflow at %s: run %s, model %s, version %s", self._config.mlflow, self._run_id, name, version)

    def _log(self, step: int, metrics: dict[str, float], model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(name, value, now, step, model_id=model_id) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=points)

    def _log_best(self, step: int, metrics: dict[str, float], model_id: str | None = None) -> None:
        known = self._client.get_run(self._run_id).data.metrics
        new = {f"best_{name}": value for name, value in metrics.items() if known.get(f"best_{name}") != value}
        if new:
            self._log(step, new, model_id)

    # -- the run ---------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._client is not None:
            return
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # Retries are reported here, once.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        mlflow.set_tracking_uri(self._config.mlflow)
        self._client = mlflow.MlflowClient(self._config.mlflow)

    def _begin(self) -> None:
        """Find or create the run, send the parameters that it lacks, and look which epochs it has."""
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        if self._run_id is not None:
            return
        self._connect()
        record, run = self._record(), None
        if "run_id" in record:
            try:
                run = self._client.get_run(record["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if run is None or run.info.lifecycle_stage != "active":
            run = self._new_run(record.get("token") if run is None else None)
            self._keep(run_id=run.info.run_id)
        elif run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        known, flags = run.data.params, self.params
        new = [Param(name, value) for name, value in flags.items() if name not in known]
        # Parameters cannot be changed: resumable flags with another value, such as --max-workers, become tags.
        tags = [
            RunTag(f"now.{name}", flags[name]) for name in flags.keys() & known.keys() if flags[name] != known[name]
        ]
        for start in range(0, max(len(new), 1), _MOST_PARAMS):
            self._client.log_batch(run.info.run_id, params=new[start : start + _MOST_PARAMS], tags=tags)
        self._sent = {metric.step for metric in self._client.get_metric_history(run.info.run_id, "val_loss")}
        self._run_id = run.info.run_id

    def _new_run(self, token: str | None) -> Any:
        """Create a run, or find the one that was created already where the answer was lost."""
        name = self._config.mlflow_experiment
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        if token is not None:
            begun = self._client.search_runs([number], f"tags.`{_TOKEN}` = '{token}'")
            if begun:
                return begun[0]
        token = uuid.uuid4().hex
        self._keep(token=token)
        tags = {"cnnray.output": self._output, _TOKEN: token}
        if self._parent:
            tags["mlflow.parentRunId"] = self._parent
        return self._client.create_run(number, run_name=storage.short_name(self._output), tags=tags)

    # -- the output ------------------------------------------------------------------------------------

    def _record(self) -> dict[str, Any]:
        """The record of the run on this server; empty where there is none."""
        try:
            record = json.loads(storage.read_bytes(storage.join(self._output, RECORD)))
        except (FileNotFoundError, ValueError):
            return {}
        mine = [self._config.mlflow, self._config.mlflow_experiment]
        return record if [record.get("server"), record.get("experiment")] == mine else {}

    def _keep(self, **changes: Any) -> None:
        mine = {"server": self._config.mlflow, "experiment": self._config.mlflow_experiment}
        text = json.dumps(mine | self._record() | changes, indent=2)
        storage.write_bytes(storage.join(self._output, RECORD), text.encode())

    def _history(self) -> list[dict[str, Any]]:
        """The metrics of each finished epoch, without the name of the phase."""
        try:
            text = storage.read_bytes(self._history_uri).decode()
        except FileNotFoundError:
            return []
        return [
            {name: float(value) for name, value in row.items() if name not in ("epoch", "phase") and value != ""}
            | {"epoch": int(row["epoch"])}
            for row in csv.DictReader(io.StringIO(text))
        ]


@contextlib.contextmanager
def _variables(changes: dict[str, str]) -> Iterator[None]:
    """Set environment variables for as long as this context lasts."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def reason(error: BaseException) -> str:
    """An error in one line: of a failed connection, the message of the operating system."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__
