"""The Ray Serve deployment, which `import_path` in Serve's configuration names."""

import asyncio
import contextlib
import logging
import logging.handlers
import math
import queue
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import RUNNING_REQUESTS_KEY
from ray.serve.grpc_util import RayServegRPCContext
from starlette.types import ASGIApp

from cnnray.serving import direct
from cnnray.serving.application import create_application
from cnnray.serving.coordinator import Coordination
from cnnray.serving.job_queue import JobQueue
from cnnray.serving.keys import Keys, read_keys
from cnnray.serving.open_inference_grpc import GrpcGate
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

_MOST_LINES = 10_000
"""Of the access log, those that wait to be written."""


@serve.deployment
@serve.ingress()
class Classifier:
    """A replica: decodes and predicts in its own process, and can replace its models while it answers requests."""

    def __init__(self) -> None:
        _log_as_serve_does()
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        context = serve.get_replica_context()
        self._service = Service(
            threads=max(1, math.ceil(cpus)),
            gpus=bool(ray.get_gpu_ids()),
            coordination=Coordination(context.app_name, context.deployment, context.replica_id.unique_id),
            queue=JobQueue(),
        )
        self._keys = Keys(read_keys())
        self._grpc = GrpcGate(self._service, self._keys)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once, after the constructor."""
        self._reading_keys = asyncio.create_task(self._keys.read_again())  # held, as the event loop does not
        return direct.register(
            create_application(self._service, self._keys),
            by_ray=create_application(self._service, self._keys, behind_ray=True),
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve before the first request, and whenever `user_config` has changed."""
        await self._service.change_settings(Settings.from_dict(user_config))

    async def ServerLive(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802 - the protocol's name
        """Called by Serve for gRPC requests, like the methods that follow; see `open_inference_grpc`."""
        return await self._grpc.answer("ServerLive", request, grpc_context)

    async def ServerReady(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802 - the protocol's name
        """See `ServerLive`."""
        return await self._grpc.answer("ServerReady", request, grpc_context)

    async def ServerMetadata(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802 - the protocol's name
        """See `ServerLive`."""
        return await self._grpc.answer("ServerMetadata", request, grpc_context)

    async def ModelReady(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802 - the protocol's name
        """See `ServerLive`."""
        return await self._grpc.answer("ModelReady", request, grpc_context)

    async def ModelMetadata(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802 - the protocol's name
        """See `ServerLive`."""
        return await self._grpc.answer("ModelMetadata", request, grpc_context)

    async def ModelInfer(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802 - the protocol's name
        """See `ServerLive`."""
        return await self._grpc.answer("ModelInfer", request, grpc_context)

    def __del__(self) -> None:
        """Called by Serve at the end of the replica."""
        self._service.close()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, whose autoscaler follows this number instead of its own count of requests."""
        return {RUNNING_REQUESTS_KEY: float(self._service.admission.load)}

    async def check_health(self) -> None:
        """Called by Serve every few seconds. Serve replaces a replica whose engine does not answer."""
        await self._service.check_health()


class _ServeHandlers(logging.Handler):
    """Writes records as Serve's logger does at that time: its handlers change with the configuration."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        for handler in logging.getLogger("ray.serve").handlers:
            handler.handle(record)


class _BoundedHandler(logging.handlers.QueueHandler):
    """Leaves out what does not fit into its queue: a disk that hangs must not take the memory."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """See `QueueHandler`."""
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


def _log_as_serve_does() -> None:
    """Write the records of cnnray to Serve's log; those of requests in a thread, so that no request waits for it."""
    records: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_LINES)
    logging.handlers.QueueListener(records, _ServeHandlers()).start()
    of_requests = _BoundedHandler(records)
    for name, handler in (("cnnray", _ServeHandlers()), ("cnnray.access", of_requests)):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


app = Classifier.bind()  # type: ignore[attr-defined] # Serve's decorators have no types here
