"""What a benchmark says: rates side by side, and their ratios by the median of several rounds."""

import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from cnnray.models.bundle import library_versions


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


def machine() -> str:
    """Cores, processor and library versions, for the line under a table."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = ", ".join(f"{library} {number}" for library, number in library_versions().items())
    return f"{len(os.sched_getaffinity(0))} cores of {model}; {versions}"


def write_photos(folder: Path, count: int, classes: int = 10) -> Path:
    """Write JPEGs of 500x375 pixels and 20 to 60 KB into class folders: cuts from the two photos that scikit-learn
    brings."""
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for index in range(count):
        path = folder / f"class{index % classes}" / f"{index:06d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = photos[index % len(photos)]
        width = int(generator.integers(400, photo.width))
        height = width * 3 // 4 if width * 3 // 4 <= photo.height else photo.height
        left, top = (int(generator.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
        cut = photo.resize((500, 375), box=(left, top, left + width, top + height))
        cut.save(path, quality=int(generator.integers(75, 93)))
    return folder
