import sys

import pytest

from tests.cluster.nodes import Nodes, why_not
from tests.conftest import write_digits
from tests.e2e.conftest import Job

CLASSES = 10


@pytest.fixture(scope="session")
def session_nodes():
    """A head and two nodes, each of 2 CPUs and with an object store of 80 MB."""
    if reason := why_not():
        pytest.skip(reason)
    nodes = Nodes(others=2)
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(session_nodes):
    """The session's cluster, with all of its nodes."""
    session_nodes.restore()
    return session_nodes


@pytest.fixture
def start(nodes, tmp_path_factory):
    """Start `python jobs/NAME.py ...` on the head; what runs in the end is ended."""
    jobs = []

    def start(name, *arguments):
        command = nodes.on_head(sys.executable, f"jobs/{name}.py", *arguments)
        jobs.append(Job(command, tmp_path_factory.mktemp("job"), nodes.variables))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


@pytest.fixture(scope="session")
def all_digits(tmp_path_factory):
    """1,797 digits of 10 classes."""
    return write_digits(tmp_path_factory.mktemp("all_digits"), 1797)
