"""From what was measured on a few cores to many nodes and a billion images, by calculation: which part of a job is
used up first. `docs/scaling.md` reasons about what comes out.

What nobody can measure on a few cores is stated as a constant here, with its source.
"""

from dataclasses import dataclass

S3_LIST_SECONDS, S3_LIST_KEYS, S3_LISTERS = 0.1, 1000, 16
"""A ListObjectsV2 request of 1,000 keys (its most) takes about a tenth of a second; `storage` has 16 at once."""
S3_GETS_A_PREFIX = 5500
"""GET requests a second that S3 takes for each prefix, at least (Amazon S3 User Guide, "Optimizing performance")."""
NETWORK = 1.25e9
"""Bytes a second of each node in each direction: 10 Gbit/s."""
ROUND_TRIP = 2e-4
"""Seconds of one message between two nodes of one data centre, and of its start."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured; seconds and bytes are of one image, where nothing else is said."""

    listing: float
    """Seconds to list a local file."""
    manifest: float
    """Seconds of the driver: addresses to a manifest, cut into tasks and saved."""
    manifest_bytes: float
    """Most memory of the driver meanwhile."""
    order: float
    """Seconds of each training worker for an epoch's order."""
    row: float
    """Seconds of the driver: a row into its part, written, read back, compared and summed up."""
    row_bytes: float
    """Of a part's file."""
    task: float
    """Seconds of the driver for a task of Ray Data, which here does nothing."""
    task_images: int
    """Images of a task."""
    image: float
    """Seconds of one core to read, decode and predict."""
    image_bytes: float
    """Of an encoded file."""
    step: float
    """Seconds of one worker for a training step."""
    step_images: int
    """Its images in it."""
    weights: float
    """Bytes of the network's weights, which are the bytes of its gradients."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A cluster, and what it is to do."""

    nodes: int
    cores: int = 8
    """Of each node."""
    runs: int = 1
    """How many runs, each with its driver, have a table of the images of their own."""
    prefixes: int = 100
    """Of the bucket, over which images are spread."""


@dataclass(frozen=True)
class Limit:
    """The most that one part of a prediction job takes."""

    part: str
    images: float
    """A second, of the whole fleet."""


def limits(costs: Costs, fleet: Fleet) -> list[Limit]:
    """Of all parts of a prediction job that work at the same time; the least is how fast the job is."""
    return [
        Limit("workers", fleet.nodes * fleet.cores / costs.image),
        Limit("S3's GET requests", S3_GETS_A_PREFIX * fleet.prefixes),
        Limit("nodes' networks", fleet.nodes * NETWORK / costs.image_bytes),
        Limit("drivers: rows", fleet.runs / costs.row),
        Limit("drivers: Ray Data's tasks", fleet.runs * costs.task_images / costs.task),
    ]


def predicted(costs: Costs, fleet: Fleet, images: float) -> tuple[Limit, float, float, float]:
    """A prediction job over images that a table lists.

    Returns:
        the part that is used up first; seconds before the first image (the manifest); seconds of the images; and
        bytes of memory of each driver.
    """
    first = min(limits(costs, fleet), key=lambda limit: limit.images)
    each = images / fleet.runs
    return first, each * costs.manifest, images / first.images, each * costs.manifest_bytes


def listed(images: float) -> float:
    """Seconds to list a bucket."""
    return images / S3_LIST_KEYS * S3_LIST_SECONDS / S3_LISTERS


def reduced(costs: Costs, workers: int) -> float:
    """Seconds in which workers on nodes of their own sum up their gradients: a ring, in which each sends and receives
    2 (n - 1) / n of the bytes in 2 (n - 1) messages (Patarasu and Yuan 2009, "Bandwidth optimal all-reduce")."""
    rounds = 2 * (workers - 1)
    return rounds / workers * costs.weights / NETWORK + rounds * ROUND_TRIP


def trained(costs: Costs, workers: int, images: float) -> tuple[float, float, float]:
    """Training with an image share for each worker that stays the same, each worker on a node of its own.

    Returns:
        images/s; the share of one worker's speed that each keeps; and seconds of an epoch.
    """
    seconds = costs.step + reduced(costs, workers)
    rate = workers * costs.step_images / seconds
    return rate, costs.step / seconds, costs.order * images + images / rate


def table(costs: Costs, images: float = 1e9) -> str:
    """The projection to 1 to 1,000 nodes as Markdown."""
    lines = [
        f"{images:.0e} images that a table lists, 8 cores a node (to list a bucket: {_time(listed(images))}):",
        "",
        "| nodes | runs | images/s | used up first | before the first image | images | memory of each driver |",
        "|---|---|---|---|---|---|---|",
    ]
    for fleet in [Fleet(nodes=nodes) for nodes in (1, 10, 100, 1000)] + [
        Fleet(nodes=1000, runs=runs) for runs in (10, 100)
    ]:
        first, before, during, memory = predicted(costs, fleet, images)
        lines.append(
            f"| {fleet.nodes} | {fleet.runs} | {first.images:,.0f} | {first.part} "
            f"| {_time(before)} | {_time(during)} | {memory / 2**30:.1f} GiB |"
        )
    lines += [
        "", "| training workers | images/s | each keeps | sum of gradients | an epoch |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for workers in (1, 2, 8, 64, 1000):
        rate, kept, epoch = trained(costs, workers, images)
        lines.append(
            f"| {workers} | {rate:,.0f} | {kept:.1%} | {1000 * reduced(costs, workers):,.0f} ms | {_time(epoch)} |"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
