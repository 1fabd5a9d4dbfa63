"""A search on an MLflow server: one run, with a run inside for each trial."""

import logging

import yaml

from cnnray.images import storage
from cnnray.training.assignment import CONFIG
from cnnray.training.config import TrainConfig
from cnnray.training.tracking import Tracker, reason

log = logging.getLogger(__name__)


class SearchTracker(Tracker):
    """Tells a server of a search: one run, with a run inside for each trial. No bundle is registered."""

    def __init__(self, config: TrainConfig, trials: str) -> None:
        """
        Args:
            config: with `mlflow`.
            trials: the folder of the trials' outputs, which need not be there.

        Raises:
            TrackingError: MLflow is not installed.
        """
        super().__init__(config)
        self._folder = trials
        self._trials: dict[str, Tracker] = {}

    def tell(self) -> None:
        """Tell the server of each trial's epochs that it does not know."""
        self._begin()
        for folder in storage.folders(self._folder) if storage.exists(self._folder) else []:
            config = storage.join(folder, CONFIG)
            if storage.name(folder) not in self._trials and storage.is_file(config):
                trial = TrainConfig(**yaml.safe_load(storage.read_bytes(config)))
                trial = trial.with_changes(
                    mlflow=self._config.mlflow, mlflow_experiment=self._config.mlflow_experiment
                )
                self._trials[storage.name(folder)] = Tracker(trial, parent=self._run_id)
        for tracker in self._trials.values():
            tracker.tell()

    def _forget(self) -> None:
        super()._forget()
        self._trials = {}

    def finish_search(self, states: dict[str, str], best: dict[str, float]) -> None:
        """Tell the server all that it lacks of a search that has come to its end; warn where that fails.

        Args:
            states: by trial, FINISHED, FAILED or KILLED.
            best: metrics of the best trial.
        """

        def tell_end() -> None:
            for name, tracker in self._trials.items():
                tracker.end(states.get(name, "KILLED"))
            self._log_best(0, best)
            self.end("FINISHED")

        try:
            self._insist(tell_end)
        except Exception as error:
            log.warning(
                "MLflow at %s lacks the end of the search (%s). The same command again tells it.",
                self._config.mlflow, reason(error),
            )  # fmt: skip
        else:
            log.info("MLflow at %s: run %s with %d trials", self._config.mlflow, self._run_id, len(self._trials))
