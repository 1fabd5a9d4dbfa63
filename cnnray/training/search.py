"""A search over training flags: trials are training runs, of which Ray Tune stops the worse ones early."""

import ast
import contextlib
import csv
import dataclasses
import functools
import io
import logging
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

from cnnray import cluster, flags
from cnnray.cluster import Resources
from cnnray.errors import PermanentError
from cnnray.images import storage
from cnnray.images.lease import lease
from cnnray.models.augment import Augmentations
from cnnray.training import data, recipe
from cnnray.training.assignment import CONFIG, HISTORY
from cnnray.training.budget import budget_of, bundles, check_cpus
from cnnray.training.config import TrainConfig
from cnnray.training.search_tracking import SearchTracker
from cnnray.training.tracking import RECORD

log = logging.getLogger(__name__)

BEST, TRIALS_TABLE, TRIALS, STATE = "best.yaml", "trials.csv", "trials", "search"
# Parts of the whole search, not of one of its trials.
_NOT_SEARCHED = {
    "output", "overwrite", "preview_augmentations", "search", "trials", "parallel", "metric", "mlflow",
    "mlflow_experiment", "mlflow_model",
}  # fmt: skip
# The search's own, of which trials know nothing.
_OF_SEARCH = {"overwrite": False, "preview_augmentations": None, "mlflow": None, "mlflow_model": None}
_SPACES = ("uniform", "quniform", "loguniform", "qloguniform", "randint", "lograndint", "choice", "grid_search")
_ENDS = {"finished": "FINISHED", "failed": "FAILED", "stopped early": "KILLED"}
"""A trial's state in MLflow's words."""
_MODES = {"val_accuracy": "max", "val_loss": "min"}


class SearchError(PermanentError, RuntimeError):
    """A search that cannot start or ended badly; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(TrainConfig):
    """Search for the best values of training flags, and leave them as YAML that jobs/train.py --config takes.

    All other flags are those of jobs/train.py, the same for each trial.
    """

    search: list[str] = field(default_factory=list)
    """What is searched: flag=space, several behind one another, such as 'learning_rate=loguniform(1e-4,1e-2)' and
    'augment=choice(["none","light"])'; the spaces are Ray Tune's: uniform, quniform, loguniform, qloguniform,
    randint, lograndint, choice, grid_search."""
    trials: int = 10
    """Values that are tried (of grid_search: as often each)."""
    parallel: int = 1
    """Trials that run side by side, each on its share of the cluster."""
    metric: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """What the best trial has most (or least) of, in its best epoch."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        super().__post_init__()
        flags.check_at_least_one(self, "trials", "parallel")
        if self.is_elastic:
            raise ValueError(f"--workers {self.workers}: a search's trials have a fixed number of workers.")
        if self.preview_augmentations is not None:
            raise ValueError("--preview-augmentations is of jobs/train.py.")
        if self.mlflow_model is not None:
            raise ValueError("--mlflow-model is of jobs/train.py: a search registers no bundle.")
        if not self.search:
            raise ValueError("--search is needed, such as --search 'learning_rate=loguniform(1e-4,1e-2)'.")
        for text in self.search:
            parsed(text)

    def trial(self, values: dict[str, Any], output: str) -> TrainConfig:
        """The training run that a trial is.

        Args:
            values: by flag, with dots for those inside others.
            output: of the run.

        Raises:
            ValueError: values that cannot work.
        """
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(TrainConfig)}
        for name, value in values.items():
            outer, _, inner = name.partition(".")
            fields[outer] = dataclasses.replace(fields[outer], **{inner: value}) if inner else value
        return TrainConfig(**fields | _OF_SEARCH | {"output": output})


def parsed(text: str) -> tuple[str, str, list[Any]]:
    """A flag, the name of a space, and what that is called with.

    Raises:
        ValueError: it is not of the form flag=space(values), in one sentence.
    """
    name, _, space = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    known = {item.name for item in dataclasses.fields(TrainConfig)} - _NOT_SEARCHED
    outer, _, inner = name.partition(".")
    inside = set(asdict(Augmentations())) if outer == "augmentations" else {""}
    if outer not in known or inner not in inside:
        raise ValueError(f"--search {text}: {name!r} is no training flag.")
    try:
        call = ast.parse(space.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.keywords):
            raise ValueError("it is no call")
        values = [ast.literal_eval(value) for value in call.args]
    except (ValueError, SyntaxError):
        raise ValueError(f"--search {text}: expected flag=space(values), such as dropout=uniform(0,0.5).") from None
    if call.func.id not in _SPACES:
        raise ValueError(f"--search {text}: no space is called {call.func.id!r}; there are {', '.join(_SPACES)}.")
    return name, call.func.id, values


def search(config: SearchConfig) -> dict[str, Any]:
    """Run the trials, and leave `best.yaml`, `trials.csv`, and each trial's run below `trials/`.

    A search that was interrupted goes on with the trials that are not finished.

    Returns:
        `config` (the uri of best.yaml), `trials`, `stopped_early`, `best` (its values), `val_accuracy` and `val_loss`
        of its best epoch, `seconds`.

    Raises:
        ValueError, OSError, ClusterError, SearchError, TrackingError: with a sentence for the user.
    """
    started = time.time()
    spaces = _spaces(config)
    if cluster.starts_own():
        check_cpus(config, cluster.local_cpus())
    with lease(config.output):
        tracker = SearchTracker(config, storage.join(config.output, TRIALS)) if config.mlflow else None
        if tracker:
            tracker.reach()
        # Each trial would find the same fault.
        recipe.check(config, data.manifest_of_run(config))
        _begin(config)
        with cluster.connected(), tracker.following() if tracker else contextlib.nullcontext():
            found = cluster.when_it_fits(functools.partial(_fit, config), bundles(config), config.wait_minutes)
            results = _results(config, spaces, found)
        rows = _rows(config, results)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        storage.write_bytes(storage.join(config.output, TRIALS_TABLE), text.getvalue().encode())
        scored = [row for row in rows if row[config.metric] is not None]
        if not scored:
            reason = next((cluster.user_error(error) or cluster.last_line(error) for error in results.errors), "")
            raise SearchError(
                f"None of the {len(rows)} trials came to an end of an epoch: {reason or 'no reason is known'}"
            )
        sign = 1 if _MODES[config.metric] == "min" else -1
        best = min(scored, key=lambda row: sign * row[config.metric])
        if tracker:
            tracker.finish_search(
                {row["trial"]: _ENDS[row["state"]] for row in rows},
                {name: best[name] for name in ("val_accuracy", "val_loss")},
            )
        values = {name: best[name] for name in spaces}
        winner = config.trial(values, config.output).as_dict()
        del winner["output"]
        text_of_best = yaml.safe_dump(winner, sort_keys=False)
        storage.write_bytes(storage.join(config.output, BEST), text_of_best.encode())
        return {
            "config": storage.join(config.output, BEST),
            "trials": len(rows),
            "stopped_early": sum(row["state"] == "stopped early" for row in rows),
            "best": values,
            "val_accuracy": best["val_accuracy"],
            "val_loss": best["val_loss"],
            "seconds": round(time.time() - started, 2),
        }


def _spaces(config: SearchConfig) -> dict[str, Any]:
    """Ray Tune's spaces by flag.

    Raises:
        SearchError: one that Ray Tune refuses, or gives values that no training takes.
    """
    from ray import tune

    spaces: dict[str, Any] = {}
    for text in config.search:
        name, space, values = parsed(text)
        if name in spaces:
            raise SearchError(f"--search has {name} twice.")
        try:
            spaces[name] = getattr(tune, space)(*values)
            samples = values[0] if space == "grid_search" else [spaces[name].sample() for _ in range(20)]
            for sample in samples:
                config.trial({name: sample}, config.output)
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise SearchError(f"--search {text}: {' '.join(str(error).split())}") from None
    return spaces


def _begin(config: SearchConfig) -> None:
    uri = storage.join(config.output, CONFIG)
    text = yaml.safe_dump(config.as_dict() | {"overwrite": False}, sort_keys=False).encode()
    if storage.is_file(uri):
        earlier = yaml.safe_load(storage.read_bytes(uri))
        if not isinstance(earlier, dict) or "search" not in earlier:
            raise SearchError(f"{config.output} holds another job's {CONFIG}; give another --output.")
        differences = flags.differences(
            config, earlier, {"overwrite", "output", "parallel", "data_checks", "mlflow", "mlflow_experiment"}
        )
        if not differences:
            return
        if not config.overwrite:
            raise SearchError(
                f"{config.output} holds a search with {', '.join(differences)}; give another --output, or "
                "--overwrite."
            )
        for part in (TRIALS, STATE):
            storage.delete_folder(storage.join(config.output, part))
        for part in (BEST, TRIALS_TABLE, RECORD):
            storage.delete_file(storage.join(config.output, part))
    elif storage.exists(storage.join(config.output, TRIALS)) or storage.exists(storage.join(config.output, STATE)):
        raise SearchError(f"{config.output} holds {TRIALS}, but no {CONFIG} of a search; give another --output.")
    storage.write_bytes(uri, text)


def _results(config: SearchConfig, spaces: dict[str, Any], found: Resources) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from cnnray.training.driver import interruptible

    # Its tables would go to stdout, whose one line is the job's.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    filesystem, path = storage.arrow_filesystem(config.output)
    trainable = tune.with_resources(functools.partial(_run_trial, _shared_out(config, found)), {"CPU": 0.001})
    experiment = f"{path}/{STATE}"
    if tune.Tuner.can_restore(experiment, filesystem):
        log.info("going on with the search in %s", config.output)
        tuner = tune.Tuner.restore(
            experiment, trainable, storage_filesystem=filesystem, resume_unfinished=True, restart_errored=True
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=spaces,
            tune_config=tune.TuneConfig(
                metric=config.metric,
                mode=_MODES[config.metric],
                num_samples=config.trials,
                search_alg=BasicVariantGenerator(max_concurrent=config.parallel, random_state=config.seed),
                scheduler=ASHAScheduler("epoch", max_t=max(2, config.all_epochs), grace_period=1, reduction_factor=2),
            ),
            run_config=tune.RunConfig(
                name=STATE,
                storage_path=path,
                storage_filesystem=filesystem,
                verbose=0,
                callbacks=[_progress(config)],
            ),
        )
    return interruptible(tuner.fit)


def _fit(config: SearchConfig, found: Resources) -> Resources:
    """The same cluster, if a trial fits it.

    Raises:
        ClusterError: it does not.
    """
    budget_of(config, found)
    return found


def _shared_out(config: SearchConfig, found: Resources) -> SearchConfig:
    """The config with each trial's share of the cluster, where several run side by side."""
    if config.parallel == 1:
        return config
    each = found.cpus / config.parallel
    return dataclasses.replace(
        config,
        cpus_per_worker=config.cpus_per_worker or 0.75 * each / config.most_workers,
        decode_cpus=config.decode_cpus or 0.25 * each / max(2, config.most_workers),
    )


def _run_trial(config: SearchConfig, values: dict[str, Any]) -> None:
    """A trial, in an actor of Ray Tune."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from cnnray.training.driver import train

    class AtEpochs(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if config.metric in metrics[0] and metrics[0]["epoch"] < config.all_epochs:
                super().after_report(run_context, metrics, None)

    output = storage.join(config.output, TRIALS, tune.get_context().get_trial_id())
    train(config.trial(values, output), callbacks=[AtEpochs()])
    # Of the last epoch Ray Tune hears once all is written: it ends the trial's process, as there are no more.
    last = list(csv.DictReader(io.StringIO(storage.read_bytes(storage.join(output, HISTORY)).decode())))[-1]
    if int(last["epoch"]) == config.all_epochs:
        scores = {name: float(value) for name, value in last.items() if name.startswith("val_")}
        tune.report({"epoch": config.all_epochs} | scores)


def _progress(config: SearchConfig) -> Any:
    from ray import tune

    class Progress(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
            ended = sum(one.is_finished() for one in trials)
            log.info(
                "trial %s  epoch %d/%d  val_loss %.4f  val_accuracy %.4f  %s  (%d of %d trials ended)",
                trial.trial_id, result["epoch"], config.all_epochs, result["val_loss"], result["val_accuracy"],
                trial.config, ended, max(len(trials), config.trials),
            )  # fmt: skip

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            log.warning("trial %s failed: %s", trial.trial_id, trial.config)

    return Progress()


def _rows(config: SearchConfig, results: Any) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        history = result.metrics_dataframe
        best = None
        if history is not None and len(history):
            sign = 1 if _MODES[config.metric] == "min" else -1
            best = history.iloc[int((sign * history[config.metric]).to_numpy().argmin())]
        epochs = 0 if best is None else int(history["epoch"].max())
        state = "failed" if result.error else "finished" if epochs >= config.all_epochs else "stopped early"
        rows.append(
            {
                "trial": result.metrics.get("trial_id", "") if result.metrics else "",
                **result.config,
                "state": state,
                "epochs": epochs,
                "val_accuracy": None if best is None else float(best["val_accuracy"]),
                "val_loss": None if best is None else float(best["val_loss"]),
            }
        )
    return rows
