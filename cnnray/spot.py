"""AWS nodes for `ray up` (cluster.yaml): spot instances, or the same on demand where AWS has no spot capacity."""

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

log = logging.getLogger(__name__)

NONE_LEFT = {
    "InsufficientInstanceCapacity",
    "InsufficientCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
}
"""EC2's error codes for spot requests that may succeed on demand. With any other code they would fail again."""


class SpotElseOnDemand(AWSNodeProvider):
    """Ray's AWS provider, but with on-demand instances in place of spot instances that AWS refuses.

    Ray's own provider asks for the same spot instances again and again. Nor does the autoscaler of Ray 2.60 turn to
    another node type: it lowers the rank of a type whose nodes were granted but did not start, not of a refused type.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start nodes in the first availability zone that has capacity.

        Returns:
            The instances by id.

        Raises:
            NodeLaunchException: AWS has none on demand either, or the request is wrong.
        """
        spot = "InstanceMarketOptions" in node_config
        created: dict[str, Any] = {}
        try:
            created = super().create_node(node_config, tags, count)
        except NodeLaunchException as refused:
            if not spot or refused.category not in NONE_LEFT:
                raise
            log.warning("no spot instances of %s: %s", node_config["InstanceType"], refused.description)
        missing = count - len(created)
        if spot and missing:
            log.warning("starting %d of %d %s instances on demand", missing, count, node_config["InstanceType"])
            on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
            created |= super().create_node(on_demand, tags, missing)
        return created
