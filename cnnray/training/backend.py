"""Makes Ray Train's workers those of TensorFlow: `TF_CONFIG` gets the addresses of all.

Ray's own `ray.train.tensorflow` does the same, but imports TensorFlow into the driver and the controller too
(five seconds each) and asks for Keras 2 (`TF_USE_LEGACY_KERAS`).
"""

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


@dataclass
class MultiWorkerConfig(BackendConfig):
    """Set up `TF_CONFIG` on each worker."""

    @property
    def backend_cls(self) -> type["_MultiWorkerBackend"]:
        """What Ray Train runs at the start of a worker group."""
        return _MultiWorkerBackend


class _MultiWorkerBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses, rank)
                for rank in range(len(addresses))
            ]
        )


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    )
