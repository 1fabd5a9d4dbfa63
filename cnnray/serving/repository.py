"""Triton's model repository extension: models are loaded and unloaded while the service runs.

A change is one of all replicas, and of those that start later, until `jobs/serve.py` deploys the service anew.
"""

import asyncio
import logging
import time
from typing import Annotated, Any

import pydantic
from starlette.requests import Request

from cnnray.images import storage
from cnnray.models.bundle import BundleError
from cnnray.serving.bodies import RequestError, parse_model
from cnnray.serving.coordinator import Coordination
from cnnray.serving.models import find_engine
from cnnray.serving.operations import Bodies, Operation
from cnnray.serving.releases import ChangeError
from cnnray.serving.service import Service
from cnnray.serving.settings import NAME, NAME_CHARACTERS, ModelSettings, Settings

log = logging.getLogger(__name__)

_TAG = "Model repository"
_CHANGE_SECONDS = 300.0
"""Seconds in which a replica must have loaded a model."""


class LoadConfig(pydantic.BaseModel):
    """What is loaded."""

    model_config = pydantic.ConfigDict(extra="forbid")

    uri: Annotated[
        str | None,
        pydantic.Field(
            min_length=1, description="Folder or s3:// prefix of the bundle; null: that of the newest version."
        ),
    ] = None
    share: Annotated[
        float,
        pydantic.Field(ge=0, le=1, description="Share of the requests that it answers; below 1, it is a canary."),
    ] = 1.0


class LoadParameters(LoadConfig):
    """Parameters of a request to load a model: the values themselves, or all of them as JSON in `config`."""

    config: str | None = None


class LoadRequest(pydantic.BaseModel):
    """A request to load a model."""

    parameters: LoadParameters = LoadParameters()


async def _index(service: Service, request: Request) -> list[dict[str, str]]:
    """The models that are loaded."""
    return [
        {"name": served.name, "version": served.version, "state": "READY", "reason": ""}
        for served in service.ready_models().all
    ]


async def _load(service: Service, request: Request) -> dict[str, Any]:
    """Load a bundle as a model, or as a new version of it."""
    name = request.path_params["model"]
    if not NAME.fullmatch(name):
        raise RequestError(400, f"{name!r} cannot be a name: expected {NAME_CHARACTERS}.")
    asked = await service.read(request, lambda body, _: _parse(body))
    service.ready_models()
    settings = service.settings
    assert settings is not None
    places = {model.uri: model.version for model in settings.models if model.name == name}
    if asked.uri is None and not places:
        raise RequestError(400, f"{name} is not served yet: give the uri of its bundle.")
    uri = list(places)[-1] if asked.uri is None else storage.absolute(asked.uri)
    try:
        bundle, engine, digest = await asyncio.to_thread(
            find_engine, uri, settings.engine, gpus=service.gpus, batch_size=settings.batch_size
        )
        if asked.share < 1 and places.get(bundle.uri) not in (None, bundle.version):
            raise ChangeError(
                f"{bundle.uri} held {places[bundle.uri]}, which no new replica could load: write the canary's bundle "
                "at another path."
            )
        new = ModelSettings(
            name=name, uri=bundle.uri, share=asked.share, version=bundle.version, engine=engine, digest=digest
        )
        change = await _coordination(service).load(new, settings)
    except (BundleError, ChangeError, OSError) as error:
        raise RequestError(400, str(error)) from None
    await asyncio.shield(_finish(service, *change, name, bundle.version))  # also where the client leaves
    return {}


async def _unload(service: Service, request: Request) -> dict[str, Any]:
    """Serve a model no more."""
    name = request.path_params["model"]
    try:
        change = await _coordination(service).unload(name)
    except ChangeError as error:
        raise RequestError(400, str(error)) from None
    await asyncio.shield(_finish(service, *change, name))
    return {}


def _parse(body: bytes) -> LoadConfig:
    parameters = parse_model(LoadRequest, body or b"{}").parameters
    return parameters if parameters.config is None else parse_model(LoadConfig, parameters.config.encode())


def _coordination(service: Service) -> Coordination:
    """
    Raises:
        RequestError: 503, there is none.
    """
    if service.coordination is None:
        raise RequestError(503, "The models of this service cannot be changed by requests.")
    return service.coordination


async def _finish(service: Service, before: Settings, after: Settings, name: str, version: str | None = None) -> None:
    """Wait until this replica serves a model as settings say. If it cannot, go back to the settings before.

    Raises:
        RequestError: 400, it cannot; 503, it takes too long.
    """
    end = time.monotonic() + _CHANGE_SECONDS
    while not _has(service.tried, after, name):
        if time.monotonic() > end:
            await _undo(service, before, after)
            raise RequestError(503, f"The models are not loaded after {_CHANGE_SECONDS:g} seconds.")
        await asyncio.sleep(0.1)
    if problem := service.change_problem or service.problems.get((name, version)):
        await _undo(service, before, after)
        raise RequestError(400, problem)


def _has(tried: Settings | None, after: Settings, name: str) -> bool:
    """Whether settings that were tried have a model as a change has it, or a later one."""

    def revision(settings: Settings) -> int | None:
        return max((model.revision for model in settings.models if model.name == name), default=None)

    if tried is None:
        return False
    at, wanted = revision(tried), revision(after)
    return at == wanted if at is None or wanted is None else at >= wanted


async def _undo(service: Service, before: Settings, after: Settings) -> None:
    try:
        await _coordination(service).undo(before, after)
    except Exception as error:  # the client is to hear why the change failed
        log.warning("a change of the models that failed stays: %s", error)


_BODIES: Bodies = {"application/json": LoadRequest}
_FAILURES = (400, 401, 403, 404, 408, 413, 429, 500, 503)
OPERATIONS = [
    Operation(
        "POST", "/v2/repository/index", _index, answer=list[dict[str, str]], failures=(401, 429, 503), tag=_TAG
    ),
    *(
        Operation(
            "POST",
            f"/v2/repository/models/{{model}}/{verb}",
            handler,
            bodies=bodies,
            failures=_FAILURES,
            tag=_TAG,
            for_admins=True,
        )
        for verb, handler, bodies in (("load", _load, _BODIES), ("unload", _unload, {}))
    ),
]
