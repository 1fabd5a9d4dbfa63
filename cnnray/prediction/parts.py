"""The part files of a run's output. Each holds the rows of one row range of the manifest and is written atomically.

The manifest alone determines the row ranges. A run with other workers, or one that resumes after a kill, therefore
writes the same parts and need not repeat those that exist.

A part whose images could not all be read, because storage was in trouble, is written as `part-NNNNNN-incomplete` with
the rows that there are. The next run classifies all of its images again.
"""

import csv
import io
import json
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from cnnray.errors import PermanentError
from cnnray.images import reading, storage
from cnnray.prediction.config import Format

_NAME = re.compile(r"part-(\d{6,})(-incomplete)?\.(parquet|csv|jsonl)")
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()), ("uri", pa.string()), ("status", pa.string()), ("error", pa.string()),
        ("prediction", pa.string()), ("confidence", pa.float32()),
    ]
)  # fmt: skip
"""The columns that `Parts.read` returns."""


class PartError(PermanentError, RuntimeError):
    """Lost, repeated or damaged rows; the message is one sentence for the user."""


@dataclass(frozen=True)
class Parts:
    """The part files of one run, numbered from 0."""

    folder: str
    format: Format
    ranges: list[tuple[int, int]]
    """Row range of each part: its first row in the manifest, and the row after its last."""

    def uri(self, part: int) -> str:
        """The path or s3:// address of a part's file."""
        return storage.join(self.folder, f"part-{part:06d}.{self.format}")

    def written(self) -> set[int]:
        """The parts whose files exist and are complete."""
        matches = (_NAME.fullmatch(storage.name(uri)) for uri in list_part_files(self.folder))
        numbers = {int(match[1]) for match in matches if match and not match[2] and match[3] == self.format}
        return {number for number in numbers if number < len(self.ranges)}

    def incomplete_files(self) -> list[str]:
        """The uris of the incomplete parts."""
        return [uri for uri in list_part_files(self.folder) if "-incomplete." in storage.name(uri)]

    def row_count(self, parts: set[int]) -> int:
        """Rows of the manifest that these parts hold together."""
        return sum(stop - start for part, (start, stop) in enumerate(self.ranges) if part in parts)

    def write(self, part: int, rows: pa.Table) -> None:
        """Write a part atomically, under the name of an incomplete one if rows are missing."""
        start, stop = self.ranges[part]
        name, suffix = self.uri(part).rsplit(".", 1)
        uri = f"{name}.{suffix}" if len(rows) == stop - start else f"{name}-incomplete.{suffix}"
        storage.write_bytes(uri, _ENCODERS[self.format](rows))

    def read(self, part: int) -> pa.Table:
        """Read the columns of a part that the summary needs: `id`, `uri`, `status`, `error`, `prediction` and
        `confidence`.

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
        """Compare the ids of a part with the manifest.

        Args:
            part: number of the part.
            rows: all rows of the part.
            ids: int64 (N,), the ids of all rows of the manifest.

        Returns:
            the ids that differ, for a message; empty where none do.
        """
        part_ids, expected = rows["id"].to_numpy(), ids[slice(*self.ranges[part])]
        return "" if np.array_equal(part_ids, expected) else _describe_difference(part_ids, expected)


def list_part_files(folder: str) -> list[str]:
    """The uris of all parts in a folder, of any format, without those of shards below it."""
    files = storage.files(folder) if storage.exists(folder) else []
    return [file.uri for file in files if _NAME.fullmatch(file.uri.removeprefix(storage.join(folder, "")))]


class Collector:
    """Gathers rows that arrive in any order, and writes each part when all of its rows have arrived."""

    def __init__(self, parts: Parts, ids: npt.NDArray[np.int64], *, leave_out: bool = True) -> None:
        """
        Args:
            parts: the parts to write.
            ids: int64 (N,), the ids of the manifest's rows, ascending.
            leave_out: whether parts are written without the rows whose error says that storage was in trouble.
        """
        self._parts, self._ids, self._leave_out = parts, ids, leave_out
        self._starts = np.asarray([start for start, _ in parts.ranges])
        self._gathered: dict[int, list[pa.Table]] = {}
        self._left_out: list[pa.Table] = []

    @property
    def left_out(self) -> pa.Table | None:
        """The rows that parts were written without: `id`, `uri` and `error`; None if there are none."""
        return pa.concat_tables(self._left_out) if self._left_out else None

    def add(self, rows: pa.Table) -> None:
        """Add rows, and write the parts that they complete.

        Raises:
            PartError: a part has the expected number of rows, but not the expected ids.
            OSError: storage cannot be written.
        """
        places = np.searchsorted(self._ids, rows["id"].to_numpy())
        owners = np.searchsorted(self._starts, places, side="right") - 1
        for part in np.unique(owners).tolist():
            self._gathered.setdefault(part, []).append(rows.filter(pa.array(owners == part)))
            start, stop = self._parts.ranges[part]
            if sum(map(len, self._gathered[part])) >= stop - start:
                self._write(part, pa.concat_tables(self._gathered.pop(part)).sort_by("id"))

    def _write(self, part: int, rows: pa.Table) -> None:
        if problem := self._parts.problem(part, rows, self._ids):
            raise PartError(f"Rows were lost or delivered twice ({problem}); run the same command again.")
        if self._leave_out:
            unavailable = reading.is_unavailable(rows["error"])
            if pc.any(unavailable).as_py():
                self._left_out.append(rows.filter(unavailable).select(["id", "uri", "error"]))
                rows = rows.filter(pc.invert(unavailable))
        if len(rows):
            self._parts.write(part, rows)


def _describe_difference(ids: npt.NDArray[np.int64], expected: npt.NDArray[np.int64]) -> str:
    """List the ids that are missing, unexpected or repeated."""
    missing, unexpected = np.setdiff1d(expected, ids), np.setdiff1d(ids, expected)
    values, counts = np.unique(ids, return_counts=True)
    problems = {"missing": missing, "unexpected": unexpected, "more than once": values[counts > 1]}
    return (
        "; ".join(
            f"{problem} {', '.join(map(str, wrong[:10].tolist()))}{' ...' if len(wrong) > 10 else ''} ({len(wrong)})"
            for problem, wrong in problems.items()
            if len(wrong)
        )
        or "another order"
    )


# -- file formats ---------------------------------------------------------------------------------------------


def _encode_parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer)
    return buffer.getvalue()


def _encode_jsonl(rows: pa.Table) -> bytes:
    return "".join(f"{json.dumps(row, default=str)}\n" for row in rows.to_pylist()).encode()


def _encode_csv(rows: pa.Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)  # ends lines with \r\n, and therefore quotes values that contain \r or \n
    writer.writerow(rows.column_names)
    nested = [pa.types.is_nested(field.type) for field in rows.schema]
    for row in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        values = zip(row, nested, strict=True)
        writer.writerow([json.dumps(value) if lists and value is not None else value for value, lists in values])
    return text.getvalue().encode()


def _decode_parquet(data: bytes) -> pa.Table:
    return storage.parse_parquet(data, _SCHEMA.names)


def _decode_jsonl(data: bytes) -> pa.Table:
    rows = [json.loads(line) for line in data.splitlines()]
    return pa.Table.from_pylist([{name: row[name] for name in _SCHEMA.names} for row in rows], _SCHEMA)


def _decode_csv(data: bytes) -> pa.Table:
    convert = pyarrow.csv.ConvertOptions(
        column_types=_SCHEMA, include_columns=_SCHEMA.names,
        strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=False,
    )  # fmt: skip
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(pa.BufferReader(data), convert_options=convert, parse_options=parse)


_ENCODERS = {"parquet": _encode_parquet, "csv": _encode_csv, "jsonl": _encode_jsonl}
_DECODERS = {"parquet": _decode_parquet, "csv": _decode_csv, "jsonl": _decode_jsonl}
