"""cluster.yaml through all of `ray up` that needs no machine: Ray's own code, and moto in place of AWS."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import boto3
import moto
import pytest
import yaml
from botocore.exceptions import ClientError
from jsonschema import ValidationError
from moto.core import set_initial_no_auth_action_count
from ray.autoscaler._private import commands, providers
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent
from ray.scripts import scripts

from cnnray import commandline
from cnnray.cluster import Node, Resources
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.pool import plan_pool
from cnnray.serving.direct import ON_NODES
from cnnray.spot import SpotElseOnDemand
from cnnray.training.config import TrainConfig
from cnnray.training.plan import share_out
from tests.conftest import REPOSITORY

REGION = "us-west-2"
POLICIES = REPOSITORY / "deploy" / "aws"


def written():
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


def _forget():
    """Clear Ray's caches, which hold clients with other credentials."""
    for cached in (aws_utils.resource_cache, aws_utils.client_cache, aws_config._get_subnets_or_die):
        cached.cache_clear()
    providers._clear_provider_cache()


def _make_profiles():
    """As the README says."""
    iam = boto3.client("iam")
    for name, policies in (("cnnray-head", ("head", "node")), ("cnnray-node", ("node",))):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=(POLICIES / "trust.json").read_text())
        for policy in policies:
            # moto looks at a request's action, and not at the instance that it is for.
            text = (POLICIES / f"{policy}.json").read_text().replace("arn:aws:ec2:*:*:instance/*", "*")
            iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=text)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """AWS without AWS, for a user who has done what cluster.yaml asks for; the current folder is the repository."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("secret")
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {
            "HOME": str(home), "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": REGION,
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        patch.setattr("ray.autoscaler._private.aws.node_provider.TAG_BATCH_DELAY", 0)
        patch.chdir(REPOSITORY)
        _forget()
        _make_profiles()
        yield boto3.client("ec2")
    _forget()


@pytest.fixture(scope="module")
def bootstrapped(aws):
    """What `ray up` makes of cluster.yaml before it starts a machine."""
    return commands._bootstrap_config(written(), no_config_cache=True)


class _Shells:
    """Stands for `subprocess` where Ray runs ssh and rsync: notes what is run, and copies into this home."""

    CalledProcessError = subprocess.CalledProcessError

    def __init__(self):
        self.commands, self.copied = [], set()

    def check_call(self, command, **_):
        if command[0] != "rsync":
            self.commands.append(command[-1])  # of bash on the node
            return
        source, target = Path(command[-2]), Path(command[-1].partition(":")[2])
        self.copied.add(str(target))
        target = target.expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source != target:
            shutil.copy(source, target)

    def check_output(self, command, **_):
        self.check_call(command)
        return b""

    def Popen(self, command, **_):  # noqa: N802 - subprocess's name
        self.check_call(command)
        return SimpleNamespace(communicate=lambda *_: (b"", b""), wait=lambda *_: 0, returncode=0, poll=lambda: 0)


@pytest.fixture(scope="module")
def head(bootstrapped):
    """What `ray up` ran on the head."""
    shells = _Shells()
    commands.get_or_create_head_node(bootstrapped, "cluster.yaml", False, False, True, None, _runner=shells)
    return shells


def _instances(aws):
    return {
        instance["InstanceId"]: instance
        for r in aws.describe_instances()["Reservations"]
        for instance in r["Instances"]
    }


def _type(name):
    return written()["available_node_types"][name]


def test_ray_accepts_it_and_refuses_mistakes():
    validate_config(prepare_config(written()))
    for mistake in (
        lambda config: config.update(idle_timeout_minute=5),
        lambda config: config["available_node_types"]["gpu-workers"].update(max_worker=1),
        lambda config: config["available_node_types"]["head"]["resources"].update(CPU="none"),
    ):
        broken = prepare_config(written())
        mistake(broken)
        with pytest.raises(ValidationError):
            validate_config(broken)
    broken = prepare_config(written() | {"head_node_type": "heads"})
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(broken)


def test_nothing_is_left_to_the_defaults_of_rays_own_provider():
    """Which are for a config of type aws."""
    filled = prepare_config({"cluster_name": "x", "provider": {"type": "aws", "region": REGION}})
    assert filled.keys() - written().keys() == {"docker"}


def test_bootstrapped_on_aws(bootstrapped, aws):
    types = bootstrapped["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["cpu-workers"]["resources"]["CPU"] == 16
    assert (types["gpu-workers"]["resources"]["GPU"], types["gpu-workers"]["resources"]["CPU"]) == (1, 8)
    subnets = types["cpu-workers"]["node_config"]["SubnetIds"]
    zones = {subnet["SubnetId"]: subnet["AvailabilityZone"] for subnet in aws.describe_subnets()["Subnets"]}
    assert [zones[subnet] for subnet in subnets] == written()["provider"]["availability_zone"].split(",")
    groups = aws.describe_security_groups(GroupIds=types["head"]["node_config"]["SecurityGroupIds"])
    rules = groups["SecurityGroups"][0]["IpPermissions"]
    assert [rule["FromPort"] for rule in rules if rule.get("IpRanges")] == [22]


def test_ray_up_sets_up_the_head(head, aws):
    (instance,) = [instance for instance in _instances(aws).values() if _tag(instance, "ray-node-type") == "head"]
    assert instance["InstanceType"] == _type("head")["node_config"]["InstanceType"]
    assert instance["IamInstanceProfile"]["Arn"].endswith("instance-profile/cnnray-head")
    assert _tag(instance, "ray-node-status") == "up-to-date"
    assert head.copied == {*written()["file_mounts"], "~/ray_bootstrap_config.yaml", "~/ray_bootstrap_key.pem"}
    ran = [shlex.split(command)[0] for command in head.commands]
    places = [next(i for i, command in enumerate(ran) if wanted in command) for wanted in written()["setup_commands"]]
    start = next(i for i, command in enumerate(ran) if "ray start --head" in command)
    assert places == sorted(places)
    assert places[-1] < start


def _tag(instance, key):
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}.get(key)


@pytest.fixture
def node(tmp_path):
    """A node's shell as Ray's ssh gives it; what stands for a program notes its arguments and its environment."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    for folder in (".local", "venv"):
        (home / folder / "bin").mkdir(parents=True)
    (home / "venv" / "bin" / "python").symlink_to(sys.executable)
    (home / ".bashrc").touch()
    programs.mkdir()
    note = tmp_path / "calls"
    for path in [programs / name for name in ("ray", "sudo", "python3", "gcc")] + [home / ".local" / "bin" / "uv"]:
        path.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"line = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ)])\n"
            f"open({str(note)!r}, 'a').write(line + '\\n')\n"
        )
        path.chmod(0o755)

    def run(command, **variables):
        note.write_text("")
        environment = {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", **variables}
        # As ray.autoscaler._private.command_runner wraps it.
        text = f"source ~/.bashrc; export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore && ({command})"
        subprocess.run(["bash", "-c", text], env=environment, check=True, cwd=home, timeout=60)
        return [json.loads(line) for line in note.read_text().splitlines()]

    return SimpleNamespace(run=run, home=home, programs=programs)


@pytest.mark.parametrize("which", ["head", "worker"])
def test_nodes_start_with_all_that_jobs_and_the_service_need(node, which):
    calls = [
        call
        for command in written()[f"{which}_start_ray_commands"]
        for call in node.run(command, RAY_HEAD_IP="10.0.0.1")
    ]
    assert [call[1][0] for call in calls] == ["stop", "start"]
    _, (_, *arguments), environment = calls[-1]
    options = scripts.start.make_context("start", list(arguments)).params  # of Ray's own command line
    assert options["head"] is (which == "head")
    assert options["autoscaling_config" if which == "head" else "address"] in (
        "~/ray_bootstrap_config.yaml", "10.0.0.1:6379",
    )  # fmt: skip
    assert ON_NODES.items() <= environment.items()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["PYTHONPATH"] == f"{node.home}/cnnray"
    assert "OMP_NUM_THREADS" not in environment


def test_set_up_installs_what_the_lock_file_says(node):
    locked = dict(
        re.findall(r"^([a-z0-9-]+)==([^ ;]+)", (REPOSITORY / "requirements-dev.lock").read_text(), re.MULTILINE)
    )
    for lock in ("requirements.lock", "requirements-gpu.lock"):
        calls = [call for command in written()["setup_commands"] for call in node.run(command)]
        installs = [call[1] for call in calls if call[1][:2] == ["pip", "install"]]
        assert [install[-1] for install in installs] == [f"{node.home}/cnnray/{lock}"]
        assert "--require-hashes" in installs[0]
        assert ["-m", "pip", "install", "--quiet", "--user", f"uv=={locked['uv']}"] in [call[1] for call in calls]
        assert f"~/cnnray/{lock}" in written()["file_mounts"]
        (compilation,) = [call[1] for call in calls if call[0] == "gcc"]
        assert compilation[-3:] == [
            f"{node.home}/cnnray/native/resize.c", "-o", f"{node.home}/cnnray/_cnnray_resize.abi3.so",
        ]  # fmt: skip
        assert f"-I{sysconfig.get_path('include')}" in compilation
        # The second time: with a GPU, and after a first set-up.
        (node.programs / "nvidia-smi").write_text("#!/bin/sh\n")
        (node.programs / "nvidia-smi").chmod(0o755)
    assert (node.home / ".bashrc").read_text() == "export PATH=$HOME/venv/bin:$PATH\n"


def _as_ec2(provider, monkeypatch):
    """EC2 starts as many nodes as it can, MaxCount at most; moto MinCount.

    Returns:
        the requests.
    """
    requests, create = [], provider.ec2_fail_fast.create_instances

    def create_instances(**request):
        requests.append(request)
        return create(**request | {"MinCount": request["MaxCount"]})

    monkeypatch.setattr(provider.ec2_fail_fast, "create_instances", create_instances)
    return requests


@pytest.fixture
def autoscaler(head, aws, monkeypatch):
    """What the head does to start nodes, with the config that `ray up` left there."""
    config = AutoscalingConfig(json.loads(Path("~/ray_bootstrap_config.yaml").expanduser().read_text()))
    provider = providers._get_node_provider(config.get_provider_config(), config.get_config("cluster_name"), False)
    requests = _as_ec2(provider, monkeypatch)
    reader = SimpleNamespace(get_cached_autoscaling_config=lambda: config)
    return SimpleNamespace(
        config=config, provider=provider, nodes=NodeProviderAdapter(provider, reader), requests=requests
    )


def _launch(autoscaler, aws, name, count):
    """Start nodes as Ray's autoscaler does.

    Returns:
        the instances, and the errors.
    """
    before = _instances(aws).keys()
    autoscaler.nodes.launch({name: count}, "request")
    deadline = time.monotonic() + 30
    errors = []
    while time.monotonic() < deadline:
        errors += autoscaler.nodes.poll_errors()
        launched = [instance for key, instance in _instances(aws).items() if key not in before]
        if errors or len(launched) == count:
            return launched, errors
        time.sleep(0.05)
    raise AssertionError(f"{len(launched)} of {count} nodes, no error")


@pytest.mark.parametrize("name", ["cpu-workers", "gpu-workers"])
def test_workers_are_spot_nodes_with_the_buckets_role_alone(autoscaler, aws, name):
    launched, errors = _launch(autoscaler, aws, name, 3)
    assert not errors
    assert {instance["InstanceLifecycle"] for instance in launched} == {"spot"}
    assert {_tag(instance, "ray-user-node-type") for instance in launched} == {name}
    (request,) = autoscaler.requests
    assert request["IamInstanceProfile"] == {"Name": "cnnray-node"}
    assert request["KeyName"] == "ray-autoscaler_us-west-2"
    assert _type(name)["node_config"].items() <= request.items()


def _refuse(monkeypatch, provider, code, only_spot=True, after=0):
    """EC2 grants `after` spot nodes, and refuses all others with this code.

    Returns:
        The subnets of the refused requests, which grow as requests come.
    """
    subnets, granted, create = [], [], provider.ec2_fail_fast.create_instances

    def create_instances(**request):
        if "InstanceMarketOptions" in request or not only_spot:
            if len(granted) >= after:
                subnets.append(request["SubnetId"])
                raise ClientError({"Error": {"Code": code, "Message": "none left"}}, "RunInstances")
            request["MaxCount"] = after
            granted.extend(range(after))
        return create(**request)

    monkeypatch.setattr(provider.ec2_fail_fast, "create_instances", create_instances)
    return subnets


def test_refused_spot_nodes_are_started_on_demand(autoscaler, aws, monkeypatch, bootstrapped):
    subnets = _refuse(monkeypatch, autoscaler.provider, "InsufficientInstanceCapacity")
    launched, errors = _launch(autoscaler, aws, "gpu-workers", 3)
    assert not errors
    assert [instance.get("InstanceLifecycle") for instance in launched] == [None] * 3
    assert {_tag(instance, "ray-user-node-type") for instance in launched} == {"gpu-workers"}
    assert set(subnets) == set(bootstrapped["available_node_types"]["gpu-workers"]["node_config"]["SubnetIds"])


def test_what_spot_lacks_is_started_on_demand(autoscaler, aws, monkeypatch):
    _refuse(monkeypatch, autoscaler.provider, "InsufficientInstanceCapacity", after=2)
    launched, errors = _launch(autoscaler, aws, "cpu-workers", 5)
    assert not errors
    assert Counter(instance.get("InstanceLifecycle") for instance in launched) == {"spot": 2, None: 3}


@pytest.mark.parametrize(
    ("code", "only_spot"), [("UnauthorizedOperation", True), ("InsufficientInstanceCapacity", False)]
)
def test_a_wrong_request_or_none_at_all_is_an_error(autoscaler, aws, monkeypatch, code, only_spot):
    _refuse(monkeypatch, autoscaler.provider, code, only_spot)
    launched, errors = _launch(autoscaler, aws, "gpu-workers", 1)
    assert not launched
    assert isinstance(errors[0].__cause__, NodeLaunchException)


def test_ray_alone_would_ask_for_the_same_again(autoscaler, monkeypatch, bootstrapped):
    """What cnnray/spot.py is for: once Ray does better, it can go."""
    plain = AWSNodeProvider(autoscaler.config.get_provider_config(), "cnnray")
    _refuse(monkeypatch, plain, "InsufficientInstanceCapacity")
    with pytest.raises(NodeLaunchException):
        plain.create_node(bootstrapped["available_node_types"]["gpu-workers"]["node_config"], {}, 1)
    monitor = CloudResourceMonitor()
    failed = InstanceUpdateEvent(instance_type="gpu-workers", new_instance_status=Instance.ALLOCATION_FAILED)
    monitor.notify([failed])
    assert not monitor.get_recoverable_resource_availabilities()
    never_up = InstanceUpdateEvent(instance_type="gpu-workers", new_instance_status=Instance.ALLOCATION_TIMEOUT)
    monitor.notify([never_up])
    assert monitor.get_recoverable_resource_availabilities() == {"gpu-workers": 0.0}


def _asks_for(autoscaler, *shapes):
    """Nodes by type that Ray's autoscaler starts for tasks that wait, on a cluster of a head alone."""
    request = SchedulingRequest(
        node_type_configs=autoscaler.config.get_node_type_configs(),
        max_num_nodes=autoscaler.config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(shape) for shape in shapes]),
        disable_launch_config_check=True,
    )
    launched = ResourceDemandScheduler(SimpleNamespace(add=lambda *_, **__: None)).schedule(request).to_launch
    return {kind.instance_type: kind.count for kind in launched}


def test_tasks_get_the_nodes_that_are_meant_for_them(autoscaler):
    floor = {
        name: kind.get("min_workers", 0) for name, kind in written()["available_node_types"].items() if name != "head"
    }
    assert _asks_for(autoscaler) == floor
    assert _asks_for(autoscaler, *[{"CPU": 1}] * 200)["cpu-workers"] > floor["cpu-workers"]
    assert _asks_for(autoscaler, *[{"CPU": 1}] * 60)["gpu-workers"] == floor["gpu-workers"]
    assert _asks_for(autoscaler, *[{"CPU": 1, "GPU": 1}] * 6) == floor | {"gpu-workers": 6}


def test_the_readmes_jobs_fit_what_is_there_from_the_start(bootstrapped):
    nodes = [
        Node(cpus=kind["resources"]["CPU"], gpus=kind["resources"].get("GPU", 0), object_store_bytes=2**32)
        for kind in bootstrapped["available_node_types"].values()
        for _ in range(kind["min_workers"])
    ]
    train = "--data s3://my-bucket/photos --output s3://my-bucket/runs/1 --max-workers 2 --gpus-per-worker 1"
    assert share_out(commandline.parse(TrainConfig, "train", train.split()), Resources(tuple(nodes))).decode_cpus == 1
    predict = (
        "--bundle s3://my-bucket/runs/1/bundle --input s3://my-bucket/new --output s3://my-bucket/p --max-workers 8"
    )
    pool = plan_pool(commandline.parse(PredictConfig, "predict", predict.split()), "keras", Resources(tuple(nodes)))
    assert (pool.first, pool.largest, pool.gpus) == (2, 8, 1)


def test_the_heads_role_is_enough_to_start_and_end_nodes(autoscaler, aws):
    keys = boto3.client("sts").assume_role(
        RoleArn=boto3.client("iam").get_role(RoleName="cnnray-head")["Role"]["Arn"], RoleSessionName="head"
    )["Credentials"]
    credentials = {
        "aws_access_key_id": keys["AccessKeyId"], "aws_secret_access_key": keys["SecretAccessKey"],
        "aws_session_token": keys["SessionToken"],
    }  # fmt: skip
    provider = SpotElseOnDemand(autoscaler.config.get_provider_config() | {"aws_credentials": credentials}, "cnnray")
    config = autoscaler.config.get_cloud_node_config("gpu-workers")

    def as_the_head():
        (started,) = provider.create_node(config, {"ray-node-kind": "worker"}, 1)
        assert started in provider.non_terminated_nodes({})
        provider.set_node_tags(started, {"ray-node-status": "up-to-date"})
        provider.terminate_node(started)
        with pytest.raises(ClientError, match="not authorized"):
            boto3.client("iam", **credentials).create_user(UserName="x")
        with pytest.raises(ClientError, match="not authorized"):
            boto3.client("ec2", **credentials).describe_vpcs()

    set_initial_no_auth_action_count(0)(as_the_head)()


def test_nodes_get_the_clusters_tag_with_the_request_that_starts_them(autoscaler, aws):
    """So that the head's policy can ask for it."""
    _launch(autoscaler, aws, "cpu-workers", 1)
    (request,) = autoscaler.requests
    (tags,) = [spec["Tags"] for spec in request["TagSpecifications"] if spec["ResourceType"] == "instance"]
    assert {"Key": "ray-cluster-name", "Value": written()["cluster_name"]} in tags
    assert len(request["TagSpecifications"]) == 1
