"""`jobs/serve.py` in a process of its own, and how it is asked."""

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

from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from tests.e2e.conftest import free_port, until


def ask(address, data=None, kind="image/png"):
    """Status, and what came as JSON; POST where there are data."""
    request = urllib.request.Request(address, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


class Service:
    """A service with a Ray of its own."""

    def __init__(self, start, *arguments):
        self._start, self.address = start, f"http://127.0.0.1:{free_port()}"
        self.job = start("serve", "--port", self.address.rpartition(":")[2], *arguments)
        until(lambda: self.job.process.poll() is not None or "To change" in self.said(), 120, "the service")
        assert self.job.process.poll() is None, self.said()
        self.ray = dict(re.findall(r"(RAY_\w+)=(\S+)", self.said()))
        (self._dashboard,) = re.findall(r"serve status --address (\S+)", self.said())

    def said(self):
        return self.job.err.read_text()

    def change(self, *arguments):
        """What a second `jobs/serve.py` does to it, once it is done."""
        job = self._start("serve", "--port", self.address.rpartition(":")[2], *arguments, environment=self.ray)
        job.wait(120)
        return job

    def status(self):
        """How many replicas are in which state, as `serve status` tells."""
        command = [str(Path(sys.executable).with_name("serve")), "status", "--address", self._dashboard]
        done = subprocess.run(command, env=os.environ | self.ray, capture_output=True, text=True, check=True)
        return yaml.safe_load(done.stdout)["applications"]["cnnray"]["deployments"]["Classifier"]["replica_states"]

    def replicas(self):
        """The processes."""
        return [child for child, name in self.job.named_children() if "ServeReplica" in name]


def another_version(bundle, folder):
    """A copy of a bundle that answers a little otherwise."""
    shutil.copytree(bundle, folder)
    bundles.write_info(str(folder), dataclasses.replace(Bundle.load(bundle).info, temperature=2.0))
    return str(folder)


FORMS = ("raw", "typed", "form", "json", "open inference", "tensorflow")


def send(address, image, form):
    """Ask about an image by one of these ways: status and text of the answer."""
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


def described(address, examples, folder):
    """Have schemathesis ask what the service's own description allows and forbids, so often for each operation.

    Returns:
        the number of requests, and what schemathesis said in the end.
    """
    ((name, (version, *_)), *_) = ask(f"{address}/metadata")[1]["models"].items()
    config = folder / "schemathesis.toml"  # names that there are, or else nearly all that is asked is 404
    names = {"model": name, "version": version["version"]}
    lines = [f'"{place}.{key}" = "{value}"' for key, value in names.items() for place in ("path", "query")]
    config.write_text("\n".join(["[parameters]", *lines]))
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "--no-color", "--config-file", str(config), "run",
        f"{address}/openapi.json",
        "--max-examples", str(examples), "--seed", "1", "--exclude-checks",
        # Random bytes that are allowed by the description need not be an image.
        "positive_data_acceptance",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout[done.stdout.rindex("Test cases:") :]
    return int(re.search(r"[\d,]+", summary)[0].replace(",", "")), summary
