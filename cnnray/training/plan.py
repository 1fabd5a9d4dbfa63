"""The plan of a run: its workers, which share of the cluster they and the decoding tasks get, and what each receives.

It is decided, or refused with a sentence, before anything waits for resources.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from cnnray import configs
from cnnray.cluster import ClusterError, Node, Resources
from cnnray.models import own_network, startup
from cnnray.models.bundle import BundleInfo
from cnnray.training.config import SIXTEENTHS, TrainConfig
from cnnray.training.decided import PLANNED, DecidedConfig, PlannedConfig
from cnnray.training.recipe_config import Precision

_WORKERS_SHARE = 0.75
_CACHE_SHARE = 0.2
_LEFT_OF_A_NODE, _LEAST_DECODE_CPUS = 1 / 8, 0.01
_BFLOAT16 = re.compile(r"(A|L|H|B|GH|GB|RTX-A|RTX-PRO-)\d")
"""Matches the types of GPUs that compute in bfloat16: NVIDIA's from Ampere on (2020)."""


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

    config: PlannedConfig
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
    has_lanes: bool
    """See `data.need_lanes`."""
    is_in_parquet: bool
    """Whether some of the images are in Parquet files."""
    started: float
    """When the job began, in seconds since the epoch."""
    lease_holder: str
    """See `lease.Lease.holder`."""
    network: own_network.Function | None = None
    """The function that `architecture` names, where Python did not find it by its name."""


def planned(
    config: DecidedConfig, *, workers: int = 1, gpus: float = 0.0, precision: Precision = "float32"
) -> PlannedConfig:
    """The config with these values where it leaves them open."""
    values: dict[str, Any] = {"max_workers": workers, "gpus_per_worker": gpus, "precision": precision}
    stated = {name: value for name in PLANNED if (value := getattr(config, name)) is not None}
    return PlannedConfig(**configs.fields_of(config, DecidedConfig) | values | stated)


def place(config: DecidedConfig, images: int, available: Resources, *, parallel: int = 1) -> PlannedConfig:
    """Decide the number of workers, whether they have GPUs, and the type that they compute in.

    Args:
        config: the flags. What they state is kept.
        images: training images.
        available: the cluster.
        parallel: such runs share it.
    """
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = float(_gpus(available) >= parallel * config.fewest_workers and startup.is_built_for_gpus())
    workers = min(_most_workers(config, gpus, available) // parallel, images, config.batch_size)
    kinds = available.gpu_types if gpus else set()
    computes = bool(kinds) and all(kind and _BFLOAT16.match(kind) for kind in kinds)
    return planned(
        config,
        workers=max(workers, config.most_workers),
        gpus=gpus,
        precision="bfloat16" if computes else "float32",
    )


def _most_workers(config: TrainConfig, gpus: float, available: Resources) -> int:
    """One worker for each GPU, or for each node.

    Each step waits for the slowest worker: as many of the largest nodes are used as have the most CPUs together, if
    all count as the smallest of them.
    """
    if gpus:
        return _gpus(available)
    cpus = sorted((node.cpus for node in available.nodes if node.cpus >= (config.cpus_per_worker or 0)), reverse=True)
    together = [(count * smallest, -count) for count, smallest in enumerate(cpus, 1)]
    return -max(together)[1] if together else 1


def _gpus(available: Resources) -> int:
    """The number of whole GPUs."""
    return sum(int(node.gpus) for node in available.nodes)


def describe(config: PlannedConfig, shares: Shares, available: Resources, decoded: str) -> list[str]:
    """The plan in three lines.

    Args:
        config: of the run.
        shares: of the cluster.
        available: the cluster.
        decoded: what becomes of the decoded images.
    """
    least, most = config.fewest_workers, config.most_workers
    kinds = ", ".join(sorted(kind for kind in available.gpu_types if kind))
    gpu = f"{config.gpus:g} GPU{f' ({kinds})' if kinds else ''} and " if config.gpus else ""
    threads = shares.threads_per_worker
    share = math.ceil(config.batch_size / most)
    fewer = f", or more with fewer than {most} workers" if config.is_elastic else ""
    at_once = f"; at most {config.images_per_worker} at once" if config.images_per_worker else ""
    return [
        f"workers: {f'{least} to {most}' if config.is_elastic else most}, each of {gpu}{shares.cpus_per_worker:g} "
        f"CPU(s) ({threads} thread(s)), computing in {config.precision}; of a cluster of {len(available.nodes)} "
        f"node(s), {available.cpus:g} CPUs and {available.gpus:g} GPUs{_why_unused(config, available)}",
        f"each step: {config.batch_size} images, {share} of each worker{fewer}{at_once}",
        f"images: {decoded}",
    ]


def _why_unused(config: PlannedConfig, available: Resources) -> str:
    if config.gpus or not available.gpus:
        return ""
    if not startup.is_built_for_gpus():
        return ", which this TensorFlow cannot use: install requirements-gpu.lock"
    return ", which are not used (--gpus-per-worker 0, or fewer GPUs than workers)"


def share_out(config: TrainConfig, available: Resources) -> Shares:
    """Share out a cluster between workers and decoding tasks.

    Ray Data's tasks wait for ever where the workers hold all CPUs, so some CPUs are always left to the tasks: some of
    the cluster's, and with elastic workers, which may move to any node, some of each node.

    Raises:
        ClusterError: the cluster has too little, in one sentence with what would fit.
    """
    check_cpus(config, available.cpus)
    workers = config.fewest_workers
    if config.gpus * workers > available.gpus:
        raise ClusterError(
            f"{workers} worker(s) with a GPU each do not fit a cluster of {available.gpus:g} GPUs: lower "
            "--max-workers, or use --gpus-per-worker 0."
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
    worker = {"CPU": config.cpus_per_worker or 1.0, "GPU": config.gpus}
    return [worker] * config.most_workers + [{"CPU": config.decode_cpus or 1.0}]


def fewest_workers(config: TrainConfig, shares: Shares) -> list[dict[str, float]]:
    """The resources of each of the workers that a run needs at least."""
    return [{"CPU": shares.cpus_per_worker, "GPU": config.gpus}] * config.fewest_workers


def check_fit(config: TrainConfig, shares: Shares, available: Resources) -> None:
    """Refuse a cluster that has lost so many nodes that the shares of a run no longer fit.

    Raises:
        ClusterError: see `share_out`.
    """
    _check_room(config, shares.cpus_per_worker, available)
    _check_left(config, shares.cpus_per_worker, shares.decode_cpus, available)


def _check_room(config: TrainConfig, cpus: float, available: Resources) -> None:
    if (room := available.room_for(cpus, config.gpus)) < config.fewest_workers:
        raise ClusterError(
            f"Only {room} of {config.fewest_workers} worker(s) of {cpus:g} CPUs and {config.gpus:g} GPUs "
            f"fit the cluster's {len(available.nodes)} node(s): lower --max-workers or --cpus-per-worker."
        )


def _check_left(config: TrainConfig, cpus: float, decode: float | None, available: Resources) -> float:
    workers = min(config.most_workers, available.room_for(cpus, config.gpus))
    free = available.cpus - cpus * workers
    if free <= 0 or (decode and not _fits_beside(config, workers, cpus, decode, available)):
        raise ClusterError(
            f"{workers} worker(s) of {cpus:g} CPUs leave {max(free, 0):g} of the cluster's {available.cpus:g} CPUs, "
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
        if left.cpus >= 0 and Resources((left, *others)).room_for(cpus, config.gpus) >= workers:
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
                    f"{workers} worker(s) of {cpus:g} CPUs leave {free:g} of a node's {node.cpus:g} CPUs, and "
                    f"reading the images needs {config.decode_cpus or 'some'} where other nodes are lost: choose "
                    "another --cpus-per-worker."
                )
    return config.decode_cpus or min(1.0, math.floor(min(shares) * 1000) / 1000)


def _filled(config: TrainConfig, cpus: float, node: Node) -> tuple[int, float]:
    """The most workers that a node may get, and the CPUs that they leave."""
    workers = min(config.most_workers, Resources((node,)).room_for(cpus, config.gpus))
    return workers, node.cpus - workers * cpus


def _elastic_cpus(config: TrainConfig, available: Resources) -> float:
    """The largest CPU share, in sixteenths, at which all workers fit the nodes without filling any."""
    largest = available.cpus * _WORKERS_SHARE / config.most_workers
    if config.gpus:
        largest = min(1.0, largest)
    # Nodes with more GPUs may be added.
    wanted = min(config.most_workers, available.room_for(1 / SIXTEENTHS, config.gpus))
    for sixteenths in range(math.floor(largest * SIXTEENTHS), 0, -1):
        cpus = sixteenths / SIXTEENTHS
        if available.room_for(cpus, config.gpus) < wanted:
            continue
        filled = [(node, *_filled(config, cpus, node)) for node in available.nodes]
        if all(free >= node.cpus * _LEFT_OF_A_NODE for node, workers, free in filled if workers):
            return cpus
    raise ClusterError(f"{config.most_workers} worker(s) do not fit {available.cpus:g} CPUs: lower --max-workers.")


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
            f"{workers} worker(s){each} do not fit {cpus:g} CPUs: lower --max-workers, or give each a fraction "
            "with --cpus-per-worker."
        )


def _default_cpus(config: TrainConfig, available: Resources) -> float:
    """The largest equal CPU share that fits the nodes, in whole CPUs if there are enough for several workers."""
    share = available.cpus * _WORKERS_SHARE / config.most_workers
    if config.gpus:
        return min(1.0, share)
    for cpus in range(math.floor(share), 0, -1):
        if available.room_for(cpus, 0) >= config.most_workers:
            # One worker of 1.5 CPUs has two threads.
            return share if config.most_workers == cpus == 1 and available.room_for(share, 0) else float(cpus)
    return math.floor(min(share, 1.0) * 1000) / 1000
