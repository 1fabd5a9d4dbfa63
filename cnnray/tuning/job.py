"""The job of a search: trials are training runs, and Ray Tune stops the worse ones early (ASHA)."""

import contextlib
import csv
import dataclasses
import functools
import io
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import yaml

from cnnray import cluster, configs, waiting
from cnnray.cluster import Resources
from cnnray.cpus import usable_cpus
from cnnray.errors import PermanentError
from cnnray.images import manifest as manifests
from cnnray.images import storage
from cnnray.images.lease import lease
from cnnray.tracking.mlflow import RECORD
from cnnray.tracking.mlflow_search import SearchTracker
from cnnray.training import data, decided, decisions, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DecidedConfig
from cnnray.training.output import CONFIG, HISTORY
from cnnray.training.plan import check_cpus, fewest_workers, place, resource_requests, share_out
from cnnray.tuning.config import LISTS, Metric, SearchConfig

log = logging.getLogger(__name__)

BEST, TRIALS_TABLE, TRIALS, STATE = "best.yaml", "trials.csv", "trials", "search"
_ENDS = {"finished": "FINISHED", "failed": "FAILED", "stopped early": "KILLED"}
"""MLflow's status for each state of a trial."""
_DECISIVE = {"data", "validation", "preset", "architecture", "weights", "optimizer"}
"""Searched flags on which the values of flags that are null depend."""
_MODES = {"val_accuracy": "max", "val_mean_average_precision": "max", "val_loss": "min"}


class SearchError(PermanentError, RuntimeError):
    """A search that cannot start or failed; the message is one sentence for the user."""


def search(config: SearchConfig) -> dict[str, Any]:
    """Run the trials, and leave `best.yaml`, `trials.csv`, and each trial's run below `trials/`.

    A search that was interrupted goes on with the trials that are not finished.

    Returns:
        `config` (the uri of best.yaml), `trials`, `stopped_early`, `best` (its values), `val_accuracy` (of several
        labels `val_mean_average_precision`) and `val_loss` of its best epoch, `seconds`.

    Raises:
        ValueError, OSError, ClusterError, SearchError, TrackingError: with a sentence for the user.
    """
    started = time.time()
    spaces = _spaces(config)
    if cluster.starts_own():
        check_cpus(config, usable_cpus())
    with lease(config.output):
        tracker = make_tracker(config)
        if tracker:
            tracker.reach()
        # Each trial would find the same fault.
        manifest = data.build_run_manifest(config)
        config = _with_metric(config, manifests.is_multi_label(manifest))
        earlier = _earlier_search(config)
        first = decisions.as_before(config, earlier) if earlier else decisions.for_images(config, manifest)
        config = dataclasses.replace(_decide(config, first), multi_label=first.multi_label)
        recipe.check(decisions.decide(config, decisions.data_facts(config, manifest))[0], manifest)
        # Ray Train's actors in the trials ask the dashboard for each other.
        with cluster.connected(dashboard=True):
            images = manifests.count_split(manifest, "train")
            config, available = waiting.wait_for_resources(
                functools.partial(_plan, config, first, images), resource_requests(config), config.wait_minutes
            )
            of_trial = _for_trials(config, available)
            workers = fewest_workers(of_trial, share_out(of_trial, available))
            waiting.wait_for_room(workers, config.wait_minutes)
            # Nothing is written or deleted before all checks have passed.
            if earlier is None:
                data.check_images(config, manifest, share_out(config, available))
                _begin(config)
            with tracker.following() if tracker else contextlib.nullcontext():
                results = _results(of_trial, spaces, first.all_epochs)
        rows = _rows(config, results, first.all_epochs)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        storage.write_bytes(storage.join(config.output, TRIALS_TABLE), text.getvalue().encode())
        scored = [row for row in rows if row[_metric(config)] is not None]
        if not scored:
            errors = [cluster.user_error(error) or cluster.last_line(error) for error in results.errors]
            reason = errors[-1] if errors else "no reason is known"
            raise SearchError(f"None of the {len(rows)} trials finished an epoch: {reason}") from (
                results.errors[-1] if results.errors else None
            )
        sign = 1 if _MODES[_metric(config)] == "min" else -1
        best = min(scored, key=lambda row: sign * row[_metric(config)])
        if tracker:
            tracker.finish_search(
                {row["trial"]: _ENDS[row["state"]] for row in rows},
                {name: best[name] for name in _scores(config)},
            )
        values = {name: best[name] for name in spaces}
        # Without the output, which is not the trial's: whoever trains with these flags names another.
        winner = configs.as_dict(config.trial(values, config.output))
        del winner["output"]
        storage.write_bytes(storage.join(config.output, BEST), yaml.safe_dump(winner, sort_keys=False).encode())
        return {
            "config": storage.join(config.output, BEST),
            "trials": len(rows),
            "stopped_early": sum(row["state"] == "stopped early" for row in rows),
            "best": values,
            **{name: best[name] for name in _scores(config)},
            "seconds": round(time.time() - started, 2),
        }


def _with_metric(config: SearchConfig, multi_label: bool) -> SearchConfig:
    """Decide the metric where it is null.

    Raises:
        SearchError: it is not of such images.
    """
    kinds: list[Metric] = ["val_accuracy", "val_mean_average_precision"]
    other, usual = kinds if multi_label else reversed(kinds)
    if config.metric == other:
        raise SearchError(f"--metric {other}: the images of {config.data} have {usual} in its place.")
    return dataclasses.replace(config, metric=config.metric or usual)


def _metric(config: SearchConfig) -> Metric:
    assert config.metric is not None  # see `_with_metric`
    return config.metric


def _scores(config: SearchConfig) -> tuple[str, str]:
    """The metrics of a trial that a search shows."""
    return ("val_mean_average_precision" if config.multi_label else "val_accuracy"), "val_loss"


def make_tracker(config: SearchConfig) -> SearchTracker | None:
    """The tracker of a search, where `--mlflow` asks for one.

    Raises:
        TrackingError: MLflow is not installed.
    """

    def trial(folder: str) -> tuple[dict[str, str], str] | None:
        uri = storage.join(folder, CONFIG)
        if not storage.is_file(uri):
            return None
        flags = TrainConfig(**configs.load(TrainConfig, storage.read_bytes(uri), uri))
        return flags.tracked(), storage.join(folder, HISTORY)

    if config.mlflow is None:
        return None
    trials = storage.join(config.output, TRIALS)
    return SearchTracker(config, config.output, config.tracked(), trials, trial)


def _spaces(config: SearchConfig) -> dict[str, Any]:
    """Ray Tune's spaces by flag.

    Raises:
        SearchError: one that Ray Tune refuses, or gives values that no training takes.
    """
    from ray import tune

    spaces: dict[str, Any] = {}
    samples: dict[str, list[Any]] = {}

    def refused(name: str, error: Exception) -> SearchError:
        return SearchError(f"--search {name}: {' '.join(str(error).split())}")

    assert isinstance(config.search, dict)
    for name, space in config.search.items():
        [(kind, values)] = space.items()
        try:
            spaces[name] = getattr(tune, kind)(*([values] if kind in LISTS else values))
            samples[name] = values if kind == "grid_search" else [spaces[name].sample() for _ in range(20)]
            firsts = {other: next(iter(those)) for other, those in samples.items()}
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise refused(name, error) from None
    for name, values in samples.items():
        try:
            for value in values:
                config.trial(firsts | {name: value}, config.output)
        except (ValueError, TypeError) as error:
            raise refused(name, error) from None
    return spaces


def _earlier_search(config: SearchConfig) -> dict[str, Any] | None:
    """The config of the search that the output holds, by field, if this one goes on with it; else None.

    Raises:
        SearchError: the output holds something else.
        NewerFormatError: a later version of cnnray wrote it.
    """
    uri = storage.join(config.output, CONFIG)
    if storage.is_file(uri):
        earlier = configs.load(SearchConfig, storage.read_bytes(uri), uri)
        if "search" not in earlier:
            raise SearchError(f"{config.output} holds another job's {CONFIG}; give another --output.")
        # The scheduler of an interrupted search was made for its number of epochs.
        differences = decided.differences(config, earlier, {"epochs"})
        if differences and not config.overwrite:
            raise SearchError(
                f"{config.output} holds a search with {', '.join(differences)}; give another --output, or "
                "--overwrite."
            )
        return None if differences else earlier
    if storage.exists(storage.join(config.output, TRIALS)) or storage.exists(storage.join(config.output, STATE)):
        raise SearchError(f"{config.output} holds {TRIALS}, but no {CONFIG} of a search; give another --output.")
    return None


def _decide(config: SearchConfig, first: DecidedConfig) -> SearchConfig:
    """The config with those values of `first` that are the same for all trials.

    Each trial decides what depends on the flags that are searched; the scheduler needs the same epochs for all.
    """
    return _with_values(config, first, ("epochs",) if _DECISIVE & set(config.search) else decided.DECIDED)


def _with_values(config: SearchConfig, values: DecidedConfig, names: Sequence[str]) -> SearchConfig:
    """The config with these fields of `values`, but for the flags that are searched."""
    return dataclasses.replace(config, **{name: getattr(values, name) for name in names if name not in config.search})


def _begin(config: SearchConfig) -> None:
    """Make the output that of this search, in place of the one that it may hold."""
    uri = storage.join(config.output, CONFIG)
    if storage.is_file(uri):
        _delete(config)
    storage.write_bytes(uri, configs.dump(config, overwrite=False))


def _delete(config: SearchConfig) -> None:
    """Delete all of a search but its config."""
    for part in (TRIALS, STATE):
        storage.delete_folder(storage.join(config.output, part))
    for part in (BEST, TRIALS_TABLE, RECORD):
        storage.delete_file(storage.join(config.output, part))


def _results(config: SearchConfig, spaces: dict[str, Any], epochs: int) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Ray Tune's tables are another progress beside ours
    filesystem, path = storage.arrow_filesystem(config.output)
    trainable = tune.with_resources(functools.partial(_run_trial, config, epochs), {"CPU": 0.001})
    experiment = f"{path}/{STATE}"
    tuner = None
    if tune.Tuner.can_restore(experiment, filesystem):
        try:
            tuner = tune.Tuner.restore(
                experiment, trainable, storage_filesystem=filesystem, resume_unfinished=True, restart_errored=True
            )
        except (ImportError, AttributeError) as error:
            # Ray Tune pickles our functions by name, and other versions have other names.
            if not config.overwrite:
                raise SearchError(
                    f"{config.output} holds a search of another version of cnnray that cannot be continued "
                    f"({error}); give another --output, or --overwrite."
                ) from None
            _delete(config)
        else:
            log.info("going on with the search in %s", config.output)
    if tuner is None:
        tuner = tune.Tuner(
            trainable,
            param_space=spaces,
            tune_config=tune.TuneConfig(
                metric=_metric(config),
                mode=_MODES[_metric(config)],
                num_samples=config.trials,
                search_alg=BasicVariantGenerator(max_concurrent=config.parallel, random_state=config.seed),
                scheduler=ASHAScheduler("epoch", max_t=max(2, epochs), grace_period=1, reduction_factor=2),
            ),
            run_config=tune.RunConfig(
                name=STATE,
                storage_path=path,
                storage_filesystem=filesystem,
                verbose=0,
                callbacks=[_trial_logger(config, epochs)],
            ),
        )
    return waiting.interruptible(waiting.in_background(tuner.fit))


def _plan(
    config: SearchConfig, first: DecidedConfig, images: int, available: Resources
) -> tuple[SearchConfig, Resources]:
    """The config with the workers of each trial, and the cluster that has room for them.

    Raises:
        ClusterError: it does not.
    """
    config = _with_values(config, place(first, images, available, parallel=config.parallel), decided.PLANNED)
    share_out(config, available)
    return config, available


def _for_trials(config: SearchConfig, available: Resources) -> SearchConfig:
    """The config with each trial's share of the cluster, if several run side by side, and without a second check of
    the images that the search has checked."""
    if not {"data", "validation"} & set(config.search):
        config = dataclasses.replace(config, data_checks=False)
    if config.parallel == 1:
        return config
    each = available.cpus / config.parallel
    return dataclasses.replace(
        config,
        cpus_per_worker=config.cpus_per_worker or 0.75 * each / config.most_workers,
        decode_cpus=config.decode_cpus or 0.25 * each / max(2, config.most_workers),
    )


def _run_trial(config: SearchConfig, epochs: int, values: dict[str, Any]) -> None:
    """Run a trial in an actor of Ray Tune."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from cnnray.training.job import train

    class AtEpochs(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if _metric(config) in metrics[0] and metrics[0]["epoch"] < epochs:
                super().after_report(run_context, metrics, None)

    output = storage.join(config.output, TRIALS, tune.get_context().get_trial_id())
    train(config.trial(values, output), callbacks=[AtEpochs()])
    # The last epoch is reported after everything is written, because Ray Tune then ends the trial's process.
    last = list(csv.DictReader(io.StringIO(storage.read_bytes(storage.join(output, HISTORY)).decode())))[-1]
    if int(last["epoch"]) == epochs:
        scores = {name: float(value) for name, value in last.items() if name.startswith("val_")}
        tune.report({"epoch": epochs} | scores)


def _trial_logger(config: SearchConfig, epochs: int) -> Any:
    from ray import tune

    class TrialLogger(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
            ended = sum(other.is_finished() for other in trials)
            scores = "  ".join(f"{name} {result[name]:.4f}" for name in reversed(_scores(config)))
            log.info(
                "trial %s  epoch %d/%d  %s  %s  (%d of %d trials ended)",
                trial.trial_id, result["epoch"], epochs, scores, trial.config, ended,
                max(len(trials), config.trials),
            )  # fmt: skip

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            log.warning("trial %s failed: %s", trial.trial_id, trial.config)

    return TrialLogger()


def _rows(config: SearchConfig, results: Any, all_epochs: int) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        history = result.metrics_dataframe
        best = None
        if history is not None and len(history):
            sign = 1 if _MODES[_metric(config)] == "min" else -1
            best = history.iloc[int((sign * history[_metric(config)]).to_numpy().argmin())]
        epochs = 0 if best is None else int(history["epoch"].max())
        state = "failed" if result.error else "finished" if epochs >= all_epochs else "stopped early"
        rows.append(
            {
                "trial": result.metrics.get("trial_id", "") if result.metrics else "",
                **result.config,
                "state": state,
                "epochs": epochs,
                **{name: None if best is None else float(best[name]) for name in _scores(config)},
            }
        )
    return rows
