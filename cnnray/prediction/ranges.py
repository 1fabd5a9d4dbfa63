"""A range from its manifest rows to its committed part: what the driver asks for, and what a worker does."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.images import reading, shards, storage
from cnnray.images.inputs import VERSION
from cnnray.images.lease import check_holder
from cnnray.images.shards import CHANGED, Range
from cnnray.prediction import decoding, delta, isolation, parts
from cnnray.prediction.config import FileFormat
from cnnray.prediction.parts import Part
from cnnray.prediction.plan import Plan
from cnnray.prediction.tally import Tally, error_rows, write_errors
from cnnray.prediction.worker import Worker, rename_reserved

RETRIED_REASONS = ("missing", "access denied", "unreadable", reading.UNAVAILABLE, "crashed", "throttled")
"""Reasons of errors that another attempt may not have; `throttled` is of versions up to 0.2."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What workers know of the run that they work for."""

    folder: str
    """Of the parts."""
    manifest: str
    """Folder of the manifest's shards."""
    format: FileFormat
    threshold: float
    """See `Tally`."""
    skip_unreadable: bool
    multi_label: bool = False
    """Whether images may have several labels."""
    is_delta: bool = False
    """Whether rows get the types that a Delta table can have."""
    leased: str = ""
    """The folder whose lease the run has."""
    lease_holder: str = ""
    """See `lease.Lease`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A range to classify and commit."""

    range: Range
    attempt: int = 0
    """Of the part to create."""
    earlier: Part | None = None
    """A Parquet part with rows of the range, which are taken over unless they changed or are to be tried again."""
    retry: bool = False
    """Whether its rows with errors that another attempt may not have (`RETRIED_REASONS`) are to be tried again."""
    isolated: bool = False
    """Whether the range has ended its workers: its images are classified one by one in a process of their own."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What the driver learns of a range that was committed. No row reaches it."""

    range: Range
    part: Part
    tally: Tally
    """Of the rows in the part."""
    classified: int
    """Images that were read for it."""
    unavailable: Tally | None
    """Of the rows that the part lacks, because storage was in trouble."""


class RangeWorker:
    """Classifies ranges in this process, and commits their parts."""

    def __init__(self, plan: Plan, output: Output, make_worker: type[Worker] = Worker) -> None:
        """
        Args:
            plan: the engine and the workers.
            output: of the run.
            make_worker: class of what classifies rows.

        Raises:
            BundleError: see `Worker`.
        """
        self._plan, self._output = plan, output
        self._worker = make_worker(plan)

    def ready(self) -> None:
        """Answer once the network is loaded."""

    def run(self, task: Task) -> Receipt:
        """Read the images of a range, classify them, and create the range's part, unless another worker has.

        Raises:
            LeaseLostError: the run has ended, or another one has taken over its output.
            PartError, StorageError, UnavailableError: the output or the manifest cannot be read or written.
        """
        rows = rename_reserved(shards.read(self._output.manifest, task.range))
        kept = self._kept(task, rows) if task.earlier else None
        todo = rows.drop_columns([name for name in (VERSION, CHANGED) if name in rows.column_names])
        if kept is not None:
            todo = todo.filter(pc.invert(pc.is_in(todo["id"], kept["id"].combine_chunks())))
        new = [*self._classify(todo, task.isolated)] if len(todo) else []
        if self._output.is_delta:
            new = [rows.cast(delta.storable(rows.schema), safe=False) for rows in new]
        if kept is not None:
            new.append(kept)
        done = pa.concat_tables(new, promote_options="permissive")
        return self._commit(task, done.sort_by("id") if kept is not None else done, len(todo))

    def _kept(self, task: Task, rows: pa.Table) -> pa.Table | None:
        """The rows of the earlier part that are still true; None where there are none."""
        assert task.earlier is not None
        kept = parts.read_all(self._output.folder, task.earlier)
        if task.earlier.generation < task.range.generation:
            same = rows.filter(pc.invert(rows[CHANGED])) if CHANGED in rows.column_names else rows.slice(0, 0)
            kept = kept.filter(pc.is_in(kept["id"], same["id"].combine_chunks()))
        if task.retry:
            reasons = pc.list_element(pc.split_pattern(pc.fill_null(kept["error"], ""), ":", max_splits=1), 0)
            kept = kept.filter(pc.invert(pc.is_in(reasons, pa.array(RETRIED_REASONS))))
        return kept if len(kept) else None

    def _classify(self, rows: pa.Table, isolated: bool) -> Iterator[pa.Table]:
        if self._plan.pool.decode_cpus and not isolated:
            try:
                return iter(list(decoding.in_tasks(self._plan, rows, self._worker)))
            except decoding.CrashedError:
                isolated = True
        return isolation.classify_one_by_one(self._plan, rows, self._worker) if isolated else self._worker(rows)

    def _commit(self, task: Task, rows: pa.Table, classified: int) -> Receipt:
        output, range_ = self._output, task.range
        errors, unavailable = error_rows(rows), None
        if not output.skip_unreadable and pc.any(is_unavailable := reading.is_unavailable(rows["error"])).as_py():
            unavailable = Tally.of(rows.filter(is_unavailable), output.threshold, multi_label=output.multi_label)
            rows = rows.filter(pc.invert(is_unavailable))
        tally = Tally.of(rows, output.threshold, multi_label=output.multi_label)
        part = Part(range_.first, range_.generation, task.attempt, unavailable is not None, output.format)
        check_holder(output.leased, output.lease_holder)
        if parts.write(output.folder, part, rows, tally):
            if len(errors):
                write_errors(storage.join(output.folder, part.errors_name), errors)
        else:
            tally = parts.read_tally(output.folder, part, output.threshold, multi_label=output.multi_label)
        return Receipt(range=range_, part=part, tally=tally, classified=classified, unavailable=unavailable)
