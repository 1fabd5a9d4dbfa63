"""Serve's controller, through which what is served is read and changed."""

import importlib
from typing import Any

from cnnray.serving.releases import ChangeError
from cnnray.serving.settings import Settings

APPLICATION, DEPLOYMENT, MODULE = "cnnray", "Classifier", "cnnray.serving.deployment"
"""Names of the application and its deployment in Serve, and the module that holds them."""


class OwnServe:
    """Serve on the Ray that this process has started: what `ServeSubmissionClient` does, without a dashboard."""

    def __init__(self, module: str) -> None:
        """Let the process that will import the application for Serve's controller do so while that starts."""
        import ray

        ray.remote(num_cpus=0)(importlib.import_module).remote(module)
        self._controller: Any = None

    def deploy_applications(self, configuration: dict[str, Any]) -> None:
        """Start Serve if it does not run, and deploy. Proxies and applications start side by side."""
        import ray
        from ray.serve._private import api
        from ray.serve.config import ControllerOptions
        from ray.serve.schema import ServeDeploySchema

        schema = ServeDeploySchema.model_validate(configuration)
        if self._controller is None:
            # `serve.start` would wait for the proxies.
            self._controller, _ = api._create_controller_and_proxy_refs(
                http_options=schema.http_options.model_dump(),
                grpc_options=schema.grpc_options.model_dump(),
                global_logging_config=schema.logging_config,
                global_tracing_config=None,
                controller_options=ControllerOptions(),
                proxy_location=schema.proxy_location,
            )
        ray.get(self._controller.apply_config.remote(schema))

    def get_serve_details(self) -> dict[str, Any]:
        """The state of Serve, as in the answer of its REST API."""
        import ray

        if self._controller is None:
            return {}
        details: dict[str, Any] = ray.get(self._controller.get_serve_instance_details.remote())
        return details


def rest_client() -> Any:
    """The client of the cluster's dashboard, through which its Serve is changed."""
    import ray
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    context = ray.init(ignore_reinit_error=True, logging_level="ERROR")
    return ServeSubmissionClient(f"http://{context.dashboard_url}")


def other_applications(details: dict[str, Any], application: str = APPLICATION) -> list[dict[str, Any]]:
    """The configurations of the applications beside one, which Serve deletes if a new configuration lacks them."""
    return [
        entry["deployed_app_config"]
        for name, entry in details.get("applications", {}).items()
        if name != application and entry.get("deployed_app_config")
    ]


class ServedSettings:
    """The settings that Serve gives to all replicas of a deployment, in a process of the cluster."""

    def __init__(self, application: str, deployment: str) -> None:
        self._application, self._deployment = application, deployment

    def read(self) -> Settings:
        """The present settings."""
        return Settings.from_dict(self._find(self._details())["user_config"])

    def write(self, before: Settings, after: Settings) -> None:
        """Change the settings of all replicas, which go on to answer requests meanwhile.

        Raises:
            ChangeError: they are not the settings that they are to be changed from.
        """
        import ray
        from ray.serve.schema import ServeDeploySchema

        details = self._details()
        deployment = self._find(details)
        if Settings.from_dict(deployment["user_config"]) != before:
            raise ChangeError("Somebody else has changed the service at the same time: try again.")
        deployment["user_config"] = after.as_dict()
        ours = details["applications"][self._application]["deployed_app_config"]
        others = other_applications(details, self._application)
        schema = ServeDeploySchema.model_validate(
            {"applications": [ours, *others], "target_capacity": details.get("target_capacity")}
        )
        ray.get(self._controller().apply_config.remote(schema))

    def _find(self, details: dict[str, Any]) -> dict[str, Any]:
        ours = details["applications"][self._application]["deployed_app_config"]
        (found,) = (entry for entry in ours["deployments"] if entry["name"] == self._deployment)
        deployment: dict[str, Any] = found
        return deployment

    def _details(self) -> dict[str, Any]:
        import ray

        details: dict[str, Any] = ray.get(self._controller().get_serve_instance_details.remote())
        return details

    @staticmethod
    def _controller() -> Any:
        import ray
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
