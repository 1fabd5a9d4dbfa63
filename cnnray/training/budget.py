"""Who gets which share of the cluster: decided, and refused, before anything waits for it."""

import math
from dataclasses import dataclass

from cnnray.cluster import ClusterError, Resources
from cnnray.training.config import TrainConfig

_WORKERS_SHARE = 0.75
_CACHE_SHARE = 0.2
_STREAMS_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Shares of one run."""

    cpus_per_worker: float
    threads_per_worker: int
    decode_cpus: float
    """CPUs that Ray reserves for a decoding task."""
    stream_bytes: int
    """Object store that one worker's stream may fill ahead."""
    cache_bytes: int
    """Largest decoded data set that is kept in the object store on `--cache auto`."""
    store_bytes: int
    """The smallest node's object store: the largest data set that `--cache memory` can keep."""


def budget_of(config: TrainConfig, found: Resources) -> Budget:
    """Share out a cluster between workers and decoding tasks.

    Ray Data's tasks wait for ever where the workers hold all CPUs, so some are always left to them.

    Raises:
        ClusterError: the cluster has too little, in one sentence with what would fit.
    """
    check_cpus(config, found.cpus)
    if config.gpus_per_worker * config.workers > found.gpus:
        raise ClusterError(
            f"{config.workers} workers of {config.gpus_per_worker:g} GPUs do not fit a cluster of {found.gpus:g} "
            "GPUs: lower --workers or --gpus-per-worker."
        )
    cpus = config.cpus_per_worker or _default_cpus(config, found)
    if (room := found.room_for(cpus, config.gpus_per_worker)) < config.workers:
        raise ClusterError(
            f"Only {room} of {config.workers} workers of {cpus:g} CPUs and {config.gpus_per_worker:g} GPUs fit the "
            f"cluster's {len(found.nodes)} node(s): lower --workers or --cpus-per-worker."
        )
    free = found.cpus - cpus * config.workers
    decode = config.decode_cpus or min(1.0, free / max(2, config.workers))
    if decode > free + 1e-9 or free <= 0:
        raise ClusterError(
            f"{config.workers} workers of {cpus:g} CPUs leave {max(free, 0):g} of the cluster's {found.cpus:g} CPUs, "
            f"and reading the images needs {config.decode_cpus or 'some'}: lower --workers or --cpus-per-worker."
        )
    return Budget(
        cpus_per_worker=cpus,
        threads_per_worker=max(1, math.ceil(cpus)),
        decode_cpus=math.floor(decode * 1000) / 1000,
        stream_bytes=int(found.object_store_bytes * _STREAMS_SHARE / config.workers),
        cache_bytes=int(found.smallest_object_store_bytes * _CACHE_SHARE),
        store_bytes=found.smallest_object_store_bytes,
    )


def check_cpus(config: TrainConfig, cpus: float) -> None:
    """Refuse more workers than CPUs, which may be known before Ray starts.

    Raises:
        ClusterError: see `budget_of`.
    """
    needed = (config.cpus_per_worker or (1 if cpus >= config.workers else math.inf)) * config.workers
    if needed > cpus:
        each = f" of {config.cpus_per_worker:g} CPUs" if config.cpus_per_worker else ""
        raise ClusterError(
            f"{config.workers} workers{each} do not fit {cpus:g} CPUs: lower --workers, or give each a fraction "
            "with --cpus-per-worker."
        )


def _default_cpus(config: TrainConfig, found: Resources) -> float:
    """The largest even share that fits the nodes: whole CPUs where there are as many."""
    share = found.cpus * _WORKERS_SHARE / config.workers
    if config.gpus_per_worker:
        return min(1.0, share)
    for cpus in range(math.floor(share), 0, -1):
        if found.room_for(cpus, 0) >= config.workers:
            return float(cpus)
    return math.floor(min(share, 1.0) * 1000) / 1000
