"""The checks of an evaluation's images, on the cluster or in the job's own process."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cnnray import cluster, paths, waiting
from cnnray.evaluation.config import EvaluateConfig
from cnnray.images import checks, containers
from cnnray.images import manifest as manifests
from cnnray.images.checks import CheckResult
from cnnray.prediction import plan as prediction_plans

log = logging.getLogger(__name__)


def check_data(config: EvaluateConfig) -> dict[str, Any]:
    """Check the images and log the findings. Nothing is written.

    Returns:
        `images`, `unreadable`, `copies`, `nearly` (see `CheckResult`) and `findings`, the number of findings by kind.

    Raises:
        ValueError, OSError, ClusterError: with a sentence for the user.
    """
    assert config.data is not None
    try:
        manifest = read_manifest(config, multi_label=bool(config.multi_label))
    except manifests.ManifestError as error:
        log.info("checking without labels: %s", error)
        manifest = manifests.build_manifest(config.data, labelled=False)
    log.info("%d images", len(manifest))
    with connected_if_many(config, manifest):
        if cluster.is_connected():
            from cnnray.images import stream

            paths.check_shared(cluster.resources(), [containers.containing_file(manifest["uri"][0].as_py())])
            stream.silence_progress()
            checked = stream.check(manifest, _cpus_per_task(), keep_unavailable=config.skip_unreadable)
        else:
            checked = _check_in_process(manifest, config)
    checked.warn()
    log.info(
        "%d images with sides of %d to %d pixels, median %d; %d copies",
        checked.images, checked.sides[0], checked.sides[2], checked.sides[1], checked.copies,
    )  # fmt: skip
    return {
        "images": checked.images,
        "unreadable": checked.unreadable,
        "copies": checked.copies,
        "nearly": checked.nearly,
        "findings": {finding.kind: finding.count for finding in checked.findings},
    }


def read_manifest(config: EvaluateConfig, *, multi_label: bool) -> pa.Table:
    """The labelled images of an evaluation: `id`, `uri`, `label` and `split`.

    Args:
        config: the flags.
        multi_label: whether images may have several labels.

    Raises:
        ManifestError, OSError: with a sentence for the user.
    """
    assert config.data is not None
    manifest = manifests.build_manifest(
        config.data,
        labelled=True,
        multi_label=multi_label and config.multi_label is not False,
        label_separator=config.label_separator,
    ).select(["id", "uri", "label", "split"])
    return manifests.as_multi_label(manifest) if multi_label else manifest


@contextlib.contextmanager
def connected_if_many(config: EvaluateConfig, manifest: pa.Table) -> Iterator[None]:
    """A connection to the cluster; none where the images are so few that this process reads them itself.

    Raises:
        ClusterError: other jobs leave no room for a task.
    """
    if prediction_plans.fits_this_process(config, len(manifest)):
        yield
        return
    with cluster.connected(dashboard=config.dashboard):
        waiting.wait_for_room([{"CPU": _cpus_per_task()}], config.wait_minutes)
        yield


def check_if_small(manifest: pa.Table, config: EvaluateConfig) -> CheckResult | None:
    """Check the images of an evaluation; None if they are too many, or cannot be checked."""
    if not cluster.is_connected():
        log.info("checking %d images", len(manifest))
        return _check_in_process(manifest, config)
    from cnnray.images import stream

    stream.silence_progress()
    return stream.check_if_small(manifest, _cpus_per_task(), keep_unavailable=config.skip_unreadable)


def _check_in_process(manifest: pa.Table, config: EvaluateConfig) -> CheckResult:
    examined = pa.concat_tables(checks.examine(manifest.select(["id", "uri"])))
    return checks.check(manifest, examined, keep_unavailable=config.skip_unreadable)


def _cpus_per_task() -> float:
    return min(1.0, cluster.resources().cpus / 2)
