"""The plan of a run: the engine, and the process or the pool of workers that runs it."""

from dataclasses import dataclass

from cnnray import cluster, waiting
from cnnray.cluster import Resources
from cnnray.cpus import usable_cpus
from cnnray.images.reading import FEW_IMAGES
from cnnray.models import engines
from cnnray.models.answers import Rules
from cnnray.models.bundle import Bundle
from cnnray.prediction.config import InferenceOptions, PredictConfig, PredictOptions
from cnnray.prediction.pool import Pool, plan_pool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The engine, and the workers that run it."""

    bundle: Bundle
    engine: str
    options: PredictOptions
    pool: Pool
    rules: Rules
    """Make answers of what the engine gives."""
    digest: str
    """`engines.digest` of the file that the engine runs. A worker that finds another file fails."""
    output: str = ""
    """Folder of the output, which names the run in metrics; empty if rows are not written."""
    in_process: bool = False
    """Whether the job's own process does the work, without Ray."""


def fits_this_process(options: InferenceOptions, images: int) -> bool:
    """Whether a job should do its work in its own process: it would start a Ray of its own for a few images only.

    Args:
        options: must not ask for anything of Ray.
        images: number of images.
    """
    return (
        images <= FEW_IMAGES
        and cluster.starts_own()
        and not cluster.may_have_gpus()
        and not options.asks_for_workers
        and not options.dashboard
    )


def plan_in_process(
    bundle: Bundle, options: PredictOptions, engine: str | None = None, *, withholds: bool = True
) -> Plan:
    """A plan for the job's own process, with all of its CPUs; the engine is chosen unless one is given.

    Args:
        bundle: to run.
        options: of the job.
        engine: its name; None: it is chosen.
        withholds: False: each image gets its most probable class, also below the threshold of the bundle.

    Raises:
        BundleError: the bundle was not exported to the engine, or has no threshold for it.
    """
    engine = engine or choose_engine(bundle, options, gpus=False)
    pool = Pool(smallest=1, first=1, largest=1, cpus=usable_cpus())
    return _plan(bundle, options, engine, pool, withholds=withholds, in_process=True)


def plan_on_cluster(
    bundle: Bundle,
    options: PredictOptions,
    resources: Resources,
    engine: str | None = None,
    *,
    withholds: bool = True,
) -> Plan:
    """Choose the engine, unless one is given, and the workers.

    Args:
        bundle, options, engine, withholds: see `plan_in_process`.
        resources: of the cluster.

    Raises:
        BundleError: see `plan_in_process`.
        ClusterError: the cluster is too small.
    """
    if engine is None:
        gpus = resources.gpus >= 1 and options.gpus_per_worker != 0
        engine = choose_engine(bundle, options, gpus=gpus)
    return _plan(bundle, options, engine, plan_pool(options, engine, resources), withholds=withholds)


def plan_when_resources_allow(
    bundle: Bundle, options: PredictOptions, engine: str | None = None, *, withholds: bool = True
) -> Plan:
    """`plan_on_cluster` with the cluster that this process is connected to.

    Waits `options.wait_minutes` for missing nodes.

    Raises:
        BundleError, ClusterError: see `plan_on_cluster`.
    """
    worker = {"CPU": options.cpus_per_worker or 1.0, "GPU": options.gpus_per_worker or 0.0}
    return waiting.wait_for_resources(
        lambda resources: plan_on_cluster(bundle, options, resources, engine, withholds=withholds),
        [worker] * (options.max_workers or options.min_workers or 1),
        options.wait_minutes,
    )


def choose_engine(bundle: Bundle, options: PredictOptions, *, gpus: bool) -> str:
    """Resolve `options.engine`: `auto` is the fastest verified engine, or keras where embeddings are asked for.

    Raises:
        BundleError: the bundle was not exported to the engine.
    """
    if options.engine == "auto":
        if options.embeddings:
            return engines.KERAS
        return engines.choose(bundle, gpus=gpus, batch_size=options.batch_size)
    engines.check_exported(bundle, options.engine)
    return options.engine


def _plan(
    bundle: Bundle, options: PredictOptions, engine: str, pool: Pool, *, withholds: bool, in_process: bool = False
) -> Plan:
    engines.check_exported(bundle, engine)
    return Plan(
        bundle=bundle,
        engine=engine,
        options=options,
        pool=pool,
        rules=engines.find_rules(bundle, engine, withholds=withholds),
        digest=engines.digest(bundle, engine),
        output=options.output if isinstance(options, PredictConfig) else "",
        in_process=in_process,
    )
