"""Counts over rows, which add up from ranges to a run, and the lists of rows without a prediction."""

import contextlib
import csv
import functools
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from cnnray.images import ahead, labels, storage
from cnnray.images.retries import patient

_ERROR_COLUMNS = ("id", "uri", "error")
_EXAMPLES = 3
"""Images listed for each error reason."""
MAX_LISTED = 1_000_000
"""Rows of a run's list of errors at most."""
_THREADS = 16


@dataclass
class Tally:
    """Counts over rows. Those of several ranges add up."""

    threshold: float
    """Confidence below which predictions are counted in `below_threshold`."""
    rows: int = 0
    below_threshold: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    """Predictions by class name; with several labels, the images that have each."""
    unsure: Counter[str] = field(default_factory=Counter)
    """Images of which the bundle is unsure, by their most probable class; empty text: unknown."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Errors by reason."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The first rows of each error reason: `id`, `uri` and `error`."""

    @classmethod
    def of(cls, rows: pa.Table, threshold: float, *, multi_label: bool = False) -> "Tally":
        """Count rows that have at least `id`, `uri`, `error`, `prediction` and `confidence`, or, with several labels,
        `id`, `uri`, `error` and `labels`."""
        tally = cls(threshold, rows=len(rows))
        good = rows.filter(pc.is_null(rows["error"]))
        for row in error_rows(rows).to_pylist():
            reason = row["error"].partition(":")[0]
            tally.reasons[reason] += 1
            if len(tally.examples.setdefault(reason, [])) < _EXAMPLES:
                tally.examples[reason].append(row)
        if multi_label:
            tally.classes.update(labels.count(good["labels"]))
            return tally
        unsure = good.filter(pc.is_null(good["prediction"]))
        if "top_k_labels" in rows.column_names:
            tally.unsure.update(pc.list_element(unsure["top_k_labels"], 0).to_pylist())
        elif len(unsure):
            tally.unsure[""] = len(unsure)
        predicted = good.filter(pc.is_valid(good["prediction"]))
        tally.below_threshold = pc.sum(pc.less(predicted["confidence"], threshold)).as_py() or 0
        for item in pc.value_counts(predicted["prediction"]).to_pylist():
            tally.classes[item["values"]] = item["counts"]
        return tally

    @classmethod
    def from_json(cls, text: str | bytes) -> "Tally":
        """Read what `as_json` gave."""
        values: Mapping[str, Any] = json.loads(text)
        counters = {name: Counter(values.get(name, {})) for name in ("classes", "unsure", "reasons")}
        return cls(**{**values, **counters})

    def as_json(self) -> bytes:
        """All counts, for a part's footer."""
        return json.dumps(vars(self)).encode()

    def add(self, other: "Tally") -> None:
        """Add the counts of other rows."""
        self.rows += other.rows
        self.below_threshold += other.below_threshold
        self.classes += other.classes
        self.unsure += other.unsure
        self.reasons += other.reasons
        for reason, rows in other.examples.items():
            # Ranges end in any order; the same run names the same examples.
            both = sorted([*self.examples.get(reason, []), *rows], key=lambda row: row["id"])
            self.examples[reason] = both[:_EXAMPLES]

    @property
    def errors(self) -> int:
        """Number of rows with an error."""
        return self.reasons.total()

    @property
    def most_probable(self) -> Counter[str] | None:
        """Images without an error by their most probable class; None: that of images without an answer is unknown."""
        return None if self.unsure[""] else self.classes + self.unsure

    @property
    def ok(self) -> int:
        """Number of rows with a prediction."""
        return self.rows - self.errors - self.unsure.total()


def error_rows(rows: pa.Table) -> pa.Table:
    """The rows that have an error, with the columns `id`, `uri` and `error`."""
    return rows.filter(pc.is_valid(rows["error"])).select(list(_ERROR_COLUMNS))


@patient
def write_errors(uri: str, errors: pa.Table) -> None:
    """Write rows of `error_rows` as CSV, with a header."""
    storage.write_bytes(uri, _as_csv(errors, header=True))


def join_errors(folder: str, names: Iterable[str], uri: str) -> None:
    """Write the rows of files of `write_errors` as one file, in the order of the names.

    The first `MAX_LISTED` rows are taken: a run of a billion images may have more errors than one file should hold.
    """
    rows, text = 0, [_as_csv(pa.table({name: [] for name in _ERROR_COLUMNS}), header=True)]
    with contextlib.closing(ahead.mapped(functools.partial(_read_errors, folder), names, _THREADS)) as tables:
        for table in tables:
            text.append(_as_csv(table.slice(0, MAX_LISTED - rows), header=False))
            rows += len(table)
            if rows >= MAX_LISTED:
                break
    storage.write_bytes(uri, b"".join(text))


@patient
def _read_errors(folder: str, name: str) -> pa.Table:
    return pyarrow.csv.read_csv(
        pa.BufferReader(storage.read_bytes(storage.join(folder, name))),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(("uri", "error"), pa.string())),
    )


def _as_csv(rows: pa.Table, *, header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(_ERROR_COLUMNS)
    writer.writerows(zip(*(column.to_pylist() for column in rows.columns), strict=True))
    return text.getvalue().encode()
