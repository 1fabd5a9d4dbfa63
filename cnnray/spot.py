"""Nodes of AWS for `ray up` (cluster.yaml): spot ones, and where AWS has none left, the same on demand."""

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
"""EC2's codes for a spot request that would be granted on demand; any other would be refused again."""


class SpotElseOnDemand(AWSNodeProvider):
    """Ray's provider for AWS, which asks for the same spot nodes again and again where AWS refuses them.

    Ray 2.60 knows no way from one node type to another then: its autoscaler lowers the rank of a type whose nodes
    were given but did not come up, not of one that was refused.
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start nodes, in the first availability zone that has some.

        Returns:
            instances by id.

        Raises:
            NodeLaunchException: there are none on demand either, or the request is wrong.
        """
        spot = "InstanceMarketOptions" in node_config
        created: dict[str, Any] = {}
        try:
            created = super().create_node(node_config, tags, count)
        except NodeLaunchException as refused:
            if not spot or refused.category not in NONE_LEFT:
                raise
            log.warning("No spot nodes of %s: %s", node_config["InstanceType"], refused.description)
        missing = count - len(created)
        if spot and missing:
            log.warning("%d of %d nodes of %s on demand", missing, count, node_config["InstanceType"])
            on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
            created |= super().create_node(on_demand, tags, missing)
        return created
