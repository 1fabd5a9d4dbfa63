"""Predictions that take longer than a request: jobs of Ray, on the cluster that serves."""

import asyncio
import io
import logging
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

import cnnray
from cnnray.images import storage
from cnnray.serving.bodies import RequestError
from cnnray.serving.keys import API_KEY, API_KEY_FILE
from cnnray.serving.settings import JobSettings

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_PREFIX = "cnnray-predict-"
_MOST_UNFINISHED = 16
_THREADS, _MOST_CALLS = 4, 64
"""Calls of Ray's job API at once, and those that wait for their turn, too."""
_ROWS = "rows"
"""In the metadata that Ray keeps of a job."""
_WAIT_MINUTES = 1440
"""That a job waits for free CPUs."""
_CALL_SECONDS, _SILENCE_SECONDS = 60.0, 30.0
"""Seconds after which a request is given up, and after which a job API that sends nothing is."""
_NOT_YET = "No available agent"
"""In the answer of Ray's job API while the agents of a cluster that has just started are not known."""


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job that was submitted."""

    id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """Why it failed, in one sentence; otherwise empty."""
    rows: str
    """Folder or s3:// prefix of its rows."""


class JobQueue:
    """Submits predictions to Ray's job API, and asks it for their state. Ray keeps both."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "jobs")
        self._calls: set[Future[Any]] = set()

    async def submit(
        self, settings: JobSettings, uris: Sequence[str], *, bundle: str, version: str, engine: str
    ) -> QueuedJob:
        """Submit a prediction.

        Args:
            settings: where its rows go.
            uris: of the images.
            bundle: uri of the bundle.
            version: `Bundle.version` that the bundle must have when the job begins.
            engine: name of the engine.

        Raises:
            RequestError: 503, there are too many jobs, or Ray's job API cannot be reached.
        """
        return await self._call(self._submit, settings, uris, bundle, version, engine)

    async def find(self, settings: JobSettings, job: str) -> QueuedJob:
        """The state of a job.

        Raises:
            RequestError: 404, there is no such job; 503, Ray's job API cannot be reached.
        """
        return await self._call(self._find, settings, job)

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        self._calls = {call for call in self._calls if not call.done()}
        if len(self._calls) >= _MOST_CALLS:
            raise RequestError(503, "Too many requests wait for Ray's job API: try again.")
        given_up = threading.Event()
        try:
            call = self._threads.submit(function, *arguments, given_up)
            self._calls.add(call)
            async with asyncio.timeout(_CALL_SECONDS):
                return await asyncio.wrap_future(call)
        except TimeoutError:
            raise RequestError(503, "Ray's job API does not answer: try again.") from None
        except (OSError, RuntimeError) as error:  # of the storage, and of Ray's client
            log.exception("a job cannot be submitted or looked up")
            raise RequestError(
                503,
                f"The job cannot be submitted or looked up ({type(error).__name__}): the replica's log says why.",
            ) from None
        finally:
            given_up.set()  # also where the client has left

    def _submit(
        self,
        settings: JobSettings,
        uris: Sequence[str],
        bundle: str,
        version: str,
        engine: str,
        given_up: threading.Event,
    ) -> QueuedJob:
        import ray

        client = _client()
        unfinished = [job for job in client.list_jobs()
                      if str(job.submission_id).startswith(_PREFIX) and not job.status.is_terminal()]  # fmt: skip
        if len(unfinished) >= _MOST_UNFINISHED:
            raise RequestError(503, f"{len(unfinished)} jobs are not done yet: try again later.")
        job = f"{_PREFIX}{uuid.uuid4().hex}"
        rows = storage.join(settings.place, job)
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pa.table({"uri": pa.array(uris, pa.string())}), buffer)
        table = storage.join(settings.place, f"{job}.parquet")
        storage.write_bytes(table, buffer.getvalue())
        context = ray.get_runtime_context()
        environment = _without_keys(dict(context.runtime_env))
        script, python = "jobs/predict.py", "python"
        if "working_dir" not in environment:  # Ray was started by `jobs/serve.py`, on this machine
            script, python = str(Path(cnnray.__file__).parents[1] / script), sys.executable
        flags = {
            "--bundle": bundle, "--bundle-version": version, "--input": table, "--output": rows, "--engine": engine,
            "--wait-minutes": str(_WAIT_MINUTES),
        }  # fmt: skip
        # Ray looks for the cluster of a job's process, and may find another one that runs on this machine.
        address = f"RAY_ADDRESS={context.gcs_address}"
        command = shlex.join(["env", address, python, script, *(word for pair in flags.items() for word in pair)])
        while not given_up.is_set():  # else the client has left, or been told to try again
            try:
                client.submit_job(
                    entrypoint=command, submission_id=job, runtime_env=environment, metadata={_ROWS: rows}
                )
                break
            except RuntimeError as error:
                if _NOT_YET not in str(error):
                    raise
                given_up.wait(1.0)
        return QueuedJob(id=job, state="PENDING", message="", rows=rows)

    def _find(self, settings: JobSettings, job: str, given_up: threading.Event) -> QueuedJob:
        try:
            info = _client().get_job_info(job)
        except RuntimeError as error:  # of Ray's client, for each answer that is none
            if "status code 404" in str(error):
                raise no_such_job(job) from None
            raise
        errors = [line for line in (info.message or "").splitlines() if line.startswith("Error: ")]
        sentence = errors[-1].removeprefix("Error: ") if errors else "See the logs of the job in Ray."
        return QueuedJob(
            id=job,
            state=str(info.status),
            message=sentence if str(info.status) == "FAILED" else "",
            # The service may have another --jobs-output by now. Earlier versions submitted no metadata.
            rows=(info.metadata or {}).get(_ROWS) or storage.join(settings.place, job),
        )


def _without_keys(environment: dict[str, Any]) -> dict[str, Any]:
    """A runtime environment without the API keys, which all who may list jobs can read."""
    variables = {
        name: value for name, value in environment.get("env_vars", {}).items() if name not in (API_KEY, API_KEY_FILE)
    }
    return environment | ({"env_vars": variables} if "env_vars" in environment else {})


def is_job(job: str) -> bool:
    """Whether a job with this id may be one of the queue."""
    return job.startswith(_PREFIX) and job.removeprefix(_PREFIX).isalnum()


def no_such_job(job: str) -> RequestError:
    """The error for a job that is not known."""
    return RequestError(404, f"There is no job {job[:100]!r}.")


def _client() -> Any:
    import ray
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client, which by itself waits for an answer without a limit, and holds a thread as long."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, timeout=_SILENCE_SECONDS, **options)

    return Client(ray.get_runtime_context().gcs_address)
