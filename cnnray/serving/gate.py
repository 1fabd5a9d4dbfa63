"""What every request passes: request id, API key, errors, metrics, access log."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cnnray.serving.admission import Held
from cnnray.serving.bodies import RequestError
from cnnray.serving.keys import Keys, is_public
from cnnray.serving.request_log import request_id as logged_id
from cnnray.serving.service import Service

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_VALID_ID = re.compile(r"[!-~]{1,128}")
_PATIENCE = 1.0
"""Seconds after which a request is watched for its client's leaving; most are answered before."""
_LINGERING = 2.0
"""Seconds at most for which the rest of a refused body is read."""


class _Client:
    """The client of a request that takes long: when it leaves, the task that works for it is cancelled.

    Attributes:
        has_left: whether it was cancelled for that.
        has_sent_all: whether the end of its body has been received.
    """

    def __init__(self, receive: Receive) -> None:
        self.has_left = self.has_sent_all = False
        self._receive = receive
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._watching: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(_PATIENCE, self._watch)

    async def receive(self) -> Message:
        """See ASGI."""
        message = await self._receive()
        if not message.get("more_body"):
            self.has_sent_all = True
        return message

    async def drain(self, most: int) -> None:
        """Drop what the client still sends, for a while.

        A connection that is closed before its input is read is reset, and with it goes the answer that the client has
        not read yet (RFC 9112, section 9.6).

        Args:
            most: bytes, about.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGERING):
                while most > 0 and not self.has_sent_all:
                    most -= len((await self.receive()).get("body", b""))

    def forget(self) -> None:
        """The request has its answer."""
        self._timer.cancel()
        if self._watching:
            self._watching.cancel()

    def _watch(self) -> None:
        if self.has_sent_all:
            self._watching = self._loop.create_task(self._wait_until_it_leaves())
        else:
            self._timer = self._loop.call_later(_PATIENCE, self._watch)

    async def _wait_until_it_leaves(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.has_left = True
        if self._task:
            self._task.cancel()


class Gate:
    """ASGI middleware that gives each request an id, checks its API key, answers errors, and records the answer.

    Attributes:
        service: that the application behind it works for.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Keys, behind_ray: bool) -> None:
        self._app, self.service, self._keys = app, service, keys
        self._behind_ray = behind_ray
        self._cors: tuple[tuple[str, ...], ASGIApp] | None = None
        """The last origins, and the gate for them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        settings = self.service.settings
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif settings is not None and settings.cors_origins:
            await self._for_browsers(settings.cors_origins)(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    def _for_browsers(self, origins: tuple[str, ...]) -> ASGIApp:
        """The gate for pages of other hosts. Browsers ask first, without a key, what a page may send."""
        if self._cors is None or self._cors[0] != origins:
            app = CORSMiddleware(
                self._answer,
                allow_origins=origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=(REQUEST_ID, "retry-after", "x-class", "x-confidence", "x-model"),
            )
            self._cors = origins, app
        return self._cors[1]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, start = Headers(scope=scope), time.perf_counter()
        status, started, linger = 499, False, False  # 499: the client left before an answer
        request_id = request_id_from(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        logged_id.set(request_id)
        scope["service"], scope["needs_key"] = self.service, self._keys.are_needed
        scope["behind_ray"] = self._behind_ray
        scope["held"] = held = Held(self.service.admission)
        client = _Client(receive)

        async def send_answer(message: Message) -> None:
            nonlocal status, started, linger
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                answer_headers = MutableHeaders(scope=message)
                if not self._behind_ray:
                    answer_headers[REQUEST_ID] = request_id
                if not client.has_sent_all and _has_body(headers):
                    # What is still to come is not wanted. Uvicorn would keep what has come until the connection ends,
                    # and up to 90 s longer where it is reset.
                    answer_headers["connection"] = "close"
                    linger = not self._behind_ray
            elif linger:
                message = {**message, "more_body": True}  # else Uvicorn would close the connection
            await send(message)

        def error_response(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
            return JSONResponse({"error": sentence, "request_id": request_id}, status, headers)

        try:
            self._check_key(scope, headers)
            await self._app(scope, client.receive, send_answer)
        except asyncio.CancelledError:
            if not client.has_left:
                raise
        except ClientDisconnect:
            pass
        except RequestError as error:
            await error_response(error.status, str(error), error.headers)(scope, receive, send_answer)
        except HTTPException as error:
            await error_response(error.status_code, f"{error.detail}.", error.headers)(scope, receive, send_answer)
        except Exception:
            log.exception("request %s", request_id)
            if started:
                raise
            await error_response(500, "Internal error.")(scope, receive, send_answer)
        finally:
            client.forget()
            held.release()
            self._record(scope, request_id, status, time.perf_counter() - start)
        if linger:
            settings = self.service.settings
            await client.drain(settings.max_bytes if settings else 0)
            await send({"type": "http.response.body"})

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not is_public(path):
            scope["key"] = self._keys.check(headers)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        # Not the requested path: the set of label values would be unbounded.
        self.service.metrics.record_request(getattr(route, "path", "unknown"), status, seconds)
        self.service.log_access(request_id, scope["method"], scope["path"], status, seconds, scope.get("key"))


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def request_id_from(headers: Mapping[str, str]) -> str:
    """The id that a request has brought, or a new one."""
    sent = headers.get(REQUEST_ID, "")
    return sent if _VALID_ID.fullmatch(sent) else uuid.uuid4().hex
