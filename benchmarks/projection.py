"""Projection of costs measured on a few cores to many nodes and a billion images.

It names the part of a job that limits it at each size. `docs/scaling.md` discusses the results. Values that
cannot be measured on a few cores are constants with their sources.
"""

from dataclasses import dataclass

S3_LIST_SECONDS, S3_LIST_KEYS, S3_LISTERS = 0.1, 1000, 16
"""A ListObjectsV2 request takes about 0.1 s and returns at most 1,000 keys; `storage` runs 16 in parallel."""
S3_GETS_PER_PREFIX = 5500
"""GET requests per second and prefix that S3 serves at least (Amazon S3 User Guide, "Optimizing performance")."""
NETWORK = 1.25e9
"""Bytes per second of each node in each direction: 10 Gbit/s."""
ROUND_TRIP = 2e-4
"""Seconds that a message between two nodes of a data centre takes beside its transfer."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured costs, in seconds or bytes per image unless stated otherwise."""

    listing: float
    """Seconds to list a local file."""
    row: float
    """Seconds of the driver from a table's row to its receipt: manifest, checks, ranges, reconciliation."""
    driver_bytes: float
    """Peak memory of the driver meanwhile, whatever the number of images."""
    order: float
    """Seconds of a training worker to find which image it takes next."""
    row_bytes: float
    """Bytes in a part's file."""
    image: float
    """Seconds of one core to read, decode and predict."""
    image_bytes: float
    """Bytes of an encoded file."""
    step: float
    """Seconds of a training step with one worker."""
    step_images: int
    """Images per worker and step."""
    weights: float
    """Bytes of the network's weights; its gradients have the same size."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A cluster, and how the work is divided."""

    nodes: int
    cores: int = 8
    """Cores per node."""
    prefixes: int = 100
    """Number of prefixes of the bucket over which the images are spread."""


@dataclass(frozen=True)
class Limit:
    """The highest throughput of one part of a prediction job."""

    part: str
    images: float
    """Images/s of the whole fleet."""


def limits(costs: Costs, fleet: Fleet) -> list[Limit]:
    """The limits of all parts of a prediction job. They work in parallel, so the lowest limit is the job's speed."""
    return [
        Limit("workers", fleet.nodes * fleet.cores / costs.image),
        Limit("S3's GET requests", S3_GETS_PER_PREFIX * fleet.prefixes),
        Limit("nodes' networks", fleet.nodes * NETWORK / costs.image_bytes),
        Limit("the driver", 1 / costs.row),
    ]


def project_prediction(costs: Costs, fleet: Fleet, images: float) -> tuple[Limit, float, float]:
    """Project a prediction job over images that a table lists.

    Returns:
        The lowest limit, the seconds of the driver before the first image of a table is classified, and the seconds
        for the images. The images of a folder are classified while it is listed.
    """
    lowest = min(limits(costs, fleet), key=lambda limit: limit.images)
    return lowest, images * costs.row, images / lowest.images


def listing_seconds(images: float) -> float:
    """Seconds to list a bucket."""
    return images / S3_LIST_KEYS * S3_LIST_SECONDS / S3_LISTERS


def all_reduce_seconds(costs: Costs, workers: int) -> float:
    """Seconds of a ring all-reduce of the gradients, with one worker per node.

    Each of n workers sends and receives 2 (n - 1) / n of the bytes in 2 (n - 1) messages (Patarasu and Yuan 2009,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations").
    """
    rounds = 2 * (workers - 1)
    return rounds / workers * costs.weights / NETWORK + rounds * ROUND_TRIP


def project_training(costs: Costs, workers: int, images: float) -> tuple[float, float, float]:
    """Project training with a constant number of images per worker and step, and one worker per node.

    Returns:
        The images/s, the efficiency (speed per worker relative to a single worker), and the seconds of an epoch.
    """
    seconds = costs.step + all_reduce_seconds(costs, workers)
    rate = workers * costs.step_images / seconds
    return rate, costs.step / seconds, costs.order * images / workers + images / rate


def table(costs: Costs, images: float = 1e9) -> str:
    """The projection to between 1 and 1,000 nodes as Markdown tables."""
    listing = _format_time(listing_seconds(images))
    lines = [
        f"{images:.0e} images that a table lists, 8 cores a node (to list a bucket: {listing}):",
        "",
        "| nodes | prefixes | images/s | limited by | before the first image | images | memory of the driver |",
        "|---|---|---|---|---|---|---|",
    ]
    for fleet in [*(Fleet(nodes=nodes) for nodes in (1, 10, 100, 1000)), Fleet(nodes=1000, prefixes=1000)]:
        lowest, before, during = project_prediction(costs, fleet, images)
        lines.append(
            f"| {fleet.nodes} | {fleet.prefixes} | {lowest.images:,.0f} | {lowest.part} "
            f"| {_format_time(before)} | {_format_time(during)} | {costs.driver_bytes / 2**30:.1f} GiB |"
        )
    lines += [
        "", "| training workers | images/s | efficiency | all-reduce | epoch |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for workers in (1, 2, 8, 64, 1000):
        rate, efficiency, epoch = project_training(costs, workers, images)
        lines.append(
            f"| {workers} | {rate:,.0f} | {efficiency:.1%} "
            f"| {1000 * all_reduce_seconds(costs, workers):,.0f} ms | {_format_time(epoch)} |"
        )
    return "\n".join(lines)


def _format_time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
