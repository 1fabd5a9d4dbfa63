import functools
import sys

import pytest

from tests.cluster.nodes import Nodes, autoscaling, why_not
from tests.conftest import write_digits
from tests.e2e.conftest import Job


@pytest.fixture(scope="session")
def session_nodes():
    """A head and two nodes, each of 2 CPUs and with an object store of 80 MB."""
    if reason := why_not():
        pytest.skip(reason)
    nodes = Nodes(others=2)
    yield nodes
    nodes.close()


@pytest.fixture
def growing_nodes():
    """A head of 1 CPU, to which Ray's autoscaler adds up to two nodes of 2 CPUs."""
    if reason := why_not():
        pytest.skip(reason)
    nodes = Nodes(grows=autoscaling(cpus=2, most=2))
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(session_nodes):
    """The session's cluster, with all of its nodes."""
    session_nodes.restore()
    return session_nodes


@pytest.fixture
def start_on(tmp_path_factory):
    """Start `python jobs/NAME.py ...` on the head of a cluster; what runs in the end is ended."""
    jobs = []

    def start(nodes, name, *arguments):
        command = nodes.on_head(sys.executable, f"jobs/{name}.py", *arguments)
        jobs.append(Job(command, tmp_path_factory.mktemp("job"), nodes.variables))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


@pytest.fixture
def start(nodes, start_on):
    """The same on that of the session's cluster."""
    return functools.partial(start_on, nodes)


@pytest.fixture(scope="session")
def all_digits(tmp_path_factory):
    """1,797 digits of 10 classes."""
    return write_digits(tmp_path_factory.mktemp("all_digits"), 1797)
