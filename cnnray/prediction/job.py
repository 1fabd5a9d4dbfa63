"""A prediction job from end to end: manifest, workers, parts, reconciliation, summary."""

import functools
import json
import logging
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import cluster, paths
from cnnray.images import containers, storage, stream
from cnnray.images import manifest as manifests
from cnnray.images.lease import lease
from cnnray.images.manifest import ManifestError
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.prediction import parts as output
from cnnray.prediction import pipeline, resume, summary
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.parts import Parts
from cnnray.prediction.pool import check_room
from cnnray.prediction.resume import PredictionError
from cnnray.progress import Progress, duration
from cnnray.tracking.prometheus import PredictionMetrics

log = logging.getLogger(__name__)

_SAMPLED_RUNS, _SAMPLED_RUN = 8, 32
_TRIED_FIRST = 1000
"""Images after which `--max-error-fraction` may stop the run."""


def run(config: PredictConfig) -> dict[str, Any]:
    """Classify all images of `config.input`, and leave in `config.folder` the rows (`part-*`), `summary.json`,
    `errors.csv` where there were any, `manifest.parquet` and `config.yaml`.

    A run that was interrupted goes on; one that is finished is not run again.

    Returns:
        `output`, `rows`, `ok`, `errors`, `resumed` (rows that were there already), `engine`, and of this call
        `images_per_second` and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PartError, PredictionError: with a sentence for the user; what can be known
            before Ray starts is raised before it, and before anything is written.
    """
    started = time.monotonic()
    with lease(config.folder):
        bundle = Bundle.load(config.bundle)
        earlier = resume.earlier_run(config, bundle)
        if earlier is not None and not config.retry_errors and (done := resume.finished(config)) is not None:
            if not config.overwrite:
                log.info("%s is finished already; nothing was run.", config.folder)
                return done | {"resumed": done["rows"], "seconds": round(time.monotonic() - started, 2)}
            earlier = None
        if config.engine != "auto":
            engines.check_exported(bundle, config.engine)
        engine = earlier["engine"] if earlier else ""
        manifest = resume.read_manifest(config) if earlier else manifest_of(config)
        if earlier is None:
            resume.check_shards(config, manifest, bundle)
        parts = resume.parts_of(config, manifest)
        written = parts.written() if earlier else set()
        again = resume.unread(config, parts, written)
        written -= again
        resumed = _rows_of(parts, written)
        log.info("%d images, %d of them done", len(manifest), resumed)
        rate = 0.0
        if not earlier or len(written) < len(parts.ranges):
            with cluster.connected():
                planned = pipeline.plan_when_it_fits(bundle, config, earlier["engine"] if earlier else None)
                paths.check_shared(
                    cluster.resources(), [config.bundle, containers.file_of(manifest["uri"][0].as_py())]
                )
                engine = planned.engine
                # Nothing is written, or taken away, before all is known to be right.
                if earlier is None:
                    resume.begin(config, manifest, planned)
                resume.take_away(config, parts, again)
                rate = _run(config, manifest, parts, written, planned)
        found_all = _reconciled(config, manifest, parts, bundle)
        resume.check_shards(config, manifest, bundle)  # those that began at the same time
        line = {
            "output": config.folder,
            **{name: found_all[name] for name in ("rows", "ok", "errors")},
            "resumed": resumed,
            "engine": engine,
            "images_per_second": round(rate, 2),
            "seconds": round(time.monotonic() - started, 2),
        }
        stated = line | {"model": bundle.version} | found_all
        storage.write_bytes(storage.join(config.folder, resume.SUMMARY), json.dumps(stated, indent=2).encode())
        summary.log_summary(found_all)
        return line


def dry_run(config: PredictConfig) -> dict[str, Any]:
    """Say what a run would read, and how long that would take by a sample of the images; nothing is written.

    Returns:
        `output`, `rows`, `resumed`, `engine`, `workers`, and estimated `images_per_second` and `seconds`.

    Raises:
        ValueError, OSError, ClusterError, PredictionError: as `run`.
    """
    bundle = Bundle.load(config.bundle)
    earlier = resume.earlier_run(config, bundle)
    manifest = resume.read_manifest(config) if earlier else manifest_of(config)
    parts = resume.parts_of(config, manifest)
    resumed = _rows_of(parts, parts.written() if earlier else set())
    with cluster.connected():
        planned = pipeline.plan_when_it_fits(bundle, config, earlier["engine"] if earlier else None)
    sample = _sample(manifest)
    worker = pipeline.Worker(planned, bundle.version)
    list(worker(sample.slice(0, 1)))
    start = time.monotonic()
    errors = sum(len(rows) - rows["error"].null_count for rows in worker(sample))
    rate = planned.pool.first * len(sample) / (time.monotonic() - start)
    seconds = (len(manifest) - resumed) / rate
    log.info(
        "would read %d images of %s, %s for one; %d are done",
        len(manifest), config.input, sample["uri"][0], resumed,
    )  # fmt: skip
    log.info("of a sample of %d images %d have no prediction", len(sample), errors)
    log.info("%d workers of %s: %.0f images/s, %s", planned.pool.first, planned.engine, rate, duration(seconds))
    return {
        "output": config.folder,
        "rows": len(manifest),
        "resumed": resumed,
        "engine": planned.engine,
        "workers": planned.pool.first,
        "images_per_second": round(rate, 2),
        "seconds": round(seconds, 2),
    }


def _sample(manifest: pa.Table) -> pa.Table:
    """A few runs of images from all over a manifest: of images that lie together in files, as a run reads them."""
    starts = np.linspace(0, max(len(manifest) - _SAMPLED_RUN, 0), _SAMPLED_RUNS).astype(np.int64)
    rows = np.unique(np.add.outer(starts, np.arange(_SAMPLED_RUN)))
    return manifest.take(pa.array(rows[rows < len(manifest)]))


def _rows_of(parts: Parts, some: set[int]) -> int:
    return sum(stop - start for part, (start, stop) in enumerate(parts.ranges) if part in some)


def manifest_of(config: PredictConfig) -> pa.Table:
    """The images of a run: those of the input that the limit and the shard leave, with the columns that pass through.

    Raises:
        ManifestError, OSError: with a sentence.
    """
    manifest = manifests.manifest_of(config.input, labelled=False).slice(0, config.limit)
    stated = {resume.INPUT: manifests.fingerprint(manifest)}
    manifest = pipeline.passed_through(manifest)
    if config.shards > 1:
        ranges = stream.shares(manifest["uri"].to_pylist(), config.shards)
        if len(ranges) < config.shards:
            raise ManifestError(
                f"{config.input} can be split into {len(ranges)} shards only (images in one row group stay together)."
            )
        start, stop = ranges[config.shard]
        manifest = manifest.slice(start, stop - start)
    return manifest.replace_schema_metadata(stated)


# -- the run --------------------------------------------------------------------------------------------------


def _run(
    config: PredictConfig,
    manifest: pa.Table,
    parts: Parts,
    written: set[int],
    planned: pipeline.Plan,
) -> float:
    """Make the parts that are not written.

    Returns:
        images/s.
    """
    import ray

    stream.be_quiet()
    pending = [bounds for part, bounds in enumerate(parts.ranges) if part not in written]
    rows = sum(stop - start for start, stop in pending)
    pool = planned.pool
    log.info(
        "%d to %d workers of %g CPUs and %g GPUs, %d at first; decoding in %s",
        pool.smallest, pool.largest, pool.cpus, pool.gpus, pool.first,
        f"tasks of {pool.decode_cpus:g} CPUs" if pool.decode_cpus else "the workers",
    )  # fmt: skip
    collector = output.Collector(parts, manifest["id"].to_numpy())
    progress = Progress(len(manifest), len(manifest) - rows)
    errors, meter = _Errors(config, rows), PredictionMetrics(config.folder)
    per_task = pipeline.rows_per_task(rows, pool)
    uris = manifest["uri"].to_pylist()
    tasks = [
        (first + start, first + stop)
        for first, last in pending
        for start, stop in stream.pieces(uris[first:last], per_task)
    ]
    del uris  # of millions of images it is large
    dataset = pipeline.predicted(manifest.replace_schema_metadata(None), planned, tasks)
    try:
        with cluster.watched(functools.partial(check_room, pool.cpus, pool.gpus), config.wait_minutes):
            for found in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
                collector.add(found)
                meter.rows(found)
                errors.add(found)
                progress.add(len(found), f"{errors.count} errors" if errors.count else "")
    except ray.exceptions.RayError as error:
        sentence = f"Prediction failed: {cluster.last_line(error)} (The same command goes on.)"
        raise cluster.user_error(error) or PredictionError(sentence) from error
    finally:
        progress.close()
    return progress.images_per_second


class _Errors:
    """Stops a run in which too much is wrong."""

    def __init__(self, config: PredictConfig, rows: int) -> None:
        self._config, self._rows, self._tried = config, rows, 0
        self.count = 0

    def add(self, rows: pa.Table) -> None:
        """
        Raises:
            PredictionError: too large a share of the rows so far has no prediction.
        """
        bad = rows.filter(pc.is_valid(rows["error"]))
        self._tried += len(rows)
        self.count += len(bad)
        most = self._config.max_error_fraction * self._tried
        if len(bad) and self.count > most and self._tried >= min(_TRIED_FIRST, self._rows):
            raise PredictionError(_too_many(self._config, self.count, self._tried, bad.slice(0, 1).to_pylist()[0]))


def _too_many(config: PredictConfig, errors: int, tried: int, example: dict[str, Any]) -> str:
    return (
        f"{errors} of {tried} images have no prediction, more than --max-error-fraction "
        f"{config.max_error_fraction:g}, {example['uri']} for one ({example['error']}): once that is mended, run the "
        "same command with --retry-errors."
    )


# -- the end --------------------------------------------------------------------------------------------------


def _reconciled(config: PredictConfig, manifest: pa.Table, parts: Parts, bundle: Bundle) -> dict[str, Any]:
    """Read all parts back, compare their ids with the manifest's, and sum them up.

    Raises:
        PartError: a part is missing or has other ids.
        PredictionError: too large a share of the rows has no prediction.
    """
    ids: Any = manifest["id"].to_numpy()
    written = parts.written()
    missing = [bounds for part, bounds in enumerate(parts.ranges) if part not in written]
    if missing:
        lost = np.concatenate([ids[start:stop] for start, stop in missing])
        raise output.PartError(
            f"{len(lost)} images have no row, the ids {lost[:10].tolist()} for some. Run the same command again."
        )
    tally, errors = summary.Tally(config.threshold), summary.ErrorList()
    for part in range(len(parts.ranges)):
        rows = parts.read(part)
        if problem := parts.problem(part, rows, ids):
            raise output.PartError(f"{parts.uri(part)} has other ids than the manifest ({problem}): delete it.")
        tally.add(rows)
        errors.add(rows)
    if tally.errors > config.max_error_fraction * tally.rows:
        raise PredictionError(_too_many(config, tally.errors, tally.rows, next(iter(tally.examples.values()))[0]))
    if tally.errors:
        errors.write(storage.join(config.folder, resume.ERRORS))
    else:
        storage.delete_file(storage.join(config.folder, resume.ERRORS))
    return summary.summary_of(tally, bundle.info)
