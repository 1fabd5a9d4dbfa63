"""Check that local paths are on a file system that all nodes of a cluster share."""

import random
from collections.abc import Iterable
from pathlib import Path

from cnnray.cluster import ClusterError, Resources
from cnnray.images import storage

_MAX_NODES, _TIMEOUT_SECONDS = 16, 60.0


def check_shared(resources: Resources, uris: Iterable[str]) -> None:
    """Check that other nodes have these files and folders, so that a missing mount is not taken for bad images.

    At most 16 other nodes are asked, chosen at random. Nodes that do not answer within a minute are skipped.

    Args:
        resources: the cluster's.
        uris: files and folders that the workers open. Remote ones, and those that this node lacks, are skipped.

    Raises:
        ClusterError: a node lacks one of them.
    """
    paths = [uri for uri in uris if storage.is_local(uri) and Path(uri).exists()]
    if len(resources.nodes) < 2 or not paths:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != this_node]
    others = random.Random(0).sample(others, min(len(others), _MAX_NODES))
    ask = ray.remote(num_cpus=0, max_retries=0)(_missing)
    answers = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            paths
        ): node
        for node in others
    }
    answered, waiting = ray.wait(list(answers), num_returns=len(answers), timeout=_TIMEOUT_SECONDS)
    for answer in waiting:
        ray.cancel(answer)
    for answer in answered:
        try:
            missing = ray.get(answer)
        except ray.exceptions.RayError:
            continue  # the node was lost in the meantime
        if missing:
            raise ClusterError(
                f"{missing[0]} is not on the node {answers[answer]['NodeManagerAddress']}: on several nodes local "
                "paths must be on a file system that all of them share; or give s3://BUCKET/PREFIX."
            )


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]
