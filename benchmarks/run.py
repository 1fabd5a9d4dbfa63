"""The benchmark from end to end: runs the measurements that the command line names, and collects their results."""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import (
    bookkeeping,
    causes,
    export,
    few_images,
    ingest,
    load,
    manifest_rows,
    pixels,
    predict,
    projection,
    recipes,
    report,
    scale,
    serve,
    small_networks,
    start,
    train,
    whole_command,
)
from benchmarks.bookkeeping import Bookkeeping
from benchmarks.photos import Photos
from benchmarks.report import BenchmarkError, Comparison
from cnnray import cluster
from cnnray.cluster import Resources
from cnnray.cpus import usable_cpus
from cnnray.images import stream

_STUDIES = {
    "start": start.measure,
    "formats": export.measure_formats,
    "causes": causes.measure,
    "few-images": few_images.measure,
    "small-networks": small_networks.measure,
}
_NEEDS_CLUSTER = ("ingest", "train", "predict", "scale", "all")


@dataclass
class Result:
    """The results of all measurements."""

    comparisons: list[Comparison] = field(default_factory=list)
    scaling: dict[str, scale.Rates] = field(default_factory=dict)
    """By workload, the rates at increasing numbers of workers."""
    costs: dict[str, float] = field(default_factory=dict)
    """See `projection.Costs`."""
    tables: list[str] = field(default_factory=list)
    """Markdown tables to print."""
    cluster: str = ""
    """The cluster's nodes, CPUs and GPUs; empty if no cluster was needed."""


def run(measure: str, folder: Path, data: str | None, images: int | None, *, shared: bool) -> Result:
    """Run one measurement, or all.

    Args:
        measure: one of `MEASURES` in `jobs/benchmark.py`.
        folder: files are written here.
        data: the user's own images; None: generate photos.
        images: number of images; None: each measurement's own number.
        shared: whether all nodes share the folder.

    Raises:
        BenchmarkError, ManifestError, OSError, ClusterError, MissingWrkError: the benchmark cannot run; the message
            is for the user.
    """
    result = Result()
    if measure == "recipes":
        result.tables.append(recipes.measure(folder, data))
    if measure in _STUDIES:
        result.tables.append(_STUDIES[measure](folder))
    if measure in ("serve", "scale", "all"):
        load.require_wrk()
    if measure in _NEEDS_CLUSTER:
        photos = Photos(folder=folder, data=data, images=images)
        if data:
            photos.manifest(1)  # reports bad input before Ray starts
        kept = []
        if measure in ("scale", "all"):
            # All studies together are to end within half an hour.
            sizes = bookkeeping.ROWS if measure == "scale" else bookkeeping.ROWS[:1]
            kept = [bookkeeping.measure(folder, predict.write_random_bundle(folder), rows) for rows in sizes]
            result.tables.append(bookkeeping.table(kept))
            if measure == "scale":
                measured = [manifest_rows.measure(folder, rows) for rows in manifest_rows.ROWS]
                result.tables.append(manifest_rows.table(measured))
        if measure == "predict":
            result.comparisons.append(whole_command.measure(folder, images=images or whole_command.IMAGES))
        with cluster.connected() as resources:
            if len(resources.nodes) > 1 and not shared:
                raise BenchmarkError("The cluster has several nodes: give a --folder that all of them share.")
            stream.silence_progress()
            result.cluster = report.describe_cluster(resources)
            _measure_on_cluster(result, measure, photos, resources, kept)
    if measure in ("pixels", "all"):
        result.comparisons += pixels.measure()
    if measure in ("export", "all"):
        result.comparisons += export.measure(folder)
    if measure in ("serve", "all"):
        comparisons, latencies = serve.measure(folder, whole=measure == "serve")
        result.comparisons += comparisons
        result.tables.append(latencies)
    if measure in ("scale", "all"):
        result.scaling["serving"] = scale.measure_serving(folder, usable_cpus())
        result.tables.append(scale.table("replicas on this machine", result.scaling["serving"], "requests/s"))
    if result.comparisons:
        result.tables.append(report.table(result.comparisons))
    return result


def _measure_on_cluster(
    result: Result, measure: str, photos: Photos, resources: Resources, kept: list[Bookkeeping]
) -> None:
    if measure in ("ingest", "all"):
        result.comparisons += ingest.measure(photos, resources)
    if measure in ("train", "all"):
        result.comparisons += train.measure(photos, resources)
    if measure in ("predict", "all"):
        result.comparisons += predict.measure(photos, resources)
    if measure in ("scale", "all"):
        training, prediction = scale.measure_training(photos, resources), scale.measure_prediction(photos, resources)
        result.scaling |= {"training": training, "prediction": prediction}
        result.tables += [scale.table("training workers", training), scale.table("prediction workers", prediction)]
        costs = scale.measure_costs(photos, training, prediction, kept[-1])
        result.costs = vars(costs)
        result.tables += [scale.costs_table(costs), projection.table(costs)]
