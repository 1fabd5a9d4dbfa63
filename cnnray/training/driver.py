"""A training job from end to end: manifest, cluster, Ray Train's run, and the bundle."""

import contextlib
import csv
import functools
import io
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from cnnray import cluster, paths
from cnnray.errors import CnnrayError, PermanentError
from cnnray.images import containers, storage
from cnnray.images import manifest as manifests
from cnnray.images.lease import lease
from cnnray.models import bundle, startup, transfer
from cnnray.models.bundle import BundleInfo
from cnnray.training import data, recipe
from cnnray.training.assignment import CONFIG, HISTORY, TENSORBOARD, Assignment
from cnnray.training.budget import Budget, budget_of, bundles, check_cpus, check_shares
from cnnray.training.config import TrainConfig
from cnnray.training.tracking import RECORD, tracker_of

log = logging.getLogger(__name__)

BUNDLE, MANIFEST = "bundle", "manifest.parquet"
SUMMARY, BAD_IMAGES, CHECKPOINTS = "summary.json", "bad_images.csv", "checkpoints"
IMAGENET = "imagenet.weights.h5"
_RESIZE_SECONDS = 30.0
# In the order of deleting: a run without its summary is not finished, and one without its config is none.
_FILES = (SUMMARY, HISTORY, BAD_IMAGES, MANIFEST, IMAGENET, RECORD)
_FOLDERS = (CHECKPOINTS, TENSORBOARD, BUNDLE)


class TrainingError(PermanentError, RuntimeError):
    """A run that cannot start or ended badly; the message is one sentence for the user."""


def train(config: TrainConfig, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train, and leave in `config.output`: `bundle/`, `history.csv`, `tensorboard/`, `config.yaml`,
    `manifest.parquet`, `summary.json`, `checkpoints/`, and `bad_images.csv` where there were any.

    A run that was interrupted goes on from its last checkpoint; one that is finished is not run again.

    Args:
        config: the flags.
        callbacks: Ray Train's `UserCallback`s.

    Returns:
        What is also in `summary.json`: `bundle` (its uri), `epochs` (run in all), `metrics` (of the bundle's
        weights), `images_per_second` (over the steps, without each worker's first), `seconds_to_first_step`
        and `seconds` (of this call).

    Raises:
        ValueError, OSError, ClusterError, TrainingError, TrackingError: with a sentence for the user; what can be
            known before Ray starts is raised before it, and before anything is written.
    """
    started = time.time()
    if cluster.starts_own():
        check_cpus(config, cluster.local_cpus())
    with lease(config.output):
        if config.weights not in ("none", "imagenet"):
            transfer.check(config.weights)
        tracker = tracker_of(config)
        earlier = _earlier_run(config)
        if earlier is not None and (summary := _finished(config, earlier)) is not None:
            if not config.overwrite:
                log.info("%s is finished already; nothing was run.", config.output)
                if tracker:
                    tracker.finish(summary)
                return summary
            earlier = None
        if tracker:
            tracker.reach()
        manifest = manifests.read(storage.join(config.output, MANIFEST)) if earlier else data.manifest_of_run(config)
        data.describe(manifest)
        recipe.check(config, manifest)
        weights = _imagenet_weights(config) if config.weights == "imagenet" and not earlier else None
        with cluster.connected():
            shares = cluster.when_it_fits(functools.partial(budget_of, config), bundles(config), config.wait_minutes)
            weights_file = None if config.weights in ("none", "imagenet") else config.weights
            first = containers.file_of(manifest["uri"][0].as_py())
            opened = filter(None, [first, config.output, config.teacher, weights_file])
            paths.check_shared(cluster.resources(), opened)
            cached = data.is_cached(config, manifest, shares)
            # Nothing is written, or taken away, before all is known to be right.
            if earlier is None:
                data.check_images(config, manifest, shares)
                _delete_run(config.output)
                # First of all: an output that has other files and no config is taken for somebody else's.
                _write_config(config)
                manifests.write(manifest, storage.join(config.output, MANIFEST))
                if weights is not None:
                    storage.write_bytes(storage.join(config.output, IMAGENET), weights)
            else:
                log.info("going on with the run in %s", config.output)
                _drop_torn_checkpoints(config.output)
                _write_config(config)
            with tracker.following() if tracker else contextlib.nullcontext():
                best, latest = _run(config, manifest, shares, cached, started, callbacks)
                summary = _finish(config, best, latest, started)
        if tracker:
            tracker.finish(summary)
        return summary


# -- the output -----------------------------------------------------------------------------------------------


def _earlier_run(config: TrainConfig) -> dict[str, Any] | None:
    """The config of the run that the output holds, if it is this one."""
    try:
        earlier = yaml.safe_load(storage.read_bytes(storage.join(config.output, CONFIG)))
    except FileNotFoundError:
        foreign = [part for part in (*_FOLDERS, *_FILES) if storage.exists(storage.join(config.output, part))]
        if foreign:
            raise TrainingError(
                f"{config.output} holds {', '.join(foreign)}, but no {CONFIG} of a run; give another --output."
            ) from None
        return None
    differences = config.differs_from(earlier)
    if differences and config.overwrite:
        return None
    if differences:
        raise TrainingError(
            f"{config.output} holds a run with {', '.join(differences)}; give another --output, or --overwrite."
        )
    if not storage.is_file(storage.join(config.output, MANIFEST)):
        return None
    return dict(earlier)


def _finished(config: TrainConfig, earlier: dict[str, Any]) -> dict[str, Any] | None:
    try:
        summary: dict[str, Any] = json.loads(storage.read_bytes(storage.join(config.output, SUMMARY)))
    except FileNotFoundError:
        return None
    return None if config.epochs > int(earlier["epochs"]) else summary


def _delete_run(output: str) -> None:
    for part in _FILES:
        storage.delete_file(storage.join(output, part))
    for part in _FOLDERS:
        storage.delete_folder(storage.join(output, part))


def _write_config(config: TrainConfig) -> None:
    storage.delete_file(storage.join(config.output, SUMMARY))
    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    storage.write_bytes(storage.join(config.output, CONFIG), text.encode())


def _drop_torn_checkpoints(output: str) -> None:
    """Start over where Ray's own list of checkpoints was cut off while it was written.

    It is not written at once as a whole. The run then begins anew, and ends as it would have.
    """
    try:
        json.loads(storage.read_bytes(storage.join(output, CHECKPOINTS, "checkpoint_manager_snapshot.json")))
    except FileNotFoundError:
        return
    except ValueError:
        log.warning("the list of checkpoints in %s is damaged; starting over", output)
        storage.delete_folder(storage.join(output, CHECKPOINTS))


# -- the run --------------------------------------------------------------------------------------------------


def _run(
    config: TrainConfig,
    manifest: pa.Table,
    shares: Budget,
    cached: bool,
    started: float,
    callbacks: Sequence[Any],
) -> tuple[Any, Any]:
    """Run Ray Train.

    Returns:
        The best and the latest checkpoint.
    """
    import ray.train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from cnnray.training.backend import MultiWorkerConfig

    log.info(
        "%s workers of %g CPUs (%d threads) and %g GPUs; decoding tasks of %g CPUs",
        str(config.workers).replace(":", " to "), shares.cpus_per_worker, shares.threads_per_worker,
        config.gpus_per_worker, shares.decode_cpus,
    )  # fmt: skip
    assignment = Assignment(
        config=config,
        info=_bundle_info(config, manifest),
        manifest=storage.join(config.output, MANIFEST),
        weights=_weights_file(config),
        threads=shares.threads_per_worker,
        decode_cpus=shares.decode_cpus,
        stream_bytes=shares.stream_bytes,
        cached=data.decoded_into_memory(config, manifest, shares) if cached else {},
        started=started,
    )
    if config.is_elastic:
        # Nodes that are lost, but not known to be, are tried for so long.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
        if config.checkpoint_every_steps is None:
            log.info(
                "Each time that workers are lost or added the epoch begins anew; with --checkpoint-every-steps it "
                "would go on from the last of these."
            )
    filesystem, path = storage.arrow_filesystem(config.output)
    trainer = DataParallelTrainer(
        functools.partial(train_on_worker, assignment),
        backend_config=MultiWorkerConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=((config.fewest_workers, config.most_workers) if config.is_elastic else config.most_workers),
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": shares.cpus_per_worker}
            | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="min"
            ),
        ),
    )
    shortage = cluster.Shortage(cluster.LOST_MINUTES if config.wait_minutes is None else config.wait_minutes)
    try:
        result = interruptible(trainer.fit, lambda: shortage.look(functools.partial(check_shares, config, shares)))
    except ray.train.TrainingFailedError as error:
        reason = cluster.user_error(error)
        raise reason or TrainingError(f"Training failed: {cluster.last_line(error)}") from error
    if isinstance(result.return_value, CnnrayError):
        raise result.return_value
    if result.return_value:
        raise TrainingError(result.return_value)
    return result.get_best_checkpoint("score", "min"), result.checkpoint


def _imagenet_weights(config: TrainConfig) -> bytes:
    startup.load_tensorflow(gpus=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, IMAGENET)
        transfer.imagenet(config.architecture, config.image_size, path)
        return path.read_bytes()


def _weights_file(config: TrainConfig) -> str | None:
    if config.weights == "none":
        return None
    if config.weights == "imagenet":
        return storage.join(config.output, IMAGENET)
    return config.weights if storage.is_file(config.weights) else storage.join(config.weights, bundle.MODEL)


def interruptible(function: Callable[[], Any], watch: Callable[[], None] = lambda: None) -> Any:
    """Call a function in a thread, where Ray leaves Ctrl-C to us: Ray Train's own handler ends the process with 0.

    Args:
        function: to be called.
        watch: called every few seconds meanwhile; what it raises ends the waiting for the function.
    """
    outcome: Future[Any] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    while not wait([outcome], timeout=cluster.LOOK_SECONDS).done:
        watch()
    return outcome.result()


def _bundle_info(config: TrainConfig, manifest: pa.Table) -> BundleInfo:
    counts = Counter(manifests.rows_of(manifest, "train")["label"].to_pylist())
    return BundleInfo(
        class_names=manifests.class_names(manifest),
        image_size=config.image_size,
        resize=config.resize,
        architecture=config.architecture,
        config=config.as_dict(),
        data_fingerprint=manifests.fingerprint(manifest),
        class_counts=dict(sorted(counts.items())),
    )


# -- the end --------------------------------------------------------------------------------------------------


def _finish(config: TrainConfig, best: Any, latest: Any, started: float) -> dict[str, Any]:
    from cnnray.training import checkpoint

    target = storage.join(config.output, BUNDLE)
    with lease(target):  # an export may be writing to it
        bundle.replace(target, storage.join(_uri(config, best), checkpoint.BUNDLE))
    progress = json.loads(storage.read_bytes(storage.join(_uri(config, latest), checkpoint.PROGRESS)))
    files = [file.uri for file in storage.files(_uri(config, latest)) if file.uri.endswith(".jsonl")]
    bad = checkpoint.read_bad_images(storage.read_bytes(uri) for uri in files)
    if bad:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=["id", "uri", "error"])
        writer.writeheader()
        writer.writerows(bad[key] for key in sorted(bad))
        storage.write_bytes(storage.join(config.output, BAD_IMAGES), text.getvalue().encode())
        log.warning("%d images could not be read; they are listed in %s", len(bad), BAD_IMAGES)
    summary = {
        "bundle": target,
        "epochs": progress["epoch"],
        "metrics": bundle.read_info(target).metrics,
        "images_per_second": round(progress["images"] / max(progress["seconds"], 1e-9), 2),
        "seconds_to_first_step": round(progress["seconds_to_first_step"], 2),
        "seconds": round(time.time() - started, 2),
    }
    storage.write_bytes(storage.join(config.output, SUMMARY), json.dumps(summary, indent=2).encode())
    return summary


def train_on_worker(assignment: Assignment) -> str | CnnrayError:
    """What Ray Train runs on each worker: see `worker.run`."""
    startup.load_tensorflow(gpus=assignment.config.gpus_per_worker > 0)
    from cnnray.training import worker

    return worker.run(assignment)


def _uri(config: TrainConfig, saved: Any) -> str:
    """Where one of Ray's checkpoints is, as `storage` takes it."""
    scheme = config.output.partition("://")[0]
    return str(saved.path) if storage.is_local(config.output) else f"{scheme}://{saved.path}"
