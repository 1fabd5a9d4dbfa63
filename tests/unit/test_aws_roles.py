"""What deploy/aws/head.json allows, decided as IAM decides it: moto looks at actions alone."""

import fnmatch
import json

import pytest

from tests.conftest import REPOSITORY

INSTANCE, OTHER_RESOURCE = "arn:aws:ec2:us-west-2:1:instance/i-1", "arn:aws:ec2:us-west-2:1:{}/x"
AT_LAUNCH = {"ec2:CreateAction": "RunInstances"}


def _of_cluster(name, key="ec2:ResourceTag"):
    return {f"{key}/ray-cluster-name": name}


def _allows(action, resource, context):
    """Whether the head's policy allows a request.

    Args:
        action: such as "ec2:RunInstances".
        resource: its ARN. EC2 asks for each resource of a request by itself.
        context: the request's condition keys.
    """

    def states(statement, name, value):
        patterns = statement[name] if isinstance(statement[name], list) else [statement[name]]
        return any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)

    for statement in json.loads((REPOSITORY / "deploy/aws/head.json").read_text())["Statement"]:
        assert statement["Effect"] == "Allow"
        conditions = statement.get("Condition", {"StringEquals": {}})
        assert conditions.keys() == {"StringEquals"}
        kept = all(context.get(key) == value for key, value in conditions["StringEquals"].items())
        of_resource = (
            states(statement, "Resource", resource)
            if "Resource" in statement
            else not states(statement, "NotResource", resource)
        )
        if kept and of_resource and states(statement, "Action", action):
            return True
    return False


@pytest.mark.parametrize(
    ("action", "resource", "context", "allowed"),
    [
        ("ec2:RunInstances", INSTANCE, _of_cluster("cnnray", "aws:RequestTag"), True),
        ("ec2:RunInstances", INSTANCE, _of_cluster("other", "aws:RequestTag"), False),
        ("ec2:RunInstances", INSTANCE, {}, False),
        *(
            ("ec2:RunInstances", OTHER_RESOURCE.format(kind), {}, True)
            for kind in ("volume", "subnet", "security-group", "network-interface", "key-pair", "image")
        ),
        ("ec2:CreateTags", INSTANCE, _of_cluster("cnnray", "aws:RequestTag") | AT_LAUNCH, True),
        ("ec2:CreateTags", INSTANCE, _of_cluster("cnnray"), True),
        # Tagged as this cluster's, another instance could be ended.
        ("ec2:CreateTags", INSTANCE, _of_cluster("cnnray", "aws:RequestTag"), False),
        ("ec2:CreateTags", INSTANCE, _of_cluster("cnnray", "aws:RequestTag") | _of_cluster("other"), False),
        ("ec2:CreateTags", OTHER_RESOURCE.format("volume"), _of_cluster("cnnray"), False),
        ("ec2:TerminateInstances", INSTANCE, _of_cluster("cnnray"), True),
        ("ec2:TerminateInstances", INSTANCE, _of_cluster("other"), False),
        ("ec2:TerminateInstances", INSTANCE, {}, False),
        ("ec2:StopInstances", INSTANCE, _of_cluster("cnnray"), False),
        ("iam:PassRole", "arn:aws:iam::1:role/cnnray-node", {"iam:PassedToService": "ec2.amazonaws.com"}, True),
        ("iam:PassRole", "arn:aws:iam::1:role/cnnray-node", {"iam:PassedToService": "lambda.amazonaws.com"}, False),
        ("iam:PassRole", "arn:aws:iam::1:role/admin", {"iam:PassedToService": "ec2.amazonaws.com"}, False),
    ],
)
def test_the_head_can_start_tag_and_end_nodes_of_its_cluster_alone(action, resource, context, allowed):
    assert _allows(action, resource, context) is allowed
