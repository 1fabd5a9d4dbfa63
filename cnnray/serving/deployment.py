"""The Ray Serve deployment, which `import_path` in Serve's configuration names."""

import asyncio
import logging
import logging.handlers
import math
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._common.ray_constants import LOGGING_ROTATE_BACKUP_COUNT, LOGGING_ROTATE_BYTES
from ray.serve._private.common import RUNNING_REQUESTS_KEY
from ray.serve._private.logging_utils import get_serve_logs_dir
from ray.serve.grpc_util import RayServegRPCContext
from starlette.types import ASGIApp

from cnnray.serving import direct, free_memory
from cnnray.serving.application import create_application
from cnnray.serving.coordinator import Coordination
from cnnray.serving.job_queue import JobQueue
from cnnray.serving.keys import Keys, read_keys
from cnnray.serving.open_inference_grpc import GrpcGate
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings


@serve.deployment
@serve.ingress()
class Classifier:
    """A replica: decodes and predicts in its own process, and can replace its models while it answers requests."""

    def __init__(self) -> None:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        context = serve.get_replica_context()
        _write_logs(f"access_{context.app_name}_{context.deployment}_{context.replica_id.unique_id}.log")
        self._service = Service(
            threads=max(1, math.ceil(cpus)),
            gpus=bool(ray.get_gpu_ids()),
            coordination=Coordination(context.app_name, context.deployment, context.replica_id.unique_id),
            queue=JobQueue(),
        )
        free_memory.return_regularly()
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
    """Writes records as Serve's logger does at that time: its handlers change with the configuration.

    Serve keeps up to a thousand records in memory. These are few, and one who looks at the log needs the last ones.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        for handler in logging.getLogger("ray.serve").handlers:
            handler.handle(record)
            handler.flush()


def _write_logs(access_log: str) -> None:
    """Write the records of cnnray to Serve's log, and those of requests to a file beside it, rotated as Serve's."""
    lines = logging.handlers.RotatingFileHandler(
        Path(get_serve_logs_dir(), access_log),
        maxBytes=LOGGING_ROTATE_BYTES,
        backupCount=LOGGING_ROTATE_BACKUP_COUNT,
        encoding="utf-8",
    )
    for name, handler in (("cnnray", _ServeHandlers()), ("cnnray.access", lines)):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False


app = Classifier.bind()  # type: ignore[attr-defined] # Serve's decorators have no types here
