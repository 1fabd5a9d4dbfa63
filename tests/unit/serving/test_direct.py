"""Which requests go past Ray's wrapper of the application."""

import asyncio
import threading

import pytest

from cnnray.serving import direct


@pytest.fixture(autouse=True)
def no_replica(monkeypatch):
    monkeypatch.setattr(direct, "_replica", None)


def _application(name, calls):
    async def application(scope, receive, send):
        calls.append((name, scope.get("path"), scope.get("root_path")))

    return application


def test_requests_go_past_ray_once_ray_has_told_the_path_of_the_application():
    calls = []

    async def ask():
        wrapped = direct.register(_application("direct", calls), by_ray=_application("by ray", calls))

        async def ray(scope, receive, send):
            if scope["path"].startswith("/-/"):
                calls.append(("ray", scope["path"], None))
            else:
                await wrapped(scope | {"root_path": "/pictures"}, receive, send)

        await wrapped({"type": "lifespan"}, None, None)
        middleware = direct.Direct(ray)
        for path in (
            "/-/healthz",
            "/pictures/b",
            "/pictures/b",
            "/-/routes",
            "/picturesque",
            "/-/healthz",
        ):
            await middleware({"type": "http", "path": path, "root_path": ""}, None, None)
        await middleware({"type": "websocket", "path": "/pictures/x"}, None, None)

    asyncio.run(ask())
    assert [name for name, *_ in calls] == ["by ray", "ray", "by ray", "direct", "ray", "by ray", "ray", "by ray"]
    assert calls[3] == ("direct", "/pictures/b", "/pictures")


def test_a_process_that_is_no_replica_leaves_requests_to_ray():
    calls = []
    asyncio.run(direct.Direct(_application("ray", calls))({"type": "http", "path": "/predict"}, None, None))
    assert calls == [("ray", "/predict", None)]


def test_code_in_another_event_loop_gets_its_requests_by_ray():
    calls = []

    async def register():
        wrapped = direct.register(_application("direct", calls), by_ray=_application("by ray", calls))
        await wrapped({"type": "http", "path": "/predict"}, None, None)
        return wrapped

    thread = threading.Thread(target=asyncio.run, args=(register(),))
    thread.start()
    thread.join()
    asyncio.run(direct.Direct(_application("ray", calls))({"type": "http", "path": "/predict"}, None, None))
    assert [name for name, *_ in calls] == ["by ray", "ray"]
