"""How many workers, of what: decided, and refused, before anything waits for it."""

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
    """How many there are at the start."""
    largest: int
    cpus: float = 1.0
    """Of each worker."""
    gpus: float = 0.0
    decode_cpus: float = 0.0
    """CPUs that Ray reserves for a task that reads and decodes; 0: workers do that themselves."""

    @property
    def threads(self) -> int:
        """Of each worker."""
        return max(1, math.ceil(self.cpus))


def pool_of(options: PredictOptions, engine: str, found: Resources) -> Pool:
    """Share out a cluster.

    Ray Data waits for ever for a worker that fits nowhere, and its tasks for ever where workers hold all CPUs: so
    the first worker must fit, and tasks are always left some.

    Raises:
        ClusterError: the cluster has too little, in one sentence with what would fit.
    """
    if not found.cpus:
        raise ClusterError("The cluster has no CPUs (yet): start a node that has some.")
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if engine == engines.KERAS and found.gpus >= 1 else 0.0
    in_tasks = options.decoding == "tasks"
    if options.decoding == "auto":
        in_tasks = gpus > 0 and any(node.cpus >= 1 and not node.gpus for node in found.nodes)
    cpus = options.cpus_per_worker or _default_cpus(found, 0 if in_tasks else gpus)
    check_room(cpus, gpus, found)
    room = found.room_for(cpus, gpus)
    largest = options.max_workers or (room if gpus or not in_tasks else max(1, room // 2))
    smallest = options.min_workers or 1
    if smallest > largest:
        raise ClusterError(f"--min-workers {smallest} do not fit the cluster, which has room for {largest}.")
    decode_cpus = 0.0
    if in_tasks:
        # However the workers are spread, some node has at least the average left.
        left = (found.cpus - cpus * min(room, largest)) / len(found.nodes)
        if left <= 0:
            raise ClusterError(
                f"{min(room, largest)} workers of {cpus:g} CPUs leave none of the cluster's {found.cpus:g} to decode "
                "with: lower --max-workers or --cpus-per-worker, or use --decoding workers."
            )
        decode_cpus = min(1.0, math.floor(left * 1000) / 1000)
    first = max(smallest, min(room, largest))
    return Pool(smallest=smallest, first=first, largest=largest, cpus=cpus, gpus=gpus, decode_cpus=decode_cpus)


def check_room(cpus: float, gpus: float, found: Resources) -> None:
    """Refuse a cluster that has no room for a worker (any more).

    Raises:
        ClusterError: it has none.
    """
    if found.room_for(cpus, gpus) < 1:
        raise ClusterError(
            f"No worker of {cpus:g} CPUs and {gpus:g} GPUs fits the cluster's {len(found.nodes)} node(s) of "
            f"{found.cpus:g} CPUs and {found.gpus:g} GPUs in all: lower --cpus-per-worker or --gpus-per-worker."
        )


def _default_cpus(found: Resources, gpus: float) -> float:
    """A CPU, or with GPUs an even share of the CPUs of the GPUs' nodes."""
    with_gpus = [node for node in found.nodes if gpus and node.gpus >= gpus]
    if not with_gpus:
        return min(1.0, max(node.cpus for node in found.nodes))
    return max(1.0, float(min(node.cpus * gpus // node.gpus for node in with_gpus)))
