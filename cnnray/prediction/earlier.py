"""Converts outputs of versions up to 0.2, which had one manifest file and numbered parts, to the current format."""

import re
from collections.abc import Iterator

import pyarrow as pa

from cnnray.images import manifest as manifests
from cnnray.images import shards, storage
from cnnray.images.inputs import VERSION
from cnnray.images.ranges import split_rows
from cnnray.images.shards import Range
from cnnray.prediction import parts
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.parts import Part
from cnnray.prediction.tally import Tally, error_rows, write_errors

_MANIFEST = "manifest.parquet"
_PART = re.compile(r"part-(\d{6,})(-incomplete)?\.(parquet|csv|jsonl)")
_MODEL, _FILE = b"model", b"engine_file"
"""Keys of the manifest's metadata: `Bundle.version`, and `engines.digest` of the file that the engine ran."""


def is_part(name: str) -> bool:
    """Whether a file's name is that of an earlier version's part."""
    return _PART.fullmatch(name) is not None


def identity(output: str) -> tuple[str, str] | None:
    """The model's version and the digest of the engine's file of an earlier version's run.

    Returns:
        None if it was killed before it wrote its manifest.
    """
    try:
        metadata = manifests.read_metadata(storage.join(output, _MANIFEST))
    except FileNotFoundError:
        return None
    return metadata.get(_MODEL, b"").decode(), metadata.get(_FILE, b"").decode()


def convert(config: PredictConfig, folder: str) -> None:
    """Write the manifest of an earlier version's run as shards of generation 0, and its parts under today's names.

    A conversion that is killed is done again. The earlier manifest stays until `delete_manifest`.

    Args:
        config: of the run.
        folder: for the shards.
    """
    manifest = manifests.read(storage.join(config.output, _MANIFEST)).replace_schema_metadata(None)
    manifest = manifest.append_column(VERSION, pa.nulls(len(manifest), pa.string()))
    bounds = split_rows(manifest["uri"], config.rows_per_part, cut_groups=True)
    storage.delete_folder(folder)
    tables = ((manifest.slice(start, stop - start), 0) for start, stop in bounds)
    ranges = list(shards.write_ranges(folder, tables))
    shards.finish(folder)
    for file in storage.files(config.output):
        match = _PART.fullmatch(file.uri.removeprefix(storage.join(config.output, "")))
        if match is None:
            continue
        if not match[2] and match[3] == config.format and int(match[1]) < len(ranges):
            _convert_part(config, file.uri, ranges[int(match[1])])
        storage.delete_file(file.uri)


def delete_manifest(output: str) -> None:
    """Delete the manifest of an earlier version's run, whose output then has the current format."""
    storage.delete_file(storage.join(output, _MANIFEST))


def read_parts(output: str) -> Iterator[pa.Table]:
    """The rows of an earlier version's finished run that wrote Parquet files, in order."""
    for file in storage.files(output):
        if is_part(storage.name(file.uri)):
            yield storage.parse_parquet(storage.read_bytes(file.uri))


def _convert_part(config: PredictConfig, uri: str, range_: Range) -> None:
    data = storage.read_bytes(uri)
    part = Part(range_.first, 0, 0, False, config.file_format)
    if config.file_format == "parquet":
        rows = storage.parse_parquet(data)
        parts.write(config.output, part, rows, Tally.of(rows, config.threshold))
    else:
        storage.create(storage.join(config.output, part.name), data)
    errors = error_rows(parts.read(config.output, part))
    if len(errors):
        write_errors(storage.join(config.output, part.errors_name), errors)
