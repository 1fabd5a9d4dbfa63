"""Middleware that Ray's ASGI servers add; RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this module's function."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cnnray.serving.direct import Direct


class ReadableHeaders:
    """ASGI middleware: re-encodes header values that are not UTF-8, from Latin-1, which was HTTP's encoding once.

    Ray decodes some headers (X-Request-ID, X-Session-ID, ...) as UTF-8 before an application sees the request, and
    answers 500 if that fails.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if "headers" in scope:
            scope["headers"] = [(name, _as_utf8(value)) for name, value in scope["headers"]]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Called by Ray when it starts its servers."""
    return [Middleware(ReadableHeaders), Middleware(Direct)]  # the last one is the outermost


def _as_utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
