"""A Ray cluster of several nodes on one machine, each with a network, an address and Ray files of its own.

Every node is a network namespace behind one bridge, with a folder of its own mounted where Ray keeps its session. A
power failure is simulated by taking the node's link down, so that no other node is notified, and then killing all its
processes.
"""

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import psutil

from cnnray.serving.direct import ON_NODES
from tests.conftest import REPOSITORY
from tests.e2e.conftest import until

_PORT, _STORE_BYTES = 6379, 80 * 2**20
_HAPROXY = {
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "SERVER_STATE_BASE": "",
    "SERVER_STATE_FILE": "server-state",
    "METRICS_SOCKET_PATH": "metrics.sock",
}
_TOOLS = ("ip", "nsenter", "unshare")


def why_unsupported() -> str:
    """The reason why this machine cannot run such a cluster; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in _TOOLS if shutil.which(name) is None]:
        return f"{missing[0]} is not installed (Debian's packages iproute2 and util-linux)"
    name = f"n{secrets.token_hex(4)}"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if added.returncode:
        return f"network namespaces are not allowed here: {added.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def _ip(*arguments) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def autoscaling(cpus: int, most: int) -> dict[str, object]:
    """The configuration for `ray start --autoscaling-config`, by which Ray's fake provider starts nodes in the head's
    network.

    Args:
        cpus: of each node.
        most: nodes beside the head.
    """
    unused = ("head_setup_commands", "worker_setup_commands", "setup_commands", "initialization_commands")
    unused += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")
    return {
        "cluster_name": "growing",
        "max_workers": most,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "ray.worker.cpu": {
                "resources": {"CPU": cpus, "object_store_memory": _STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "head_node": {},
        "worker_nodes": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "rsync_filter": [],
        **{name: [] for name in unused},
    }


class Nodes:
    """A cluster: a head and nodes that can be stopped and started, with two CPUs each; or a head with one CPU and
    Ray's autoscaler.

    Args:
        others: nodes beside the head.
        autoscaler: see `autoscaling`; None: no autoscaler.
    """

    def __init__(self, others: int = 0, autoscaler: dict[str, object] | None = None) -> None:
        self._id = f"n{secrets.token_hex(4)}"  # an interface's name has 15 characters at most
        self._subnet = f"10.{random.randint(1, 254)}.{random.randint(1, 254)}"
        self._processes: dict[int, subprocess.Popen] = {}
        self._starts = 0
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.variables |= ON_NODES | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_ADDRESS": f"{self.address(0)}:{_PORT}",
            # By default Ray notices a power failure after a minute (five health checks of 10 s without an answer).
            "RAY_health_check_timeout_ms": "4000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            # By default a stopped replica drains for half a minute, for load balancers that are notified late.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        }
        self._folder = Path(tempfile.mkdtemp(prefix="r"))
        (self._folder / "ray").mkdir()
        for name, file in _HAPROXY.items():
            # The default is the temporary folder, which the nodes share.
            self.variables[f"RAY_SERVE_HAPROXY_{name}"] = f"{self._folder}/ray/{file}"
        self._cpus, self._config = 2, self._folder / "growing.json"
        if autoscaler is not None:
            self._cpus = 1
            self.variables["RAY_FAKE_CLUSTER"] = "1"  # required by the fake provider
            self._config.write_text(json.dumps(autoscaler))
        self.others = range(1, others + 1)
        _ip("link", "add", self._id, "type", "bridge")
        try:
            _ip("link", "set", self._id, "up")
            for number in (0, *self.others):
                self.start(number)
        except BaseException:
            self.close()
            raise

    def address(self, number: int) -> str:
        """The IP address of a node; the head is node 0."""
        return f"{self._subnet}.{number + 1}"

    def name(self, number: int) -> str:
        """The name of a node's network namespace."""
        return f"{self._id}-{number}"

    def start(self, number: int) -> None:
        """Start a node that is not running, and wait until Ray has started on it."""
        name, link = self.name(number), f"{self._id}v{number}"
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self._id, "up")
        _ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "route", "add", "default", "dev", "eth0")  # Ray finds the node's address by it
        self._starts += 1
        own = self._folder / f"{self._starts}-of-node-{number}"
        own.mkdir()
        role = ["--head", f"--port={_PORT}", f"--temp-dir={self._folder}/ray", f"--dashboard-host={self.address(0)}"]
        if self._config.exists():
            role.append(f"--autoscaling-config={self._config}")
        if number:
            role = [f"--address={self.address(0)}:{_PORT}"]
        command = [
            "ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c",
            'mount --bind "$0" "$1" && shift && exec "$@"', str(own), f"{self._folder}/ray",
            "ray", "start", "--block", *role, f"--node-ip-address={self.address(number)}",
            f"--num-cpus={self._cpus}", f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats",
        ]  # fmt: skip
        variables = {key: value for key, value in self.variables.items() if key != "RAY_ADDRESS"}
        with (own / "out").open("w") as out:
            self._processes[number] = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        until(lambda: "Ray runtime started" in (own / "out").read_text(), 60, f"node {number}")

    def processes(self, number: int, command: str = "") -> list[psutil.Process]:
        """The processes of a node whose command line starts with `command`."""
        processes = []
        for pid in map(int, _ip("netns", "pids", self.name(number)).split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if " ".join(process.cmdline()).startswith(command):
                    processes.append(process)
        return processes

    def running(self, command: str) -> list[int]:
        """The nodes that have a process whose command line starts with `command`."""
        return [number for number in self._processes if self.processes(number, command)]

    def cut_power(self, number: int) -> None:
        """Stop a node as a power failure does: first cut its network link, then kill all its processes."""
        _ip("link", "set", f"{self._id}v{number}", "down")
        self._end(number)

    @contextlib.contextmanager
    def cut_off(self, number: int, command: str) -> Generator[None]:
        """Cut a node's network link and stop its processes whose command line starts with `command`; then both go on.

        Ray takes the node for lost meanwhile, and its raylet ends when it hears of that. It is left to `restore`.
        """
        link, stopped = f"{self._id}v{number}", self.processes(number, command)
        _ip("link", "set", link, "down")
        for process in stopped:
            process.suspend()
        try:
            yield
        finally:
            _ip("link", "set", link, "up")
            for process in stopped:
                process.resume()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[number].wait(60)
            self._end(number)

    def wait_until_lost(self, number: int) -> float:
        """Wait until Ray reports a node as lost, and return the seconds that it took."""
        started = time.monotonic()
        program = f"""
import time, ray
ray.init(logging_level="ERROR")
while any(node["Alive"] and node["NodeManagerAddress"] == "{self.address(number)}" for node in ray.nodes()):
    time.sleep(0.5)
"""
        subprocess.run(
            self.on_head(sys.executable, "-c", program), env=self.variables, check=True, timeout=120,
            capture_output=True,
        )  # fmt: skip
        return time.monotonic() - started

    def _end(self, number: int) -> None:
        deadline = time.monotonic() + 10
        while (alive := self.processes(number)) and time.monotonic() < deadline:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        process = self._processes.pop(number, None)
        if process is not None:
            process.kill()
            process.wait()
        _ip("link", "del", f"{self._id}v{number}")
        _ip("netns", "del", self.name(number))

    def restore(self) -> None:
        """Start the nodes that are not running."""
        for number in self.others:
            if number not in self._processes:
                self.start(number)

    def on_head(self, *command) -> list[str]:
        """The command line that runs a command on the head."""
        return [
            "nsenter",
            f"--target={self._processes[0].pid}",
            "--net",
            "--mount",
            f"--wd={REPOSITORY}",
            "--",
            *map(str, command),
        ]

    def close(self) -> None:
        """Stop all nodes, and remove their namespaces, links and folders."""
        names = [line.split()[0] for line in _ip("netns", "list").splitlines()]
        for number in reversed((0, *self.others)):
            if self.name(number) in names:
                self._end(number)
        _ip("link", "del", self._id)
        shutil.rmtree(self._folder, ignore_errors=True)
