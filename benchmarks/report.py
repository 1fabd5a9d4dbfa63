"""What a benchmark says: rates side by side, and their ratios by the median of several rounds."""

import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from cnnray import cluster
from cnnray.cluster import Resources
from cnnray.errors import PermanentError
from cnnray.models.bundle import library_versions


class BenchmarkError(PermanentError, RuntimeError):
    """A benchmark that cannot be run; the message is one sentence for the user."""


@dataclass(frozen=True)
class Comparison:
    """Our rates against those of one peer or limit, round by round."""

    name: str
    ours: list[float]
    """images/s in each round."""
    peer: str
    theirs: list[float]
    """images/s of the peer in the same rounds."""
    target: float
    """The ratio that is aimed at."""
    ratio: float = field(init=False)
    """Median over the rounds of ours / theirs."""

    def __post_init__(self) -> None:
        ratios = [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]
        object.__setattr__(self, "ratio", statistics.median(ratios))


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    lines = ["| ours | images/s | against | images/s | ratio | aim | |", "|---|---|---|---|---|---|---|"]
    for one in comparisons:
        verdict = "reached" if one.ratio >= one.target else "missed"
        lines.append(
            f"| {one.name} | {statistics.median(one.ours):.0f} | {one.peer} | {statistics.median(one.theirs):.0f} "
            f"| {one.ratio:.3f} | {one.target:.2f} | {verdict} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Bare:
    """How bare loops run: on the machine of the benchmark, with its cores, as they know no other."""

    processes: int
    """One a core."""
    times: float
    """How many times more cores the cluster has; their rates are taken times that."""

    def named(self, what: str) -> str:
        """For a table."""
        return what if self.times == 1 else f"{what}, times {self.times:.3g}"


def bare_loops(found: Resources) -> Bare:
    """The bare loops' share of a cluster."""
    processes = max(1, min(cluster.local_cpus(), int(found.cpus)))
    return Bare(processes, max(1.0, found.cpus / processes))


def cluster_of(found: Resources) -> str:
    """Nodes, CPUs and GPUs, for the line under a table."""
    return f"{len(found.nodes)} node(s), {found.cpus:g} CPUs and {found.gpus:g} GPUs in all"


def machine() -> str:
    """Cores, processor and library versions, for the line under a table."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = ", ".join(f"{library} {number}" for library, number in library_versions().items())
    return f"{len(os.sched_getaffinity(0))} cores of {model}; {versions}"
