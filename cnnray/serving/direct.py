"""Requests that HAProxy sends to a replica go to its application, past Ray's wrapper of it.

Ray's wrapper costs CPU for each request: two tasks, a queue, a context. It also receives a whole body before the
application has seen the first byte of it, so that limits would come too late. What the wrapper does for a service,
the application does itself: bounds, metrics, request ids, and the load that autoscaling follows. What is
lost: Ray's metrics of requests, its context and tracing of them, and its own timeout.
"""

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

ON_NODES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "131072",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cnnray.serving.headers:middlewares",
}
"""Environment variables for Ray's nodes. HAProxy sends requests directly to the replicas, replicas handle requests in
one event loop, no process reads a line of HAProxy's for each request (replicas count them), most images fit into one
of HAProxy's buffers, and requests go past Ray's wrapper of the application. A request whose replica ends before it
has answered goes to another replica, once, as a request may be what has ended it: if it had arrived as a whole when
HAProxy began to send it on, as those up to some 20 KB do, and larger ones that clients send at once."""
_OF_RAY = ("/-/healthz", "/-/routes")
"""Ends of the paths that Ray answers itself."""


@dataclass
class _Replica:
    application: ASGIApp
    loop: asyncio.AbstractEventLoop
    root_path: str | None = None
    """Path under which the application is; None until a request has come through Ray's wrapper, which knows it."""


_replica: _Replica | None = None
"""The replica that this process is; None in other processes that have the middleware."""


def register(application: ASGIApp, by_ray: ASGIApp) -> ASGIApp:
    """Name the application of this process's replica. Called in the event loop of the replica's code.

    Args:
        application: gets the requests that come past Ray's wrapper.
        by_ray: gets those that come through it.

    Returns:
        The application for Ray's wrapper.
    """
    global _replica
    _replica = replica = _Replica(application, asyncio.get_running_loop())

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":  # the server's start and end come through here, too, without a path
            replica.root_path = scope.get("root_path", "")
        await by_ray(scope, receive, send)

    return wrapped


class Direct:
    """ASGI middleware of Ray's servers; in other processes than replicas, it does nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        replica = _replica
        if (
            replica is not None
            and replica.root_path is not None
            and scope["type"] == "http"
            and scope["path"].startswith(f"{replica.root_path}/")
            and not scope["path"].endswith(_OF_RAY)
            # Else the replica's code runs in a thread of its own.
            and asyncio.get_running_loop() is replica.loop
        ):
            scope["root_path"] = replica.root_path
            await replica.application(scope, receive, send)
        else:
            await self._app(scope, receive, send)
