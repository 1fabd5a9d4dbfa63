"""What requests may hold, and what becomes of clients that are slow or leave."""

import asyncio
import base64
import json
import threading
from types import SimpleNamespace

import pytest
from ray.serve._private.common import RUNNING_REQUESTS_KEY

from cnnray.serving import admission, gate
from cnnray.serving.deployment import Classifier
from tests.unit.serving.conftest import GOOD


class Connection:
    """A client of an ASGI application, in its event loop: sends its body part by part."""

    def __init__(self, client, *, path="/predict", query=b"", length=None, kind=b"image/png"):
        headers = [(b"content-type", kind)]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        scope = {
            "type": "http", "method": "POST", "path": path, "query_string": query, "headers": headers,
            "root_path": "",
        }  # fmt: skip
        self.sent, self.parts, self.asked, self.asked_before = [], asyncio.Queue(), 0, None
        """`asked_before`: how often the application had asked for a part of the body when it answered."""
        self.task = asyncio.ensure_future(client.app(scope, self._receive, self._send))

    async def _receive(self):
        self.asked += 1
        return await self.parts.get()

    async def _send(self, message):
        if self.asked_before is None:
            self.asked_before = self.asked
        self.sent.append(message)

    def part(self, body, more=True):
        self.parts.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self):
        self.parts.put_nowait({"type": "http.disconnect"})

    async def answer(self):
        await asyncio.wait_for(self.task, 20)
        return self.sent[0]["status"], self.sent[1]["body"].decode()


async def _connect(client, count):
    """Send so many images, one after the other. Two micro-batches are then being computed; the other images wait."""
    connections = []
    for _ in range(count):
        connections.append(Connection(client))
        connections[-1].part(GOOD, more=False)
        await asyncio.sleep(0.05)
    return connections


async def _until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def _ask(client, function):
    return client.portal.call(function)


def test_what_is_too_much_is_refused_before_it_is_read(start_client):
    client = start_client(max_bytes=1000, max_bytes_in_flight=1500)

    async def ask():
        first = Connection(client, length=900)
        first.part(b"x" * 700)
        await asyncio.sleep(0.05)
        second = Connection(client, length=900)
        status, body = await second.answer()
        assert (status, second.asked_before) == (503, 0)
        assert "overloaded: it holds 700 bytes" in body
        assert dict(second.sent[0]["headers"])[b"retry-after"] == b"1"
        # The server need not keep what the client still sends.
        assert dict(second.sent[0]["headers"])[b"connection"] == b"close"
        first.part(b"x" * 200, more=False)
        assert (await first.answer())[0] == 415  # no image
        assert b"connection" not in dict(first.sent[0]["headers"])
        third = Connection(client, length=900)
        third.part(b"x" * 900, more=False)
        assert (await third.answer())[0] == 415

    _ask(client, ask)
    assert client.app.service.admission.bytes == client.app.service.admission.requests == 0


def test_the_rest_of_a_refused_body_is_dropped_for_a_while_so_that_the_answer_arrives(start_client, monkeypatch):
    client = start_client(max_bytes=1000)
    monkeypatch.setattr(gate, "_LINGERING", 0.5)

    async def ask():
        patient = Connection(client, length=1500)
        await _until(lambda: len(patient.sent) == 2)
        assert [message.get("more_body") for message in patient.sent] == [None, True]
        assert (patient.sent[0]["status"], patient.task.done()) == (413, False)
        patient.part(b"x" * 700)
        patient.part(b"x" * 200, more=False)
        assert (await patient.answer())[0] == 413
        assert not patient.sent[-1].get("more_body")
        # Neither a client that stops sending nor one that never stops holds its connection.
        silent, endless = Connection(client, length=1500), Connection(client, length=10**9)
        for _ in range(100):
            endless.part(b"x" * 100)
        assert (await endless.answer())[0] == 413
        assert (silent.task.done(), endless.asked) == (False, 10)
        assert (await silent.answer())[0] == 413
        left = Connection(client, length=1500)
        left.leave()
        assert (await left.answer())[0] == 413

    _ask(client, ask)
    assert client.app.service.admission.bytes == client.app.service.admission.requests == 0


def test_large_bodies_leave_room_for_small_ones(start_client):
    client = start_client(max_bytes=2**23, max_bytes_in_flight=2**24)

    async def ask():
        # Two that do not say how long they are, and many that do, and begin at once.
        large = [Connection(client) for _ in range(2)] + [Connection(client, length=2**21) for _ in range(40)]
        for connection in large:
            connection.part(b"x" * (2**23 - 2**20 if connection in large[:2] else 2**19))
        await asyncio.sleep(0.05)
        assert client.app.service.admission.bytes == 2**24 * 7 / 8
        assert [bool(connection.sent) for connection in large] == [False] * 2 + [True] * 40
        small = Connection(client)
        small.part(GOOD)
        await asyncio.sleep(0.05)
        large[0].part(b"x")
        assert (await large[0].answer())[0] == 503
        small.part(b"", more=False)
        assert (await small.answer())[0] == 200
        large[1].leave()
        await asyncio.wait_for(large[1].task, 20)

    _ask(client, ask)
    assert client.app.service.admission.bytes == 0


def test_a_body_whose_length_is_not_known_is_refused_when_there_is_no_more_room(start_client):
    client = start_client(max_bytes=1000, max_bytes_in_flight=1500)

    async def ask():
        connections = [Connection(client) for _ in range(2)]
        for connection in connections:
            connection.part(b"x" * 800)
        await asyncio.sleep(0.05)
        refused = [connection for connection in connections if connection.task.done()]
        assert len(refused) == 1
        assert (await refused[0].answer())[0] == 503
        (other,) = set(connections) - set(refused)
        other.part(b"x" * 100, more=False)
        assert (await other.answer())[0] == 415

    _ask(client, ask)
    assert client.app.service.admission.bytes == 0


def test_images_that_wait_have_a_bound(start_client, monkeypatch):
    client, free = start_client(max_queued_images=2), threading.Event()
    (served,) = client.app.service.models.all
    compute = served.compute.predict
    monkeypatch.setattr(served.compute, "predict", lambda images: (free.wait(20), compute(images))[1])

    async def ask():
        accepted = [Connection(client) for _ in range(2)]
        for connection in accepted:
            connection.part(GOOD, more=False)
        await asyncio.sleep(0.1)
        assert client.app.service.admission.load == 2
        refused = Connection(client)
        status, body = await refused.answer()
        assert (status, refused.asked) == (503, 0)
        assert "overloaded: 2 images wait" in body
        free.set()
        assert [(await connection.answer())[0] for connection in accepted] == [200, 200]

    _ask(client, ask)
    assert client.app.service.admission.load == 0


def test_a_version_that_hangs_leaves_room_for_others(start_client, bundle, newer, monkeypatch):
    client = start_client(("c", bundle, 0.5), ("c", newer, 0.5), max_queued_images=4)
    stable, canary = client.app.service.models.all
    free, compute = threading.Event(), canary.compute.predict
    monkeypatch.setattr(canary.compute, "predict", lambda images: (free.wait(20), compute(images))[1])

    def send(served):
        connection = Connection(client, query=f"version={served.version}".encode())
        connection.part(GOOD, more=False)
        return connection

    async def ask():
        hanging = [send(canary) for _ in range(3)]
        await _until(lambda: client.app.service.admission.images == 3)
        status, body = await send(canary).answer()
        assert (status, f"3 images wait for c {canary.version}" in body) == (503, True)
        for _ in range(2):
            assert (await send(stable).answer())[0] == 200
        free.set()
        assert [(await connection.answer())[0] for connection in hanging] == [200] * 3

    _ask(client, ask)
    assert not client.app.service.admission.images_of


@pytest.mark.parametrize(("parts", "rate"), [(0, 2**10), (4, 2**20)])
def test_a_client_that_is_too_slow_is_let_go_of(parts, rate, start_client, monkeypatch):
    """One that sends nothing; one whose parts come at less than the lowest rate."""
    monkeypatch.setattr(admission, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(admission, "_LOWEST_RATE", rate)
    client = start_client()

    async def ask():
        connection = Connection(client)
        for _ in range(parts):
            connection.part(b"x" * 1000)
            await asyncio.sleep(0.04)
        status, body = await connection.answer()
        assert status == 408
        assert f"at least {rate // 1024} KiB a second" in body

    _ask(client, ask)


def test_a_client_that_is_fast_enough_is_waited_for(start_client, monkeypatch):
    monkeypatch.setattr(admission, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(admission, "_LOWEST_RATE", 1000)
    client = start_client()

    async def ask():
        connection = Connection(client)
        for _ in range(4):
            connection.part(b"x" * 1000)
            await asyncio.sleep(0.1)
        connection.part(b"", more=False)
        assert (await connection.answer())[0] == 415

    _ask(client, ask)


def test_a_body_has_no_more_time_than_the_timeout(start_client):
    client = start_client(timeout_seconds=0.1)

    async def ask():
        connection = Connection(client)
        connection.part(b"x" * 2**20)
        assert (await connection.answer())[0] == 408

    _ask(client, ask)


def test_nothing_is_computed_for_a_client_that_has_left(start_client, monkeypatch):
    monkeypatch.setattr(gate, "_PATIENCE", 0.05)
    client, free, recorded = start_client(), threading.Event(), []
    (served,) = client.app.service.models.all
    compute, sizes = served.compute.predict, []

    def predict(images):
        sizes.append(len(images))
        free.wait(20)
        return compute(images)

    monkeypatch.setattr(served.compute, "predict", predict)
    monkeypatch.setattr(client.app.service.metrics, "record_request", lambda *values: recorded.append(values))

    async def ask():
        connections = await _connect(client, 4)
        connections[2].leave()
        await asyncio.sleep(0.2)
        assert connections[2].task.done()
        assert connections[2].sent == []
        assert [status for _, status, _ in recorded] == [499]
        free.set()
        assert [(await connections[number].answer())[0] for number in (0, 1, 3)] == [200] * 3

    _ask(client, ask)
    assert sizes == [1, 1, 1]
    assert client.app.service.admission.load == 0


def test_images_of_clients_that_have_left_are_not_held(start_client, monkeypatch):
    """In a long queue, they would wait for their turn, and would be counted no more."""
    monkeypatch.setattr(gate, "_PATIENCE", 0.05)
    client, free = start_client(), threading.Event()
    (served,) = client.app.service.models.all
    compute = served.compute.predict
    monkeypatch.setattr(served.compute, "predict", lambda images: (free.wait(20), compute(images))[1])

    async def ask():
        connections = await _connect(client, 5)
        await _until(lambda: len(served.batcher._waiting) == 3)
        connections[2].leave()
        connections[4].leave()
        await _until(lambda: len(served.batcher._waiting) == 1)
        free.set()
        assert [(await connections[number].answer())[0] for number in (0, 1, 3)] == [200] * 3

    _ask(client, ask)


def test_the_autoscaler_follows_images_and_not_requests(start_client, monkeypatch):
    client, free = start_client(), threading.Event()
    service = client.app.service
    (served,) = service.models.all
    compute = served.compute.predict
    monkeypatch.setattr(served.compute, "predict", lambda images: (free.wait(20), compute(images))[1])

    async def ask():
        tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [5], "data": [encoded] * 5}
        connection = Connection(client, path="/v2/models/colours/infer", kind=b"application/json")
        connection.part(json.dumps({"inputs": [tensor]}).encode(), more=False)
        await _until(lambda: service.admission.images)
        replica = SimpleNamespace(_service=service)
        assert Classifier.func_or_class.record_autoscaling_stats(replica) == {RUNNING_REQUESTS_KEY: 5.0}
        free.set()
        assert (await connection.answer())[0] == 200

    encoded = base64.b64encode(GOOD).decode()
    _ask(client, ask)


def test_a_client_that_leaves_while_it_sends_is_no_error(start_client, caplog):
    client = start_client()

    async def ask():
        connection = Connection(client)
        connection.part(b"x")
        connection.leave()
        await asyncio.wait_for(connection.task, 20)
        assert connection.sent == []

    _ask(client, ask)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
