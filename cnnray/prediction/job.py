"""A prediction job from end to end: list, plan, ranges, receipts, reconcile, summary."""

import contextlib
import dataclasses
import functools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from cnnray import cluster, paths, waiting
from cnnray.images import containers, storage
from cnnray.images.lease import Lease, lease
from cnnray.images.shards import Range
from cnnray.models import averaging, engines
from cnnray.models.bundle import INFO, Bundle, BundleError
from cnnray.prediction import delta, resume, summary, verify
from cnnray.prediction import earlier as earlier_versions
from cnnray.prediction import manifest as manifests
from cnnray.prediction import plan as plans
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.dispatch import Dispatcher
from cnnray.prediction.listed import ListedTasks
from cnnray.prediction.manifest import Manifest
from cnnray.prediction.plan import Plan
from cnnray.prediction.pool import Pool, check_room
from cnnray.prediction.ranges import Output, RangeWorker, Receipt, Task
from cnnray.prediction.reconcile import Received, left_out, reconcile, too_many_errors
from cnnray.prediction.worker import Worker, rename_reserved
from cnnray.progress import ProgressBar, duration
from cnnray.tracking.prometheus import PredictionMetrics

log = logging.getLogger(__name__)

_MIN_ROWS_CHECKED = 1000
"""Rows from which on `--max-error-fraction` may stop the run."""

Planner = Callable[[Range], Task | None]


def run(config: PredictConfig, *, withholds: bool = True) -> dict[str, Any]:
    """Classify all images of `config.input`.

    Writes the rows (`part-*`, or the Delta table `table/`), `summary.json`, `errors.csv` and `errors-*.csv` if there
    are errors, `manifest/` and `config.yaml` to `config.output`.

    An interrupted run resumes. A finished run is not repeated.

    Args:
        config: of the run.
        withholds: False: each image gets its most probable class, also below the threshold of the bundle.

    Returns:
        `output`, `rows`, `ok`, `unsure` (of a bundle that may be), `errors`, `resumed` (rows that existed already),
        `classified` (images that this call has read), `engine`, and of this call `images_per_second` and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PartError, PredictionError: with a sentence for the user. Mistakes that can
            be found without Ray are raised before Ray starts and before anything is written.
    """
    started = time.monotonic()
    with lease(config.output) as held:
        bundle = _load_bundle(config)
        earlier = resume.earlier_run(config, bundle)
        result = resume.read_result(config, earlier) if earlier else None
        if result is not None and not (config.retry_errors or config.update):
            if config.overwrite:
                earlier = None
            elif not config.verify:
                log.info("%s is finished already; nothing was run.", config.output)
                return result | {
                    "resumed": result["rows"], "classified": 0, "seconds": round(time.monotonic() - started, 2),
                }  # fmt: skip
        if config.engine != "auto":
            engines.check_exported(bundle, config.engine)
            if withholds:
                engines.find_threshold(bundle, config.engine)
        manifest = list_images(config, earlier)
        plan_task = _task_planner(config, manifest, earlier)
        left = _images_left(manifest, plan_task)
        tasks, received, rate = ListedTasks(manifest.ranges, plan_task), Received(config), 0.0
        engine = earlier["engine"] if earlier else ""
        if left == 0:
            ranges = list(manifest.ranges)
            resume.set_generation(config, manifest.generation)
        else:
            # A run that was not finished goes on with Ray: perhaps an image has ended the process that did the work.
            if config.averages:
                averaging.write(bundle)
            is_few = left is not None and (earlier is None or result is not None)
            make_plan = functools.partial(_make_plan, config, bundle, engine or None, withholds)
            with _planned(config, manifest, make_plan, left if is_few else None) as plan:
                engine = plan.engine
                # All checks have passed: only now is anything of an earlier run replaced.
                resume.begin_output(config, plan, manifest.generation, is_new=earlier is None)
                rate = _classify(config, plan, manifest, tasks, received, held)
            ranges = tasks.ranges
        totals, counting = reconcile(config, ranges, received, multi_label=bundle.info.is_multi_label)
        resume.delete_manifests(config, manifest.generation)
        if config.verify:
            verify.verify(config, ranges, manifest.folder)
        if config.format == "delta":
            delta.commit(config.parts_folder, counting, bundle.version)
        values = summary.summarize(totals, bundle.info) | {
            "output": config.output,
            "resumed": totals.rows - received.classified,
            "classified": received.classified,
            "engine": engine,
            "images_per_second": round(rate, 2),
            "seconds": round(time.monotonic() - started, 2),
        }
        line = {key: values[key] for key in resume.RESULT if key in values}
        text = json.dumps(line | {"model": bundle.version} | values, indent=2)
        storage.write_bytes(storage.join(config.output, resume.SUMMARY), text.encode())
        summary.log_summary(values)
        return line


def dry_run(config: PredictConfig) -> dict[str, Any]:
    """Report what a run would read, and estimate its time from a sample of the images. Nothing is written.

    Returns:
        `output`, `rows`, `resumed`, `engine`, `workers`, and the estimates `images_per_second` and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PredictionError: as `run`.
    """
    bundle = _load_bundle(config)
    with tempfile.TemporaryDirectory(prefix="cnnray-averaged-") as folder:
        if config.averages and not storage.is_file(storage.join(bundle.uri, INFO)):
            bundle = averaging.write(dataclasses.replace(bundle, uri=storage.join(folder, "bundle")))
        return _dry_run(config, bundle)


def _dry_run(config: PredictConfig, bundle: Bundle) -> dict[str, Any]:
    earlier = resume.earlier_run(config, bundle)
    count, sample = manifests.sample(config)
    resumed = resume.row_count(config, earlier) if earlier else 0
    is_few = earlier is None and plans.fits_this_process(config, count)
    with contextlib.nullcontext() if is_few else cluster.connected(dashboard=config.dashboard):
        plan = _make_plan(config, bundle, earlier["engine"] if earlier else None, True, is_few)
    worker = Worker(plan)
    sample = rename_reserved(sample)
    list(worker(sample.slice(0, 1)))  # the first call is slow
    start = time.monotonic()
    errors = sum(len(rows) - rows["error"].null_count for rows in worker(sample))
    rate = plan.pool.first * len(sample) / (time.monotonic() - start)
    seconds = (count - resumed) / rate
    log.info(
        "would read %d images of %s, for example %s; %d are done", count, config.input, sample["uri"][0], resumed
    )
    log.info("%d of %d sampled images have no prediction", errors, len(sample))
    log.info("%d workers of %s: %.0f images/s, %s", plan.pool.first, plan.engine, rate, duration(seconds))
    return {
        "output": config.output,
        "rows": count,
        "resumed": resumed,
        "engine": plan.engine,
        "workers": plan.pool.first,
        "images_per_second": round(rate, 2),
        "seconds": round(seconds, 2),
    }


def _load_bundle(config: PredictConfig) -> Bundle:
    """The bundle that runs.

    Raises:
        BundleError, OSError: the bundle cannot be read, or has another version than is asked for.
    """
    bundle = Bundle.load(config.bundle)
    if config.bundle_version not in (None, bundle.version):
        raise BundleError(f"{config.bundle} holds {bundle.version}, and --bundle-version is {config.bundle_version}.")
    return config.averaged_bundle(bundle, config.output)


def list_images(config: PredictConfig, earlier: dict[str, Any] | None) -> Manifest:
    """The manifest of a run that begins anew, goes on, or is updated."""
    if earlier is None:
        return manifests.begin(config, resume.next_generation(config))
    generation = earlier[resume.GENERATION]
    if generation == resume.EARLIER_VERSION:
        generation = 0
        earlier_versions.convert(config, manifests.folder_of(config, generation))
        resume.set_generation(config, generation)
    if config.update:
        committed = resume.Committed(config)
        updated = manifests.update(config, generation, lambda range_: committed.of(range_) is not None)
        if updated is not None:
            return updated
    return manifests.proceed(config, generation)


def _task_planner(config: PredictConfig, manifest: Manifest, earlier: dict[str, Any] | None) -> Planner:
    """Gives the task for a range of the manifest; None where its part is there."""
    if earlier is None:
        return lambda range_: Task(range=range_)
    committed = resume.Committed(config)
    retried = resume.find_retried(config, manifest, committed) if config.retry_errors else frozenset()
    return functools.partial(resume.plan_task, committed=committed, retried=retried, retry_errors=config.retry_errors)


def _images_left(manifest: Manifest, plan_task: Planner) -> int | None:
    """Images of the ranges that have no part yet; None if they are too many to be counted before the run."""
    if not manifest.is_listed:
        return manifest.rows
    return sum(range_.rows for range_ in manifest.ranges if plan_task(range_) is not None)


@contextlib.contextmanager
def _planned(
    config: PredictConfig, manifest: Manifest, make_plan: Callable[[bool], Plan], few: int | None
) -> Iterator[Plan]:
    """The plan of a run; where it needs Ray, a connection to the cluster for as long as the context lasts.

    Args:
        config: of the run.
        manifest: of the run.
        make_plan: makes the plan, for this process or not.
        few: number of images, if this process may classify them.
    """
    if few is not None and plans.fits_this_process(config, few):
        yield make_plan(True)
        return
    with cluster.connected(dashboard=config.dashboard):
        plan = make_plan(False)
        # Workers read the manifest from the output, and write its parts.
        example = containers.containing_file(manifest.example)
        paths.check_shared(cluster.resources(), [config.bundle, example, config.output])
        waiting.wait_for_room([plan.pool.worker, {"CPU": plan.pool.decode_cpus}], config.wait_minutes)
        yield plan


def _make_plan(config: PredictConfig, bundle: Bundle, engine: str | None, withholds: bool, in_process: bool) -> Plan:
    make = plans.plan_in_process if in_process else plans.plan_when_resources_allow
    return make(bundle, config, engine, withholds=withholds)


# -- ranges and receipts --------------------------------------------------------------------------------------


def _classify(
    config: PredictConfig, plan: Plan, manifest: Manifest, tasks: ListedTasks, received: Received, held: Lease
) -> float:
    """Carry out the tasks of a run, and add up their receipts.

    Returns:
        images/s.

    Raises:
        UnavailableError: the storage of some images was in trouble; all others have their row.
        PredictionError: too large a share of the images has no prediction; or a worker failed.
    """
    output = Output(
        folder=config.parts_folder,
        manifest=manifest.folder,
        format=config.file_format,
        threshold=config.threshold,
        skip_unreadable=config.skip_unreadable,
        multi_label=plan.bundle.info.is_multi_label,
        is_delta=config.format == "delta",
        leased=config.output,
        lease_holder=held.holder,
    )
    metrics = None if plan.in_process else PredictionMetrics(config.output)
    progress = ProgressBar(manifest.rows or 0)
    receipts: Generator[Receipt | None]
    if plan.in_process:
        receipts = _in_process(plan, output, tasks)
    else:
        at_once = 1 if storage.is_local(manifest.example) else 2
        receipts = _on_cluster(config, Dispatcher(plan, output, at_once), plan.pool, tasks)
    tasks.start()
    try:
        with contextlib.closing(receipts):
            for receipt in receipts:
                held.raise_if_lost()
                progress.set_total(tasks.rows, tasks.rows_done + received.rows - received.classified)
                if receipt is None:
                    continue
                received.add(receipt)
                if metrics:
                    tally = receipt.tally
                    metrics.add(ok=tally.ok, unsure=tally.unsure.total(), reasons=tally.reasons)
                progress.add(receipt.classified, f"{received.errors} errors" if received.errors else "")
                _check_errors(config, received, tasks)
    finally:
        tasks.stop()
        progress.close()
    if received.unavailable.rows:
        raise left_out(config, received, tasks.rows)
    return progress.images_per_second


def _in_process(plan: Plan, output: Output, tasks: ListedTasks) -> Generator[Receipt | None]:
    """Carry out the tasks in this process."""
    log.info("in this process, with %d threads", plan.pool.threads)
    worker = RangeWorker(plan, output)
    while not tasks.ended:
        if (task := tasks.take(seconds=1.0)) is not None:
            yield worker.run(task)


def _on_cluster(
    config: PredictConfig, dispatcher: Dispatcher, pool: Pool, tasks: ListedTasks
) -> Generator[Receipt | None]:
    """Carry out the tasks with workers on the cluster.

    Raises:
        ClusterError: other jobs hold the room, or lost nodes did not come back.
    """
    log.info(
        "%d to %d workers of %g CPUs and %g GPUs, %d at first; decoding in %s",
        pool.smallest, pool.largest, pool.cpus, pool.gpus, pool.first,
        f"tasks of {pool.decode_cpus:g} CPUs" if pool.decode_cpus else "the workers",
    )  # fmt: skip
    placement = waiting.Placement("RangeWorker", [pool.worker])

    def check(total: cluster.Resources) -> None:
        check_room(pool.cpus, pool.gpus, total)
        placement.check(total)

    with waiting.watch(check, config.wait_minutes):
        yield from dispatcher.run(tasks)


def _check_errors(config: PredictConfig, received: Received, tasks: ListedTasks) -> None:
    """
    Raises:
        PredictionError: too large a share of the images so far has no prediction.
    """
    enough = min(_MIN_ROWS_CHECKED, tasks.rows - tasks.rows_done) if tasks.is_complete else _MIN_ROWS_CHECKED
    if received.errors > config.max_error_fraction * received.rows and received.rows >= enough:
        raise too_many_errors(config, received.everything())
