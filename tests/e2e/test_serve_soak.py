"""A service under half of its highest load for half an hour, with faults, changes and nonsense (make soak)."""

import asyncio
import base64
import collections
import itertools
import random
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pyarrow.dataset
import pytest
import requests

from benchmarks import load
from benchmarks.predict import write_random_bundle
from benchmarks.serve import make_photo
from cnnray.models.bundle import Bundle
from tests.awkward import awkward_images
from tests.e2e.conftest import started_jobs, until
from tests.e2e.service import FORMS, Service, ask, copy_as_new_version, run_schemathesis, send
from tests.malformed import fuzzed, malformed_json

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SECONDS = 1800
HALF = ["--cpus-per-replica", "0.5"]
TWO = [*HALF, "--min-replicas", "2", "--max-replicas", "2"]
THREE = [*HALF, "--min-replicas", "3", "--max-replicas", "3"]
start = pytest.fixture(started_jobs, scope="module")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    path.write_bytes(make_photo())
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """`vgg_bn` at 64x64 with int8 engines, as in the benchmark."""
    folder = tmp_path_factory.mktemp("bundle")
    return write_random_bundle(folder)


@pytest.fixture
def start_steady():
    """`load.start_steady`, whose processes end with the test."""
    processes = []

    def begin(*arguments):
        processes.append(load.start_steady(*arguments))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()


def _print(capsys, sentence):
    with capsys.disabled():
        print(f"\n{sentence}")


class Repeated(threading.Thread):
    """Calls a function every few seconds, until it is stopped."""

    def __init__(self, function, pause):
        super().__init__(daemon=True)  # a test that fails does not stop it
        self._function, self._pause, self._stopped, self.error = function, pause, threading.Event(), None
        self.start()

    def run(self):
        try:
            while not self._stopped.wait(self._pause):
                self._function()
        except Exception as error:
            self.error = error

    def stop(self):
        self._stopped.set()
        self.join()
        if self.error:
            raise self.error


class Memory:
    """The memory of a service's processes over time, in MiB that no other process shares."""

    def __init__(self, service):
        self._service, self._start = service, time.monotonic()
        self._names = {}
        """By process, the one that it had first: Ray's processes change theirs with what they do."""
        self.sizes = collections.defaultdict(list)
        """By process and name: (seconds, MiB)."""
        self._thread = Repeated(self._read, 10)
        self.stop = self._thread.stop

    def _read(self):
        for process, name in self._service.job.named_children():
            try:
                size = process.memory_full_info().uss / 2**20
            except psutil.NoSuchProcess:
                continue
            name = self._names.setdefault(process.pid, " ".join(name.split()[:2])[-60:])
            self.sizes[process.pid, name].append((time.monotonic() - self._start, size))

    def by_minute(self):
        """By process that has lived for ten minutes: the means of its minutes."""
        return {
            key: [
                round(statistics.mean(size for _, size in minute), 1)
                for minute in (sizes[start : start + 6] for start in range(0, len(sizes), 6))
            ]
            for key, sizes in self.sizes.items()
            if sizes[-1][0] - sizes[0][0] >= 600
        }


def _send_nonsense(address, number, statuses):
    """Send a damaged image or malformed JSON; a replica that is killed meanwhile may answer nothing."""
    generator = random.Random(number)
    try:
        if number % 2:
            status, text = send(address, fuzzed(number), generator.choice(FORMS))
        else:
            image = base64.b64encode(awkward_images()["rgb.png"]).decode()
            body = generator.choice([*malformed_json({"image": image}).values()])
            answer = requests.post(
                f"{address}/predict", body, headers={"Content-Type": "application/json"}, timeout=60
            )
            status, text = answer.status_code, answer.text
    except requests.RequestException as error:
        status, text = type(error).__name__, ""
    assert "Traceback" not in text, (number, text)
    statuses[status] += 1


def _burst(address, data):
    """Send 256 images at once, ten times: a process takes memory for its busiest moment, and keeps some of it."""
    time.sleep(20)  # what waited for a new replica is answered
    headers = {"Content-Type": "image/jpeg"}
    with ThreadPoolExecutor(256) as pool:
        statuses = pool.map(
            lambda _: requests.post(address, data, headers=headers, timeout=60).status_code, range(2560)
        )
        assert Counter(statuses) == {200: 2560}


def test_faults_under_constant_load(start, start_steady, bundle, photo, tmp_path, capsys):
    newer, log = copy_as_new_version(bundle, tmp_path / "newer"), tmp_path / "log"
    logged = ["--log-requests", log, "--log-share", "0.1"]
    service = Service(start, "--bundle", bundle, *TWO, *logged)
    address = f"{service.address}/predict"
    # The highest load varies by a third from one ten seconds to the next.
    peak = statistics.median(
        load.measure_peak(address, photo, tmp_path, connections=16, seconds=10).rate for _ in range(5)
    )
    process = start_steady(address, photo, peak / 2, SECONDS)
    started, moments, numbers, nonsense = time.monotonic(), [], iter(range(10**9)), Counter()
    memory = Memory(service)
    senders = Repeated(lambda: _send_nonsense(service.address, next(numbers), nonsense), 0.5)
    _burst(address, photo.read_bytes())

    def kill():
        service.replicas()[0].kill()
        until(lambda: len(service.replicas()) == 2, 60, "another replica")
        until(lambda: service.status() == {"RUNNING": 2}, 60, "another replica")
        _burst(address, photo.read_bytes())

    def update(uri):
        assert service.change("--bundle", uri, *TWO, *logged).process.returncode == 0
        assert ask(address, photo.read_bytes())[1]["model"] == Bundle.load(uri).version

    def up(uri):
        assert service.change("--bundle", uri, *THREE, *logged).process.returncode == 0
        assert len(service.replicas()) == 3
        _burst(address, photo.read_bytes())

    def down(uri):
        assert service.change("--bundle", uri, *TWO, *logged).process.returncode == 0
        until(lambda: len(service.replicas()) == 2, 60, "the end of a replica")

    for share, change, *arguments in (
        (0.05, kill), (0.15, update, newer), (0.25, up, newer), (0.35, down, newer),
        (0.45, kill), (0.55, update, bundle), (0.65, up, bundle), (0.75, down, bundle),
    ):  # fmt: skip
        time.sleep(max(0.0, started + share * SECONDS - time.monotonic()))
        moments.append((time.monotonic() - started, change.__name__))
        change(*arguments)
    result = load.read_steady(process)
    senders.stop()
    memory.stop()
    _print(capsys, f"peak {peak:.0f} requests/s, load of {peak / 2:.0f} for {SECONDS} s: {result.statuses}")
    killed = 0
    for (moment, name), (following, _) in zip(moments, [*moments[1:], (SECONDS + 1, "end")], strict=True):
        failed = [due for due in result.failed_at if moment - 1 <= due < following - 1]
        _print(capsys, f"from {moment:.1f} s on ({name}): {len(failed)} failed {failed[:20]}")
        if name == "kill":
            # Requests in flight on one of the two replicas, and those that came until HAProxy noticed.
            assert len(failed) <= 64
            assert all(due < moment + 3 for due in failed)
            killed += len(failed)
    _print(capsys, f"p50 {result.percentile(0.5):.1f} ms, p99 {result.percentile(0.99):.1f} ms; nonsense: {nonsense}")
    assert len(result.failed_at) == killed  # none failed otherwise
    assert sum(nonsense[status] for status in (200, 400, 413, 415, 422)) >= nonsense.total() - 4
    sizes = memory.by_minute()
    for (pid, name), minutes in sizes.items():
        _print(capsys, f"MiB of {pid} {name}, by minute: {[round(size) for size in minutes]}")
    replicas = [minutes for (_, name), minutes in sizes.items() if "ServeReplica" in name]
    assert len(replicas) >= 2
    # A replica that lives for half an hour stops growing, and those that live less do not outgrow it.
    longest = max(replicas, key=len)
    quarter = len(longest) // 4
    assert statistics.mean(longest[-quarter:]) < 1.05 * statistics.mean(longest[quarter : 3 * quarter])
    assert all(max(minutes) < 1.05 * max(longest) for minutes in replicas)
    service.job.end()
    rows = pyarrow.dataset.dataset(log).count_rows()
    _print(capsys, f"{rows} answers in the log")
    assert rows > 0.09 * result.statuses["200"]


async def _send_slowly(port, rate, seconds, statuses):
    """Send bodies of 32 MiB at a rate in bytes per second, one after the other, and count the answers."""
    end, part = time.monotonic() + seconds, b"x" * 16384
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nContent-Length: {2**25}\r\n\r\n"
    while time.monotonic() < end:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            statuses[type(error).__name__] += 1
            await asyncio.sleep(1)
            continue
        try:
            writer.write(head.encode())
            answer = asyncio.ensure_future(reader.readline())
            for _ in range(2**25 // len(part)):
                if answer.done() or time.monotonic() > end:
                    break
                writer.write(part)
                await writer.drain()
                await asyncio.wait([answer], timeout=len(part) / rate)
            statuses[
                (await asyncio.wait_for(answer, 60)).split()[1].decode() if time.monotonic() < end else "cut"
            ] += 1
        except (OSError, IndexError, TimeoutError) as error:
            statuses[type(error).__name__] += 1
        finally:
            writer.close()
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("rate", [16 * 2**10, 400 * 2**10])
def test_slow_clients_do_not_fill_the_memory(start, start_steady, bundle, photo, rate, capsys):
    """500 of them, slower than is allowed or just fast enough, beside one that is answered all the while."""
    service = Service(start, "--bundle", bundle, "--max-replicas", "1")
    (replica,), statuses, seconds, most = service.replicas(), Counter(), 60, []
    process = start_steady(f"{service.address}/predict", photo, 5, seconds)
    reader = Repeated(lambda: most.append(replica.memory_info().rss / 2**20), 0.2)

    async def send_all():
        port = int(service.address.rpartition(":")[2])
        await asyncio.gather(*(_send_slowly(port, rate, seconds, statuses) for _ in range(500)))

    asyncio.run(send_all())
    reader.stop()
    result = load.read_steady(process)
    _print(
        capsys,
        f"500 clients at {rate // 1024} KiB/s: {dict(statuses)}; replica at most {max(most):.0f} MiB; a fast client "
        f"{result.statuses}, median {result.percentile(0.5):.1f} ms",
    )
    assert max(most) < 1024
    assert service.replicas()[0].pid == replica.pid
    assert result.statuses == {"200": 5 * seconds}
    service.job.end()


def test_large_json_does_not_fill_the_memory(start, start_steady, bundle, photo, capsys):
    """Eight clients whose bodies become many times as large as objects, beside one that sends images."""
    service = Service(start, "--bundle", bundle, "--max-replicas", "1")
    (replica,), statuses, seconds, most = service.replicas(), Counter(), 40, []
    size = 31 * 2**20
    parts = (b"[],", b"[1,2,3],", b"1.25,", b'"ab",', b'{"a":1},', b"[[[[1,2,3],[4,5,6]],[[7,8,9],[10,11,12]]]],")
    bodies = [b'{"instances": [' + size // len(part) * part + b"1]}" for part in parts]
    process = start_steady(f"{service.address}/predict", photo, 5, seconds)
    reader = Repeated(lambda: most.append(replica.memory_info().rss / 2**20), 0.05)
    end = time.monotonic() + seconds - 5

    def send_all(client):
        for number in itertools.count(client):
            if time.monotonic() > end:
                return
            try:
                answer = requests.post(
                    f"{service.address}/v1/models/model:predict", data=bodies[number % len(bodies)],
                    headers={"Content-Type": "application/json"}, timeout=120,
                )  # fmt: skip
            except requests.RequestException:
                statuses["cut"] += 1  # refused while it was sent, and the answer lost with the connection
            else:
                statuses[answer.status_code] += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send_all, range(8)))
    reader.stop()
    result = load.read_steady(process)
    _print(
        capsys,
        f"8 clients with JSON of 31 MiB: {dict(statuses)}; replica at most {max(most):.0f} MiB; a client with images "
        f"{result.statuses}, median {result.percentile(0.5):.1f} ms, p99 {result.percentile(0.99):.0f} ms",
    )
    assert statuses.keys() <= {413, 503, "cut"}
    assert statuses[413] > 0
    assert max(most) < 1024
    assert service.replicas()[0].pid == replica.pid
    assert result.statuses == {"200": 5 * seconds}
    service.job.end()


def test_replicas_come_with_load_and_go_without(start, start_steady, bundle, photo, capsys):
    service = Service(
        start, "--bundle", bundle, "--cpus-per-replica", "0.5", "--max-replicas", "2",
        "--target-ongoing-requests", "0.1", "--downscale-delay-seconds", "10",
    )  # fmt: skip

    assert service.status() == {"RUNNING": 1}
    process = start_steady(f"{service.address}/predict", photo, 80, 90)
    started = time.monotonic()
    until(lambda: service.status() == {"RUNNING": 2}, 90, "a second replica")
    _print(capsys, f"2 replicas after {time.monotonic() - started:.0f} s of load")
    result = load.read_steady(process)
    started = time.monotonic()
    until(lambda: service.status() == {"RUNNING": 1}, 90, "one replica again")
    _print(capsys, f"1 replica {time.monotonic() - started:.0f} s after its end; answers: {result.statuses}")
    assert result.statuses == {"200": 90 * 80}
    service.job.end()


@pytest.fixture(scope="module")
def small(start, bundle):
    """A service with one replica and a small limit for bodies."""
    service = Service(start, "--bundle", bundle, "--max-replicas", "1", "--max-mebibytes", "1")
    yield service
    service.job.end()


def test_requests_generated_from_the_description(small, tmp_path, capsys):
    cases, summary = run_schemathesis(small.address, 500, tmp_path)
    _print(capsys, f"schemathesis: {cases} cases; {summary}")
    assert cases >= 5000
    assert "Traceback" not in small.log()


def test_fuzzed_images(small, capsys):
    statuses, generator = {}, random.Random(0)
    for number in range(2000):
        status, text = send(small.address, fuzzed(number), generator.choice(FORMS))
        statuses[status] = statuses.get(status, 0) + 1
        assert status in (200, 400, 413, 415, 422, 503), (number, text)
        assert "Traceback" not in text
    _print(capsys, f"fuzzed images: {statuses}")


def test_malformed_json(small, capsys):
    text, statuses = base64.b64encode(awkward_images()["rgb.png"]).decode(), Counter()
    tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [text]}
    for path, valid in (
        ("/predict", {"image": text}),
        ("/predict", {"images": [text]}),
        ("/v2/models/model/infer", {"inputs": [tensor]}),
        ("/v1/models/model:predict", {"instances": [{"b64": text}]}),
    ):
        for name, body in malformed_json(valid).items():
            status, answer = ask(small.address + path, body, "application/json")
            statuses[status] += 1
            is_listed = status == 200 and "images" in valid and [entry["status"] for entry in answer] == [400]
            assert is_listed or status in (400, 413), (path, name, answer)
    _print(capsys, f"malformed JSON: {dict(statuses)}")


def test_memory_stays_flat(small, start_steady, photo, capsys):
    (replica,), sizes, requests_each = small.replicas(), [], 2000
    _burst(f"{small.address}/predict", photo.read_bytes())
    for _ in range(11):
        process = start_steady(f"{small.address}/predict", photo, 100, requests_each / 100)
        assert load.read_steady(process).statuses == {"200": requests_each}
        sizes.append(replica.memory_full_info().uss / 2**20)
    _print(capsys, f"MiB of the replica after each {requests_each} requests: {[round(size) for size in sizes]}")
    assert sizes[-1] < 1.05 * sizes[0]
