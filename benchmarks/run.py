"""The benchmark from end to end: what is measured where, and what comes of it."""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import export, ingest, load, predict, projection, recipes, report, scale, serve, train
from benchmarks.photos import Photos
from benchmarks.report import BenchmarkError, Comparison
from cnnray import cluster
from cnnray.cluster import Resources
from cnnray.images import stream

_ON_THE_CLUSTER = ("ingest", "train", "predict", "scale", "all")


@dataclass
class Result:
    """What was measured."""

    comparisons: list[Comparison] = field(default_factory=list)
    scaling: dict[str, scale.Rates] = field(default_factory=dict)
    """By workload: of more and more workers the name, their number, and images or requests a second."""
    costs: dict[str, float] = field(default_factory=dict)
    """See `projection.Costs`."""
    tables: list[str] = field(default_factory=list)
    """As Markdown."""
    cluster: str = ""
    """Its nodes, CPUs and GPUs; empty where none was needed."""


def run(measure: str, folder: Path, data: str | None, images: int | None, *, shared: bool) -> Result:
    """Measure.

    Args:
        measure: one of those that `jobs/benchmark.py` names.
        folder: where files are written.
        data: the user's own images.
        images: how many.
        shared: whether the folder is one that all nodes see.

    Raises:
        BenchmarkError, ManifestError, OSError, ClusterError, MissingWrkError: with a sentence for the user.
    """
    result = Result()
    if measure == "formats":
        result.tables.append(export.formats(folder))
    if measure == "recipes":
        result.tables.append(recipes.recipes(folder, data))
    if measure in ("serve", "scale", "all"):
        load.require_wrk()
    if measure in _ON_THE_CLUSTER:
        photos = Photos(folder=folder, data=data, images=images)
        if data:
            photos.manifest(1)  # so that what is wrong with it is said before Ray starts
        with cluster.connected() as found:
            if len(found.nodes) > 1 and not shared:
                raise BenchmarkError("The cluster has several nodes: give a --folder that all of them see.")
            stream.be_quiet()
            result.cluster = report.cluster_of(found)
            _on_the_cluster(result, measure, photos, found)
    if measure in ("export", "all"):
        result.comparisons += export.export(folder)
    if measure in ("serve", "all"):
        compared, latencies = serve.serve(folder)
        result.comparisons += compared
        result.tables.append(latencies)
    if measure in ("scale", "all"):
        result.scaling["serving"] = scale.serving(folder, cluster.local_cpus())
        result.tables.append(scale.table("replicas on this machine", result.scaling["serving"], "requests/s"))
    if result.comparisons:
        result.tables.append(report.table(result.comparisons))
    return result


def _on_the_cluster(result: Result, measure: str, photos: Photos, found: Resources) -> None:
    if measure in ("ingest", "all"):
        result.comparisons += ingest.ingest(photos, found)
    if measure in ("train", "all"):
        result.comparisons += train.train(photos, found)
    if measure in ("predict", "all"):
        result.comparisons += predict.predict(photos, found)
    if measure in ("scale", "all"):
        trained, predicted = scale.training(photos, found), scale.prediction(photos, found)
        result.scaling |= {"training": trained, "prediction": predicted}
        result.tables += [scale.table("training workers", trained), scale.table("prediction workers", predicted)]
        costs = scale.costs(photos, trained, predicted)
        result.costs = vars(costs)
        result.tables += [scale.costs_table(costs), projection.table(costs)]
