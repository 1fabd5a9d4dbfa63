import os

import pytest
import ray


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 API over HTTP: the one that AWS_ENDPOINT_URL names (make test-s3), or else moto's.

    It is there before the cluster, so that Ray's processes are born with its variables.
    """
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield os.environ["AWS_ENDPOINT_URL"]
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(variables)
    yield variables["AWS_ENDPOINT_URL"]
    for name in variables:
        os.environ.pop(name)
    server.stop()


@pytest.fixture(scope="session", autouse=True)
def ray_cluster(s3_server, tmp_path_factory):
    """One local cluster for the session, with more CPUs than the machine has, so that tests never wait."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=True, logging_level="ERROR")
    yield
    ray.shutdown()
