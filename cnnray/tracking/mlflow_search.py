"""A search on an MLflow server: one run, with a run inside for each trial."""

import logging
from collections.abc import Callable

from cnnray.images import storage
from cnnray.tracking.config import TrackingConfig
from cnnray.tracking.mlflow import Tracker, reason

log = logging.getLogger(__name__)


class SearchTracker(Tracker):
    """Sends a search to a server: one run, with a run inside for each trial. No bundle is registered."""

    def __init__(
        self,
        config: TrackingConfig,
        output: str,
        params: dict[str, str],
        trials: str,
        trial: Callable[[str], tuple[dict[str, str], str] | None],
    ) -> None:
        """
        Args:
            config: with `mlflow`.
            output: of the search.
            params: the search's parameters.
            trials: the folder of the trials' outputs, which need not be there.
            trial: gives the parameters and the history file of a trial's output; None where it has not begun.

        Raises:
            TrackingError: MLflow is not installed.
        """
        # A search has no epochs of its own.
        super().__init__(config, output, params, storage.join(output, "history.csv"))
        self._folder, self._trial = trials, trial
        self._trials: dict[str, Tracker] = {}

    def sync(self) -> None:
        """Send the epochs of each trial that the server lacks."""
        self._begin()
        for folder in storage.folders(self._folder) if storage.exists(self._folder) else []:
            if storage.name(folder) not in self._trials and (begun := self._trial(folder)):
                self._trials[storage.name(folder)] = Tracker(self._config, folder, *begun, parent=self._run_id)
        for tracker in self._trials.values():
            tracker.sync()

    def _forget(self) -> None:
        super()._forget()
        self._trials = {}

    def finish_search(self, states: dict[str, str], best: dict[str, float]) -> None:
        """Send all that the server lacks of a finished search; warn where that fails.

        Args:
            states: by trial, FINISHED, FAILED or KILLED.
            best: metrics of the best trial.
        """

        def send_end() -> None:
            for name, tracker in self._trials.items():
                tracker.end(states.get(name, "KILLED"))
            self._log_best(0, best)
            self.end("FINISHED")

        try:
            self._retry(send_end)
        except Exception as error:
            log.warning(
                "MLflow at %s lacks the end of the search (%s). Run the same command again to send it.",
                self._config.mlflow, reason(error),
            )  # fmt: skip
        else:
            log.info("MLflow at %s: run %s with %d trials", self._config.mlflow, self._run_id, len(self._trials))
