"""deploy/ and the files that are uploaded, checked without a cluster: by Kubernetes' schemas, Ray's packaging
code, and the jobs' flags."""

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
    """Loads YAML as kubectl does.

    It refuses repeated keys, and values that YAML 1.1 and 1.2 read differently (on, 010, 1:30, 1_000).
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{repeated} twice in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and not node.style and not _is_unambiguous(node.tag, node.value):
            raise ValueError(f"{node.value} in line {node.start_mark.line + 1} needs quotes")
        return super().construct_object(node, deep)


def _is_unambiguous(tag: str, text: str) -> bool:
    """Whether YAML 1.1 and 1.2 read a scalar without quotes as the same value."""
    type_name = tag.rpartition(":")[2]
    if type_name == "str":
        # YAML 1.2 reads these as numbers, 1.1 as text.
        return not re.fullmatch(r"[-+]?(0o[0-7]+|[0-9.]+[eE][-+]?[0-9]+)", text)
    return {
        "bool": text in ("true", "false"),
        "null": text in ("null", ""),
        "int": re.fullmatch(r"-?(0|[1-9][0-9]*)", text) is not None,
        "float": re.fullmatch(r"-?(0|[1-9][0-9]*)\.[0-9]+", text) is not None,
    }[type_name]


def manifest(name: str) -> dict[str, Any]:
    return yaml.load((DEPLOY / name).read_text(), _KubernetesLoader)


def _without_unknown_fields(schema: Any) -> Any:
    """A copy of the schema that refuses every field that it does not name."""
    if isinstance(schema, list):
        return [_without_unknown_fields(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: value if key == "properties" else _without_unknown_fields(value) for key, value in schema.items()}
    if "properties" in schema:
        strict["properties"] = {name: _without_unknown_fields(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    return strict


def _check(resource: dict[str, Any]) -> None:
    """Check a resource by the schema of its kind.

    Raises:
        ValidationError: Kubernetes would refuse it, or drop a field.
    """
    text = gzip.decompress((REPOSITORY / "tests" / "crds" / f"{resource['kind']}.json.gz").read_bytes())
    Draft7Validator(_without_unknown_fields(json.loads(text))).validate(resource)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_match_kuberays_schemas(name):
    resource = manifest(name)
    _check(resource)
    assert resource["apiVersion"] == "ray.io/v1"
    # The names of pods begin with it.
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
def test_mistakes_in_manifests_are_refused(path, value):
    broken = copy.deepcopy(manifest("rayjob-train.yaml"))
    parent = broken
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(ValidationError):
        _check(broken)


@pytest.mark.parametrize("text", ["a: on", "a: 010", "a: 1:30", "a: 1e3", "a: 1_000", "a: ~", "a: 1\na: 2"])
def test_ambiguous_yaml_is_refused(text):
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
def test_every_node_is_configured_completely(name):
    resource = manifest(name)
    assert _cluster(resource)["rayVersion"] == _locked("requirements.lock")["ray"]
    assert _cluster(resource)["authOptions"] == {"mode": "token"}
    assert _cluster(resource)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in _groups(resource):
        spec, container = group["template"]["spec"], _container(group)
        resources = container["resources"]
        # A node gets all of its limits, as it requests them.
        assert resources["limits"].items() <= resources["requests"].items()
        assert {"livenessProbe", "readinessProbe", "envFrom"} <= container.keys()
        # KubeRay mounts /dev/shm itself.
        assert "volumes" not in spec
        gpus = "nvidia.com/gpu" in resources["limits"]
        assert container["image"] == ("cnnray:gpu" if gpus else "cnnray:cpu")
        assert bool(spec.get("tolerations")) == gpus
        assert group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0)


def _nodes(resource: dict[str, Any], replicas: str) -> Resources:
    """The cluster as Ray sees it, with `minReplicas` or `maxReplicas` nodes of each group."""
    nodes = [Node(cpus=0)]
    for group in _cluster(resource)["workerGroupSpecs"]:
        limits = {name: _quantity(value) for name, value in _container(group)["resources"]["limits"].items()}
        node = Node(
            cpus=limits["cpu"], gpus=limits.get("nvidia.com/gpu", 0), object_store_bytes=int(limits["memory"] * 0.3)
        )
        nodes += [node] * group[replicas]
    return Resources(tuple(nodes))


def _parse_entrypoint(resource: dict[str, Any], script: str, config: type[Any]) -> Any:
    """The config that a job's manifest passes on the command line."""
    python, path, *arguments = shlex.split(resource["spec"]["entrypoint"])
    assert (python, path) == ("python", f"jobs/{script}.py")
    assert (REPOSITORY / path).exists()
    return commandline.parse(config, path, arguments)


def test_the_training_fits_its_cluster():
    resource = manifest("rayjob-train.yaml")
    config = _parse_entrypoint(resource, "train", TrainConfig)
    shares = share_out(config, _nodes(resource, "minReplicas"))
    assert (config.max_workers, config.gpus_per_worker, shares.decode_cpus) == (2, 1, 1)


def test_the_prediction_fits_its_smallest_cluster_and_fills_its_largest():
    resource = manifest("rayjob-predict.yaml")
    config = _parse_entrypoint(resource, "predict", PredictConfig)
    small, large = _nodes(resource, "minReplicas"), _nodes(resource, "maxReplicas")
    pool = plan_pool(config, "openvino-int8", small)
    assert pool.first == pool.smallest == small.room_for(pool.cpus, 0)
    assert pool.largest == large.room_for(pool.cpus, 0) == large.cpus


def _parse_serve_command() -> ServeConfig:
    """The config of the command in the manifest's comment, which wrote the manifest's configuration."""
    (line,) = re.findall(r"^#   (python jobs/serve\.py .*)$", (DEPLOY / "rayservice.yaml").read_text(), re.MULTILINE)
    return commandline.parse(ServeConfig, "jobs/serve.py", shlex.split(line)[2:])


def test_the_service_is_configured_as_the_job_writes_it():
    resource, config = manifest("rayservice.yaml"), _parse_serve_command()
    configured = yaml.load(resource["spec"]["serveConfigV2"], _KubernetesLoader)
    assert config.write_config
    assert configured == deploy.build_configuration(config, None, max_replicas=1)
    ServeDeploySchema.model_validate(configured)
    assert configured["http_options"]["host"] == "0.0.0.0"  # otherwise no other pod could reach it
    ports = [port["containerPort"] for port in _container(_cluster(resource)["workerGroupSpecs"][0])["ports"]]
    assert ports == [config.port]


def test_the_service_fits_its_cluster():
    resource, config = manifest("rayservice.yaml"), _parse_serve_command()
    needs = config.resources
    assert _nodes(resource, "minReplicas").room_for(*needs) >= config.min_replicas
    assert _nodes(resource, "maxReplicas").room_for(*needs) == config.max_replicas


def test_nodes_wait_for_the_end_of_running_requests():
    resource, config = manifest("rayservice.yaml"), _parse_serve_command()
    (group,) = _cluster(resource)["workerGroupSpecs"]
    (_, pause) = _container(group)["lifecycle"]["preStop"]["exec"]["command"]
    (application,) = deploy.build_configuration(config, None, 1)["applications"]
    drain = application["deployments"][0]["graceful_shutdown_timeout_s"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= float(pause) + drain
    assert resource["spec"]["rayClusterDeletionDelaySeconds"] >= drain


def _instructions() -> list[tuple[str, list[str]]]:
    """The Dockerfile's instructions, each with its arguments."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split()[0], shlex.split(line)[1:]) for line in text.splitlines() if line.strip()]


def _arguments(name: str) -> list[list[str]]:
    return [words for instruction, words in _instructions() if instruction == name]


def _sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets a file pass, by the last line that matches it or a folder above it."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").strip("/")
        above = [path, *(str(part) for part in Path(path).parents if str(part) != ".")]
        if any(fnmatch.fnmatchcase(part, pattern) or fnmatch.fnmatchcase(f"./{part}", pattern) for part in above):
            sent = line.startswith("!")
    return sent


def test_the_image_holds_the_locked_packages_and_the_code():
    (compiler, base), (argument,) = _arguments("FROM"), _arguments("ARG")
    assert compiler == [*base, "AS", "compiler"]
    supported = re.findall(r"python(3\.\d+)", re.search(r"PYTHON \?= .*", (REPOSITORY / "Makefile").read_text())[0])
    assert re.fullmatch(r"python:(3\.\d+)-.+", base[0])[1] in supported
    assert argument == ["LOCK=requirements.lock"]
    (install,) = [words for words in _arguments("RUN") if words[:2] == ["pip", "install"]]
    assert install[-2:] == ["--requirement", "${LOCK}"]
    assert "--require-hashes" in install
    for words in _arguments("COPY"):
        if words[0] == "--from=compiler":
            assert f"-o {words[1]}" in (DEPLOY / "Dockerfile").read_text()
            continue
        for source in words[:-1]:
            for lock in LOCKS:
                assert (REPOSITORY / source.replace("${LOCK}", lock)).exists(), source
    ((user,),) = _arguments("USER")
    assert int(user) > 0
    environment = dict(word.split("=", 1) for words in _arguments("ENV") for word in words)
    assert deploy.ON_NODES.items() <= environment.items()
    # Jobs and Serve's replicas import the code from the folder that it was copied into.
    assert [environment["PYTHONPATH"]] == _arguments("WORKDIR")[0] == ["/cnnray"]


def test_docker_receives_only_the_files_of_the_image():
    for path in (*LOCKS, "cnnray/cluster.py", "cnnray/serving/page.html", "jobs/train.py", "native/resize.c"):
        assert (REPOSITORY / path).exists()
        assert _sent_to_docker(path), path
    for path in (".git/config", ".venv/bin/python", "demo/x.png", "tests/conftest.py", "cnnray/__pycache__/x.pyc"):
        assert not _sent_to_docker(path), path


def test_all_lock_files_hold_the_same_versions():
    cpu, gpu = (_locked(name) for name in LOCKS)
    dev = _locked("requirements-dev.lock")
    for locked in (cpu, gpu):
        assert {name: version for name, version in locked.items() if dev.get(name, version) != version} == {}
    assert cpu.keys() < dev.keys()
    assert not {"pytest", "moto", "mypy", "ruff", "schemathesis"} & (cpu.keys() | gpu.keys())
    assert "nvidia-cudnn-cu12" in gpu
    assert {"ray", "tensorflow", "keras", "openvino"} <= gpu.keys()


def test_tensorflow_comes_with_kernels_for_gpus_only_where_cuda_comes_too():
    x86 = "platform_machine == 'x86_64' and sys_platform == 'linux'"
    other = "platform_machine != 'x86_64' or sys_platform != 'linux'"
    for name in ("requirements.lock", "requirements-dev.lock"):
        lines = re.findall(r"^(tensorflow[a-z-]*)==[^ ]+ ; (.+) \\$", (REPOSITORY / name).read_text(), re.MULTILINE)
        assert sorted(lines) == [("tensorflow", other), ("tensorflow-cpu", x86)]
        assert _locked(name)["tensorflow-cpu"] == _locked(name)["tensorflow"]
    gpu = _locked("requirements-gpu.lock")
    assert gpu["tensorflow"] == _locked("requirements.lock")["tensorflow"]
    assert "tensorflow-cpu" not in gpu


def test_only_the_code_travels_with_a_job(tmp_path, monkeypatch):
    """Ray's own packaging code, run on a folder with all kinds of files that a clone collects."""
    ignore_files = (".gitignore", ".rayignore")
    ignored = [
        ".git/config", ".venv/bin/python", "demo/run/bundle/model.keras", "build/x", "runs/1/summary.json",
        ".ruff_cache/x", "cnnray.egg-info/x", "cnnray/__pycache__/x.pyc", "tests/conftest.py", "docs/scaling.md",
        "deploy/Dockerfile", "requirements-dev.lock", ".mypy_cache/x",
    ]  # fmt: skip
    uploaded = [
        "cnnray/cluster.py", "cnnray/serving/page.html", "cnnray/evaluation/report.html", "jobs/train.py",
        "pyproject.toml", "requirements.lock", "requirements-gpu.lock",
    ]  # fmt: skip
    for name in ignore_files:
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    for name in ignored + uploaded:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    excludes = packaging._get_excludes(tmp_path, get_runtime_env_default_excludes())
    packed: list[str] = []
    packaging._dir_travel(
        tmp_path, [excludes], lambda path: packed.append(str(path.relative_to(tmp_path))) if path.is_file() else None,
        include_gitignore=True,
    )  # fmt: skip
    assert sorted(packed) == sorted([*uploaded, *ignore_files])
