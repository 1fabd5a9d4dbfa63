"""Ray Train's parts: a trainer, and workers that are those of TensorFlow: `TF_CONFIG` gets the addresses of all.

Ray's own `ray.train.tensorflow` does the same, but imports TensorFlow into the driver and the controller too
(five seconds each) and asks for Keras 2 (`TF_USE_LEGACY_KERAS`).
"""

import importlib
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker, Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cnnray import cluster
from cnnray.models import startup
from cnnray.training.output import TooLittleMemoryError, TrainingError

log = logging.getLogger(__name__)


class Trainer(DataParallelTrainer):
    """Ray Train's, without processes that it does not need: each takes one to three seconds of a CPU to start."""

    def __init__(self, *arguments: Any, ahead: Sequence[Any] = (), **options: Any) -> None:
        """
        Args:
            arguments: see `DataParallelTrainer`.
            ahead: what `load_ahead` has started.
            options: see `DataParallelTrainer`.
        """
        super().__init__(*arguments, **options)
        self._is_alone, self._ahead = cluster.is_own(), list(ahead)

    def _create_default_callbacks(self) -> list[Any]:
        # The workers have no datasets of Ray Data. What frees their resources if the job dies asks the dashboard
        # whether it lives, and is not needed where Ray ends with the job.
        unneeded = (DatasetsCallback, PlacementGroupCleanerCallback) if cluster.is_own() else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unneeded)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["failure_policy"] = _FailurePolicy(self.run_config.failure_config)
        if not self._is_alone or type(options["scaling_policy"]) is not FixedScalingPolicy:
            return super()._initialize_and_run_controller(**options)
        options["scaling_policy"] = _AloneScalingPolicy(self.scaling_config)
        # Without a runtime environment of its own, it takes one of the processes that Ray starts ahead.
        controller = ray.remote(num_cpus=0)(_AloneController).remote(self._ahead, **options)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class _FailurePolicy(DefaultFailurePolicy):
    """Begins anew after trouble that the workers have made smaller, and ends after what remains the same."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        error = cluster.user_error(training_failed_error)
        if isinstance(error, TooLittleMemoryError):
            log.warning("%s", error)
            return FailureDecision.RETRY
        if isinstance(error, TrainingError):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _AloneScalingPolicy(FixedScalingPolicy):
    """Does not tell Ray Data's coordinator of the workers: nothing else wants resources, and nobody can add them."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _AloneWorkerGroup(WorkerGroup):
    """The first group consists of the workers that `load_ahead` has started."""

    ahead: ClassVar[list[Any]] = []

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **options: Any
    ) -> list[Any]:
        actors, _AloneWorkerGroup.ahead = _AloneWorkerGroup.ahead, []
        try:
            metadata = ray.get([actor.get_metadata.remote() for actor in actors])  # answered when they have loaded
        except ray.exceptions.RayError:
            metadata = []
        if len(metadata) != num_workers:
            created: list[Any] = super()._create_workers(
                num_workers, placement_group, resources_per_worker, **options
            )
            return created
        workers = [Worker(actor, known, resources_per_worker) for actor, known in zip(actors, metadata, strict=True)]
        ranked: list[Any] = WorkerGroup._assign_worker_ranks(workers, 0, num_workers, None)
        return ranked


class _AloneController(TrainController):
    worker_group_cls = _AloneWorkerGroup

    def __init__(self, ahead: list[Any], **options: Any) -> None:
        _AloneWorkerGroup.ahead = ahead
        super().__init__(**options)


def load_ahead(workers: int) -> list[Any]:
    """Start workers for a `Trainer`, which import TensorFlow while the job does other things.

    They reserve nothing: the placement group that Ray Train makes for them does.

    Args:
        workers: their number, which does not change. They have no GPUs.

    Returns:
        Their actors; nothing where this process has not started Ray itself.
    """
    if not cluster.is_own():
        return []
    actors = [ray.remote(num_cpus=0)(RayTrainWorker).remote() for _ in range(workers)]
    for actor in actors:
        actor.execute.remote(_load)
    return actors


def _load() -> None:
    startup.load_tensorflow(gpus=False)
    importlib.import_module("cnnray.training.worker")


@dataclass
class MultiWorkerConfig(BackendConfig):
    """Set up `TF_CONFIG` on each worker."""

    @property
    def backend_cls(self) -> type["_MultiWorkerBackend"]:
        """What Ray Train runs at the start of a worker group."""
        return _MultiWorkerBackend


_reserved: list[socket.socket] = []
"""Keeps the port of this worker: until TensorFlow's server has it, the system would give it to anyone."""


class _MultiWorkerBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_reserve_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses, rank)
                for rank in range(len(addresses))
            ]
        )


def _reserve_address() -> str:
    host = ray.util.get_node_ip_address()
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    is_linux = sys.platform == "linux"  # macOS may give connections to a socket that does not listen
    if is_linux:
        # Only a socket of the same user with this option can share the port.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        os.environ["TF_GRPC_REUSE_PORT"] = "1"
        _reserved.append(reserved)
    reserved.bind(("", 0))
    port = reserved.getsockname()[1]
    if not is_linux:
        reserved.close()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    )
