"""`POST /jobs` and `GET /jobs/ID`: predictions over lists of images, as jobs on the cluster that serves."""

from typing import Annotated, Literal

import pydantic
from starlette.requests import Request

from cnnray.images import storage
from cnnray.serving import job_queue
from cnnray.serving.bodies import RequestError, parse_model
from cnnray.serving.job_queue import JobQueue
from cnnray.serving.operations import Operation
from cnnray.serving.service import Service
from cnnray.serving.settings import JobSettings

_TAG = "Jobs"


class JobRequest(pydantic.BaseModel):
    """Images to classify."""

    model_config = pydantic.ConfigDict(extra="forbid")

    uris: Annotated[
        list[Annotated[str, pydantic.Field(min_length=1)]],
        pydantic.Field(min_length=1, description="Paths or addresses of the images, below the allowed prefixes."),
    ]
    model: Annotated[str | None, pydantic.Field(description="Name of the model; by default the first one.")] = None
    version: Annotated[
        str | None,
        pydantic.Field(
            description="Version of the model; by default the one with the largest share. The job fails if the "
            "bundle's path holds another one when it begins."
        ),
    ] = None


class JobAnswer(pydantic.BaseModel):
    """A job."""

    id: str
    state: Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
    message: str = pydantic.Field(description="Why it failed; otherwise empty.")
    rows: str = pydantic.Field(description="Folder or prefix of the rows, as `jobs/predict.py` writes them.")


async def _submit(service: Service, request: Request) -> JobAnswer:
    """Classify a list of images in a job, whose rows are files."""
    queue, settings = _queue(service)
    # Where there are many uris, in a thread.
    asked, uris = await service.read(request, lambda body, _: _parse(body, settings))
    if asked.version is None:
        served = service.ready_models().main(service.choose_model(asked.model).name)
    else:
        served = service.choose_model(asked.model, asked.version)
    job = await queue.submit(settings, uris, bundle=served.bundle.uri, version=served.version, engine=served.engine)
    return JobAnswer.model_validate(job, from_attributes=True)


async def _find(service: Service, request: Request) -> JobAnswer:
    """The state of a job, and where its rows are."""
    queue, settings = _queue(service)
    job = request.path_params["job"]
    if not job_queue.is_job(job):
        raise job_queue.no_such_job(job)
    return JobAnswer.model_validate(await queue.find(settings, job), from_attributes=True)


def _parse(body: bytes, settings: JobSettings) -> tuple[JobRequest, list[str]]:
    """What is asked for, and the absolute uris of its images.

    Raises:
        RequestError: 400, the body cannot be read; 403, the operator does not allow an image.
    """
    asked = parse_model(JobRequest, body)
    return asked, [_allowed(uri, settings) for uri in asked.uris]


def _queue(service: Service) -> tuple[JobQueue, JobSettings]:
    settings = service.settings.jobs if service.settings else None
    if service.queue is None or settings is None:
        raise RequestError(403, "This service takes no jobs: it was started without --jobs-output.")
    return service.queue, settings


def _allowed(uri: str, settings: JobSettings) -> str:
    """The absolute uri of an image.

    Raises:
        RequestError: 403, the operator does not allow it.
    """
    try:
        absolute = storage.absolute(uri)
    except (OSError, ValueError, RuntimeError):  # another scheme, or ~ of a user that there is not
        absolute = ""
    is_below = any(absolute.startswith(f"{prefix.rstrip('/')}/") for prefix in settings.prefixes)
    if ".." in absolute.split("/") or not is_below:
        raise RequestError(403, f"{uri[:200]!r} is not below an allowed prefix.")
    return absolute


OPERATIONS = [
    Operation(
        "POST", "/jobs", _submit, bodies={"application/json": JobRequest}, answer=JobAnswer, tag=_TAG,
        failures=(400, 401, 403, 404, 408, 413, 429, 500, 503), status=202,
    ),
    Operation(
        "GET", "/jobs/{job}", _find, answer=JobAnswer, tag=_TAG, failures=(401, 403, 404, 429, 500, 503),
    ),
]  # fmt: skip
