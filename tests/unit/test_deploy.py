"""deploy/ and what is uploaded, without a cluster: Kubernetes' schemas, Ray's own packaging, the jobs' own flags."""

import copy
import fnmatch
import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, ValidationError
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray.serve.schema import ServeDeploySchema

from cnnray import commandline
from cnnray.cluster import Node, Resources
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.pool import plan_pool
from cnnray.serving import deploy
from cnnray.serving.config import ServeConfig
from cnnray.training.config import TrainConfig
from cnnray.training.plan import share_out
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
MANIFESTS = ("rayjob-train.yaml", "rayjob-predict.yaml", "rayservice.yaml")
LOCKS = ("requirements.lock", "requirements-gpu.lock")


def _locked(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", (REPOSITORY / name).read_text(), re.MULTILINE))


class _KubernetesLoader(yaml.SafeLoader):
    """YAML as kubectl takes it: the same key twice is a mistake; and what YAML 1.1 and 1.2 read as different things
    (on, 010, 1:30, 1_000) is none that these files may have."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{twice} twice in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and not node.style and not _plain(node.tag, node.value):
            raise ValueError(f"{node.value} in line {node.start_mark.line + 1} needs quotes")
        return super().construct_object(node, deep)


def _plain(tag: str, text: str) -> bool:
    kind = tag.rpartition(":")[2]
    if kind == "str":
        # Numbers of YAML 1.2 that are text in 1.1.
        return not re.fullmatch(r"[-+]?(0o[0-7]+|[0-9.]+[eE][-+]?[0-9]+)", text)
    return {
        "bool": text in ("true", "false"),
        "null": text in ("null", ""),
        "int": re.fullmatch(r"-?(0|[1-9][0-9]*)", text) is not None,
        "float": re.fullmatch(r"-?(0|[1-9][0-9]*)\.[0-9]+", text) is not None,
    }[kind]


def manifest(name: str) -> dict[str, Any]:
    return yaml.load((DEPLOY / name).read_text(), _KubernetesLoader)


def _closed(schema: Any) -> Any:
    """The schema, with every field refused that it does not name."""
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value if key == "properties" else _closed(value) for key, value in schema.items()}
    if "properties" in schema:
        closed["properties"] = {name: _closed(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed


def _check(resource: dict[str, Any]) -> None:
    """
    Raises:
        ValidationError: Kubernetes would refuse it, or drop a field.
    """
    text = gzip.decompress((REPOSITORY / "tests" / "crds" / f"{resource['kind']}.json.gz").read_bytes())
    Draft7Validator(_closed(json.loads(text))).validate(resource)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_kuberay_takes(name):
    resource = manifest(name)
    _check(resource)
    assert resource["apiVersion"] == "ray.io/v1"
    # The names of pods are made of it.
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", resource["metadata"]["name"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"), 1),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "1"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "livenesProbe"), {}),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "autoscalerOptions", "resources", "limits", "cpu"), "a lot"),
        (("spec", "submissionMod"), "K8sJobMode"),
    ],
)
def test_mistakes_in_manifests_are_found(path, value):
    broken = copy.deepcopy(manifest("rayjob-train.yaml"))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        _check(broken)


@pytest.mark.parametrize("text", ["a: on", "a: 010", "a: 1:30", "a: 1e3", "a: 1_000", "a: ~", "a: 1\na: 2"])
def test_ambiguous_yaml_is_found(text):
    with pytest.raises(ValueError, match="in line 1"):
        yaml.load(text, _KubernetesLoader)


def _cluster(resource: dict[str, Any]) -> dict[str, Any]:
    return resource["spec"].get("rayClusterSpec") or resource["spec"]["rayClusterConfig"]


def _groups(resource: dict[str, Any]) -> list[dict[str, Any]]:
    return [_cluster(resource)["headGroupSpec"], *_cluster(resource)["workerGroupSpecs"]]


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


_UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}


def _quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(\D*)", text).groups()
    return float(number) * _UNITS[unit]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_node_has_what_it_needs(name):
    resource = manifest(name)
    assert _cluster(resource)["rayVersion"] == _locked("requirements.lock")["ray"]
    assert _cluster(resource)["authOptions"] == {"mode": "token"}
    assert _cluster(resource)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in _groups(resource):
        spec, container = group["template"]["spec"], _container(group)
        has = container["resources"]
        assert has["limits"].items() <= has["requests"].items()  # what is promised is there
        assert {"livenessProbe", "readinessProbe", "envFrom"} <= container.keys()
        # KubeRay mounts /dev/shm itself.
        assert "volumes" not in spec
        gpus = "nvidia.com/gpu" in has["limits"]
        assert container["image"] == ("cnnray:gpu" if gpus else "cnnray:cpu")
        assert bool(spec.get("tolerations")) == gpus
        assert group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0)


def _nodes(resource: dict[str, Any], replicas: str) -> Resources:
    """What Ray sees of the cluster with so many of each group."""
    nodes = [Node(cpus=0)]
    for group in _cluster(resource)["workerGroupSpecs"]:
        has = {name: _quantity(value) for name, value in _container(group)["resources"]["limits"].items()}
        node = Node(cpus=has["cpu"], gpus=has.get("nvidia.com/gpu", 0), object_store_bytes=int(has["memory"] * 0.3))
        nodes += [node] * group[replicas]
    return Resources(tuple(nodes))


def _job(resource: dict[str, Any], script: str, config: type[Any]) -> Any:
    """The config of the manifest's entrypoint."""
    python, path, *arguments = shlex.split(resource["spec"]["entrypoint"])
    assert (python, path) == ("python", f"jobs/{script}.py")
    assert (REPOSITORY / path).exists()
    return commandline.parse(config, path, arguments)


def test_the_training_fits_its_cluster():
    resource = manifest("rayjob-train.yaml")
    config = _job(resource, "train", TrainConfig)
    shares = share_out(config, _nodes(resource, "minReplicas"))
    assert (config.max_workers, config.gpus_per_worker, shares.decode_cpus) == (2, 1, 1)


def test_the_prediction_fits_its_cluster_and_uses_all_that_it_may_grow_to():
    resource = manifest("rayjob-predict.yaml")
    config = _job(resource, "predict", PredictConfig)
    small, large = _nodes(resource, "minReplicas"), _nodes(resource, "maxReplicas")
    pool = plan_pool(config, "openvino-int8", small)
    assert pool.first == pool.smallest == small.room_for(pool.cpus, 0)
    assert pool.largest == large.room_for(pool.cpus, 0) == large.cpus


def _service() -> ServeConfig:
    """The config of the command that the manifest says its configuration was written by."""
    (line,) = re.findall(r"^#   (python jobs/serve\.py .*)$", (DEPLOY / "rayservice.yaml").read_text(), re.MULTILINE)
    return commandline.parse(ServeConfig, "jobs/serve.py", shlex.split(line)[2:])


def test_the_service_is_configured_as_the_job_writes_it():
    resource, config = manifest("rayservice.yaml"), _service()
    configured = yaml.load(resource["spec"]["serveConfigV2"], _KubernetesLoader)
    assert config.write_config
    assert configured == deploy.build_configuration(config, max_replicas=1)
    ServeDeploySchema.model_validate(configured)
    assert configured["http_options"]["host"] == "0.0.0.0"  # else no other pod reaches it
    ports = [port["containerPort"] for port in _container(_cluster(resource)["workerGroupSpecs"][0])["ports"]]
    assert ports == [config.port]


def test_the_service_fits_its_cluster():
    resource, config = manifest("rayservice.yaml"), _service()
    needs = (config.cpus_per_replica, config.gpus_per_replica)
    assert _nodes(resource, "minReplicas").room_for(*needs) >= config.min_replicas
    assert _nodes(resource, "maxReplicas").room_for(*needs) == config.max_replicas


def test_requests_that_have_begun_end_before_their_node_does():
    resource, config = manifest("rayservice.yaml"), _service()
    (group,) = _cluster(resource)["workerGroupSpecs"]
    (_, pause) = _container(group)["lifecycle"]["preStop"]["exec"]["command"]
    drain = deploy.build_configuration(config, 1)["applications"][0]["deployments"][0]["graceful_shutdown_timeout_s"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= float(pause) + drain
    assert resource["spec"]["rayClusterDeletionDelaySeconds"] >= drain


def _instructions() -> list[tuple[str, list[str]]]:
    """Of the Dockerfile, each with its words."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split()[0], shlex.split(line)[1:]) for line in text.splitlines() if line.strip()]


def _of(name: str) -> list[list[str]]:
    return [words for instruction, words in _instructions() if instruction == name]


def _sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets a file pass: the last line that fits it, or a folder above it, counts."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").strip("/")
        above = [path, *(str(part) for part in Path(path).parents if str(part) != ".")]
        if any(fnmatch.fnmatchcase(part, pattern) or fnmatch.fnmatchcase(f"./{part}", pattern) for part in above):
            sent = line.startswith("!")
    return sent


def test_the_image_is_of_the_locked_packages_and_the_code():
    (base,), (argument,) = _of("FROM"), _of("ARG")
    python = (REPOSITORY / "Makefile").read_text().split("PYTHON ?= python")[1].split()[0]
    assert base[0].startswith(f"python:{python}-")
    assert argument == ["LOCK=requirements.lock"]
    (install,) = [words for words in _of("RUN") if words[:2] == ["pip", "install"]]
    assert install[-2:] == ["--requirement", "${LOCK}"]
    assert "--require-hashes" in install
    for words in _of("COPY"):
        for source in words[:-1]:
            for lock in LOCKS:
                assert (REPOSITORY / source.replace("${LOCK}", lock)).exists(), source
    ((user,),) = _of("USER")
    assert int(user) > 0
    environment = dict(word.split("=", 1) for words in _of("ENV") for word in words)
    assert deploy.ON_NODES.items() <= environment.items()
    # Jobs, and what Serve starts, import the code from the folder that it was copied into.
    assert [environment["PYTHONPATH"]] == _of("WORKDIR")[0] == ["/cnnray"]


def test_docker_is_sent_what_the_image_takes_and_no_more():
    for path in (*LOCKS, "cnnray/cluster.py", "cnnray/serving/page.html", "jobs/train.py"):
        assert (REPOSITORY / path).exists()
        assert _sent_to_docker(path), path
    for path in (".git/config", ".venv/bin/python", "demo/x.png", "tests/conftest.py", "cnnray/__pycache__/x.pyc"):
        assert not _sent_to_docker(path), path


def test_both_lock_files_hold_the_same_versions():
    cpu, gpu = (_locked(name) for name in LOCKS)
    assert {name: version for name, version in gpu.items() if cpu.get(name, version) != version} == {}
    assert "nvidia-cudnn-cu12" in gpu
    assert {"ray", "tensorflow", "keras", "openvino"} <= gpu.keys()


def test_only_the_code_travels_with_a_job(tmp_path, monkeypatch):
    """By Ray's own code, from a folder with all that a clone gathers."""
    names = (".gitignore", ".rayignore")
    made = [
        ".git/config", ".venv/bin/python", "demo/run/bundle/model.keras", "build/x", "runs/1/summary.json",
        ".ruff_cache/x", "cnnray.egg-info/x", "cnnray/__pycache__/x.pyc", "tests/conftest.py", "docs/scaling.md",
        "deploy/Dockerfile", "requirements.lock", "requirements-gpu.lock", ".mypy_cache/x",
    ]  # fmt: skip
    wanted = [
        "cnnray/cluster.py", "cnnray/serving/page.html", "cnnray/evaluation/report.html", "jobs/train.py",
        "pyproject.toml",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    for name in made + wanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    excludes = packaging._get_excludes(tmp_path, get_runtime_env_default_excludes())
    packed: list[str] = []
    packaging._dir_travel(
        tmp_path, [excludes], lambda path: packed.append(str(path.relative_to(tmp_path))) if path.is_file() else None,
        include_gitignore=True,
    )  # fmt: skip
    assert sorted(packed) == sorted([*wanted, *names])
