"""The Ray Serve deployment, which `import_path` in Serve's configuration names."""

import logging
import math
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from cnnray.serving.application import create_application
from cnnray.serving.service import Service
from cnnray.serving.settings import Settings, api_key


@serve.deployment
@serve.ingress()
class Classifier:
    """A replica: decodes and predicts in its own process, and can replace its models while it answers requests."""

    def __init__(self) -> None:
        for name in ("cnnray", "cnnray.access"):
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).handlers = logging.getLogger("ray.serve").handlers
            logging.getLogger(name).propagate = False
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
        self._service = Service(threads=max(1, math.ceil(cpus)), gpus=bool(ray.get_gpu_ids()))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once, after the constructor."""
        return create_application(self._service, api_key(), adds_request_ids=False)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve before the first request, and whenever `user_config` has changed."""
        await self._service.change_settings(Settings.from_dict(user_config))

    async def check_health(self) -> None:
        """Called by Serve every few seconds. Serve replaces a replica whose engine does not answer."""
        await self._service.check_health()


app = Classifier.bind()  # type: ignore[attr-defined] # Serve's decorators have no types here
