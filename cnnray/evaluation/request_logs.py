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

_COLUMNS = ["time", "request_id", "index", "version", "prediction", "confidence", "error"]


@dataclass
class Window:
    """What the log says of a span of time."""

    start: float
    """In seconds since 1970."""
    answers: Distribution
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    unknown: int = 0
    """Images whose label is no class of the network; they count as wrong."""
    files: list[str] = field(default_factory=list)
    """Files of the log that hold some of its rows."""


def read_log(
    place: str, bundle: Bundle, seconds: float, labels: pa.Table | None
) -> tuple[list[Window], dict[str, int]]:
    """Add up the answers of this bundle's version by window.

    Returns:
        The windows that have answers or errors, in order, and the number of images of each other version.

    Raises:
        EvaluationError: there are no answers of this version.
    """
    names = pa.array(bundle.info.class_names, pa.string())
    windows: dict[int, Window] = {}
    others: dict[str, int] = {}
    for uri in [file.uri for file in storage.files(place) if file.uri.endswith(".parquet")]:
        rows = _read_file(uri, _COLUMNS)
        for row in pc.value_counts(rows["version"]).to_pylist():
            if row["values"] != bundle.version:
                others[row["values"]] = others.get(row["values"], 0) + row["counts"]
        rows = rows.filter(pc.equal(rows["version"], bundle.version))
        numbers = (rows["time"].cast(pa.int64()).to_numpy() / 1000 // seconds).astype(np.int64)
        labelled = _labels_of(rows, labels) if labels is not None else pa.nulls(len(rows), pa.string())
        for number in np.unique(numbers):
            window = windows.setdefault(int(number), Window(float(number * seconds), Distribution.empty(len(names))))
            window.files.append(uri)
            mask = pa.array(numbers == number)
            _add(window, rows.filter(mask), labelled.filter(mask), names)
    if not windows:
        known = ", ".join(sorted(others)) or "none"
        raise EvaluationError(f"{place} holds no answers of {bundle.version} (versions with answers: {known}).")
    return [windows[number] for number in sorted(windows)], others


def _read_file(uri: str, columns: list[str]) -> pa.Table:
    """Columns of a file of the log.

    Raises:
        EvaluationError: it is none.
    """
    with storage.translated_errors(uri):
        filesystem, path = storage.arrow_filesystem(uri)
        try:
            return pyarrow.parquet.read_table(path, columns=columns, filesystem=filesystem, partitioning=None)
        except (pa.ArrowInvalid, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise EvaluationError(f"{uri} is no file of a request log: {reason}.") from None


def _add(window: Window, rows: pa.Table, labels: pa.Array, names: pa.Array) -> None:
    """Add rows, and their labels (null for none), to a window."""
    good = pc.is_null(rows["error"])
    window.errors += len(rows) - pc.sum(good).as_py() if len(rows) else 0
    rows, labels = rows.filter(good), labels.filter(good)
    answers = pc.index_in(rows["prediction"], names).to_numpy().astype(np.int64)
    window.answers += Distribution.of(answers, rows["confidence"].to_numpy(), len(names))
    is_labelled = pc.is_valid(labels)
    known, given = rows["prediction"].filter(is_labelled), labels.filter(is_labelled)
    window.labelled += len(given)
    window.correct += pc.sum(pc.equal(known, given)).as_py() or 0
    window.unknown += pc.sum(pc.invert(pc.is_in(given, names))).as_py() or 0


# -- labels that came later -----------------------------------------------------------------------------------


def read_labels(uri: str) -> pa.Table:
    """The labels by `key`: of the request, and of the image's place in it.

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
    except (pa.ArrowInvalid, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise EvaluationError(f"{uri} is no CSV, JSONL or Parquet table: {reason}.") from None
    if missing := {"request_id", "label"} - set(table.column_names):
        raise EvaluationError(
            f"{uri} lacks the column {' and '.join(sorted(missing))}: expected request_id, label, and index where "
            "requests have several images."
        )
    if "index" not in table.column_names:
        table = table.append_column("index", pa.array(np.zeros(len(table), np.int32)))
    keyed = pa.table({"key": _keys(table), "label": table["label"].cast(pa.string())})
    return keyed.take(pa.array(np.arange(len(keyed))[::-1]))  # of several labels, the last one is found first


def _labels_of(rows: pa.Table, labels: pa.Table) -> pa.ChunkedArray:
    """The label of each row; null where there is none."""
    return labels["label"].take(pc.index_in(_keys(rows), labels["key"].combine_chunks()))


def _keys(table: pa.Table) -> pa.ChunkedArray:
    index = pc.fill_null(table["index"], 0).cast(pa.int32()).cast(pa.string())
    return pc.binary_join_element_wise(table["request_id"].cast(pa.string()), index, " ")


def sample_images(bundle: Bundle, windows: list[Window], seconds: float, most: int) -> pa.Table:
    """Some images of each window, of those that the log keeps.

    Args:
        bundle: whose version has answered.
        windows: of so many seconds each.
        most: number of images of a window.

    Returns:
        `image`, the file, and `window`, its start.
    """
    random, tables = np.random.default_rng(0), []
    for window in windows:
        rows: list[pa.Table] = []
        for uri in random.permutation(window.files).tolist():
            table = _read_file(uri, ["time", "version", "error", "image"])
            end = window.start + seconds
            moments = table["time"].cast(pa.int64()).to_numpy() / 1000
            mask = (moments >= window.start) & (moments < end)
            table = table.filter(pa.array(mask)).filter(
                (pc.field("version") == bundle.version) & pc.field("error").is_null() & pc.field("image").is_valid()
            )
            rows.append(table.select(["image"]))
            if sum(map(len, rows)) >= most:
                break
        images = pa.concat_tables(rows).slice(0, most)
        tables.append(images.append_column("window", pa.array(np.full(len(images), window.start))))
    return pa.concat_tables(tables)
