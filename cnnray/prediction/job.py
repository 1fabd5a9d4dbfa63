"""A prediction job from end to end: manifest, workers, parts, reconciliation, summary."""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import cluster, paths, waiting
from cnnray.errors import CnnrayError
from cnnray.images import containers, reading, storage
from cnnray.images import manifest as manifests
from cnnray.images.lease import lease
from cnnray.images.manifest import ManifestError
from cnnray.images.ranges import divide_rows, split_rows
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.prediction import parts as output
from cnnray.prediction import plan as plans
from cnnray.prediction import resume, summary
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.parts import Parts
from cnnray.prediction.plan import Plan
from cnnray.prediction.pool import check_room
from cnnray.prediction.resume import PredictionError
from cnnray.prediction.worker import Worker, select_columns
from cnnray.progress import ProgressBar, duration
from cnnray.tracking.prometheus import PredictionMetrics

log = logging.getLogger(__name__)

_SAMPLE_RANGES, _SAMPLE_ROWS = 8, 32
"""A dry run classifies so many row ranges of so many rows each."""
_MIN_ROWS_CHECKED = 1000
"""Rows from which on `--max-error-fraction` may stop the run."""


def run(config: PredictConfig) -> dict[str, Any]:
    """Classify all images of `config.input`. Writes the rows (`part-*`), `summary.json`, `errors.csv` if there are
    errors, `manifest.parquet` and `config.yaml` to `config.folder`.

    An interrupted run resumes. A finished run is not repeated.

    Returns:
        `output`, `rows`, `ok`, `errors`, `resumed` (rows that existed already), `engine`, and of this call
        `images_per_second` and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PartError, PredictionError: with a sentence for the user. Mistakes that can
            be found without Ray are raised before Ray starts and before anything is written.
    """
    started = time.monotonic()
    with lease(config.folder):
        bundle = Bundle.load(config.bundle)
        earlier = resume.earlier_run(config, bundle)
        if earlier is not None and not config.retry_errors and (result := resume.read_result(config)) is not None:
            if not config.overwrite:
                log.info("%s is finished already; nothing was run.", config.folder)
                return result | {"resumed": result["rows"], "seconds": round(time.monotonic() - started, 2)}
            earlier = None
        if config.engine != "auto":
            engines.check_exported(bundle, config.engine)
        engine = earlier["engine"] if earlier else ""
        manifest = resume.read_manifest(config) if earlier else build_manifest(config)
        if earlier is None:
            resume.check_shards(config, manifest, bundle)
        parts = resume.plan_parts(config, manifest)
        written = parts.written() if earlier else set()
        retried = resume.find_parts_to_retry(config, parts, written)
        written -= retried
        resumed = parts.row_count(written)
        log.info("%d images, %d of them done", len(manifest), resumed)
        rate = 0.0
        if not earlier or len(written) < len(parts.ranges):
            with _planned(config, bundle, earlier, len(manifest)) as plan:
                if not plan.in_process:
                    first = containers.containing_file(manifest["uri"][0].as_py())
                    paths.check_shared(cluster.resources(), [config.bundle, first])
                engine = plan.engine
                # All checks have passed: only now is anything written or deleted.
                if earlier is None:
                    resume.begin_output(config, manifest, plan)
                resume.delete_parts(config, parts, retried)
                rate = _predict_missing_parts(config, manifest, parts, written, plan)
        totals = _reconcile(config, manifest, parts, bundle)
        resume.check_shards(config, manifest, bundle)  # another shard may have started at the same time
        values = totals | {
            "output": config.folder,
            "resumed": resumed,
            "engine": engine,
            "images_per_second": round(rate, 2),
            "seconds": round(time.monotonic() - started, 2),
        }
        result = {key: values[key] for key in resume.RESULT}
        text = json.dumps(result | {"model": bundle.version} | values, indent=2)
        storage.write_bytes(storage.join(config.folder, resume.SUMMARY), text.encode())
        summary.log_summary(totals)
        return result


def dry_run(config: PredictConfig) -> dict[str, Any]:
    """Report what a run would read, and estimate its time from a sample of the images. Nothing is written.

    Returns:
        `output`, `rows`, `resumed`, `engine`, `workers`, and the estimates `images_per_second` and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PredictionError: as `run`.
    """
    bundle = Bundle.load(config.bundle)
    earlier = resume.earlier_run(config, bundle)
    manifest = resume.read_manifest(config) if earlier else build_manifest(config)
    parts = resume.plan_parts(config, manifest)
    resumed = parts.row_count(parts.written() if earlier else set())
    with _planned(config, bundle, earlier, len(manifest)) as plan:
        pass
    sample = _sample(manifest)
    worker = Worker(plan, bundle.version)
    list(worker(sample.slice(0, 1)))  # the first call is slow
    start = time.monotonic()
    errors = sum(len(rows) - rows["error"].null_count for rows in worker(sample))
    rate = plan.pool.first * len(sample) / (time.monotonic() - start)
    seconds = (len(manifest) - resumed) / rate
    log.info(
        "would read %d images of %s, for example %s; %d are done",
        len(manifest), config.input, sample["uri"][0], resumed,
    )  # fmt: skip
    log.info("%d of %d sampled images have no prediction", errors, len(sample))
    log.info("%d workers of %s: %.0f images/s, %s", plan.pool.first, plan.engine, rate, duration(seconds))
    return {
        "output": config.folder,
        "rows": len(manifest),
        "resumed": resumed,
        "engine": plan.engine,
        "workers": plan.pool.first,
        "images_per_second": round(rate, 2),
        "seconds": round(seconds, 2),
    }


@contextlib.contextmanager
def _planned(config: PredictConfig, bundle: Bundle, earlier: dict[str, Any] | None, images: int) -> Iterator[Plan]:
    """The plan of a run; where it needs Ray, a connection to the cluster for as long as the context lasts.

    A run that resumes needs Ray: perhaps an image has crashed the process that did the work.
    """
    if earlier is None and plans.fits_this_process(config, images):
        yield plans.plan_in_process(bundle, config)
        return
    with cluster.connected(dashboard=config.dashboard):
        yield plans.plan_when_resources_allow(bundle, config, earlier["engine"] if earlier else None)


def _sample(manifest: pa.Table) -> pa.Table:
    """Short row ranges from all over a manifest; neighbouring rows, because a run reads containers in order, too."""
    starts = np.linspace(0, max(len(manifest) - _SAMPLE_ROWS, 0), _SAMPLE_RANGES).astype(np.int64)
    rows = np.unique(np.add.outer(starts, np.arange(_SAMPLE_ROWS)))
    return manifest.take(pa.array(rows[rows < len(manifest)]))


def build_manifest(config: PredictConfig) -> pa.Table:
    """The manifest of a run: the images of the input that its limit and shard select, with the columns that are
    copied to the output. Its metadata holds the fingerprint of the images of all shards.

    Raises:
        ManifestError, OSError: with a sentence for the user.
    """
    manifest = manifests.build_manifest(config.input, labelled=False).slice(0, config.limit)
    metadata = {resume.INPUT: manifests.fingerprint(manifest)}
    manifest = select_columns(manifest)
    if config.shards > 1:
        ranges = divide_rows(manifest["uri"], config.shards)
        if len(ranges) < config.shards:
            raise ManifestError(
                f"{config.input} can be split into {len(ranges)} shards only (images in one row group stay together)."
            )
        start, stop = ranges[config.shard]
        manifest = manifest.slice(start, stop - start)
    return manifest.replace_schema_metadata(metadata)


# -- the run --------------------------------------------------------------------------------------------------


def _predict_missing_parts(
    config: PredictConfig,
    manifest: pa.Table,
    parts: Parts,
    written: set[int],
    plan: Plan,
) -> float:
    """Classify the images of the parts that are not written, and write these parts.

    Returns:
        images/s.

    Raises:
        UnavailableError: the storage of some images was in trouble; all others have their row.
        PredictionError: see `_ErrorLimit`; or a worker failed.
    """
    missing = [bounds for part, bounds in enumerate(parts.ranges) if part not in written]
    missing_rows = sum(stop - start for start, stop in missing)
    collector = output.Collector(parts, manifest["id"].to_numpy(), leave_out=not config.skip_unreadable)
    progress = ProgressBar(len(manifest), len(manifest) - missing_rows)
    errors = _ErrorLimit(config, missing_rows)
    images = manifest.replace_schema_metadata(None)
    classified = _in_process(images, missing, plan) if plan.in_process else _on_cluster(config, images, missing, plan)
    try:
        with contextlib.closing(classified):
            for rows in classified:
                collector.add(rows)
                errors.add(rows)
                progress.add(len(rows), f"{errors.count} errors" if errors.count else "")
    finally:
        progress.close()
    if (left_out := collector.left_out) is not None:
        raise _left_out(config, left_out, len(manifest))
    return progress.images_per_second


def _in_process(manifest: pa.Table, ranges: list[tuple[int, int]], plan: Plan) -> Generator[pa.Table]:
    """Classify row ranges of the manifest in this process."""
    log.info("in this process, with %d threads", plan.pool.threads)
    worker = Worker(plan, plan.bundle.version)
    for start, stop in ranges:
        yield from worker(manifest.slice(start, stop - start))


def _on_cluster(
    config: PredictConfig, manifest: pa.Table, ranges: list[tuple[int, int]], plan: Plan
) -> Generator[pa.Table]:
    """Classify row ranges of the manifest with Ray. The rows come in any order.

    Raises:
        PredictionError: a worker failed.
        ClusterError: lost nodes did not come back.
    """
    import ray

    from cnnray.images import stream
    from cnnray.prediction import pipeline

    stream.silence_progress()
    pool, metrics = plan.pool, PredictionMetrics(config.folder)
    log.info(
        "%d to %d workers of %g CPUs and %g GPUs, %d at first; decoding in %s",
        pool.smallest, pool.largest, pool.cpus, pool.gpus, pool.first,
        f"tasks of {pool.decode_cpus:g} CPUs" if pool.decode_cpus else "the workers",
    )  # fmt: skip
    per_task = pipeline.rows_per_task(sum(stop - start for start, stop in ranges), pool)
    tasks = [
        (first + start, first + stop)
        for first, last in ranges
        for start, stop in split_rows(manifest["uri"][first:last], per_task)
    ]
    dataset = pipeline.predict(manifest, plan, tasks)
    try:
        with waiting.watch(functools.partial(check_room, pool.cpus, pool.gpus), config.wait_minutes):
            for rows in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
                metrics.add_rows(rows)
                yield rows
    except ray.exceptions.RayError as error:
        sentence = f"Prediction failed: {cluster.last_line(error)} (The same command resumes the run.)"
        raise cluster.user_error(error) or PredictionError(sentence) from error


def _left_out(config: PredictConfig, rows: pa.Table, images: int) -> CnnrayError:
    """The error for images that have no row. Writes the list of them, `errors.csv`."""
    errors = summary.ErrorList()
    errors.add(rows)
    errors.write(storage.join(config.folder, resume.ERRORS))
    example = rows.slice(0, 1).to_pylist()[0]
    return storage.UnavailableError(
        f"{len(rows)} of {images} images have no row, because storage was in trouble, for example {example['uri']} "
        f"({example['error']}); {resume.ERRORS} lists them. The same command continues with them, and with "
        "--skip-unreadable it gives them rows with an error."
    )


class _ErrorLimit:
    """Counts errors, and stops the run when their share exceeds `max_error_fraction`."""

    def __init__(self, config: PredictConfig, total_rows: int) -> None:
        self._config, self._total_rows, self._rows = config, total_rows, 0
        self.count = 0

    def add(self, rows: pa.Table) -> None:
        """
        Raises:
            PredictionError: too large a share of the rows so far has no prediction.
        """
        bad = rows.filter(pc.is_valid(rows["error"]))
        self._rows += len(rows)
        self.count += len(bad)
        limit = self._config.max_error_fraction * self._rows
        if len(bad) and self.count > limit and self._rows >= min(_MIN_ROWS_CHECKED, self._total_rows):
            raise _too_many_errors(self._config, self.count, self._rows, bad.slice(0, 1).to_pylist()[0])


def _too_many_errors(config: PredictConfig, errors: int, rows: int, example: dict[str, Any]) -> PredictionError:
    has_no_row = example["error"].startswith(reading.UNAVAILABLE) and not config.skip_unreadable
    return PredictionError(
        f"{errors} of {rows} images have no prediction, more than --max-error-fraction "
        f"{config.max_error_fraction:g}, for example {example['uri']} ({example['error']}): solve that, then run the "
        f"same command{'' if has_no_row else ' with --retry-errors'}."
    )


# -- the end --------------------------------------------------------------------------------------------------


def _reconcile(config: PredictConfig, manifest: pa.Table, parts: Parts, bundle: Bundle) -> dict[str, Any]:
    """Read all parts back, compare their ids with those of the manifest, and summarize them. Writes `errors.csv`.

    Returns:
        what `summary.summarize` gives.

    Raises:
        PartError: a part is missing or has other ids.
        PredictionError: too large a share of the rows has no prediction.
    """
    ids: Any = manifest["id"].to_numpy()
    written = parts.written()
    missing = [bounds for part, bounds in enumerate(parts.ranges) if part not in written]
    if missing:
        missing_ids = np.concatenate([ids[start:stop] for start, stop in missing])
        raise output.PartError(
            f"{len(missing_ids)} images have no row, for example the ids {missing_ids[:10].tolist()}. Run the same "
            "command again."
        )
    tally, errors = summary.Tally(config.threshold), summary.ErrorList()
    for part in range(len(parts.ranges)):
        rows = parts.read(part)
        if problem := parts.problem(part, rows, ids):
            raise output.PartError(f"{parts.uri(part)} has other ids than the manifest ({problem}): delete it.")
        tally.add(rows)
        errors.add(rows)
    if tally.errors > config.max_error_fraction * tally.rows:
        raise _too_many_errors(config, tally.errors, tally.rows, next(iter(tally.examples.values()))[0])
    if tally.errors:
        errors.write(storage.join(config.folder, resume.ERRORS))
    else:
        storage.delete_file(storage.join(config.folder, resume.ERRORS))
    return summary.summarize(tally, bundle.info)
