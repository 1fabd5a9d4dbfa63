"""Nodes without a worker decode for workers that wait for images."""

import json
import logging
import os
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cnnray.images import decoder_process
from cnnray.images.decoders import Decoders

log = logging.getLogger(__name__)

_SECONDS, _SHARE = 5.0, 0.1
"""A worker that has waited for images for a larger share of so many seconds asks other nodes."""


def free_cpus(rank: int, world: int) -> list[str]:
    """The CPUs of nodes without a worker, of which this worker may use its share: the id of its node for each CPU.

    Args:
        rank: of this worker.
        world: number of workers.
    """
    workers: list[str] = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
    hosts = {worker.rpartition(":")[0].strip("[]") for worker in workers}
    cpus = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeManagerAddress"] not in hosts
        for _ in range(int(node["Resources"].get("CPU", 0)))
    ]
    return cpus[rank::world]


class OtherNodes:
    """Lets other nodes decode for this worker once its own node is too slow."""

    def __init__(self, decoders: Decoders, cpus: list[str]) -> None:
        """
        Args:
            decoders: of this worker.
            cpus: from `free_cpus`.
        """
        self._decoders, self._left, self._started = decoders, cpus, 0
        self._clock: float | None = None
        self._waited = 0.0
        self._invitation: tuple[Any, ...] = decoders.invite(ray.util.get_node_ip_address()) if cpus else ()

    def ask(self) -> None:
        """Start tasks on other nodes, twice as many as before, if the last seconds were spent waiting for images.

        The tasks end with this process, or when its decoders are closed.
        """
        now, waited = time.monotonic(), self._decoders.waited
        if self._clock is None:  # the first batch waits for the processes to start
            self._clock, self._waited = now, waited
        if not self._left or now - self._clock < _SECONDS:
            return
        is_slow = waited - self._waited > _SHARE * (now - self._clock)
        self._clock, self._waited = now, waited
        if is_slow:
            count = max(1, self._started)
            more, self._left = self._left[:count], self._left[count:]
            for node in more:
                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
                task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy=strategy)(decoder_process.join)
                task.remote(*self._invitation)
            self._started += len(more)
            log.info("%d CPUs of other nodes are asked to decode for this worker", self._started)
