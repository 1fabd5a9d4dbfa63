"""A training run on an MLflow server: flags, epochs, and the bundle as a registered model.

The driver alone speaks with the server, from what the run leaves in its output: whatever the server lacks of it is
told, now or at the next look. So a server that is away for a while misses nothing, a run that was killed and goes on
is one run there too, and training never waits.
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
from cnnray.training.assignment import HISTORY
from cnnray.training.config import TrainConfig

log = logging.getLogger(__name__)

RECORD = "mlflow.json"
"""In the output: which run of which server it is."""
_TOKEN = "cnnray.token"
"""A run's tag, which the output holds before the run is begun."""
_LOOK_SECONDS = 4.0
"""Less than the 5 after which MLflow's server closes a connection that nobody uses."""
_MOST_PARAMS = 100
"""That MLflow takes at once."""
_OURS = {"mlflow", "mlflow_experiment", "mlflow_model", "overwrite", "preview_augmentations"}
"""Flags that say nothing of the training."""
_VARIABLES = {
    # It is tried again here, after a look at what has come: MLflow would send a model twice whose receipt got lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow would report each call to its makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # It would add a lock file that it finds in the working directory to the model.
    "MLFLOW_UV_AUTO_DETECT": "false",
    # Stdout is the job's JSON line's.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_WAITS = (1.0, 4.0, 10.0, 20.0)
"""Seconds between tries at the end of a run."""
_AT_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class TrackingError(PermanentError, RuntimeError):
    """An MLflow server that cannot be used; the message is one sentence for the user."""


class Tracker:
    """Tells a server of one run."""

    def __init__(self, config: TrainConfig, parent: str | None = None) -> None:
        """
        Args:
            config: with `mlflow`.
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
        self._client: Any = None
        self._run_id: str | None = None
        self._told: set[int] = set()
        """Epochs that the server has."""
        self._failures = 0
        """One after another."""

    def reach(self) -> None:
        """Look whether the server answers.

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
        """Tell the server of each epoch for as long as this context lasts; where it ends badly, of that."""
        ended = threading.Event()

        def follow() -> None:
            while True:
                self._try_to_tell()
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
                    self.tell()
                    self.end(status)
            raise
        ended.set()
        thread.join()

    def finish(self, summary: dict[str, Any]) -> None:
        """Tell the server all that it lacks of a finished run, and give it the bundle; warn where that fails.

        Args:
            summary: of the run: `bundle`, `epochs`, `metrics`.
        """
        bundle = Bundle.load(summary["bundle"])
        if self._run_id is None and self._record().get("finished") == [summary["epochs"], bundle.version]:
            return
        try:
            self._insist(lambda: self._tell_end(bundle, summary))
        except Exception as error:
            missing = [epoch for epoch in range(1, summary["epochs"] + 1) if epoch not in self._told]
            log.warning(
                "MLflow at %s lacks %sthe end of the run (%s). The same command again tells it.",
                self._config.mlflow, f"epochs {missing[0]} to {missing[-1]} and " if missing else "", reason(error),
            )  # fmt: skip

    def _insist(self, tell_end: Callable[[], None]) -> None:
        """Tell the rest and the end, several times if need be."""
        for seconds in (*_WAITS, None):
            try:
                self.tell()
                tell_end()
            except Exception:
                self._forget()
                if seconds is None:
                    raise
                time.sleep(seconds)
            else:
                return

    # -- what is told ----------------------------------------------------------------------------------

    def _try_to_tell(self) -> None:
        try:
            self.tell()
        except Exception as error:
            self._failures += 1
            if self._failures == 2:  # once is a connection that was closed meanwhile
                log.warning(
                    "MLflow at %s cannot be told (%s); training goes on, and it is tried again.",
                    self._config.mlflow, reason(error),
                )  # fmt: skip
            self._forget()
        else:
            if self._failures >= 2:
                log.info("MLflow at %s answers again.", self._config.mlflow)
            self._failures = 0

    def _forget(self) -> None:
        """Ask the server anew what it has: what was sent may have come, or not."""
        self._run_id = None

    def tell(self) -> None:
        """Tell the server of the epochs that it does not know."""
        self._begin()
        for row in self._history():
            if row["epoch"] not in self._told:
                self._log(row["epoch"], {name: value for name, value in row.items() if name != "epoch"})
                self._told.add(row["epoch"])

    def end(self, status: str) -> None:
        """Tell the server how the run ended: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self._run_id, status)

    def _tell_end(self, bundle: Bundle, summary: dict[str, Any]) -> None:
        name = self._config.mlflow_model or self._config.mlflow_experiment
        versions = self._client.search_model_versions(f"run_id = '{self._run_id}'")
        known = [one for one in versions if one.tags.get(mlflow_flavor.BUNDLE_TAG) == bundle.version]
        if known:
            version, model_id = known[0].version, known[0].model_id
        else:
            version, model_id = mlflow_flavor.log(bundle, run_id=self._run_id or "", name=name)
        metrics = summary["metrics"]
        best = [row["epoch"] for row in self._history() if all(row.get(key) == metrics[key] for key in metrics)]
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
        told = self._client.get_run(self._run_id).data.metrics
        new = {f"best_{name}": value for name, value in metrics.items() if told.get(f"best_{name}") != value}
        if new:
            self._log(step, new, model_id)

    # -- the run ---------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._client is not None:
            return
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        # What it tries again is said here, once.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        mlflow.set_tracking_uri(self._config.mlflow)
        self._client = mlflow.MlflowClient(self._config.mlflow)

    def _begin(self) -> None:
        """Find the run that this one goes on with, or begin one; tell it of the flags, and look what it has."""
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
        told, flags = run.data.params, _flags(self._config)
        new = [Param(name, value) for name, value in flags.items() if name not in told]
        # Parameters cannot be changed; those that may differ when a run goes on, such as --workers, become tags.
        tags = [
            RunTag(f"now.{name}", flags[name]) for name in flags.keys() & told.keys() if flags[name] != told[name]
        ]
        for start in range(0, max(len(new), 1), _MOST_PARAMS):
            self._client.log_batch(run.info.run_id, params=new[start : start + _MOST_PARAMS], tags=tags)
        self._told = {metric.step for metric in self._client.get_metric_history(run.info.run_id, "val_loss")}
        self._run_id = run.info.run_id

    def _new_run(self, token: str | None) -> Any:
        """A run that is begun, or that was begun already where its receipt got lost."""
        name = self._config.mlflow_experiment
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        if token is not None:
            begun = self._client.search_runs([number], f"tags.`{_TOKEN}` = '{token}'")
            if begun:
                return begun[0]
        token = uuid.uuid4().hex
        self._keep(token=token)
        tags = {"cnnray.output": self._config.output, _TOKEN: token}
        if self._parent:
            tags["mlflow.parentRunId"] = self._parent
        return self._client.create_run(number, run_name=storage.short_name(self._config.output), tags=tags)

    # -- the output ------------------------------------------------------------------------------------

    def _record(self) -> dict[str, Any]:
        """What is known of the run on this server; empty where there is none."""
        try:
            found = json.loads(storage.read_bytes(storage.join(self._config.output, RECORD)))
        except (FileNotFoundError, ValueError):
            return {}
        mine = [self._config.mlflow, self._config.mlflow_experiment]
        return found if [found.get("server"), found.get("experiment")] == mine else {}

    def _keep(self, **changes: Any) -> None:
        mine = {"server": self._config.mlflow, "experiment": self._config.mlflow_experiment}
        text = json.dumps(mine | self._record() | changes, indent=2)
        storage.write_bytes(storage.join(self._config.output, RECORD), text.encode())

    def _history(self) -> list[dict[str, Any]]:
        """The logs of each finished epoch, without what is no number (the phase's name)."""
        try:
            text = storage.read_bytes(storage.join(self._config.output, HISTORY)).decode()
        except FileNotFoundError:
            return []
        return [
            {name: float(value) for name, value in row.items() if name not in ("epoch", "phase") and value != ""}
            | {"epoch": int(row["epoch"])}
            for row in csv.DictReader(io.StringIO(text))
        ]


def tracker_of(config: TrainConfig) -> Tracker | None:
    """A tracker, where one is asked for.

    Raises:
        TrackingError: MLflow is not installed.
    """
    return Tracker(config) if config.mlflow else None


def _flags(config: TrainConfig) -> dict[str, str]:
    """The flags as text, with what null stands for where that is decided; those inside others with a dot."""
    decided = {
        "learning_rate": config.decided("learning_rate"),
        "dropout": config.decided("dropout"),
        "weight_decay": config.decided("weight_decay"),
    }
    found: dict[str, Any] = {}
    for name, value in (config.as_dict() | decided).items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": one for inner, one in value.items()}
        elif name not in _OURS:
            found[name] = value
    return {name: "null" if value is None else str(value) for name, value in found.items()}


@contextlib.contextmanager
def _variables(changes: dict[str, str]) -> Iterator[None]:
    """Other environment variables for as long as this context lasts."""
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
    """What is wrong, in a line: of a connection that fails, what the system says of it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__
