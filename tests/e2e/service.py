"""`jobs/serve.py` in a process of its own, and its clients."""

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import requests
import yaml

from cnnray.cluster import free_port
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from tests.e2e.conftest import until


def ask(address, data=None, kind="image/png"):
    """Send a request, POST if there are data. Returns the status and the parsed JSON."""
    request = urllib.request.Request(address, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


class Service:
    """A running service with a Ray of its own."""

    def __init__(self, start, *arguments):
        self._start, self.address = start, f"http://127.0.0.1:{free_port()}"
        self.job = start("serve", "--port", self.address.rpartition(":")[2], *arguments)
        until(lambda: self.job.process.poll() is not None or "To change" in self.log(), 120, "the service")
        assert self.job.process.poll() is None, self.log()
        self.ray = dict(re.findall(r"(RAY_\w+)=(\S+)", self.log()))
        (self._dashboard,) = re.findall(r"serve status --address (\S+)", self.log())

    def log(self):
        return self.job.err.read_text()

    def change(self, *arguments):
        """Run a second `jobs/serve.py`, which changes this service, and wait until it has ended."""
        job = self._start("serve", "--port", self.address.rpartition(":")[2], *arguments, environment=self.ray)
        job.wait(120)
        return job

    def status(self):
        """The number of replicas by state, from `serve status`."""
        command = [str(Path(sys.executable).with_name("serve")), "status", "--address", self._dashboard]
        done = subprocess.run(command, env=os.environ | self.ray, capture_output=True, text=True, check=True)
        return yaml.safe_load(done.stdout)["applications"]["cnnray"]["deployments"]["Classifier"]["replica_states"]

    def replicas(self):
        """The processes of the replicas."""
        return [child for child, name in self.job.named_children() if "ServeReplica" in name]


def copy_as_new_version(bundle, folder):
    """Copy a bundle, with another temperature and therefore other probabilities. Returns the folder."""
    shutil.copytree(bundle, folder)
    bundles.write_info(str(folder), dataclasses.replace(Bundle.load(bundle).info, temperature=2.0))
    return str(folder)


FORMS = ("raw", "typed", "form", "json", "open inference", "tensorflow")


def send(address, image, form):
    """Send an image in one of these forms. Returns the status and the text of the response."""
    text = base64.b64encode(image).decode()
    path, options = {
        "raw": ("/predict", {"data": image, "headers": {"Content-Type": "application/octet-stream"}}),
        "typed": ("/predict", {"data": image, "headers": {"Content-Type": "image/jpeg"}}),
        "form": ("/predict", {"files": [("image", ("a", image)), ("image", ("b", image))]}),
        "json": ("/predict", {"json": {"image": text}}),
        "open inference": (
            "/v2/models/model/infer",
            {"json": {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [text]}]}},
        ),
        "tensorflow": ("/v1/models/model:predict", {"json": {"instances": [{"b64": text}]}}),
    }[form]
    answer = requests.post(address + path, timeout=60, **options)
    return answer.status_code, answer.text


def run_schemathesis(address, examples, folder):
    """Let schemathesis send requests that the service's OpenAPI description allows and forbids.

    Args:
        address: of the service.
        examples: number of requests for each operation.
        folder: for schemathesis' config.

    Returns:
        The number of requests, and the summary that schemathesis printed.
    """
    ((name, (version, *_)), *_) = ask(f"{address}/metadata")[1]["models"].items()
    config = folder / "schemathesis.toml"  # names that exist; otherwise nearly all answers are 404
    names = {"model": name, "version": version["version"]}
    lines = [f'"{place}.{key}" = "{value}"' for key, value in names.items() for place in ("path", "query")]
    config.write_text("\n".join(["[parameters]", *lines]))
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "--no-color", "--config-file", str(config), "run",
        f"{address}/openapi.json",
        "--max-examples", str(examples), "--seed", "1", "--exclude-checks",
        # The description allows random bytes, which are no image.
        "positive_data_acceptance",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout[done.stdout.rindex("Test cases:") :]
    return int(re.search(r"[\d,]+", summary)[0].replace(",", "")), summary
