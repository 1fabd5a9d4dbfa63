"""Metrics as Ray's agent exports them."""

import os
import shutil
import subprocess
import sys
import tempfile

SCRIPT = """
import sys, time, urllib.request
import ray
from ray.util import metrics
from cnnray.tracking import gauges

ray.init(
    address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", _temp_dir=sys.argv[1],
    _system_config={"metrics_report_interval_ms": 1000},
)
gauges._SECONDS_BETWEEN_SETS = 0.5
[node] = ray.nodes()
address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

def read():
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
    except OSError:  # the agent starts
        return set()
    return {line.split("{")[0] for line in text.splitlines() if line.startswith("ray_test")}

plain = metrics.Gauge("test_plain", description="Of Ray.")
lasting = gauges.Gauge("test_lasting", metrics, description="Of ours.")
seconds = gauges.Histogram("test_seconds", metrics, description="Of ours.", boundaries=[1, 2])
lasting.set(1)
seconds.add([1.5], {})
ours = {"ray_test_lasting", "ray_test_seconds_bucket", "ray_test_seconds_sum", "ray_test_seconds_count"}
end = time.monotonic() + 60
while not ours | {"ray_test_plain"} <= read():
    plain.set(1)
    assert time.monotonic() < end, read()
    time.sleep(0.2)
while "ray_test_plain" in read():
    assert time.monotonic() < end, "Ray's gauges last: ours need no thread"
    time.sleep(0.2)
time.sleep(3)
assert ours <= read(), read()
print("lasted")
"""


def test_gauges_are_exported_when_those_of_ray_are_forgotten():
    folder = tempfile.mkdtemp(prefix="r")  # Ray's sockets need a short path
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, folder], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=150, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "lasted"
