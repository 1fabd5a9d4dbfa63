"""The output's files: each holds the rows of a fixed range of ids, and is there as a whole or not at all.

The manifest alone decides which ids a part holds, so that runs with other workers, or after a kill, write the same
parts; those that are there need not be made again.
"""

import csv
import io
import json
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from cnnray.errors import PermanentError
from cnnray.images import storage
from cnnray.prediction.config import Format

_NAME = re.compile(r"part-(\d{6,})\.(parquet|csv|jsonl)")
_READ_BACK = ("id", "uri", "status", "error", "prediction", "confidence")


class PartError(PermanentError, RuntimeError):
    """Rows that are not what they must be; the message is one sentence for the user."""


@dataclass(frozen=True)
class Parts:
    """Where a run's rows go."""

    folder: str
    format: Format
    ranges: list[tuple[int, int]]
    """Of each part the first row of the manifest that is in it, and the row after its last."""

    def uri(self, part: int) -> str:
        """Of a part's file."""
        return storage.join(self.folder, f"part-{part:06d}.{self.format}")

    def written(self) -> set[int]:
        """The parts that are there."""
        found = (_NAME.fullmatch(storage.name(uri)) for uri in files_of(self.folder))
        numbers = {int(match[1]) for match in found if match and match[2] == self.format}
        return {number for number in numbers if number < len(self.ranges)}

    def write(self, part: int, rows: pa.Table) -> None:
        """Write a part, whole or not at all."""
        storage.write_bytes(self.uri(part), _ENCODERS[self.format](rows))

    def read(self, part: int) -> pa.Table:
        """What the summary needs of a part: `id`, `uri`, `status`, `error`, `prediction`, `confidence`.

        Raises:
            PartError: the file is damaged.
        """
        data = storage.read_bytes(self.uri(part))
        try:
            return _DECODERS[self.format](data)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise PartError(
                f"{self.uri(part)} is damaged ({str(error).splitlines()[0]}): delete it, and run again."
            ) from None

    def problem(self, part: int, rows: pa.Table, ids: npt.NDArray[np.int64]) -> str:
        """What is wrong with the ids of a part's rows; an empty string where they are the manifest's.

        Args:
            part: which.
            rows: all of it.
            ids: of all rows of the manifest.
        """
        found, expected = rows["id"].to_numpy(), ids[slice(*self.ranges[part])]
        return "" if np.array_equal(found, expected) else _some_ids(found, expected)


def files_of(folder: str) -> list[str]:
    """All parts in a folder, of any format; not those of shards below it."""
    found = storage.files(folder) if storage.exists(folder) else []
    return [file.uri for file in found if _NAME.fullmatch(file.uri.removeprefix(storage.join(folder, "")))]


class Collector:
    """Gathers rows, which come in any order, into parts, and writes each part when it is whole."""

    def __init__(self, parts: Parts, ids: npt.NDArray[np.int64]) -> None:
        """
        Args:
            parts: where to.
            ids: of the manifest's rows, ascending.
        """
        self._parts, self._ids = parts, ids
        self._starts = np.asarray([start for start, _ in parts.ranges])
        self._held: dict[int, list[pa.Table]] = {}

    def add(self, rows: pa.Table) -> None:
        """Take some rows.

        Raises:
            PartError: a part that has as many rows as it should has other ids than it should.
            OSError: storage that cannot be written.
        """
        places = np.searchsorted(self._ids, rows["id"].to_numpy())
        owners = np.searchsorted(self._starts, places, side="right") - 1
        for part in np.unique(owners).tolist():
            self._held.setdefault(part, []).append(rows.filter(pa.array(owners == part)))
            start, stop = self._parts.ranges[part]
            if sum(map(len, self._held[part])) >= stop - start:
                self._write(part, pa.concat_tables(self._held.pop(part)).sort_by("id"))

    def _write(self, part: int, rows: pa.Table) -> None:
        if problem := self._parts.problem(part, rows, self._ids):
            raise PartError(f"Rows were lost or came twice on their way ({problem}); run the same command again.")
        self._parts.write(part, rows)


def _some_ids(found: npt.NDArray[np.int64], expected: npt.NDArray[np.int64]) -> str:
    """The ids that are missing, unexpected or there twice."""
    missing, unexpected = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    values, counts = np.unique(found, return_counts=True)
    kinds = {"missing": missing, "unexpected": unexpected, "more than once": values[counts > 1]}
    return (
        "; ".join(
            f"{kind} {', '.join(map(str, some[:10].tolist()))}{' ...' if len(some) > 10 else ''} ({len(some)})"
            for kind, some in kinds.items()
            if len(some)
        )
        or "another order"
    )


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer)
    return buffer.getvalue()


def _jsonl(rows: pa.Table) -> bytes:
    return "".join(f"{json.dumps(row, default=str)}\n" for row in rows.to_pylist()).encode()


def _csv(rows: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)  # which quotes line ends of the kind that it writes: \r and \n
    writer.writerow(rows.column_names)
    nested = [pa.types.is_nested(field.type) for field in rows.schema]
    for row in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        values = zip(row, nested, strict=True)
        writer.writerow([json.dumps(value) if lists and value is not None else value for value, lists in values])
    return text.getvalue().encode()


def _of_parquet(data: bytes) -> pa.Table:
    return pyarrow.parquet.read_table(pa.BufferReader(data), columns=list(_READ_BACK))


def _of_jsonl(data: bytes) -> pa.Table:
    rows = [json.loads(line) for line in data.splitlines()]
    return pa.Table.from_pylist([{name: row[name] for name in _READ_BACK} for row in rows], _SCHEMA)


def _of_csv(data: bytes) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(
        column_types={field.name: field.type for field in _SCHEMA}, include_columns=list(_READ_BACK),
        strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=False,
    )  # fmt: skip
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(pa.BufferReader(data), convert_options=options, parse_options=parsing)


_SCHEMA = pa.schema(
    [
        ("id", pa.int64()), ("uri", pa.string()), ("status", pa.string()), ("error", pa.string()),
        ("prediction", pa.string()), ("confidence", pa.float32()),
    ]
)  # fmt: skip
_ENCODERS = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl}
_DECODERS = {"parquet": _of_parquet, "csv": _of_csv, "jsonl": _of_jsonl}
