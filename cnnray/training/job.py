"""A training job from end to end: manifest, cluster, Ray Train's run, and the bundle."""

import contextlib
import dataclasses
import functools
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray import cluster, configs, paths, waiting
from cnnray.cluster import Resources
from cnnray.cpus import usable_cpus
from cnnray.errors import CnnrayError
from cnnray.images import containers, labels, storage
from cnnray.images import manifest as manifests
from cnnray.images.lease import Lease, lease
from cnnray.models import own_network, startup, transfer
from cnnray.models.bundle import BundleInfo
from cnnray.tracking.mlflow import Tracker
from cnnray.training import data, decisions, output, plan, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DecidedConfig, PlannedConfig
from cnnray.training.output import TrainingError

log = logging.getLogger(__name__)

_RESIZE_SECONDS = 30.0


def train(
    config: TrainConfig, callbacks: Sequence[Any] = (), *, architecture: own_network.Function | None = None
) -> dict[str, Any]:
    """Train, and leave in `config.output`: `bundle/`, `history.csv`, `tensorboard/`, `config.yaml`,
    `manifest.parquet`, `summary.json`, `checkpoints/`, and `bad_images.csv` where there were any.

    A run that was interrupted goes on from its last checkpoint; one that is finished is not run again.

    Args:
        config: the flags.
        callbacks: Ray Train's `UserCallback`s.
        architecture: a function that gives the network (see `own_network`), in place of the config's.

    Returns:
        What is also in `summary.json`: `bundle` (its uri), `epochs` (run in all), `metrics` (of the bundle's
        weights), `images_per_second` (over the steps, without each worker's first), `seconds_to_first_step`
        and `seconds` (of this call).

    Raises:
        ValueError, OSError, ClusterError, TrainingError, TrackingError: with a sentence for the user; what can be
            known before Ray starts is raised before it, and before anything is written.
    """
    started = time.time()
    if architecture is not None:
        config = dataclasses.replace(config, architecture=own_network.register(architecture))
    if cluster.starts_own():
        plan.check_cpus(config, usable_cpus())
    with lease(config.output) as held:
        if config.weights not in ("none", "imagenet"):
            transfer.check(config.weights)
        tracker = make_tracker(config)
        earlier = output.earlier_run(config)
        if earlier is not None and (summary := output.finished(config, earlier)) is not None:
            if not config.overwrite:
                log.info("%s is finished already; nothing was run.", config.output)
                if tracker:
                    tracker.params = decisions.as_before(config, earlier).tracked()
                    tracker.finish(summary)
                return summary
            earlier = None
        if tracker:
            tracker.reach()
        manifest_uri = storage.join(config.output, output.MANIFEST)
        manifest = manifests.read(manifest_uri) if earlier else data.build_run_manifest(config)
        data.log_counts(manifest)
        decided = decisions.as_before(config, earlier) if earlier else decisions.for_images(config, manifest)
        recipe.check(decided, manifest)
        if own_network.is_own(decided.architecture) and not earlier:
            _check_network(decided, len(manifests.class_names(manifest)))
        weights = _imagenet_weights(decided) if config.weights == "imagenet" and not earlier else None
        reading = waiting.in_background(functools.partial(data.read_few, decided, manifest, check=earlier is None))
        with cluster.connected(dashboard=config.dashboard):
            config, shares, available = waiting.wait_for_resources(
                functools.partial(_plan, decided, manifest), plan.resource_requests(decided), config.wait_minutes
            )
            for line in plan.describe(config, shares, available, data.describe(config, manifest, shares)):
                log.info(line)
            if tracker:
                tracker.params = config.tracked()
            weights_file = None if config.weights in ("none", "imagenet") else config.weights
            first = containers.containing_file(manifest["uri"][0].as_py())
            opened = filter(None, [first, config.output, config.teacher, weights_file])
            paths.check_shared(available, opened)
            cached = data.is_cached(config, manifest, shares)
            ahead = _load_ahead(config)
            few = waiting.interruptible(reading)
            if not callbacks:  # trials of a search wait for one another
                requests = [*plan.fewest_workers(config, shares), {"CPU": shares.decode_cpus}]
                waiting.wait_for_room(requests, config.wait_minutes)
            # Nothing is written or deleted before all checks have passed.
            if earlier is None:
                data.check_images(config, manifest, shares, few)
                output.delete_run(config.output)
                # The config is written first: an output with other files and no config is refused as foreign.
                output.write_config(config)
                manifests.write(manifest, manifest_uri)
                if weights is not None:
                    storage.write_bytes(storage.join(config.output, output.IMAGENET), weights)
            else:
                log.info("going on with the run in %s", config.output)
                output.drop_torn_checkpoints(config.output)
                output.write_config(config)
            with tracker.following() if tracker else contextlib.nullcontext():
                blocks = data.decode_splits_into_memory(config, manifest, shares, few) if cached else {}
                best, latest = _run(config, manifest, shares, blocks, started, held, callbacks, ahead, architecture)
                images = manifests.count_split(manifest, "train")
                summary = output.finish(config, images, best, latest, started)
        if tracker:
            tracker.finish(summary)
        return summary


def _plan(
    config: DecidedConfig, manifest: pa.Table, available: Resources
) -> tuple[PlannedConfig, plan.Shares, Resources]:
    """The config with nothing left to be decided, the workers' shares, and the cluster that they are of.

    Raises:
        ClusterError: the cluster is too small.
    """
    placed = plan.place(config, manifests.count_split(manifest, "train"), available)
    return placed, plan.share_out(placed, available), available


def make_tracker(config: TrainConfig) -> Tracker | None:
    """The tracker of a run, where `--mlflow` asks for one.

    Raises:
        TrackingError: MLflow is not installed.
    """
    if config.mlflow is None:
        return None
    return Tracker(config, config.output, config.tracked(), storage.join(config.output, output.HISTORY))


# -- the run --------------------------------------------------------------------------------------------------


def _run(
    config: PlannedConfig,
    manifest: pa.Table,
    shares: plan.Shares,
    cached: dict[str, list[Any]],
    started: float,
    held: Lease,
    callbacks: Sequence[Any],
    ahead: Sequence[Any],
    network: own_network.Function | None,
) -> tuple[Any, Any]:
    """Run Ray Train.

    Returns:
        The best and the latest checkpoint.
    """
    import ray.train

    from cnnray.training.backend import MultiWorkerConfig, Trainer

    assignment = plan.Assignment(
        config=config,
        info=_bundle_info(config, manifest),
        manifest=storage.join(config.output, output.MANIFEST),
        weights=_weights_file(config),
        threads=shares.threads_per_worker,
        decoders=shares.decoders_per_worker,
        uses_other_nodes=not callbacks,
        cached=cached,
        has_lanes=not cached and data.need_lanes(config, manifest),
        is_in_parquet=data.is_in_parquet(manifest),
        started=started,
        lease_holder=held.holder,
        network=network,
    )
    if config.is_elastic:
        # Ray tries to start workers on lost nodes that it does not know to be lost for so many seconds.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
        if config.checkpoint_every_steps is None:
            log.info(
                "When workers are lost or added, the epoch starts again; a run that is begun with "
                "--checkpoint-every-steps goes on from the last checkpoint."
            )
    filesystem, path = storage.arrow_filesystem(config.output)
    trainer = Trainer(
        functools.partial(train_on_worker, assignment),
        ahead=ahead,
        backend_config=MultiWorkerConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=((config.fewest_workers, config.most_workers) if config.is_elastic else config.most_workers),
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=config.gpus > 0,
            resources_per_worker={"CPU": shares.cpus_per_worker} | ({"GPU": config.gpus} if config.gpus else {}),
            # GPUs of one node exchange gradients faster than those of several; without them, each worker is to have
            # a node's CPUs.
            placement_strategy="PACK" if config.gpus else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=output.CHECKPOINTS,
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
    shortage = waiting.Shortage(waiting.LOST_MINUTES if config.wait_minutes is None else config.wait_minutes)
    placement = waiting.Placement("RayTrainWorker", plan.fewest_workers(config, shares))

    def check(total: cluster.Resources) -> None:
        plan.check_fit(config, shares, total)
        placement.check(total)

    def watch() -> None:
        held.raise_if_lost()
        shortage.try_plan(check)

    try:
        result = waiting.interruptible(waiting.in_background(trainer.fit), watch)
    except ray.train.TrainingFailedError as error:
        reason = cluster.user_error(error)
        raise reason or TrainingError(f"Training failed: {cluster.last_line(error)}") from error
    if result.return_value is not None:
        raise result.return_value
    return result.get_best_checkpoint("score", "min"), result.checkpoint


def _load_ahead(config: PlannedConfig) -> list[Any]:
    """See `backend.load_ahead`; nothing where the number of workers may change, or they have GPUs."""
    if config.is_elastic or config.gpus:
        return []
    from cnnray.training.backend import load_ahead

    return load_ahead(config.most_workers)


def _check_network(config: DecidedConfig, classes: int) -> None:
    """Build a network of the user's once, and warn where its bundle will need the user's code.

    Raises:
        NetworkError: it is not as it should be.
    """
    startup.load_tensorflow(gpus=False)
    from cnnray.models import architectures

    model = architectures.build(config.architecture, config.image_size, classes, multi_label=config.multi_label)
    log.info("%s: %s weights", config.architecture, f"{model.count_params():,}")
    if reason := own_network.why_not_loaded(model):
        log.warning(
            "The bundle will not be loaded by cnnray's jobs, but only by programs that import the code of its layers "
            "first, with @keras.saving.register_keras_serializable() at each class: %s", reason,
        )  # fmt: skip


def _imagenet_weights(config: DecidedConfig) -> bytes:
    startup.load_tensorflow(gpus=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, output.IMAGENET)
        transfer.write_imagenet_weights(config.architecture, config.image_size, path)
        return path.read_bytes()


def _weights_file(config: PlannedConfig) -> str | None:
    if config.weights == "none":
        return None
    if config.weights == "imagenet":
        return storage.join(config.output, output.IMAGENET)
    return transfer.weights_file(config.weights)


def _bundle_info(config: PlannedConfig, manifest: pa.Table) -> BundleInfo:
    names = manifests.class_names(manifest)
    return BundleInfo(
        class_names=names,
        image_size=config.image_size,
        resize=config.resize,
        decode_size=config.decode_size,
        architecture=config.architecture,
        config=configs.as_dict(config),
        data_fingerprint=manifests.fingerprint(manifest),
        class_counts=labels.count(manifest["label"].filter(pc.equal(manifest["split"], "train"))),
        training_images=manifests.count_split(manifest, "train") if config.multi_label else None,
        thresholds=[0.5] * len(names) if config.multi_label else None,
    )


def train_on_worker(assignment: plan.Assignment) -> CnnrayError | None:
    """Entry point of a Ray Train worker: see `worker.run`."""
    startup.load_tensorflow(gpus=assignment.config.gpus > 0)
    if assignment.network is not None:
        own_network.register(assignment.network)
    from cnnray.training import worker

    try:
        return worker.run(assignment)
    except Exception as error:
        error.add_note(traceback.format_exc())  # Ray Train keeps 1000 characters of it
        raise
