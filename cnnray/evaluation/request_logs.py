"""The request log of a service, as `jobs/serve.py --log-requests` writes it, added up by windows of time."""

import io
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from cnnray.evaluation.comparison import EvaluationError
from cnnray.images import storage
from cnnray.models.bundle import Bundle
from cnnray.models.drift import Distribution

_MOST_FILES = 50
"""Files of a window from which images are sampled."""
_MOST_BYTES = 2**28
"""Size of the images of a window from which on no more are sampled."""
_COLUMNS = ["time", "request_id", "index", "version", "prediction", "confidence", "error"]


@dataclass
class Window:
    """What the log says of a span of time."""

    start: float
    """In seconds since 1970."""
    answers: Distribution
    errors: int = 0
    unsure: int = 0
    """Images without an error of which the bundle was unsure."""
    labelled: int = 0
    correct: int = 0
    """Labelled images whose most probable class is right."""
    labelled_answers: int = 0
    correct_answers: int = 0
    """The same of the images of which the bundle was not unsure."""
    unknown: int = 0
    """Images whose label is no class of the network; they count as wrong."""
    files: list[str] = field(default_factory=list)
    """Files of the log that keep images, and hold some of its rows."""


def read_log(
    place: str, bundle: Bundle, seconds: float, labels: dict[str, str] | None
) -> tuple[list[Window], dict[str, int]]:
    """Add up the answers of this bundle's version by window.

    Args:
        place: folder or s3:// prefix of the log.
        bundle: of the answers.
        seconds: length of a window.
        labels: see `read_labels`; None: there are none.

    Returns:
        The windows that have answers or errors, in order, and the number of images of each other version.

    Raises:
        EvaluationError: there are no answers of this version.
    """
    names = pa.array(bundle.info.class_names, pa.string())
    windows: dict[int, Window] = {}
    others: dict[str, int] = {}
    for uri in [file.uri for file in storage.files(place) if file.uri.endswith(".parquet")]:
        found = _read(uri, _COLUMNS)
        if found is None:
            continue
        rows, keeps_images = found
        for row in pc.value_counts(rows["version"]).to_pylist():
            if row["values"] != bundle.version:
                others[row["values"]] = others.get(row["values"], 0) + row["counts"]
        rows = rows.filter(pc.equal(rows["version"], bundle.version))
        numbers = (rows["time"].cast(pa.int64()).to_numpy() / 1000 // seconds).astype(np.int64)
        given = pa.nulls(len(rows), pa.string()) if labels is None else _labels_of(rows, labels)
        for number in np.unique(numbers):
            window = windows.setdefault(int(number), Window(float(number * seconds), Distribution.empty(len(names))))
            if keeps_images:
                window.files.append(uri)
            mask = pa.array(numbers == number)
            _add(window, rows.filter(mask), given.filter(mask), names)
    if not windows:
        known = ", ".join(sorted(others)) or "none"
        raise EvaluationError(f"{place} holds no answers of {bundle.version} (versions with answers: {known}).")
    return [windows[number] for number in sorted(windows)], others


def _read(uri: str, columns: list[str]) -> tuple[pa.Table, bool] | None:
    """Columns of a file of the log and `unsure`, and whether it keeps images; None if it was deleted meanwhile.

    Raises:
        EvaluationError: it is none.
    """
    try:
        with storage.translated_errors(uri):
            filesystem, path = storage.arrow_filesystem(uri)
            with pyarrow.parquet.ParquetFile(path, filesystem=filesystem) as file:
                if missing := {*_COLUMNS, "image"} - {*file.schema_arrow.names}:
                    raise EvaluationError(f"{uri} is no file of a request log: it has no column {min(missing)}.")
                known = [*columns, "unsure"] if "unsure" in file.schema_arrow.names else columns
                rows = file.read(known, use_threads=False)
                if known is columns:  # of bundles that answer for every image, or of an earlier version
                    rows = rows.append_column("unsure", pa.nulls(len(rows), pa.bool_()))
                return rows, _keeps_images(file.metadata)
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        reason = str(error).partition("\n")[0]
        raise EvaluationError(f"{uri} is no file of a request log: {reason}.") from None


def _keeps_images(metadata: pyarrow.parquet.FileMetaData) -> bool:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        statistics = group.column(group.num_columns - 1).statistics  # of the column image
        if statistics is None or statistics.null_count < group.num_rows:
            return True
    return False


def _add(window: Window, rows: pa.Table, labels: pa.Array, names: pa.Array) -> None:
    """Add rows, and their labels (null for none), to a window."""
    good = pc.is_null(rows["error"])
    window.errors += len(rows) - pc.sum(good).as_py() if len(rows) else 0
    rows, labels = rows.filter(good), labels.filter(good)
    answers = pc.index_in(rows["prediction"], names).to_numpy().astype(np.int64)
    unsure = pc.fill_null(rows["unsure"], False)
    window.unsure += pc.sum(unsure).as_py() or 0
    window.answers += Distribution.of(answers, rows["confidence"].to_numpy(), len(names))
    is_labelled = pc.is_valid(labels)
    given, is_answer = labels.filter(is_labelled), pc.invert(unsure.filter(is_labelled))
    correct = pc.equal(rows["prediction"].filter(is_labelled), given)
    window.labelled += len(given)
    window.correct += pc.sum(correct).as_py() or 0
    window.labelled_answers += pc.sum(is_answer).as_py() or 0
    window.correct_answers += pc.sum(pc.and_(correct, is_answer)).as_py() or 0
    window.unknown += pc.sum(pc.invert(pc.is_in(given, names))).as_py() or 0


# -- labels that came later -----------------------------------------------------------------------------------


def read_labels(uri: str) -> dict[str, str]:
    """Labels by `_keys`: of a request and the place of an image in it. Of several for an image, the last one counts.

    Raises:
        EvaluationError: the table cannot be read, or lacks a column.
        OSError: the storage cannot be read.
    """
    data = storage.read_bytes(uri)
    try:
        if uri.endswith(".parquet"):
            table = storage.parse_parquet(data)
        elif uri.endswith(".jsonl"):
            table = pyarrow.json.read_json(io.BytesIO(data))
        else:
            texts = dict.fromkeys(("request_id", "label"), pa.string())
            table = pyarrow.csv.read_csv(
                io.BytesIO(data), convert_options=pyarrow.csv.ConvertOptions(column_types=texts)
            )
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise EvaluationError(f"{uri} is no CSV, JSONL or Parquet table: {reason}.") from None
    if missing := {"request_id", "label"} - set(table.column_names):
        raise EvaluationError(
            f"{uri} lacks the column {' and '.join(sorted(missing))}: expected request_id, label, and index where "
            "requests have several images."
        )
    if "index" not in table.column_names:
        table = table.append_column("index", pa.nulls(len(table), pa.int32()))
    labels = table["label"].cast(pa.string()).to_pylist()
    try:
        keys = _keys(table).to_pylist()
    except pa.ArrowException as error:
        raise EvaluationError(f"{uri}: index must be whole numbers: {error}.") from None
    return {key: label for key, label in zip(keys, labels, strict=True) if key is not None and label}


def _labels_of(rows: pa.Table, labels: dict[str, str]) -> pa.Array:
    """The label of each row; null where there is none."""
    return pa.array([labels.get(key) for key in _keys(rows).to_pylist()], pa.string())


def _keys(table: pa.Table) -> pa.ChunkedArray:
    index = pc.fill_null(table["index"].cast(pa.int32()), 0).cast(pa.string())
    return pc.binary_join_element_wise(table["request_id"].cast(pa.string()), index, " ")


def sample_images(window: Window, bundle: Bundle, seconds: float, most: int) -> pa.Table | None:
    """Some images of a window, of those that the log keeps, from many of its files.

    Args:
        window: of so many seconds.
        bundle: whose version has answered.
        most: number of images.

    Returns:
        A column `image`, the files as they were sent; None where there are none.
    """
    random, tables = np.random.default_rng(0), []
    uris = random.permutation(window.files)[:_MOST_FILES].tolist()
    for uri in uris:
        found = _read(uri, ["time", "version", "error", "image"])
        if found is None:
            continue
        table, _ = found
        moments = table["time"].cast(pa.int64()).to_numpy() / 1000
        table = table.filter(pa.array((moments >= window.start) & (moments < window.start + seconds))).filter(
            (pc.field("version") == bundle.version) & pc.field("error").is_null() & pc.field("image").is_valid()
        )
        # Twice as many as each would give if all had as many: some have less.
        some = random.permutation(len(table))[: -(-2 * most // len(uris))]
        tables.append(table.select(["image"]).take(some))
        if sum(table.nbytes for table in tables) > _MOST_BYTES:
            break
    if not sum(map(len, tables)):
        return None
    together = pa.concat_tables(tables)
    return together.take(random.permutation(len(together))[:most])
