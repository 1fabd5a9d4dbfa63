"""What an output holds of an earlier run: whether this one goes on with it, and what of it stays.

A run states what it is in `config.yaml` and in its manifest's metadata, written before its first part.
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
from cnnray.images import storage, stream
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.prediction import parts as output
from cnnray.prediction import pipeline
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.parts import Parts

log = logging.getLogger(__name__)

CONFIG, MANIFEST, SUMMARY, ERRORS = "config.yaml", "manifest.parquet", "summary.json", "errors.csv"
INPUT = b"input"
_MODEL, _FILE = b"model", b"engine_file"
"""What the manifest says of the run: the fingerprint of all the input, `Bundle.version` and `engines.digest`."""
_RETRIED = ("missing", "access denied", "throttled", "unreadable", "crashed")
_SHARD = re.compile(r"shard-\d+-of-(\d+)")


class PredictionError(PermanentError, RuntimeError):
    """A run that cannot start or ended badly; the message is one sentence for the user."""


def parts_of(config: PredictConfig, manifest: pa.Table) -> Parts:
    """Where the rows of a run go."""
    ranges = stream.pieces(manifest["uri"].to_pylist(), config.rows_per_part, cut_groups=True)
    return Parts(config.folder, config.format, ranges)


def earlier_run(config: PredictConfig, bundle: Bundle) -> dict[str, Any] | None:
    """The config of the run that the output holds, if it is this one."""
    try:
        text = storage.read_bytes(storage.join(config.folder, CONFIG))
    except FileNotFoundError:
        foreign = [name for name in (MANIFEST, SUMMARY) if storage.is_file(storage.join(config.folder, name))]
        if foreign := [*foreign, *map(storage.name, output.files_of(config.folder)[:1])]:
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
    stated = _stated(config.folder)
    if stated is not None and stated[_MODEL] != bundle.version:
        differences.append(f"the model {stated[_MODEL]} (now {bundle.version})")
    elif stated is not None and not differences and stated[_FILE] != engines.digest(bundle, earlier["engine"]):
        differences.append(f"another export to {earlier['engine']}")
    if differences and not config.overwrite:
        raise PredictionError(
            f"{config.folder} holds a run with {', '.join(differences)}; give another --output, or --overwrite."
        )
    return None if differences or stated is None else dict(earlier)


def _stated(folder: str) -> dict[bytes, str] | None:
    """What a run's manifest says of it; None where it was killed before it had begun."""
    try:
        found = manifests.read(storage.join(folder, MANIFEST)).schema.metadata or {}
    except FileNotFoundError:
        return None
    return {name: found.get(name, b"").decode() for name in (_MODEL, _FILE, INPUT)}


def check_shards(config: PredictConfig, manifest: pa.Table, bundle: Bundle) -> None:
    """
    Raises:
        PredictionError: what else the output holds is not of the same images, model and number of shards.
    """
    if config.overwrite or not storage.exists(config.output):
        return
    shards = {config.output: "1"}
    for folder in storage.folders(config.output):
        if found := _SHARD.fullmatch(storage.name(folder)):
            shards[folder] = found[1]
    for folder, count in shards.items():
        if (stated := _stated(folder)) is None:
            continue
        for name, there, here in (
            ("--shards", count, str(config.shards)),
            ("--input", stated[INPUT], manifest.schema.metadata[INPUT].decode()),
            ("--bundle", stated[_MODEL], bundle.version),
        ):
            if there != here:
                raise PredictionError(
                    f"{folder} is of a run with another {name} ({there}, now {here}); give another --output, or "
                    "--overwrite."
                )


def finished(config: PredictConfig) -> dict[str, Any] | None:
    """The JSON line of a run that is finished."""
    try:
        stated = json.loads(storage.read_bytes(storage.join(config.folder, SUMMARY)))
    except FileNotFoundError:
        return None
    parts = parts_of(config, read_manifest(config))
    if missing := len(parts.ranges) - len(parts.written()):
        log.warning("%s was finished, but %d of its parts are not there any more", config.folder, missing)
        return None
    names = ("output", "rows", "ok", "errors", "resumed", "engine", "images_per_second", "seconds")
    return {name: stated[name] for name in names}


def read_manifest(config: PredictConfig) -> pa.Table:
    """The manifest of the run that the output holds."""
    return manifests.read(storage.join(config.folder, MANIFEST))


def unread(config: PredictConfig, parts: Parts, written: set[int]) -> set[int]:
    """The parts that `--retry-errors` makes again."""
    if not config.retry_errors:
        return set()
    again = set()
    for part in sorted(written):
        errors = pc.unique(parts.read(part)["error"].drop_null()).to_pylist()
        if any(error.partition(":")[0] in _RETRIED for error in errors):
            again.add(part)
    log.info("%d of %d parts have images that could not be read; they are run again", len(again), len(parts.ranges))
    return again


def take_away(config: PredictConfig, parts: Parts, some: set[int]) -> None:
    """Delete some parts, and first what says that all are there."""
    storage.delete_file(storage.join(config.folder, SUMMARY))
    for part in sorted(some):
        storage.delete_file(parts.uri(part))


def begin(config: PredictConfig, manifest: pa.Table, planned: pipeline.Plan) -> None:
    """Make the output this run's, which has no part yet."""
    for name in (SUMMARY, ERRORS, MANIFEST):
        storage.delete_file(storage.join(config.folder, name))
    for uri in output.files_of(config.folder):
        storage.delete_file(uri)
    # First of all: an output that has other files and no config is taken for somebody else's.
    text = configs.dump(config, engine=planned.engine, overwrite=False)
    storage.write_bytes(storage.join(config.folder, CONFIG), text)
    stated = manifest.schema.metadata | {_MODEL: planned.bundle.version, _FILE: planned.digest}
    manifests.write(manifest.replace_schema_metadata(stated), storage.join(config.folder, MANIFEST))
