"""The end of a run: every range has a part with all of its rows, errors are listed, and old files deleted."""

import functools
import logging
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cnnray.errors import CnnrayError
from cnnray.images import reading, storage
from cnnray.images.shards import Range
from cnnray.prediction import parts, resume
from cnnray.prediction.config import PredictConfig
from cnnray.prediction.dispatch import PredictionError
from cnnray.prediction.parts import Part, PartError
from cnnray.prediction.ranges import Receipt
from cnnray.prediction.tally import Tally, error_rows, join_errors, write_errors

log = logging.getLogger(__name__)

_THREADS = 16


class Received:
    """The receipts of a run so far, added up."""

    def __init__(self, config: PredictConfig) -> None:
        self.tally = Tally(config.threshold)
        """Of the parts that are complete."""
        self.incomplete = Tally(config.threshold)
        """Of the parts that are not."""
        self.unavailable = Tally(config.threshold)
        """Of the rows that these lack, because storage was in trouble."""
        self.classified = self.rows = self.errors = 0
        self.parts: set[Part] = set()
        """That are complete."""
        self.with_errors: set[Part] = set()
        """That have rows without a prediction, or lack rows."""

    def add(self, receipt: Receipt) -> None:
        """
        Raises:
            PartError: the part lacks rows of its range.
        """
        if receipt.unavailable is None:
            if receipt.tally.rows != receipt.range.rows:
                raise _wrong_rows(receipt.part.name, receipt.tally.rows, receipt.range.rows)
            self.tally.add(receipt.tally)
            self.parts.add(receipt.part)
        else:
            self.incomplete.add(receipt.tally)
            self.unavailable.add(receipt.unavailable)
        errors = receipt.tally.errors + (receipt.unavailable.rows if receipt.unavailable else 0)
        if errors:
            self.with_errors.add(receipt.part)
        self.classified += receipt.classified
        self.rows += receipt.range.rows
        self.errors += errors

    def everything(self) -> Tally:
        """The counts over all images so far, with and without a row."""
        total = Tally(self.tally.threshold)
        for tally in (self.tally, self.incomplete, self.unavailable):
            total.add(tally)
        return total


def reconcile(
    config: PredictConfig, ranges: Sequence[Range], received: Received, *, multi_label: bool
) -> tuple[Tally, dict[Part, Range]]:
    """Check that every range has a part with all of its rows, and count the rows.

    Writes `errors.csv`, and deletes the files that do not count. Those of a Delta table stay: earlier versions of the
    table have them.

    Returns:
        the counts over all rows; and the parts that count, with their ranges.

    Raises:
        PartError: a part is missing, or lacks rows.
        PredictionError: too large a share of the rows has no prediction.
    """
    committed = resume.Committed(config)
    found = [(range_, committed.of(range_)) for range_ in ranges]
    missing = [range_ for range_, part in found if part is None or part.incomplete]
    if missing:
        raise PartError(
            f"{sum(range_.rows for range_ in missing)} images have no row, for example those from id "
            f"{missing[0].first} to {missing[0].last}. Run the same command again."
        )
    counting = {part: range_ for range_, part in found if part is not None}
    tally = Tally(config.threshold)
    if received.parts <= counting.keys():
        tally.add(received.tally)
    else:  # a worker that was thought lost has committed the same range at the same time
        received.parts.clear()
    with_errors = {part for part in received.with_errors if part in received.parts}
    unread = [part for part in counting if part not in received.parts]
    read = functools.partial(
        parts.read_tally, config.parts_folder, threshold=config.threshold, multi_label=multi_label
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        for part, other in zip(unread, pool.map(read, unread), strict=True):
            if other.rows != counting[part].rows:
                raise _wrong_rows(storage.join(config.parts_folder, part.name), other.rows, counting[part].rows)
            tally.add(other)
            if other.errors:
                with_errors.add(part)
    if tally.errors > config.max_error_fraction * tally.rows:
        raise too_many_errors(config, tally)
    _list_errors(config, with_errors)
    keep = {part.name for part in counting} | {part.errors_name for part in with_errors}
    resume.delete_files(config, keep)
    return tally, counting


def left_out(config: PredictConfig, received: Received, images: int) -> CnnrayError:
    """The error for images that have no row. Writes the list of them, `errors.csv`."""
    unavailable = received.unavailable
    _list_errors(config, {part for part in received.with_errors if part.incomplete})
    example = _example(unavailable)
    return storage.UnavailableError(
        f"{unavailable.rows} of {images} images have no row, because storage was in trouble, for example "
        f"{example['uri']} ({example['error']}); {resume.ERRORS} lists them. The same command continues with them, "
        "and with --skip-unreadable it gives them rows with an error."
    )


def too_many_errors(config: PredictConfig, tally: Tally) -> PredictionError:
    """The error of a run in which too large a share of the rows has no prediction."""
    example = _example(tally)
    has_no_row = example["error"].startswith(reading.UNAVAILABLE) and not config.skip_unreadable
    return PredictionError(
        f"{tally.errors} of {tally.rows} images have no prediction, more than --max-error-fraction "
        f"{config.max_error_fraction:g}, for example {example['uri']} ({example['error']}): solve that, then run the "
        f"same command{'' if has_no_row else ' with --retry-errors'}."
    )


def _example(tally: Tally) -> dict[str, Any]:
    return next(iter(tally.examples.values()))[0]


def _list_errors(config: PredictConfig, with_errors: Set[Part]) -> None:
    """Write `errors.csv` from the lists beside parts, and the list of a part that was killed before it had one."""
    folder, uri, names = config.parts_folder, storage.join(config.output, resume.ERRORS), []
    there = set(resume.file_names(folder))
    for part in sorted(with_errors):
        if part.errors_name not in there:
            write_errors(storage.join(folder, part.errors_name), error_rows(parts.read(folder, part)))
        names.append(part.errors_name)
    if names:
        join_errors(folder, names, uri)
    else:
        storage.delete_file(uri)


def _wrong_rows(name: str, rows: int, expected: int) -> PartError:
    return PartError(f"{name} has {rows} rows, and its range of the manifest {expected}: delete it, and run again.")
