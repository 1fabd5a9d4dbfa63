"""What the output holds of an earlier run: whether this run resumes it, and which of its parts are kept.

A run records what it is in `config.yaml` and in the metadata of its manifest, before it writes its first part.
"""

import json
import logging
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray import configs
from cnnray.errors import PermanentError
from cnnray.images import manifest as manifests
from cnnray.images import reading, storage
from cnnray.images.ranges import split_rows
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.prediction import parts as output
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.parts import Parts
from cnnray.prediction.plan import Plan

log = logging.getLogger(__name__)

CONFIG, MANIFEST, SUMMARY, ERRORS = "config.yaml", "manifest.parquet", "summary.json", "errors.csv"
RESULT = ("output", "rows", "ok", "errors", "resumed", "engine", "images_per_second", "seconds")
"""Keys of the JSON line that a run returns; `summary.json` begins with them."""
INPUT = b"input"
_MODEL, _FILE = b"model", b"engine_file"
"""Keys of the manifest's metadata that identify a run: the fingerprint of the images of all shards, `Bundle.version`,
and `engines.digest` of the file that the engine runs."""
_RETRIED_REASONS = ("missing", "access denied", "unreadable", reading.UNAVAILABLE, "crashed", "throttled")
"""Reasons of errors that another attempt may not have; `throttled` is of versions up to 0.2."""
_SHARD = re.compile(r"shard-\d+-of-(\d+)")


class PredictionError(PermanentError, RuntimeError):
    """A run that cannot start, or that failed; the message is one sentence for the user."""


def plan_parts(config: PredictConfig, manifest: pa.Table) -> Parts:
    """Divide the rows of a run into parts."""
    ranges = split_rows(manifest["uri"], config.rows_per_part, cut_groups=True)
    return Parts(config.folder, config.format, ranges)


def earlier_run(config: PredictConfig, bundle: Bundle) -> dict[str, Any] | None:
    """The config of the run in the output, if this run can resume it; None if this run begins anew.

    Raises:
        PredictionError: the output holds another run and `overwrite` is not set, or it holds files of something else.
    """
    try:
        text = storage.read_bytes(storage.join(config.folder, CONFIG))
    except FileNotFoundError:
        foreign = [name for name in (MANIFEST, SUMMARY) if storage.is_file(storage.join(config.folder, name))]
        if foreign := [*foreign, *map(storage.name, output.list_part_files(config.folder)[:1])]:
            raise PredictionError(
                f"{config.folder} holds {', '.join(foreign)}, but no {CONFIG} of a run; give another --output."
            ) from None
        return None
    earlier = configs.load(PredictConfig, text, storage.join(config.folder, CONFIG))
    if "engine" not in earlier:
        raise PredictionError(f"{config.folder} holds a {CONFIG} of another job; give another --output.")
    differences = configs.differences(config, earlier)
    if config.engine not in ("auto", earlier["engine"]):
        differences.append(f"--engine {earlier['engine']} (now {config.engine})")
    identity = _read_identity(config.folder)
    if identity is not None and identity[_MODEL] != bundle.version:
        differences.append(f"the model {identity[_MODEL]} (now {bundle.version})")
    elif identity is not None and not differences and identity[_FILE] != engines.digest(bundle, earlier["engine"]):
        differences.append(f"another export to {earlier['engine']}")
    if differences and not config.overwrite:
        raise PredictionError(
            f"{config.folder} holds a run with {', '.join(differences)}; give another --output, or --overwrite."
        )
    return None if differences or identity is None else dict(earlier)


def _read_identity(folder: str) -> dict[bytes, str] | None:
    """The metadata that identifies the run in a folder; None if it was killed before it wrote its manifest."""
    try:
        metadata = manifests.read_metadata(storage.join(folder, MANIFEST))
    except FileNotFoundError:
        return None
    return {key: metadata.get(key, b"").decode() for key in (_MODEL, _FILE, INPUT)}


def check_shards(config: PredictConfig, manifest: pa.Table, bundle: Bundle) -> None:
    """Check that all runs in the output are shards of the same images, model and number of shards.

    Raises:
        PredictionError: one is not.
    """
    if config.overwrite or not storage.exists(config.output):
        return
    shard_counts = {config.output: "1"}
    for folder in storage.folders(config.output):
        if match := _SHARD.fullmatch(storage.name(folder)):
            shard_counts[folder] = match[1]
    for folder, shard_count in shard_counts.items():
        if (identity := _read_identity(folder)) is None:
            continue
        for flag, other, this in (
            ("--shards", shard_count, str(config.shards)),
            ("--input", identity[INPUT], manifest.schema.metadata[INPUT].decode()),
            ("--bundle", identity[_MODEL], bundle.version),
        ):
            if other != this:
                raise PredictionError(
                    f"{folder} is of a run with another {flag} ({other}, now {this}); give another --output, or "
                    "--overwrite."
                )


def read_result(config: PredictConfig) -> dict[str, Any] | None:
    """The JSON line of the run in the output; None unless the run is finished and all of its parts still exist."""
    try:
        summary = json.loads(storage.read_bytes(storage.join(config.folder, SUMMARY)))
    except FileNotFoundError:
        return None
    parts = plan_parts(config, read_manifest(config))
    if missing := len(parts.ranges) - len(parts.written()):
        log.warning("%s was finished, but %d of its parts no longer exist", config.folder, missing)
        return None
    return {key: summary[key] for key in RESULT}


def read_manifest(config: PredictConfig) -> pa.Table:
    """The manifest of the run in the output."""
    return manifests.read(storage.join(config.folder, MANIFEST))


def find_parts_to_retry(config: PredictConfig, parts: Parts, written: set[int]) -> set[int]:
    """The written parts that `--retry-errors` repeats: those with an error that another attempt may not have."""
    if not config.retry_errors:
        return set()
    retried = set()
    for part in sorted(written):
        errors = pc.unique(parts.read(part)["error"].drop_null()).to_pylist()
        if any(error.partition(":")[0] in _RETRIED_REASONS for error in errors):
            retried.add(part)
    log.info("%d of %d parts have images that could not be read and are repeated", len(retried), len(parts.ranges))
    return retried


def delete_parts(config: PredictConfig, parts: Parts, numbers: set[int]) -> None:
    """Delete parts and all incomplete parts, and before them the summary, which marks the run as finished."""
    storage.delete_file(storage.join(config.folder, SUMMARY))
    for uri in [*map(parts.uri, sorted(numbers)), *parts.incomplete_files()]:
        storage.delete_file(uri)


def begin_output(config: PredictConfig, manifest: pa.Table, plan: Plan) -> None:
    """Delete the files of an earlier run from the output, and write the config and manifest of this run."""
    for name in (SUMMARY, ERRORS, MANIFEST):
        storage.delete_file(storage.join(config.folder, name))
    for uri in output.list_part_files(config.folder):
        storage.delete_file(uri)
    # The config comes first: a folder with other files but no config is refused as not ours.
    text = configs.dump(config, engine=plan.engine, overwrite=False)
    storage.write_bytes(storage.join(config.folder, CONFIG), text)
    metadata = manifest.schema.metadata | {_MODEL: plan.bundle.version, _FILE: plan.digest}
    manifests.write(manifest.replace_schema_metadata(metadata), storage.join(config.folder, MANIFEST))
