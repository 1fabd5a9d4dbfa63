"""Turns manifest rows into rows with predictions, with Ray Data on a pool of workers.

Output rows come in any order. A row has the manifest's columns and

- `status`: `ok` or `error`; and `error`: null, or why there is no prediction (a reason of `decode.BadImage` or
  `reading.UNAVAILABLE`, a colon and details);
- `prediction`, `confidence`, `top_k_labels`, `top_k_scores`: null for errors;
- `model`: `Bundle.version` of the network;
- `probabilities`, `embedding`: float32 lists of fixed size, if the options ask for them; null for errors.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from cnnray import waiting
from cnnray.cluster import Resources
from cnnray.images import containers, reading, stream
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.predictor import Predictor, find_unusable, rank_classes
from cnnray.prediction.config import PredictConfig, PredictOptions
from cnnray.prediction.ledger import MAX_CRASHES, create_ledger, finish_attempt, start_attempt
from cnnray.prediction.pool import Pool, plan_pool
from cnnray.tracking.prometheus import PredictionMetrics

COLUMNS = (
    "status", "error", "prediction", "confidence", "top_k_labels", "top_k_scores", "model", "probabilities",
    "embedding",
)  # fmt: skip
"""The columns that predictions add, in their order."""
CRASHED = "crashed: the worker process crashed each time it was given this image"
_PIXELS, _ERROR = "__pixels", "__error"
"""Columns that decoding tasks add for workers: the pixels of an image, and its error, empty where it was decoded."""
_MIN_ROWS_PER_TASK, _MAX_ROWS_PER_TASK = 32, 512

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Sources = Iterator[containers.Source] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The engine, and the workers that run it."""

    bundle: Bundle
    engine: str
    options: PredictOptions
    pool: Pool
    digest: str
    """`engines.digest` of the file that the engine runs. A worker that finds another file fails."""
    output: str = ""
    """Folder of the output, which names the run in metrics; empty if rows are not written."""


def plan(bundle: Bundle, options: PredictOptions, resources: Resources, engine: str | None = None) -> Plan:
    """Choose the engine, unless one is given, and the workers.

    Raises:
        BundleError: the bundle was not exported to the engine.
        ClusterError: the cluster is too small.
    """
    if engine is None:
        gpus = resources.gpus >= 1 and options.gpus_per_worker != 0
        engine = choose_engine(bundle, options, gpus=gpus)
    pool = plan_pool(options, engine, resources)
    return Plan(
        bundle=bundle,
        engine=engine,
        options=options,
        pool=pool,
        digest=engines.digest(bundle, engine),
        output=options.folder if isinstance(options, PredictConfig) else "",
    )


def plan_when_resources_allow(bundle: Bundle, options: PredictOptions, engine: str | None = None) -> Plan:
    """`plan` for the cluster that this process is connected to; waits `options.wait_minutes` for missing nodes.

    Raises:
        BundleError, ClusterError: see `plan`.
    """
    worker = {"CPU": options.cpus_per_worker or 1.0, "GPU": options.gpus_per_worker or 0.0}
    return waiting.wait_for_resources(
        lambda resources: plan(bundle, options, resources, engine),
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


def select_columns(manifest: pa.Table) -> pa.Table:
    """The manifest with the columns that are copied to the output.

    `label` and `split` are dropped if they are empty. Columns whose names are in `COLUMNS` are renamed to
    `original_NAME`.
    """
    optional = [name for name in ("label", "split") if name in manifest.column_names]
    manifest = manifest.drop_columns([name for name in optional if manifest[name].null_count == len(manifest)])
    names = set(manifest.column_names)
    for name in names & set(COLUMNS):
        renamed = f"original_{name}"
        while renamed in names:
            renamed = f"original_{renamed}"
        names.add(renamed)
        manifest = manifest.rename_columns({name: renamed})
    return manifest


def predict(manifest: pa.Table, plan: Plan, ranges: list[tuple[int, int]] | None = None) -> ray.data.Dataset:
    """Lazily classify the images of a manifest: a dataset with one row for each row of the manifest.

    Args:
        manifest: rows with `id` and `uri`, in the order in which images are read.
        plan: the engine and the workers.
        ranges: the row range of each task: its first row, and the row after its last; None: tasks of equal size
            over all rows.
    """
    size, resize, pool = plan.bundle.info.image_size, plan.bundle.info.resize, plan.pool
    if ranges is None:
        ranges = stream.split_rows(manifest["uri"], rows_per_task(len(manifest), pool))
    dataset, ledger = stream.from_ranges(manifest, ranges), create_ledger()
    if pool.decode_cpus:
        dataset = dataset.map_batches(
            _decoded,
            fn_kwargs={
                "size": size, "resize": resize, "rows_per_block": stream.rows_per_block(size), "ledger": ledger,
            },
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=pool.decode_cpus,
            zero_copy_batch=True,
        )  # fmt: skip
    return dataset.map_batches(
        Worker,
        fn_constructor_kwargs={"plan": plan, "model": plan.bundle.version, "ledger": ledger},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.smallest,
            max_size=pool.largest,
            initial_size=pool.first,
            max_tasks_in_flight_per_actor=2,
        ),
        zero_copy_batch=True,
    )


def rows_per_task(rows: int, pool: Pool) -> int:
    """Rows of one task: few enough that each worker gets several tasks, enough that starting a task costs little."""
    return min(_MAX_ROWS_PER_TASK, max(_MIN_ROWS_PER_TASK, math.ceil(rows / (4 * pool.first))))


def _decoded(table: pa.Table, size: int, resize: Any, rows_per_block: int, ledger: Any = None) -> Iterator[pa.Table]:
    """Manifest rows with the columns `_PIXELS` and `_ERROR`, for workers that do not decode themselves."""

    def decode(rows: pa.Table, sources: Sources = None) -> Iterator[pa.Table]:
        start = 0
        columns = rows.select(["id", "uri"])
        blocks = reading.decoded_blocks(columns, size, resize, rows_per_block, sources=sources, keep_unavailable=True)
        for block in blocks:
            count = len(block["id"])
            yield _with_pixels(rows.slice(start, count), block["image"], pa.array(block["error"], pa.string()))
            start += count

    def crashed(row: pa.Table) -> pa.Table:
        return _with_pixels(row, np.zeros((1, size, size, 3), np.uint8), pa.array([CRASHED]))

    yield from _isolate_crashes(table, decode, crashed, rows_per_block, ledger, "decode")


def _with_pixels(rows: pa.Table, images: Images, errors: pa.Array) -> pa.Table:
    kind, buffer = pa.binary(images[0].size), pa.py_buffer(np.ascontiguousarray(images))
    pixels = pa.FixedSizeBinaryArray.from_buffers(kind, len(images), [None, buffer])
    return rows.append_column(_PIXELS, pixels).append_column(_ERROR, errors)


def _isolate_crashes(
    table: pa.Table,
    process: Callable[[pa.Table, Sources], Iterator[pa.Table]],
    crashed: Callable[[pa.Table], pa.Table],
    rows_per_block: int,
    ledger: Any,
    stage: str,
) -> Iterator[pa.Table]:
    """Process the rows of a task; if the task has crashed its worker before, row by row, without the rows that crash.

    Both paths yield blocks of equal length, because Ray skips blocks by count when it retries a task.

    Args:
        table: the rows of the task.
        process: yields the output of rows, in blocks of `rows_per_block`. It takes the images from the iterator,
            or reads them itself if that is None.
        crashed: gives the output for a row that crashes its worker.
        rows_per_block: rows of each block; the last may have fewer.
        ledger: the ledger's actor, or None.
        stage: name of the work, which with the ids names the task in the ledger.
    """
    task = f"{stage} {table['id'][0]} to {table['id'][-1]}"
    if start_attempt(ledger, task) < MAX_CRASHES:
        yield from process(table, None)
    else:
        uris = table["uri"].to_pylist()
        sources = containers.encoded(uris)  # one iterator for all rows: each row group is read from its start
        for start in range(0, len(table), rows_per_block):
            outputs: list[pa.Table] = []
            for place in range(start, min(start + rows_per_block, len(table))):
                row = table.slice(place, 1)
                row_task = f"{stage} {row['id'][0]}"
                if start_attempt(ledger, row_task) < MAX_CRASHES:
                    outputs += process(row, sources)
                    finish_attempt(ledger, row_task)
                else:
                    outputs.append(crashed(row))
                    sources = containers.encoded(uris[place + 1 :])
            yield pa.concat_tables(outputs).combine_chunks()
    finish_attempt(ledger, task)


class Worker:
    """An actor of the pool: holds the network and adds predictions to rows."""

    def __init__(self, plan: Plan, model: str, ledger: Any = None) -> None:
        """
        Args:
            plan: the engine and the workers.
            model: value of the column `model`.
            ledger: the ledger's actor of the run, or None.

        Raises:
            BundleError: the bundle has changed since the plan was made, or this worker crashed each time it loaded
                the bundle.
        """
        loading = f"load {ray.get_runtime_context().get_actor_id()}" if ledger is not None else ""
        if start_attempt(ledger, loading) >= MAX_CRASHES:
            raise BundleError(
                f"A worker crashed {MAX_CRASHES} times while it loaded {plan.bundle.uri} for {plan.engine}: it may "
                "have too little memory."
            )
        if plan.engine == engines.KERAS:
            startup.load_tensorflow(gpus=plan.pool.gpus > 0)
        self._options, self._info, self._model, self._ledger = plan.options, plan.bundle.info, model, ledger
        self._predictor = Predictor(
            plan.bundle,
            engine=plan.engine,
            threads=plan.pool.threads,
            batch_size=plan.options.batch_size,
        )
        if engines.digest(plan.bundle, plan.engine) != plan.digest:
            raise BundleError(f"{plan.bundle.uri} was changed while the run was going on: run it again.")
        self._names = pa.array(self._info.class_names, pa.string())
        self._metrics = PredictionMetrics(plan.output)
        finish_attempt(ledger, loading)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield rows of a manifest, or of `_decoded`, with their predictions."""
        # Rows that come with pixels are one block.
        rows = len(table) if _PIXELS in table.column_names else stream.rows_per_block(self._info.image_size)
        yield from _isolate_crashes(table, self._predict, self._crashed_row, max(rows, 1), self._ledger, "predict")

    def _predict(self, table: pa.Table, sources: Sources = None) -> Iterator[pa.Table]:
        start, clock = 0, time.perf_counter()
        blocks = self._decoded_images(table) if _PIXELS in table.column_names else self._read_images(table, sources)
        for images, errors in blocks:
            rows = table.slice(start, len(errors))
            start += len(errors)
            read = time.perf_counter()
            predictions = self._with_predictions(rows, images, errors)
            self._metrics.add_seconds("read", read - clock)
            self._metrics.add_seconds("predict", time.perf_counter() - read)
            yield predictions
            clock = time.perf_counter()

    def _crashed_row(self, row: pa.Table) -> pa.Table:
        size = self._info.image_size
        return self._with_predictions(row, np.zeros((1, size, size, 3), np.uint8), [CRASHED])

    def _decoded_images(self, table: pa.Table) -> Iterator[tuple[Images, list[str]]]:
        """The images and errors in the rows of a decoding task, without a copy."""
        size = self._info.image_size
        pixels = table[_PIXELS].combine_chunks()
        pixels = pixels.chunk(0) if isinstance(pixels, pa.ChunkedArray) else pixels
        images = np.frombuffer(pixels.buffers()[1], np.uint8)[pixels.offset * size * size * 3 :]
        images = images[: len(table) * size * size * 3].reshape(len(table), size, size, 3)
        yield images, table[_ERROR].to_pylist()

    def _read_images(self, table: pa.Table, sources: Sources) -> Iterator[tuple[Images, list[str]]]:
        """Read and decode the images of manifest rows, in blocks of images and their errors."""
        size = self._info.image_size
        blocks = reading.decoded_blocks(
            table.select(["id", "uri"]),
            size,
            self._info.resize,
            stream.rows_per_block(size),
            sources=sources,
            keep_unavailable=True,
        )
        for block in reading.prefetched(blocks):
            yield block["image"], block["error"].tolist()

    def _with_predictions(self, rows: pa.Table, images: Images, errors: list[str]) -> pa.Table:
        """Append the columns of `COLUMNS`.

        Args:
            rows: N rows of the manifest.
            images: uint8 (N, size, size, 3).
            errors: why an image could not be decoded; empty where it could.
        """
        rows = rows.drop_columns([name for name in (_PIXELS, _ERROR) if name in rows.column_names])
        probabilities, embeddings, errors = self._classify(images, errors)
        good = np.asarray([not error for error in errors])
        # Index of each row in the predictions, which only good images have; null for the others.
        place = pa.array(np.cumsum(good) - 1, mask=~good)
        columns = {
            "status": pa.array(np.where(good, "ok", "error").tolist(), pa.string()),
            "error": pa.array([error or None for error in errors], pa.string()),
        }
        predictions = self._prediction_columns(probabilities, embeddings)
        columns |= {name: values.take(place) for name, values in predictions.items()}
        columns["model"] = pa.array([self._model] * len(rows), pa.string())
        for name in COLUMNS:
            if name in columns:
                rows = rows.append_column(name, columns[name])
        return rows

    def _classify(self, images: Images, errors: list[str]) -> tuple[Floats, Floats | None, list[str]]:
        """Run the network on the images that could be decoded.

        Args:
            images, errors: as in `_with_predictions`.

        Returns:
            the probabilities and, if the options ask for them, the embeddings of images with a prediction; and the
            errors, now also of images for which the network gives no probabilities.
        """
        decoded, embeddings = np.flatnonzero([not error for error in errors]), None
        if self._options.embeddings:
            probabilities, _, embeddings = self._predictor.all_outputs(images[decoded])
        else:
            probabilities = self._predictor.probabilities(images[decoded])
        if unusable := find_unusable(probabilities):
            errors = [*errors]
            for index, error in unusable.items():
                errors[decoded[index]] = str(error)
            usable = np.delete(np.arange(len(decoded)), list(unusable))
            probabilities, embeddings = probabilities[usable], None if embeddings is None else embeddings[usable]
        return probabilities, embeddings, errors

    def _prediction_columns(self, probabilities: Floats, embeddings: Floats | None) -> dict[str, pa.Array]:
        options = self._options
        order = rank_classes(probabilities, options.top_k)
        scores = np.take_along_axis(probabilities, order, 1)
        offsets = np.arange(0, order.size + 1, order.shape[1], dtype=np.int32)
        labels = self._names.take(pa.array(order.ravel()))
        columns = {
            "prediction": self._names.take(pa.array(order[:, 0])),
            "confidence": pa.array(scores[:, 0], pa.float32()),
            "top_k_labels": pa.ListArray.from_arrays(offsets, labels),
            "top_k_scores": pa.ListArray.from_arrays(offsets, pa.array(scores.ravel(), pa.float32())),
        }
        if options.probabilities:
            columns["probabilities"] = _fixed_size_lists(probabilities)
        if embeddings is not None:
            columns["embedding"] = _fixed_size_lists(embeddings)
        return columns


def _fixed_size_lists(values: npt.NDArray[np.float32]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), values.shape[1])
