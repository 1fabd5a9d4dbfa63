import functools
import os
import threading
import uuid

import boto3
import pytest
import ray
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from cnnray import cluster
from cnnray.images import object_stores, reading
from tests.s3_proxy import Proxy

_MOTO = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}


def _one_at_a_time(function):
    lock = threading.Lock()

    @functools.wraps(function)
    def locked(*arguments, **options):
        with lock:
            return function(*arguments, **options)

    return locked


@pytest.fixture(scope="package")
def s3_proxy():
    """A proxy in front of an S3 server: the one that AWS_ENDPOINT_URL names (make test-s3), or else moto's.

    It starts before the cluster, so that Ray's processes inherit its variables.
    """
    server, before = None, {name: os.environ.get(name) for name in (*_MOTO, "AWS_ENDPOINT_URL")}
    if not before["AWS_ENDPOINT_URL"]:
        # Moto looks whether an object exists, and then writes it: of two threads that create one, both may succeed.
        S3Response.put_object = _one_at_a_time(S3Response.put_object)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        os.environ.update(_MOTO)
        host, port = server.get_host_and_port()
    proxy = Proxy(before["AWS_ENDPOINT_URL"] or f"http://{host}:{port}")
    os.environ["AWS_ENDPOINT_URL"] = proxy.url
    os.environ["CNNRAY_STORAGE_RETRY_SECONDS"] = "5"
    yield proxy
    os.environ.pop("CNNRAY_STORAGE_RETRY_SECONDS")
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    proxy.close()
    if server:
        server.stop()


@pytest.fixture(scope="package", autouse=True)
def ray_cluster(s3_proxy):
    """One local cluster for these tests, with more CPUs than the machine has, so that they never wait.

    It ends with them: a process that is connected to a cluster ends when the cluster finds it lost, and the unit
    tests that follow keep both cores busy for many minutes.
    """
    ray.init(
        address="local",
        num_cpus=4,
        logging_level="ERROR",
        # Ray Train's cleaner asks the dashboard of RAY_ADDRESS, by default at 8265, whether a run is alive. If the
        # dashboard of another Ray on this machine answered, it would end the run.
        include_dashboard=False,
        dashboard_port=cluster.free_port(),
        runtime_env={"env_vars": {"RAY_ADDRESS": cluster.own_address()}},
    )
    os.environ.pop("RAY_GCS_SERVER_PORT")
    yield
    cluster.shut_down()
    assert not ray.is_initialized()


@pytest.fixture
def bucket(s3_proxy):
    name = f"cnnray-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def new_clients():
    """Clients that read the environment as the test has set it."""
    object_stores._store.cache_clear()
    yield
    object_stores._store.cache_clear()


@pytest.fixture
def in_process(monkeypatch):
    """Jobs work in this process; gives the uris of the images that were read."""
    monkeypatch.setattr(cluster, "starts_own", lambda: True)
    monkeypatch.setattr(cluster, "connected", None)
    read, load = [], reading.load_bytes

    def recorded(source):
        read.append(source)
        return load(source)

    monkeypatch.setattr(reading, "load_bytes", recorded)
    return read
