"""Rows of a manifest to rows of predictions, with Ray Data on a pool of workers.

The rows come in any order. A row has the manifest's columns and

- `status`: `ok` or `error`, and `error`: why there is no prediction (a reason of `decode.BadImage`, and what was
  found), else null;
- `prediction`, `confidence`, `top_k_labels`, `top_k_scores`: null where there is none;
- `model`: `Bundle.version` of the network;
- `probabilities`, `embedding`: float32 lists of fixed size, where they were asked for.
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

from cnnray import cluster
from cnnray.cluster import Resources
from cnnray.images import containers, reading, stream
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.predictor import Predictor, rank_classes
from cnnray.prediction import ledger
from cnnray.prediction.config import PredictConfig, PredictOptions
from cnnray.prediction.pool import Pool, pool_of
from cnnray.tracking.prometheus import PredictionMetrics

COLUMNS = (
    "status", "error", "prediction", "confidence", "top_k_labels", "top_k_scores", "model", "probabilities",
    "embedding",
)  # fmt: skip
_PIXELS, _ERROR = "__pixels", "__error"
CRASHED = "crashed: the worker ended each time that it was given this image"
_FEWEST_ROWS_PER_TASK, _MOST_ROWS_PER_TASK = 32, 512

Images = npt.NDArray[np.uint8]
Sources = Iterator[containers.Source] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What runs where."""

    bundle: Bundle
    engine: str
    options: PredictOptions
    pool: Pool
    digest: str
    """Of the file that the engine runs (`engines.digest`): no worker may run another."""
    output: str = ""
    """Where the rows are written, by which the run is known; empty where they are not."""


def plan(bundle: Bundle, options: PredictOptions, found: Resources, engine: str | None = None) -> Plan:
    """Choose the engine, where none is given, and share out the cluster.

    Raises:
        BundleError: the bundle was not exported to the engine.
        ClusterError: the cluster has too little.
    """
    if engine is None:
        gpus = found.gpus >= 1 and options.gpus_per_worker != 0
        engine = engine_of(bundle, options, gpus=gpus)
    pool = pool_of(options, engine, found)
    return Plan(
        bundle=bundle,
        engine=engine,
        options=options,
        pool=pool,
        digest=engines.digest(bundle, engine),
        output=options.folder if isinstance(options, PredictConfig) else "",
    )


def plan_when_it_fits(bundle: Bundle, options: PredictOptions, engine: str | None = None) -> Plan:
    """`plan` on the cluster that this process is connected to, for which it may wait.

    Raises:
        BundleError, ClusterError: see `plan`.
    """
    worker = {"CPU": options.cpus_per_worker or 1.0, "GPU": options.gpus_per_worker or 0.0}
    return cluster.when_it_fits(
        lambda found: plan(bundle, options, found, engine),
        [worker] * (options.max_workers or options.min_workers or 1),
        options.wait_minutes,
    )


def engine_of(bundle: Bundle, options: PredictOptions, *, gpus: bool) -> str:
    """The engine that is meant: `auto` is the fastest proven one, or that which has embeddings.

    Raises:
        BundleError: the bundle was not exported to it.
    """
    if options.engine == "auto":
        if options.embeddings:
            return engines.KERAS
        return engines.choose(bundle, gpus=gpus, batch_size=options.batch_size)
    engines.check_exported(bundle, options.engine)
    return options.engine


def passed_through(manifest: pa.Table) -> pa.Table:
    """A manifest without label and split where no image has one, and with columns that have the name of one of ours
    renamed to `original_NAME`."""
    has = [name for name in ("label", "split") if name in manifest.column_names]
    manifest = manifest.drop_columns([name for name in has if manifest[name].null_count == len(manifest)])
    names = set(manifest.column_names)
    for name in names & set(COLUMNS):
        renamed = f"original_{name}"
        while renamed in names:
            renamed = f"original_{renamed}"
        names.add(renamed)
        manifest = manifest.rename_columns({name: renamed})
    return manifest


def predicted(manifest: pa.Table, planned: Plan, tasks: list[tuple[int, int]] | None = None) -> ray.data.Dataset:
    """A dataset of one row for each row of a manifest.

    Args:
        manifest: with `id` and `uri`, in the order that images are read in.
        planned: what runs where.
        tasks: the first row of each task and that after its last; None: all rows, shared out evenly.
    """
    size, resize, pool = planned.bundle.info.image_size, planned.bundle.info.resize, planned.pool
    if tasks is None:
        tasks = stream.pieces(manifest["uri"].to_pylist(), rows_per_task(len(manifest), pool))
    dataset, book = stream.tasks(manifest, tasks), ledger.start()
    if pool.decode_cpus:
        dataset = dataset.map_batches(
            _decoded,
            fn_kwargs={"size": size, "resize": resize, "rows": stream.rows_per_block(size), "book": book},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=pool.decode_cpus,
            zero_copy_batch=True,
        )
    return dataset.map_batches(
        Worker,
        fn_constructor_kwargs={"planned": planned, "model": planned.bundle.version, "book": book},
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
    """So many that each worker has several tasks, and a task's start costs little."""
    return min(_MOST_ROWS_PER_TASK, max(_FEWEST_ROWS_PER_TASK, math.ceil(rows / (4 * pool.first))))


def _decoded(table: pa.Table, size: int, resize: Any, rows: int, book: Any = None) -> Iterator[pa.Table]:
    """The rows with their pixels, where workers are given these."""

    def decoded(some: pa.Table, sources: Sources = None) -> Iterator[pa.Table]:
        start = 0
        for block in reading.decoded_blocks(some.select(["id", "uri"]), size, resize, rows, sources=sources):
            count = len(block["id"])
            yield _with_pixels(some.slice(start, count), block["image"], pa.array(block["error"], pa.string()))
            start += count

    def crashed(row: pa.Table) -> pa.Table:
        return _with_pixels(row, np.zeros((1, size, size, 3), np.uint8), pa.array([CRASHED]))

    yield from _carefully(table, decoded, crashed, rows, book, "decode")


def _with_pixels(rows: pa.Table, images: Images, errors: pa.Array) -> pa.Table:
    kind, buffer = pa.binary(images[0].size), pa.py_buffer(np.ascontiguousarray(images))
    pixels = pa.FixedSizeBinaryArray.from_buffers(kind, len(images), [None, buffer])
    return rows.append_column(_PIXELS, pixels).append_column(_ERROR, errors)


def _carefully(
    table: pa.Table,
    work: Callable[[pa.Table, Sources], Iterator[pa.Table]],
    crashed: Callable[[pa.Table], pa.Table],
    rows: int,
    book: Any,
    name: str,
) -> Iterator[pa.Table]:
    """Do some work on rows; where it has ended its process again and again, on each row alone, and then no more on
    those that do so.

    The tables that come are of the same numbers of rows both ways, which is `rows`: Ray knows what it has already of
    a task that it runs again by counting.
    """
    task = f"{name} {table['id'][0]} to {table['id'][-1]}"
    if ledger.begin(book, task) < ledger.TRIES:
        yield from work(table, None)
    else:
        uris = table["uri"].to_pylist()
        sources = containers.encoded(uris)  # of all rows together, as each row group is read from its start
        for start in range(0, len(table), rows):
            found: list[pa.Table] = []
            for place in range(start, min(start + rows, len(table))):
                row = table.slice(place, 1)
                alone = f"{name} {row['id'][0]}"
                if ledger.begin(book, alone) < ledger.TRIES:
                    found += work(row, sources)
                    ledger.end(book, alone)
                else:
                    found.append(crashed(row))
                    sources = containers.encoded(uris[place + 1 :])
            yield pa.concat_tables(found).combine_chunks()
    ledger.end(book, task)


class Worker:
    """An actor of the pool: holds the network, and gives rows their predictions."""

    def __init__(self, planned: Plan, model: str, book: Any = None) -> None:
        """
        Args:
            planned: what runs where.
            model: what rows name the network.
            book: the run's ledger, an actor, where there is one.

        Raises:
            BundleError: the bundle is not the planned one any more, or this worker ended each time that it loaded it.
        """
        loading = f"load {ray.get_runtime_context().get_actor_id()}" if book is not None else ""
        if ledger.begin(book, loading) >= ledger.TRIES:
            raise BundleError(
                f"A worker ended {ledger.TRIES} times while it loaded {planned.bundle.uri} for {planned.engine}: it "
                "may have too little memory."
            )
        if planned.engine == engines.KERAS:
            startup.load_tensorflow(gpus=planned.pool.gpus > 0)
        self._options, self._info, self._model, self._book = planned.options, planned.bundle.info, model, book
        self._predictor = Predictor(
            planned.bundle,
            engine=planned.engine,
            threads=planned.pool.threads,
            batch_size=planned.options.batch_size,
        )
        if engines.digest(planned.bundle, planned.engine) != planned.digest:
            raise BundleError(f"{planned.bundle.uri} was changed while the run was going on: run it again.")
        self._names = pa.array(self._info.class_names, pa.string())
        self._meter = PredictionMetrics(planned.output)
        ledger.end(book, loading)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Rows of a manifest, or of `_decoded`, with their predictions."""
        # Pixels that are given come in one table.
        rows = len(table) if _PIXELS in table.column_names else stream.rows_per_block(self._info.image_size)
        yield from _carefully(table, self._answered, self._crashed, max(rows, 1), self._book, "predict")

    def _answered(self, table: pa.Table, sources: Sources = None) -> Iterator[pa.Table]:
        start, clock = 0, time.perf_counter()
        blocks = self._given(table) if _PIXELS in table.column_names else self._read(table, sources)
        for images, errors in blocks:
            rows = table.slice(start, len(errors))
            start += len(errors)
            read = time.perf_counter()
            answered = self._with_answers(rows, images, errors)
            self._meter.took("read", read - clock)
            self._meter.took("predict", time.perf_counter() - read)
            yield answered
            clock = time.perf_counter()

    def _crashed(self, row: pa.Table) -> pa.Table:
        size = self._info.image_size
        return self._with_answers(row, np.zeros((1, size, size, 3), np.uint8), [CRASHED])

    def _given(self, table: pa.Table) -> Iterator[tuple[Images, list[str]]]:
        size = self._info.image_size
        pixels = table[_PIXELS].combine_chunks()
        pixels = pixels.chunk(0) if isinstance(pixels, pa.ChunkedArray) else pixels
        images = np.frombuffer(pixels.buffers()[1], np.uint8)[pixels.offset * size * size * 3 :]
        images = images[: len(table) * size * size * 3].reshape(len(table), size, size, 3)
        yield images, table[_ERROR].to_pylist()

    def _read(self, table: pa.Table, sources: Sources) -> Iterator[tuple[Images, list[str]]]:
        size = self._info.image_size
        blocks = reading.decoded_blocks(
            table.select(["id", "uri"]), size, self._info.resize, stream.rows_per_block(size), sources=sources
        )
        for block in reading.ahead(blocks):
            yield block["image"], block["error"].tolist()

    def _with_answers(self, rows: pa.Table, images: Images, errors: list[str]) -> pa.Table:
        rows = rows.drop_columns([name for name in (_PIXELS, _ERROR) if name in rows.column_names])
        good = np.asarray([not error for error in errors])
        # Where each row finds its answer among those of the good images; null where it has none.
        place = pa.array(np.cumsum(good) - 1, mask=~good)
        columns = {
            "status": pa.array(np.where(good, "ok", "error").tolist(), pa.string()),
            "error": pa.array([error or None for error in errors], pa.string()),
        }
        columns |= {name: values.take(place) for name, values in self._columns(images[good]).items()}
        columns["model"] = pa.array([self._model] * len(rows), pa.string())
        for name in COLUMNS:
            if name in columns:
                rows = rows.append_column(name, columns[name])
        return rows

    def _columns(self, images: Images) -> dict[str, pa.Array]:
        options, embeddings = self._options, None
        if options.embeddings:
            probabilities, _, embeddings = self._predictor.all_outputs(images)
        else:
            probabilities = self._predictor.probabilities(images)
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
            columns["probabilities"] = _lists(probabilities)
        if embeddings is not None:
            columns["embedding"] = _lists(embeddings)
        return columns


def _lists(values: npt.NDArray[np.float32]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), values.shape[1])
