"""Clusters of several nodes, and jobs on them."""

import functools
import sys

import pytest

from tests.cluster.nodes import Nodes, autoscaling, why_unsupported
from tests.conftest import write_digits
from tests.e2e.conftest import Job


@pytest.fixture(scope="session")
def session_nodes():
    """A head and two nodes, each with 2 CPUs and an object store of 80 MiB."""
    if reason := why_unsupported():
        pytest.skip(reason)
    nodes = Nodes(others=2)
    yield nodes
    nodes.close()


@pytest.fixture
def growing_nodes():
    """A head with 1 CPU, to which Ray's autoscaler adds up to two nodes with 2 CPUs."""
    if reason := why_unsupported():
        pytest.skip(reason)
    nodes = Nodes(autoscaler=autoscaling(cpus=2, most=2))
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(session_nodes):
    """The session's cluster; nodes that earlier tests stopped are started again."""
    session_nodes.restore()
    return session_nodes


@pytest.fixture
def start_on(tmp_path_factory):
    """Start `python jobs/NAME.py ...` on the head of a cluster; jobs that are still running at the end are ended."""
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
    """Start `python jobs/NAME.py ...` on the head of the session's cluster."""
    return functools.partial(start_on, nodes)


@pytest.fixture(scope="session")
def all_digits(tmp_path_factory):
    """A folder with 1,797 images of 10 classes."""
    return write_digits(tmp_path_factory.mktemp("all_digits"), 1797)
