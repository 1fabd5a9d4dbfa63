"""How many workers a run has and what each reserves; a cluster that is too small is refused before the run starts."""

import math
from dataclasses import dataclass

from cnnray.cluster import ClusterError, Resources
from cnnray.models import engines
from cnnray.prediction.config import PredictOptions


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The workers of a run."""

    smallest: int
    first: int
    """Number of workers at the start."""
    largest: int
    cpus: float = 1.0
    """CPUs of each worker."""
    gpus: float = 0.0
    """GPUs of each worker."""
    decode_cpus: float = 0.0
    """CPUs that Ray reserves for a task that reads and decodes; 0: the workers read and decode themselves."""

    @property
    def threads(self) -> int:
        """CPU threads of each worker."""
        return max(1, math.ceil(self.cpus))

    @property
    def worker(self) -> dict[str, float]:
        """The resources of each worker."""
        return {"CPU": self.cpus, "GPU": self.gpus}


def plan_pool(options: PredictOptions, engine: str, resources: Resources) -> Pool:
    """Decide on the workers that a cluster has room for.

    Ray waits for ever for a worker that fits on no node, and for decoding tasks where workers hold all CPUs. So at
    least one worker must fit, and decoding tasks always keep some CPUs.

    Raises:
        ClusterError: the cluster is too small; the message is one sentence with what would fit.
    """
    if not resources.cpus:
        raise ClusterError("The cluster has no CPUs (yet): start a node that has some.")
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if engine in engines.KERAS_POLICIES and resources.gpus >= 1 else 0.0
    in_tasks = options.decoding == "tasks"
    if options.decoding == "auto":
        in_tasks = gpus > 0 and any(node.cpus >= 1 and not node.gpus for node in resources.nodes)
    cpus = options.cpus_per_worker or resources.cpus_beside(0 if in_tasks else gpus)
    check_room(cpus, gpus, resources)
    room = resources.room_for(cpus, gpus)
    largest = options.max_workers or (room if gpus or not in_tasks else max(1, room // 2))
    smallest = options.min_workers or 1
    if smallest > largest:
        raise ClusterError(f"--min-workers {smallest} do not fit the cluster, which has room for {largest}.")
    decode_cpus = 0.0
    if in_tasks:
        # However the workers are spread, some node keeps at least the average of the remaining CPUs.
        remaining = (resources.cpus - cpus * min(room, largest)) / len(resources.nodes)
        if remaining <= 0:
            raise ClusterError(
                f"{min(room, largest)} workers of {cpus:g} CPUs leave none of the cluster's {resources.cpus:g} CPUs "
                "for decoding: lower --max-workers or --cpus-per-worker, or use --decoding workers."
            )
        decode_cpus = min(1.0, math.floor(remaining * 1000) / 1000)
    first = max(smallest, min(room, largest))
    return Pool(smallest=smallest, first=first, largest=largest, cpus=cpus, gpus=gpus, decode_cpus=decode_cpus)


def check_room(cpus: float, gpus: float, resources: Resources) -> None:
    """Check that the cluster has room for a worker, at the start or after it has lost nodes.

    Raises:
        ClusterError: no node has room for one.
    """
    if resources.room_for(cpus, gpus) < 1:
        raise ClusterError(
            f"No worker of {cpus:g} CPUs and {gpus:g} GPUs fits the cluster's {len(resources.nodes)} node(s) with "
            f"{resources.cpus:g} CPUs and {resources.gpus:g} GPUs in total: lower --cpus-per-worker or "
            "--gpus-per-worker."
        )
