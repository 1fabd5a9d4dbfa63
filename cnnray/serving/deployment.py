"""The Ray Serve deployment: what `import_path` in a configuration of Serve names."""

import logging
import math
import os
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from cnnray.serving.application import application
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings

API_KEY = "CNNRAY_API_KEY"
"""Environment variable; where it is set, requests must bring the key."""


@serve.deployment
@serve.ingress()
class Classifier:
    """A replica: decodes and predicts in its own process, and changes its models while it answers."""

    def __init__(self) -> None:
        for name in ("cnnray", "cnnray.access"):
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).handlers = logging.getLogger("ray.serve").handlers
            logging.getLogger(name).propagate = False
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        self._service = Service(threads=max(1, math.ceil(cpus)), gpus=bool(ray.get_gpu_ids()))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once, after the constructor."""
        return application(self._service, os.environ.get(API_KEY) or None, names_requests=False)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve before the first request, and whenever `user_config` has changed."""
        await self._service.change(Settings.of(user_config))

    async def check_health(self) -> None:
        """Called by Serve every few seconds: an engine that does not answer has its replica replaced."""
        await self._service.check()


app = Classifier.bind()  # type: ignore[attr-defined] # Serve's decorators have no types here
