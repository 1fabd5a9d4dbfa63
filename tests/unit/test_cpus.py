"""The number of usable CPUs, where the system has affinities and where it has none."""

import os
import subprocess
import sys

from cnnray import cpus


def test_the_affinity_counts():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cpus.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_without_affinities_all_cpus_count(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpus.usable_cpus() == os.cpu_count()


def test_jobs_start_without_affinities(tmp_path):
    """Their checks before Ray starts, and their engines."""
    program = (
        "import os; del os.sched_getaffinity\n"
        "import pytest\n"
        "from cnnray.models import engines, export\n"
        "from cnnray.training.config import TrainConfig\n"
        "from cnnray.training.job import train\n"
        "config = TrainConfig(data='/d', output='/o', max_workers=500, batch_size=500)\n"
        "with pytest.raises(RuntimeError, match='500 worker'): train(config)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
