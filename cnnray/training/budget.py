"""Who gets which share of the cluster: decided, and refused, before anything waits for it."""

import math
from dataclasses import dataclass, replace

from cnnray.cluster import ClusterError, Node, Resources
from cnnray.training.config import SIXTEENTHS, TrainConfig

_WORKERS_SHARE = 0.75
_CACHE_SHARE = 0.2
_STREAMS_SHARE = 0.5
_LEFT_OF_A_NODE, _LEAST_DECODE_CPUS = 1 / 8, 0.01


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

    Ray Data's tasks wait for ever where the workers hold all CPUs, so some are always left to them; by workers that
    may move to whatever nodes there are, some of each node.

    Raises:
        ClusterError: the cluster has too little, in one sentence with what would fit.
    """
    check_cpus(config, found.cpus)
    workers, gpus = config.fewest_workers, config.gpus_per_worker
    if gpus * workers > found.gpus:
        raise ClusterError(
            f"{workers} workers of {gpus:g} GPUs do not fit a cluster of {found.gpus:g} GPUs: lower --workers or "
            "--gpus-per-worker."
        )
    default = _elastic_cpus if config.is_elastic else _default_cpus
    cpus = config.cpus_per_worker or default(config, found)
    _check_room(config, cpus, found)
    decode = _elastic_decode_cpus(config, cpus, found) if config.is_elastic else _decode_cpus(config, cpus, found)
    return Budget(
        cpus_per_worker=cpus,
        threads_per_worker=max(1, math.ceil(cpus)),
        decode_cpus=decode,
        stream_bytes=int(found.object_store_bytes * _STREAMS_SHARE / config.most_workers),
        cache_bytes=int(found.smallest_object_store_bytes * _CACHE_SHARE),
        store_bytes=found.smallest_object_store_bytes,
    )


def bundles(config: TrainConfig) -> list[dict[str, float]]:
    """What a cluster that grows by itself is asked for: the workers, and a decoding task."""
    worker = {"CPU": config.cpus_per_worker or 1.0, "GPU": config.gpus_per_worker}
    return [worker] * config.most_workers + [{"CPU": config.decode_cpus or 1.0}]


def check_shares(config: TrainConfig, shares: Budget, found: Resources) -> None:
    """Refuse a cluster that has lost so much that a run's shares, once decided, do not fit it any more.

    Raises:
        ClusterError: see `budget_of`.
    """
    _check_room(config, shares.cpus_per_worker, found)
    _check_left(config, shares.cpus_per_worker, shares.decode_cpus, found)


def _check_room(config: TrainConfig, cpus: float, found: Resources) -> None:
    if (room := found.room_for(cpus, config.gpus_per_worker)) < config.fewest_workers:
        raise ClusterError(
            f"Only {room} of {config.fewest_workers} workers of {cpus:g} CPUs and {config.gpus_per_worker:g} GPUs "
            f"fit the cluster's {len(found.nodes)} node(s): lower --workers or --cpus-per-worker."
        )


def _check_left(config: TrainConfig, cpus: float, decode: float | None, found: Resources) -> float:
    workers = min(config.most_workers, found.room_for(cpus, config.gpus_per_worker))
    free = found.cpus - cpus * workers
    if free <= 0 or (decode and not _fits_beside(config, workers, cpus, decode, found)):
        raise ClusterError(
            f"{workers} workers of {cpus:g} CPUs leave {max(free, 0):g} of the cluster's {found.cpus:g} CPUs, and "
            f"reading the images needs {f'{decode:g}' if decode else 'some'} on one node: lower --workers or "
            "--cpus-per-worker."
        )
    return free


def _fits_beside(config: TrainConfig, workers: int, cpus: float, decode: float, found: Resources) -> bool:
    """Whether the workers leave room for a decoding task on some node, if they are on the right ones."""
    for place, node in enumerate(found.nodes):
        left = replace(node, cpus=node.cpus - decode + 1e-6)
        others = found.nodes[:place] + found.nodes[place + 1 :]
        if left.cpus >= 0 and Resources((left, *others)).room_for(cpus, config.gpus_per_worker) >= workers:
            return True
    return False


def _decode_cpus(config: TrainConfig, cpus: float, found: Resources) -> float:
    free = _check_left(config, cpus, config.decode_cpus, found)
    if config.decode_cpus:
        return math.floor(config.decode_cpus * 1000) / 1000
    # Where a node is lost, all that is left may be what the workers leave of theirs.
    beside = [left for workers, left in (_filled(config, cpus, node) for node in found.nodes) if workers]
    decode = min(1.0, free / max(2, config.most_workers), *(left for left in beside if left > _LEAST_DECODE_CPUS))
    return math.floor(decode * 1000) / 1000


def _elastic_decode_cpus(config: TrainConfig, cpus: float, found: Resources) -> float:
    """So few that there is room for a task of each worker on any node, as the others may be lost."""
    shares = []
    for node in found.nodes:
        workers, free = _filled(config, cpus, node)
        if workers:
            shares.append(free / max(2, workers))
            if free <= 0 or (config.decode_cpus or 0) > free:
                raise ClusterError(
                    f"{workers} workers of {cpus:g} CPUs leave {free:g} of a node's {node.cpus:g} CPUs, and reading "
                    f"the images needs {config.decode_cpus or 'some'} where other nodes are lost: choose another "
                    "--cpus-per-worker."
                )
    return config.decode_cpus or min(1.0, math.floor(min(shares) * 1000) / 1000)


def _filled(config: TrainConfig, cpus: float, node: Node) -> tuple[int, float]:
    """The most workers that a node may get, and the CPUs that these leave."""
    workers = min(config.most_workers, Resources((node,)).room_for(cpus, config.gpus_per_worker))
    return workers, node.cpus - workers * cpus


def _elastic_cpus(config: TrainConfig, found: Resources) -> float:
    """The largest share, in sixteenths, of which all workers fit the nodes that there are, and fill none."""
    largest = found.cpus * _WORKERS_SHARE / config.most_workers
    if config.gpus_per_worker:
        largest = min(1.0, largest)
    # More GPUs may come.
    wanted = min(config.most_workers, found.room_for(1 / SIXTEENTHS, config.gpus_per_worker))
    for sixteenths in range(math.floor(largest * SIXTEENTHS), 0, -1):
        cpus = sixteenths / SIXTEENTHS
        if found.room_for(cpus, config.gpus_per_worker) < wanted:
            continue
        filled = [(node, *_filled(config, cpus, node)) for node in found.nodes]
        if all(free >= node.cpus * _LEFT_OF_A_NODE for node, workers, free in filled if workers):
            return cpus
    raise ClusterError(f"{config.most_workers} workers do not fit {found.cpus:g} CPUs: lower --workers.")


def check_cpus(config: TrainConfig, cpus: float) -> None:
    """Refuse more workers than CPUs, which may be known before Ray starts.

    Raises:
        ClusterError: see `budget_of`.
    """
    workers = config.fewest_workers
    needed = (config.cpus_per_worker or (1 if cpus >= workers else math.inf)) * workers
    if needed > cpus:
        each = f" of {config.cpus_per_worker:g} CPUs" if config.cpus_per_worker else ""
        raise ClusterError(
            f"{workers} workers{each} do not fit {cpus:g} CPUs: lower --workers, or give each a fraction "
            "with --cpus-per-worker."
        )


def _default_cpus(config: TrainConfig, found: Resources) -> float:
    """The largest even share that fits the nodes: whole CPUs where there are as many."""
    share = found.cpus * _WORKERS_SHARE / config.most_workers
    if config.gpus_per_worker:
        return min(1.0, share)
    for cpus in range(math.floor(share), 0, -1):
        if found.room_for(cpus, 0) >= config.most_workers:
            return float(cpus)
    return math.floor(min(share, 1.0) * 1000) / 1000
