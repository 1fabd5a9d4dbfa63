"""The full check of an output: the ids of each part are those of its range in the manifest."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cnnray import cluster, waiting
from cnnray.images import shards, storage
from cnnray.images.shards import Range
from cnnray.prediction import parts, resume
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.parts import Part, PartError

log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Ranges of a task, if a cluster checks them; so many are checked here."""

Ids = npt.NDArray[np.int64]


def verify(config: PredictConfig, ranges: Sequence[Range], manifest: str) -> None:
    """Read the ids of all parts and of the manifest, and compare them. On a Ray cluster where there are many.

    Args:
        config: of the run, which is finished.
        ranges: of its manifest.
        manifest: folder of its shards.

    Raises:
        PartError: a part is missing, there is one too many, or its ids are not those of its range.
    """
    committed = resume.Committed(config)
    # A Delta table keeps the parts of its earlier versions.
    folder = config.parts_folder
    there = set(parts.list_parts(folder)) if config.format != "delta" else set()
    pairs = [(range_, committed.of(range_)) for range_ in ranges]
    if more := sorted(there - {part for _, part in pairs if part is not None}):
        raise PartError(f"{storage.join(folder, more[0].name)} is of no range of the manifest: delete it.")
    groups = [pairs[start : start + _AT_ONCE] for start in range(0, len(pairs), _AT_ONCE)]
    if len(groups) > 1:
        import ray

        with cluster.connected(dashboard=config.dashboard):
            waiting.wait_for_room([{"CPU": 1.0}], config.wait_minutes)
            check = ray.remote(max_retries=3)(check_ranges)
            try:
                problems = ray.get([check.remote(folder, manifest, group) for group in groups])
            except ray.exceptions.RayError as error:
                raise cluster.user_error(error) or PartError(
                    f"The check failed: {cluster.last_line(error)}"
                ) from error
    else:
        problems = [check_ranges(folder, manifest, group) for group in groups]
    if found := [problem for group in problems for problem in group]:
        raise PartError(f"{len(found)} output files have other ids than the manifest, for example {found[0]}")
    log.info("the ids of all %d output files are those of the manifest", len(pairs))


def check_ranges(folder: str, manifest: str, pairs: Sequence[tuple[Range, Part | None]]) -> list[str]:
    """Compare the ids of parts with those of their ranges, and say what is wrong."""
    with ThreadPoolExecutor(4) as pool:
        problems = pool.map(lambda pair: _problem(folder, manifest, *pair), pairs)
    return [problem for problem in problems if problem]


def _problem(folder: str, manifest: str, range_: Range, part: Part | None) -> str:
    expected = shards.read(manifest, range_, columns=["id"])["id"].to_numpy()
    if part is None:
        return f"the ids from {range_.first} to {range_.last} have no file"
    ids = parts.read(folder, part)["id"].to_numpy()
    if np.array_equal(ids, expected):
        return ""
    return f"{storage.join(folder, part.name)} ({_difference(ids, expected)}): delete it, and run again."


def _difference(ids: Ids, expected: Ids) -> str:
    """List the ids that are missing, unexpected or repeated."""
    missing, unexpected = np.setdiff1d(expected, ids), np.setdiff1d(ids, expected)
    values, counts = np.unique(ids, return_counts=True)
    problems = {"missing": missing, "unexpected": unexpected, "more than once": values[counts > 1]}
    return (
        "; ".join(
            f"{problem} {', '.join(map(str, wrong[:10].tolist()))}{' ...' if len(wrong) > 10 else ''} ({len(wrong)})"
            for problem, wrong in problems.items()
            if len(wrong)
        )
        or "another order"
    )
