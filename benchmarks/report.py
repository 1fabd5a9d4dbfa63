"""Reports of benchmarks: rates measured side by side, and the medians of their ratios over several rounds."""

import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from cnnray.cluster import Resources
from cnnray.cpus import usable_cpus
from cnnray.errors import PermanentError
from cnnray.models.bundle import library_versions


class BenchmarkError(PermanentError, RuntimeError):
    """A benchmark that cannot be run; the message is one sentence for the user."""


@dataclass(frozen=True)
class Comparison:
    """Our rates against those of a peer or a bare loop, round by round."""

    name: str
    ours: list[float]
    """Our rate in each round, in images/s (services: requests/s)."""
    peer: str
    theirs: list[float]
    """The peer's rate in the same rounds."""
    target: float
    """The ratio to reach."""
    ratio: float = field(init=False)
    """Median of ours / theirs over the rounds."""

    def __post_init__(self) -> None:
        ratios = [own / peer for own, peer in zip(self.ours, self.theirs, strict=True)]
        object.__setattr__(self, "ratio", statistics.median(ratios))


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as a Markdown table."""
    lines = ["| ours | images/s | against | images/s | ratio | aim | |", "|---|---|---|---|---|---|---|"]
    for comparison in comparisons:
        ours, theirs = statistics.median(comparison.ours), statistics.median(comparison.theirs)
        verdict = "reached" if comparison.ratio >= comparison.target else "missed"
        lines.append(
            f"| {comparison.name} | {ours:.0f} | {comparison.peer} | {theirs:.0f} "
            f"| {comparison.ratio:.3f} | {comparison.target:.2f} | {verdict} |"
        )
    return "\n".join(lines)


def accuracy_line(setup: str, label: str, accuracies: list[float]) -> str:
    """A table row of the accuracies by seed and their mean."""
    by_seed = ", ".join(f"{value:.4f}" for value in accuracies)
    return f"| {setup} | {label} | {by_seed} | **{statistics.mean(accuracies):.4f}** |"


def mean_and_spread(accuracies: list[float]) -> str:
    """The mean over the seeds, and the standard deviation where there are several."""
    mean = f"{statistics.mean(accuracies):.3f}"
    return mean if len(accuracies) < 2 else f"{mean} ± {statistics.stdev(accuracies):.3f}"


@dataclass(frozen=True)
class BareLoops:
    """How bare loops run: only on the machine of the benchmark, with one process per core."""

    processes: int
    """Number of processes."""
    scale: float
    """Cores of the cluster / processes. The measured rates of bare loops are multiplied by it."""

    def label(self, name: str) -> str:
        """The name of a bare loop in a table, with the scale if there is one."""
        return name if self.scale == 1 else f"{name}, times {self.scale:.3g}"


def plan_bare_loops(resources: Resources) -> BareLoops:
    """Plan bare loops for a comparison with a cluster."""
    processes = max(1, min(usable_cpus(), int(resources.cpus)))
    return BareLoops(processes, max(1.0, resources.cpus / processes))


def describe_cluster(resources: Resources) -> str:
    """Nodes, CPUs and GPUs, for the line below the tables."""
    return f"{len(resources.nodes)} node(s), {resources.cpus:g} CPUs and {resources.gpus:g} GPUs in all"


def describe_machine() -> str:
    """Cores, processor and library versions, for the line below the tables."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = ", ".join(f"{library} {version}" for library, version in library_versions().items())
    return f"{usable_cpus()} cores of {model}; {versions}"
