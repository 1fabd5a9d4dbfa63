"""Classifies rows of a manifest in one process: an actor of the pool, or the job itself.

Output rows come in the order of the input. A row has the manifest's columns and

- `status`: `ok`, `unsure` or `error`; and `error`: null, or why there is no prediction (a reason of `decode.BadImage`
  or `reading.UNAVAILABLE`, a colon and details);
- `prediction`, `confidence`, `top_k_labels`, `top_k_scores`: null for errors; `prediction` also where the bundle is
  unsure;
- `labels` and `scores`, of a bundle with several labels: those that the image has, most probable first, and their
  probabilities; null for errors. `prediction` is the first of them, or null, and `confidence` the highest probability
  of all classes;
- `candidates`, of a bundle that may be unsure: a list of classes where it is, else null;
- `group`, of such a bundle with groups of classes: where it is unsure of the class and not of its group, that group;
- `model`: `Bundle.version` of the network;
- `probabilities`, `embedding`: float32 lists of fixed size, if the options ask for them; null for errors.
"""

import threading
import time
from collections.abc import Iterator, Sequence, Set

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cnnray.images import containers, reading
from cnnray.images.geometry import Geometry
from cnnray.images.ranges import rows_per_block
from cnnray.models import engines, startup
from cnnray.models.answers import find_labels, find_unusable, rank_classes
from cnnray.models.bundle import BundleError
from cnnray.models.predictor import Predictor
from cnnray.prediction.plan import Plan
from cnnray.tracking.prometheus import PredictionMetrics

COLUMNS = (
    "status", "error", "prediction", "confidence", "labels", "scores", "top_k_labels", "top_k_scores", "candidates",
    "group", "model", "probabilities", "embedding",
)  # fmt: skip
"""The columns that predictions add, in their order."""
_OF_SOME = frozenset({"labels", "scores", "candidates", "group"})
"""Those that predictions of some bundles add."""
RESERVED = frozenset(COLUMNS) - _OF_SOME
"""The others."""
_PIXELS, _ERROR = "__pixels", "__error"
"""Columns that decoding tasks add for workers: the pixels of an image, and its error, empty where it was decoded."""

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Sources = Iterator[containers.Source] | None


def select_columns(manifest: pa.Table) -> pa.Table:
    """The manifest with the columns that are copied to the output: without an empty `label` or `split`."""
    optional = [name for name in ("label", "split") if name in manifest.column_names]
    return rename_reserved(
        manifest.drop_columns([name for name in optional if manifest[name].null_count == len(manifest)])
    )


def rename_reserved(rows: pa.Table, reserved: Set[str] = RESERVED) -> pa.Table:
    """The rows with their columns of reserved names renamed to `original_NAME`."""
    names = set(rows.column_names)
    for name in names & reserved:
        renamed = f"original_{name}"
        while renamed in names:
            renamed = f"original_{renamed}"
        names.add(renamed)
        rows = rows.rename_columns({name: renamed})
    return rows


def decode_rows(rows: pa.Table, geometry: Geometry) -> pa.Table:
    """Rows of a manifest, one block, with the columns `_PIXELS` and `_ERROR`: for workers that do not decode."""
    columns = rows.select(["id", "uri"])
    (block,) = reading.decoded_blocks(columns, geometry, len(rows), keep_unavailable=True)
    kind, buffer = pa.binary(geometry.image_size.bytes), pa.py_buffer(block["image"])
    pixels = pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, buffer])
    return rows.append_column(_PIXELS, pixels).append_column(_ERROR, pa.array(block["error"], pa.string()))


class Worker:
    """Holds the network and adds predictions to rows.

    Attributes:
        decode_rows: what decoding tasks run.
    """

    decode_rows = staticmethod(decode_rows)

    def __init__(self, plan: Plan) -> None:
        """
        Args:
            plan: the engine and the workers.

        Raises:
            BundleError: the bundle has changed since the plan was made.
        """
        if plan.engine in engines.KERAS_POLICIES:
            startup.load_tensorflow(gpus=plan.pool.gpus > 0)
        self._options, self._info, self._model = plan.options, plan.bundle.info, plan.bundle.version
        self._rules = plan.rules
        self._predictor = Predictor(
            plan.bundle,
            engine=plan.engine,
            threads=plan.pool.threads,
            batch_size=plan.options.batch_size,
            withholds=False,
        )
        if engines.digest(plan.bundle, plan.engine) != plan.digest:
            raise BundleError(f"{plan.bundle.uri} was changed while the run was going on: run it again.")
        self._predicting = threading.Lock()  # engines take one call at a time
        self._names = pa.array(self._info.class_names, pa.string())
        self._threads = plan.pool.threads
        self._metrics = None if plan.in_process else PredictionMetrics(plan.output)

    def __call__(self, rows: pa.Table, sources: Sources = None) -> Iterator[pa.Table]:
        """Classify rows of a manifest, or of `decode_rows`.

        Args:
            rows: with `id` and `uri`.
            sources: the images; None: those of the rows' uris.

        Yields:
            the rows with their predictions, a block at a time.
        """
        start, clock = 0, time.perf_counter()
        blocks = self._decoded_images(rows) if _PIXELS in rows.column_names else self._read_images(rows, sources)
        for images, errors in blocks:
            part = rows.slice(start, len(errors))
            start += len(errors)
            read = time.perf_counter()
            predictions = self._with_predictions(part, images, errors)
            if self._metrics:
                self._metrics.add_seconds("read", read - clock)
                self._metrics.add_seconds("predict", time.perf_counter() - read)
            yield predictions
            clock = time.perf_counter()

    def without_image(self, rows: pa.Table, error: str) -> pa.Table:
        """Rows whose images have all the same error."""
        images = np.zeros((len(rows), *self._info.geometry.image_size.shape), np.uint8)
        return self._with_predictions(rows, images, [error] * len(rows))

    def _decoded_images(self, table: pa.Table) -> Iterator[tuple[Images, list[str]]]:
        """The images and errors in the rows of a decoding task, without a copy."""
        size = self._info.geometry.image_size
        pixels = table[_PIXELS].combine_chunks()
        pixels = pixels.chunk(0) if isinstance(pixels, pa.ChunkedArray) else pixels
        images = np.frombuffer(pixels.buffers()[1], np.uint8)[pixels.offset * size.bytes :]
        images = images[: len(table) * size.bytes].reshape(len(table), *size.shape)
        yield images, table[_ERROR].to_pylist()

    def _read_images(self, table: pa.Table, sources: Sources) -> Iterator[tuple[Images, list[str]]]:
        """Read and decode the images of manifest rows, in blocks of images and their errors."""
        geometry = self._info.geometry
        blocks = reading.decoded_blocks(
            table.select(["id", "uri"]),
            geometry,
            rows_per_block(geometry.image_size),
            threads=max(reading.threads_for(table["uri"][0].as_py()), self._threads),
            sources=sources,
            keep_unavailable=True,
        )
        for block in reading.prefetched(blocks):
            yield block["image"], block["error"].tolist()

    def _with_predictions(self, rows: pa.Table, images: Images, errors: list[str]) -> pa.Table:
        """Append the columns of `COLUMNS`.

        Args:
            rows: N rows of the manifest.
            images: uint8 (N, height, width, 3).
            errors: why an image could not be decoded; empty where it could.
        """
        rows = rows.drop_columns([name for name in (_PIXELS, _ERROR) if name in rows.column_names])
        probabilities, embeddings, errors = self._classify(images, errors)
        good = np.asarray([not error for error in errors])
        # Index of each row in the predictions, which only good images have; null for the others.
        place = pa.array(np.cumsum(good) - 1, mask=~good)
        columns = {"error": pa.array([error or None for error in errors], pa.string())}
        predictions = self._prediction_columns(probabilities, embeddings)
        columns |= {name: values.take(place) for name, values in predictions.items()}
        columns["status"] = columns["status"].fill_null("error")
        rows = rename_reserved(rows, _OF_SOME & columns.keys())
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
        with self._predicting:
            if self._options.embeddings:
                probabilities, _, embeddings = self._predictor.all_outputs(images[decoded])
            else:
                probabilities = self._predictor.probabilities(images[decoded])
        if unusable := find_unusable(probabilities, multi_label=self._rules.multi_label):
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
        unsure = self._rules.is_unsure(probabilities)
        columns = {
            "status": pa.array(np.where(unsure, "unsure", "ok").tolist(), pa.string()),
            "prediction": self._names.take(pa.array(order[:, 0], mask=unsure)),
            "confidence": pa.array(scores[:, 0], pa.float32()),
            "top_k_labels": pa.ListArray.from_arrays(offsets, labels),
            "top_k_scores": pa.ListArray.from_arrays(offsets, pa.array(scores.ravel(), pa.float32())),
        }
        if self._rules.label_thresholds is not None:
            columns |= self._label_columns(probabilities, self._rules.label_thresholds)
        if self._rules.threshold:
            columns["candidates"] = pa.array(
                [self._candidates(row) if no else None for row, no in zip(probabilities, unsure, strict=True)],
                pa.list_(pa.string()),
            )
        if self._rules.groups:
            places = np.full(len(unsure), -1)
            places[unsure] = [
                -1 if group is None else group for group in self._rules.find_groups(probabilities[unsure])
            ]
            names = pa.array(self._rules.groups.names, pa.string())
            columns["group"] = names.take(pa.array(places, mask=places < 0))
        if options.probabilities:
            columns["probabilities"] = _fixed_size_lists(probabilities)
        if embeddings is not None:
            columns["embedding"] = _fixed_size_lists(embeddings)
        return columns

    def _label_columns(self, probabilities: Floats, thresholds: Sequence[float]) -> dict[str, pa.Array]:
        found = find_labels(probabilities, thresholds)
        counts = np.asarray([len(labels) for labels in found], np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        flat = np.concatenate([*found, np.zeros(0, np.int64)])
        scores = probabilities[np.repeat(np.arange(len(found)), counts), flat]
        first = np.asarray([labels[0] if len(labels) else 0 for labels in found], np.int64)
        return {
            "prediction": self._names.take(pa.array(first, mask=counts == 0)),
            "labels": pa.ListArray.from_arrays(offsets, self._names.take(pa.array(flat))),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores, pa.float32())),
        }

    def _candidates(self, row: Floats) -> list[str]:
        assert self._rules.threshold
        return [self._info.class_names[index] for index in self._rules.threshold.candidates(row)]


def _fixed_size_lists(values: npt.NDArray[np.float32]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), values.shape[1])
