"""What every request passes: an id, the API key, the clock, the access log."""

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
_GOOD_ID = re.compile(r"[!-~]{1,128}")
_OPEN = ("/health/", "/v2/health/")
"""Without the API key, as the page is: it asks for the key."""


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None, names_requests: bool) -> None:
        self._app, self._service, self._key, self._names = app, service, api_key, names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, start, status, begun = Headers(scope=scope), time.perf_counter(), 499, False
        given = headers.get(REQUEST_ID, "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                if self._names:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        def refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
            return JSONResponse({"error": sentence, "request_id": request_id}, status, headers)

        try:
            if self._may_pass(scope["path"], headers):
                await self._app(scope, receive, answer)
            else:
                key = {"WWW-Authenticate": "Bearer"}
                await refusal(401, "The API key is missing or wrong.", key)(scope, receive, answer)
        except Exception:
            log.exception("request %s", request_id)
            if begun:
                raise
            await refusal(500, "Internal error.")(scope, receive, answer)
        finally:
            self._record(scope, request_id, status, time.perf_counter() - start)

    def _may_pass(self, path: str, headers: Headers) -> bool:
        if self._key is None or path == "/" or path.startswith(_OPEN):
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), self._key.encode())

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", "unknown")  # not what the client asked for: of that there is no end
        self._service.meter.request(path, status, seconds)
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
