"""Middleware for every request: request id, API key, metrics, access log."""

import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cnnray.serving.service import Service

log = logging.getLogger(__name__)
access_log = logging.getLogger("cnnray.access")

REQUEST_ID = "x-request-id"
_VALID_ID = re.compile(r"[!-~]{1,128}")
_PUBLIC = ("/health/", "/v2/health/")
"""Path prefixes that need no API key. Neither does the page, which asks for the key."""


class Gate:
    """ASGI middleware that gives each request an id, checks its API key, and records its answer."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None, adds_request_ids: bool) -> None:
        self._app, self._service, self._api_key = app, service, api_key
        self._adds_request_ids = adds_request_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, start = Headers(scope=scope), time.perf_counter()
        status, started = 499, False  # 499: the client left before an answer
        request_id = headers.get(REQUEST_ID, "")
        if not _VALID_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                if self._adds_request_ids:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        def error_response(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
            return JSONResponse({"error": sentence, "request_id": request_id}, status, headers)

        try:
            if self._is_authorized(scope["path"], headers):
                await self._app(scope, receive, send_answer)
            else:
                key = {"WWW-Authenticate": "Bearer"}
                await error_response(401, "The API key is missing or wrong.", key)(scope, receive, send_answer)
        except Exception:
            log.exception("request %s", request_id)
            if started:
                raise
            await error_response(500, "Internal error.")(scope, receive, send_answer)
        finally:
            self._record(scope, request_id, status, time.perf_counter() - start)

    def _is_authorized(self, path: str, headers: Headers) -> bool:
        if self._api_key is None or path == "/" or path.startswith(_PUBLIC):
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(key.encode(), self._api_key.encode())

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        # Not the requested path: the set of label values would be unbounded.
        path = getattr(route, "path", "unknown")
        self._service.metrics.record_request(path, status, seconds)
        settings = self._service.settings
        if settings is not None and settings.access_log:
            access_log.info(
                json.dumps(
                    {
                        "request_id": request_id, "method": scope["method"], "path": scope["path"],
                        "status": status, "milliseconds": round(1000 * seconds, 2),
                    }
                )
            )  # fmt: skip
