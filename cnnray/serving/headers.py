"""What Ray's own ASGI servers put in front of an application, by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


class ReadableHeaders:
    """ASGI middleware: header values that are not UTF-8 are taken for Latin-1, as HTTP once had it, and encoded anew.

    Ray reads some headers as UTF-8 before an application sees the request (X-Request-ID, X-Session-ID, ...), and
    answers 500 where they are not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if "headers" in scope:
            scope["headers"] = [(name, _readable(value)) for name, value in scope["headers"]]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Called by Ray."""
    return [Middleware(ReadableHeaders)]


def _readable(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
