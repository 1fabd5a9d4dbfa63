"""The part files of a run's output. Each holds the rows of one range of the manifest, and is whole or not there.

The file of a range is called `part-FIRST-G.A.parquet` (or .csv, .jsonl): FIRST is the id of its first row, G the
generation (the number of the run or update that classified the range last), and A the attempt in it, which
`--retry-errors` counts up, as does a run that goes on after trouble with storage. Of the files of a range in its
generation the one of the last attempt counts. A file is never changed and never written twice: where two workers
have a range, the file of the first one stays.

A file whose images could not all be read, because storage was in trouble, is called `-incomplete`, and holds the rows
that there are.
"""

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from cnnray.errors import PermanentError
from cnnray.images import storage
from cnnray.images.retries import patient
from cnnray.prediction.config import FileFormat
from cnnray.prediction.tally import Tally

_NAME = re.compile(r"part-(\d{12,})-(\d+)\.(\d+)(-incomplete)?\.(parquet|csv|jsonl)")
_ERRORS_NAME = re.compile(r"errors-\d{12,}-\d+\.\d+(-incomplete)?\.csv")
_TALLY = b"cnnray.tally"
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()), ("uri", pa.string()), ("status", pa.string()), ("error", pa.string()),
        ("prediction", pa.string()), ("confidence", pa.float32()),
    ]
)  # fmt: skip
"""The columns that `read` returns, and a list of labels."""


class PartError(PermanentError, RuntimeError):
    """Lost, repeated or damaged rows; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """The file of a range."""

    first: int
    """Id of the range's first row."""
    generation: int
    attempt: int
    incomplete: bool
    format: FileFormat

    @property
    def name(self) -> str:
        """Of the file."""
        suffix = "-incomplete" if self.incomplete else ""
        return f"part-{self.first:012d}-{self.generation}.{self.attempt}{suffix}.{self.format}"

    @property
    def errors_name(self) -> str:
        """Of the file beside it that lists the rows without a prediction, where there are some."""
        return f"errors-{self.name.removeprefix('part-').rpartition('.')[0]}.csv"


def list_parts(folder: str) -> Iterator[Part]:
    """All parts in a folder, in the order of their names."""
    for file in storage.walk(folder) if storage.exists(folder) else ():
        if (part := parse_name(file.uri.removeprefix(storage.join(folder, "")))) is not None:
            yield part


def parse_name(name: str) -> Part | None:
    """The part of a file's name; None for another file's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    format_: Any = match[5]
    return Part(int(match[1]), int(match[2]), int(match[3]), bool(match[4]), format_)


def is_part_or_errors(name: str) -> bool:
    """Whether a file's name is that of a part, or of a list of errors beside one."""
    return parse_name(name) is not None or _ERRORS_NAME.fullmatch(name) is not None


@patient
def write(folder: str, part: Part, rows: pa.Table, tally: Tally) -> bool:
    """Create the file of a part, and read it back.

    Args:
        folder: of the output.
        part: which file.
        rows: of the range, in the order of their ids.
        tally: of these rows.

    Returns:
        Whether the file has these rows: False where another worker has created it with others.

    Raises:
        PartError: storage gives back other bytes than it was given.
        OSError: storage that cannot be written.
    """
    data, uri = _ENCODERS[part.format](rows, tally), storage.join(folder, part.name)
    created = storage.create(uri, data)
    is_same = storage.read_bytes(uri) == data  # also where the answer to the request that created it was lost
    if created and not is_same:
        raise PartError(f"{uri} was read back with other content than was written: check the storage.")
    return is_same


@patient
def read(folder: str, part: Part, *, multi_label: bool = False) -> pa.Table:
    """Read the columns of a part that a receipt needs: `id`, `uri`, `status`, `error`, `prediction` and `confidence`;
    and `labels` where images may have several, else `top_k_labels` of a part that is no Parquet file, and so has no
    tally in a footer.

    Raises:
        PartError: the file is damaged, or gone.
    """
    with _part_errors(folder, part) as uri:
        return _DECODERS[part.format](storage.read_bytes(uri), "labels" if multi_label else "top_k_labels")


def read_tally(folder: str, part: Part, threshold: float, *, multi_label: bool = False) -> Tally:
    """The tally of a part: from the footer of its file, or counted anew where that has none for this threshold.

    Raises:
        PartError: the file is damaged, or gone.
    """
    if part.format == "parquet":
        metadata = read_schema(folder, part).metadata or {}
        if _TALLY in metadata and (tally := Tally.from_json(metadata[_TALLY])).threshold == threshold:
            return tally
    return Tally.of(read(folder, part, multi_label=multi_label), threshold, multi_label=multi_label)


@patient
def read_schema(folder: str, part: Part) -> pa.Schema:
    """Read the columns of a Parquet part, and its metadata, from the footer of its file.

    Raises:
        PartError: the file is damaged, or gone.
    """
    with _part_errors(folder, part) as uri:
        filesystem, path = storage.arrow_filesystem(uri)
        with storage.translated_errors(uri):
            return pyarrow.parquet.read_schema(path, filesystem=filesystem)


@patient
def read_all(folder: str, part: Part) -> pa.Table:
    """Read all columns of a Parquet part.

    Raises:
        PartError: the file is damaged, or gone.
    """
    with _part_errors(folder, part) as uri:
        return storage.parse_parquet(storage.read_bytes(uri)).replace_schema_metadata(None)


@contextlib.contextmanager
def _part_errors(folder: str, part: Part) -> Iterator[str]:
    uri = storage.join(folder, part.name)
    try:
        yield uri
    except FileNotFoundError:
        raise PartError(f"{uri} was deleted while the run was going on: run the same command again.") from None
    except (pa.ArrowException, storage.BadFileError, KeyError, ValueError) as error:
        raise PartError(f"{uri} is damaged ({str(error).splitlines()[0]}): delete it, and run again.") from None


# -- file formats ---------------------------------------------------------------------------------------------


def _encode_parquet(rows: pa.Table, tally: Tally) -> bytes:
    buffer = io.BytesIO()
    metadata = {**(rows.schema.metadata or {}), _TALLY: tally.as_json()}
    pyarrow.parquet.write_table(rows.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def _encode_jsonl(rows: pa.Table, tally: Tally) -> bytes:
    return "".join(f"{json.dumps(row, default=str)}\n" for row in rows.to_pylist()).encode()


def _encode_csv(rows: pa.Table, tally: Tally) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)  # ends lines with \r\n, and therefore quotes values that contain \r or \n
    writer.writerow(rows.column_names)
    nested = [pa.types.is_nested(field.type) for field in rows.schema]
    for row in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        values = zip(row, nested, strict=True)
        writer.writerow([json.dumps(value) if lists and value is not None else value for value, lists in values])
    return text.getvalue().encode()


def _decode_parquet(data: bytes, labels: str) -> pa.Table:
    return storage.parse_parquet(data, [*_SCHEMA.names, *({labels} - {"top_k_labels"})])


def _decode_jsonl(data: bytes, labels: str) -> pa.Table:
    rows = [json.loads(line) for line in data.splitlines()]
    table = pa.Table.from_pylist([{name: row[name] for name in _SCHEMA.names} for row in rows], _SCHEMA)
    if not all(labels in row for row in rows):
        return table
    return table.append_column(labels, pa.array([row[labels] for row in rows], pa.list_(pa.string())))


def _decode_csv(data: bytes, labels: str) -> pa.Table:
    header = next(csv.reader(io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="")), [])
    lists = [labels] if labels in header else []
    convert = pyarrow.csv.ConvertOptions(
        column_types=_SCHEMA.append(pa.field(labels, pa.string())), include_columns=[*_SCHEMA.names, *lists],
        strings_can_be_null=True, null_values=[""], quoted_strings_can_be_null=False,
    )  # fmt: skip
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(pa.BufferReader(data), convert_options=convert, parse_options=parse)
    if not lists:
        return table
    values = [text and json.loads(text) for text in table[labels].to_pylist()]
    return table.set_column(len(_SCHEMA), labels, pa.array(values, pa.list_(pa.string())))


_ENCODERS = {"parquet": _encode_parquet, "csv": _encode_csv, "jsonl": _encode_jsonl}
_DECODERS = {"parquet": _decode_parquet, "csv": _decode_csv, "jsonl": _decode_jsonl}
