"""What the output holds of an earlier run: whether this run goes on with it, and which parts count.

A run says in `config.yaml` what it is: its flags, the engine, the model, and the generation of its manifest.
"""

import bisect
import functools
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cnnray import configs
from cnnray.images import shards, storage
from cnnray.images.shards import Range
from cnnray.models import engines
from cnnray.models.bundle import Bundle
from cnnray.prediction import earlier as earlier_versions
from cnnray.prediction import manifest as manifests
from cnnray.prediction import parts
from cnnray.prediction.config import DELTA_FOLDER, PredictConfig
from cnnray.prediction.dispatch import PredictionError
from cnnray.prediction.manifest import Manifest
from cnnray.prediction.parts import Part
from cnnray.prediction.plan import Plan
from cnnray.prediction.ranges import RETRIED_REASONS, Task

log = logging.getLogger(__name__)

CONFIG, SUMMARY, ERRORS = "config.yaml", "summary.json", "errors.csv"
RESULT = (
    "output", "rows", "ok", "unsure", "errors", "resumed", "classified", "engine", "images_per_second", "seconds",
)  # fmt: skip
"""Keys of the JSON line that a run returns; `summary.json` begins with them. `unsure`: of a bundle that may be."""
GENERATION, EARLIER_VERSION = "generation", -1
_MODEL, _FILE = "model", "engine_file"
"""Facts in `config.yaml` (see `configs.dump`): the generation of the manifest, `Bundle.version`, and `engines.digest`
of the file that the engine runs."""
_READING_THREADS = 16


def earlier_run(config: PredictConfig, bundle: Bundle) -> dict[str, Any] | None:
    """The config of the run in the output, with the keys `engine` and `generation`, if this run can go on with it.

    Returns:
        None if this run begins anew.

    Raises:
        PredictionError: the output holds another run and `overwrite` is not set, or it holds files of something else.
    """
    earlier = _read_config(config)
    if earlier is None:
        return None
    differences = configs.differences(config, earlier)
    if config.engine not in ("auto", earlier["engine"]):
        differences.append(f"--engine {earlier['engine']} (now {config.engine})")
    if earlier[_MODEL] != bundle.version:
        differences.append(f"the model {earlier[_MODEL]} (now {bundle.version})")
    # The file of an average may be made anew, and then is another one of the same version.
    elif (
        not differences
        and not (bundle.info.averaged and earlier["engine"] in engines.KERAS_POLICIES)
        and earlier[_FILE] != engines.digest(bundle, earlier["engine"])
    ):
        differences.append(f"another export to {earlier['engine']}")
    if differences and not config.overwrite:
        raise PredictionError(
            f"{config.output} holds a run with {', '.join(differences)}; give another --output, or --overwrite."
        )
    return None if differences else earlier


def next_generation(config: PredictConfig) -> int:
    """The generation of a run that begins anew.

    No part in the output has it, so that a worker of an earlier run that was cut off can add nothing to this one.
    """
    earlier = _read_config(config)
    return 0 if earlier is None else earlier[GENERATION] + 1


def _read_config(config: PredictConfig) -> dict[str, Any] | None:
    uri = storage.join(config.output, CONFIG)
    try:
        text = storage.read_bytes(uri)
    except FileNotFoundError:
        foreign = [name for name in (SUMMARY, ERRORS) if storage.is_file(storage.join(config.output, name))]
        foreign += [
            name for name in file_names(config.output) if parts.parse_name(name) or earlier_versions.is_part(name)
        ]
        table = storage.join(config.output, DELTA_FOLDER)
        if any(parts.list_parts(table)) or storage.exists(storage.join(table, "_delta_log")):
            foreign.append(DELTA_FOLDER)
        if foreign:
            raise PredictionError(
                f"{config.output} holds {', '.join(foreign[:3])}, but no {CONFIG} of a run; give another --output."
            ) from None
        return None
    values = configs.load(PredictConfig, text, uri)
    if "engine" not in values:
        raise PredictionError(f"{config.output} holds a {CONFIG} of another job; give another --output.")
    facts = configs.load_facts(text)
    if GENERATION not in facts:
        if (identity := earlier_versions.identity(config.output)) is None:
            return None  # it was killed before it wrote its manifest
        facts = {GENERATION: EARLIER_VERSION, _MODEL: identity[0], _FILE: identity[1]}
    return values | {name: facts[name] for name in (GENERATION, _MODEL, _FILE)}


def read_result(config: PredictConfig, earlier: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON line of the run in the output; None unless it is finished, and all of its parts still exist."""
    try:
        summary = json.loads(storage.read_bytes(storage.join(config.output, SUMMARY)))
    except FileNotFoundError:
        return None
    if earlier[GENERATION] != EARLIER_VERSION and row_count(config, earlier) != summary["rows"]:
        log.warning("%s was finished, but some of its parts no longer exist", config.output)
        return None
    return {"classified": 0} | {key: summary[key] for key in RESULT if key in summary}


def begin_output(config: PredictConfig, plan: Plan, generation: int, *, is_new: bool) -> None:
    """Say that the output holds this run, with the manifest of this generation, and that it is not finished.

    Args:
        config: of the run.
        plan: of the run.
        generation: of its manifest.
        is_new: whether the run begins anew: files of an earlier run are deleted.
    """
    storage.delete_file(storage.join(config.output, SUMMARY))
    before = _read_config(config) if is_new else None
    if before is not None and before["format"] == "delta" != config.format:
        storage.delete_folder(storage.join(config.output, DELTA_FOLDER))
    # The config comes first: an output with parts and no config is refused as not ours. If the deletion is killed,
    # the same command goes on with this run, and parts of an earlier generation do not count.
    _write_config(config, plan.engine, {GENERATION: generation, _MODEL: plan.bundle.version, _FILE: plan.digest})
    if is_new:
        storage.delete_file(storage.join(config.output, ERRORS))
        delete_files(config, keep=set())
        delete_manifests(config, generation)


def set_generation(config: PredictConfig, generation: int) -> None:
    """Say that the output holds the manifest of this generation, in which no range has changed."""
    earlier = _read_config(config)
    assert earlier is not None
    if earlier[GENERATION] != generation:
        facts = {_MODEL: earlier[_MODEL], _FILE: earlier[_FILE], GENERATION: generation}
        _write_config(config, earlier["engine"], facts)


def _write_config(config: PredictConfig, engine: str, facts: dict[str, Any]) -> None:
    flags = {"engine": engine, "overwrite": False, "retry_errors": False, "update": False, "verify": False}
    text = configs.dump(config, facts, **flags)
    storage.write_bytes(storage.join(config.output, CONFIG), text)


def row_count(config: PredictConfig, earlier: dict[str, Any]) -> int:
    """Rows of an earlier run that this run would keep."""
    committed, folder = Committed(config), manifests.folder_of(config, earlier[GENERATION])
    kept = [range_ for range_ in shards.ranges(folder) if plan_task(range_, committed, frozenset()) is None]
    return sum(range_.rows for range_ in kept)


def delete_manifests(config: PredictConfig, generation: int) -> None:
    """Delete the manifests of other generations."""
    folder = storage.join(config.output, manifests.FOLDER)
    if storage.exists(folder):
        for other in storage.folders(folder):
            if storage.name(other) != str(generation):
                storage.delete_folder(other)
    earlier_versions.delete_manifest(config.output)


def delete_files(config: PredictConfig, keep: set[str]) -> None:
    """Delete parts and lists of errors whose names are not among these; those of a Delta table stay."""
    ours = [
        name for name in file_names(config.output) if parts.is_part_or_errors(name) or earlier_versions.is_part(name)
    ]
    stale = [name for name in ours if name not in keep]
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        list(pool.map(lambda name: storage.delete_file(storage.join(config.output, name)), stale))


def file_names(folder: str) -> Iterator[str]:
    """The files in a folder, relative to it."""
    prefix = storage.join(folder, "")
    files = storage.walk(folder) if storage.exists(folder) else ()
    return (file.uri.removeprefix(prefix) for file in files)


class Committed:
    """The parts in the output."""

    def __init__(self, config: PredictConfig) -> None:
        """List them."""
        self._by_first: dict[int, list[Part]] = {}
        for part in parts.list_parts(config.parts_folder):
            if part.format == config.file_format:
                self._by_first.setdefault(part.first, []).append(part)
        self._firsts = sorted(self._by_first)

    def of(self, range_: Range) -> Part | None:
        """The part of a range that counts: of its generation and of the last attempt, complete before incomplete."""
        found = [part for part in self._by_first.get(range_.first, ()) if part.generation == range_.generation]
        return max(found, key=lambda part: (part.attempt, not part.incomplete), default=None)

    def before(self, range_: Range) -> Part | None:
        """The last part of earlier generations that has rows of a range: it may begin with rows that are gone."""
        place = bisect.bisect_right(self._firsts, range_.first)
        found = [
            part
            for first in self._firsts[max(place - 1, 0) : place]
            for part in self._by_first[first]
            if part.generation < range_.generation
        ]
        return max(found, key=lambda part: (part.generation, part.attempt, not part.incomplete), default=None)


def plan_task(
    range_: Range, committed: Committed, retried: frozenset[Part], *, retry_errors: bool = False
) -> Task | None:
    """What there is to do for a range; None where its part counts.

    Args:
        range_: of the manifest.
        committed: the parts in the output.
        retried: see `find_retried`.
        retry_errors: the flag.
    """
    part = committed.of(range_)
    attempt = 0 if part is None else part.attempt + 1
    if part is not None and not part.incomplete and part not in retried:
        return None
    earlier = committed.before(range_) if part is None else part
    if earlier is None or earlier.format != "parquet":
        return Task(range=range_, attempt=attempt)
    return Task(range=range_, attempt=attempt, earlier=earlier, retry=retry_errors or earlier in retried)


def find_retried(config: PredictConfig, manifest: Manifest, committed: Committed) -> frozenset[Part]:
    """The parts that `--retry-errors` repeats: those with an error that another attempt may not have."""
    found = [part for range_ in shards.ranges(manifest.folder) if (part := committed.of(range_)) is not None]
    read = functools.partial(parts.read_tally, config.parts_folder, threshold=config.threshold)
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        tallies = pool.map(read, found)
        pairs = zip(found, tallies, strict=True)
        retried = {part for part, tally in pairs if not tally.reasons.keys().isdisjoint(RETRIED_REASONS)}
    log.info("%d of %d parts have images that could not be read and are repeated", len(retried), len(found))
    return frozenset(retried)
