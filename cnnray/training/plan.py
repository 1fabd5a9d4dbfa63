"""The plan of a run: which share of the cluster its workers and decoding tasks get, and what each worker receives.

Shares are decided, or refused with a sentence, before anything waits for resources.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from cnnray.cluster import ClusterError, Node, Resources
from cnnray.models.bundle import BundleInfo
from cnnray.training.config import SIXTEENTHS, TrainConfig
from cnnray.training.decided import DecidedConfig

_WORKERS_SHARE = 0.75
_CACHE_SHARE = 0.2
_LEFT_OF_A_NODE, _LEAST_DECODE_CPUS = 1 / 8, 0.01


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of the cluster that the workers and the decoding tasks of a run get."""

    cpus_per_worker: float
    threads_per_worker: int
    decode_cpus: float
    """CPUs that Ray reserves for a decoding task."""
    decoders_per_worker: int
    """Processes that decode for a worker while it trains, where images are streamed."""
    cache_bytes: int
    """Largest decoded data set that is kept in the object store on `--cache auto`."""
    store_bytes: int
    """The smallest node's object store: the largest data set that `--cache memory` can keep."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What each worker of a run needs to know."""

    config: DecidedConfig
    info: BundleInfo
    """Info of the future bundle, without metrics."""
    manifest: str
    """Where the manifest is."""
    weights: str | None
    """File of weights that the backbone begins with."""
    threads: int
    """TensorFlow threads of a worker."""
    decoders: int
    """Processes that decode for a worker."""
    uses_other_nodes: bool
    """Whether nodes without a worker may decode, too: in a search, they are for other trials."""
    cached: dict[str, list[Any]]
    """By split: references to decoded blocks; empty where images are streamed."""
    started: float
    """When the job began, in seconds since the epoch."""
    lease_holder: str
    """See `lease.Lease.holder`."""


def share_out(config: TrainConfig, available: Resources) -> Shares:
    """Share out a cluster between workers and decoding tasks.

    Ray Data's tasks wait for ever where the workers hold all CPUs, so some CPUs are always left to the tasks: some of
    the cluster's, and with elastic workers, which may move to any node, some of each node.

    Raises:
        ClusterError: the cluster has too little, in one sentence with what would fit.
    """
    check_cpus(config, available.cpus)
    workers, gpus = config.fewest_workers, config.gpus_per_worker
    if gpus * workers > available.gpus:
        raise ClusterError(
            f"{workers} workers of {gpus:g} GPUs do not fit a cluster of {available.gpus:g} GPUs: lower "
            "--max-workers or --gpus-per-worker."
        )
    default = _elastic_cpus if config.is_elastic else _default_cpus
    cpus = config.cpus_per_worker or default(config, available)
    _check_room(config, cpus, available)
    decode = (
        _elastic_decode_cpus(config, cpus, available) if config.is_elastic else _decode_cpus(config, cpus, available)
    )
    return Shares(
        cpus_per_worker=cpus,
        threads_per_worker=max(1, math.ceil(cpus)),
        decode_cpus=decode,
        decoders_per_worker=_decoders(config, cpus, available),
        cache_bytes=int(available.smallest_object_store_bytes * _CACHE_SHARE),
        store_bytes=available.smallest_object_store_bytes,
    )


def resource_requests(config: TrainConfig) -> list[dict[str, float]]:
    """Resource requests to an autoscaler: one for each worker, and one for a decoding task."""
    worker = {"CPU": config.cpus_per_worker or 1.0, "GPU": config.gpus_per_worker}
    return [worker] * config.most_workers + [{"CPU": config.decode_cpus or 1.0}]


def check_fit(config: TrainConfig, shares: Shares, available: Resources) -> None:
    """Refuse a cluster that has lost so many nodes that the shares of a run no longer fit.

    Raises:
        ClusterError: see `share_out`.
    """
    _check_room(config, shares.cpus_per_worker, available)
    _check_left(config, shares.cpus_per_worker, shares.decode_cpus, available)


def _check_room(config: TrainConfig, cpus: float, available: Resources) -> None:
    if (room := available.room_for(cpus, config.gpus_per_worker)) < config.fewest_workers:
        raise ClusterError(
            f"Only {room} of {config.fewest_workers} workers of {cpus:g} CPUs and {config.gpus_per_worker:g} GPUs "
            f"fit the cluster's {len(available.nodes)} node(s): lower --max-workers or --cpus-per-worker."
        )


def _check_left(config: TrainConfig, cpus: float, decode: float | None, available: Resources) -> float:
    workers = min(config.most_workers, available.room_for(cpus, config.gpus_per_worker))
    free = available.cpus - cpus * workers
    if free <= 0 or (decode and not _fits_beside(config, workers, cpus, decode, available)):
        raise ClusterError(
            f"{workers} workers of {cpus:g} CPUs leave {max(free, 0):g} of the cluster's {available.cpus:g} CPUs, "
            f"and reading the images needs {f'{decode:g}' if decode else 'some'} on one node: lower --max-workers or "
            "--cpus-per-worker."
        )
    return free


def _decoders(config: TrainConfig, cpus: float, available: Resources) -> int:
    """As many as a worker's share of its node's CPUs: they use those that the training step leaves idle."""
    shares = [node.cpus / workers for node in available.nodes if (workers := _filled(config, cpus, node)[0])]
    if config.cpus_per_worker:  # other things run beside this training
        shares.append(math.ceil(config.cpus_per_worker / _WORKERS_SHARE))
    return max(1, math.floor(min(shares)))


def _fits_beside(config: TrainConfig, workers: int, cpus: float, decode: float, available: Resources) -> bool:
    """Whether the workers can be placed so that some node has room for a decoding task."""
    for place, node in enumerate(available.nodes):
        left = replace(node, cpus=node.cpus - decode + 1e-6)
        others = available.nodes[:place] + available.nodes[place + 1 :]
        if left.cpus >= 0 and Resources((left, *others)).room_for(cpus, config.gpus_per_worker) >= workers:
            return True
    return False


def _decode_cpus(config: TrainConfig, cpus: float, available: Resources) -> float:
    free = _check_left(config, cpus, config.decode_cpus, available)
    if config.decode_cpus:
        return math.floor(config.decode_cpus * 1000) / 1000
    # After the loss of a node, only the CPUs that the workers leave on their own nodes may be free.
    beside = [left for workers, left in (_filled(config, cpus, node) for node in available.nodes) if workers]
    decode = min(1.0, free / max(2, config.most_workers), *(left for left in beside if left > _LEAST_DECODE_CPUS))
    return math.floor(decode * 1000) / 1000


def _elastic_decode_cpus(config: TrainConfig, cpus: float, available: Resources) -> float:
    """CPUs of a decoding task so that every node has room for a task of each of its workers: others may be lost."""
    shares = []
    for node in available.nodes:
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
    """The most workers that a node may get, and the CPUs that they leave."""
    workers = min(config.most_workers, Resources((node,)).room_for(cpus, config.gpus_per_worker))
    return workers, node.cpus - workers * cpus


def _elastic_cpus(config: TrainConfig, available: Resources) -> float:
    """The largest CPU share, in sixteenths, at which all workers fit the nodes without filling any."""
    largest = available.cpus * _WORKERS_SHARE / config.most_workers
    if config.gpus_per_worker:
        largest = min(1.0, largest)
    # Nodes with more GPUs may be added.
    wanted = min(config.most_workers, available.room_for(1 / SIXTEENTHS, config.gpus_per_worker))
    for sixteenths in range(math.floor(largest * SIXTEENTHS), 0, -1):
        cpus = sixteenths / SIXTEENTHS
        if available.room_for(cpus, config.gpus_per_worker) < wanted:
            continue
        filled = [(node, *_filled(config, cpus, node)) for node in available.nodes]
        if all(free >= node.cpus * _LEFT_OF_A_NODE for node, workers, free in filled if workers):
            return cpus
    raise ClusterError(f"{config.most_workers} workers do not fit {available.cpus:g} CPUs: lower --max-workers.")


def check_cpus(config: TrainConfig, cpus: float) -> None:
    """Refuse more workers than CPUs; this is known before Ray starts.

    Raises:
        ClusterError: see `share_out`.
    """
    workers = config.fewest_workers
    needed = (config.cpus_per_worker or (1 if cpus >= workers else math.inf)) * workers
    if needed > cpus:
        each = f" of {config.cpus_per_worker:g} CPUs" if config.cpus_per_worker else ""
        raise ClusterError(
            f"{workers} workers{each} do not fit {cpus:g} CPUs: lower --max-workers, or give each a fraction "
            "with --cpus-per-worker."
        )


def _default_cpus(config: TrainConfig, available: Resources) -> float:
    """The largest equal CPU share that fits the nodes, in whole CPUs if there are enough for several workers."""
    share = available.cpus * _WORKERS_SHARE / config.most_workers
    if config.gpus_per_worker:
        return min(1.0, share)
    for cpus in range(math.floor(share), 0, -1):
        if available.room_for(cpus, 0) >= config.most_workers:
            # One worker of 1.5 CPUs has two threads.
            return share if config.most_workers == cpus == 1 and available.room_for(share, 0) else float(cpus)
    return math.floor(min(share, 1.0) * 1000) / 1000
