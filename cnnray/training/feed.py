"""What a worker trains and validates on, batch after batch, ahead of its steps."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np

from cnnray.images import containers
from cnnray.images.decoders import Decoders
from cnnray.images.reading import Batch
from cnnray.training import epoch, other_nodes, rows
from cnnray.training.data import CachedSource, Source, StreamedSource
from cnnray.training.epoch import BalancedEpoch, Epoch, InOrder, Ints, LanesEpoch
from cnnray.training.output import TrainingError
from cnnray.training.plan import Assignment
from cnnray.training.rows import Rows

log = logging.getLogger(__name__)

_FEW_GROUPS = 60
"""Row groups, of which fewer are warned of."""
_DECODERS_ELSEWHERE = 4
"""Processes on other nodes, for each on the worker's own node, at most."""


class Feed:
    """A worker's share of the images of a run.

    Images are decoded in the order in which batches are asked for. Those of the next part of the run (validation, the
    next epoch) are asked for before the last ones of this part are there.

    Attributes:
        images, validation_images: numbers of images, over all workers.
        steps: of an epoch.
        validation_batch: most images of a batch for validation.
        order: number of the order of epochs (see `epoch.Epoch`).
        lanes: see `epoch.LanesEpoch`.
    """

    def __init__(self, assignment: Assignment, rank: int, world: int, at_once: int) -> None:
        """
        Args:
            assignment: of the worker.
            rank: of the worker.
            world: number of workers.
            at_once: most images that the worker takes at once.
        """
        self._config, self._rank, self._world = assignment.config, rank, world
        self.order, self.lanes = epoch.ORDER, 1
        self._opened = contextlib.ExitStack()
        names = assignment.info.class_names
        splits = self._opened.enter_context(rows.open_rows(assignment.manifest, names, assignment.lease_holder))
        train, validation = splits["train"], splits["validation"]
        self.images, self.validation_images = len(train), len(validation)
        self.label_sets = train.label_sets
        self._rows, self._validation_rows, self._targets = train, validation, None
        self._has_lanes = assignment.has_lanes
        self._is_in_parquet = assignment.is_in_parquet
        if self._has_lanes:
            self.order = epoch.LANES
            groups = len(train.groups) - 1
            bytes_of_lane = containers.bytes_of_lane(train.example)
            self.lanes = epoch.number_of_lanes(groups, world, assignment.decoders, bytes_of_lane)
            if rank == 0 and self._is_in_parquet:
                _warn_of_few(groups)
        if self._config.sampling == "balanced":
            self._targets = train.column("target")
        self.steps = self._epoch(0).steps
        self.validation_batch = min(at_once, math.ceil(self.validation_images / world))
        self._decoders: Decoders | None = None
        self._other_nodes: other_nodes.OtherNodes | None = None
        self._train_source, self._validation_source = self._sources(assignment, train, validation)
        self._next_train: Iterator[Batch] | None = None
        self._next_validation: Iterator[Batch] | None = None

    def _sources(self, assignment: Assignment, train: Rows, validation: Rows) -> tuple[Source, Source]:
        if cached := assignment.cached:
            return CachedSource(cached["train"]), CachedSource(cached["validation"])
        uses_others = assignment.uses_other_nodes and not self._has_lanes
        cpus = other_nodes.free_cpus(self._rank, self._world) if uses_others else []
        cpus = cpus[: _DECODERS_ELSEWHERE * assignment.decoders]
        decoders = self._decoders = Decoders(
            assignment.decoders,
            self._config.geometry.uncut,
            largest_batch=max(math.ceil(self._config.batch_size / self._world), self.validation_batch),
            elsewhere=len(cpus),
            keep_unavailable=self._config.skip_unreadable,
        )
        self._other_nodes = other_nodes.OtherNodes(decoders, cpus)
        return StreamedSource(train, decoders), StreamedSource(validation, decoders)

    def share(self, step: int) -> int:
        """The most images of a step that any worker has."""
        start, stop = self._epoch(0).bounds(step)
        return math.ceil((stop - start) / self._world)

    def tally(self, number: int) -> Ints:
        """`epoch.tally` of the images of an epoch."""
        if self._targets is None:
            return self._rows.tally
        ordered = self._epoch(number)
        return epoch.tally(self._rows.column("id")[ordered.at(np.arange(self.images))])

    def training(self, number: int, step: int) -> Iterator[Batch]:
        """The batches of an epoch from a step on. Those of validation are asked for, too.

        Args:
            number: of the epoch, from 0 on.
            step: the first one.
        """
        batches = self._next_train or self._training(number, step)
        self._next_train, self._next_validation = None, self._validation()
        return batches

    def validation(self, next_epoch: int | None = None) -> Iterator[Batch]:
        """The batches for validation.

        Args:
            next_epoch: whose batches are asked for, too; None: no epoch follows.
        """
        batches = self._next_validation or self._validation()
        self._next_validation = None
        self._next_train = None if next_epoch is None else self._training(next_epoch, 0)
        return batches

    def _training(self, number: int, step: int) -> Iterator[Batch]:
        return self._batches(self._train_source, self._epoch(number), step)

    def _validation(self) -> Iterator[Batch]:
        return self._batches(self._validation_source, self._validated())

    def _batches(self, source: Source, ordered: Epoch, step: int = 0) -> Iterator[Batch]:
        share, lanes = (self._rank, self._world), None
        if isinstance(ordered, LanesEpoch):
            lanes = functools.partial(_of_batch, ordered.lanes_of, step, share)
        return source.batches(functools.partial(_of_batch, ordered.rows, step, share), ordered.steps - step, lanes)

    def _epoch(self, number: int) -> Epoch:
        of_run = self._config.seed, number, self.images, self._config.batch_size, self.order
        if self._targets is not None:
            return BalancedEpoch(*of_run, targets=self._targets)
        if self.order == epoch.LANES:
            return LanesEpoch(*of_run, lanes=self.lanes, starts=self._rows.groups)
        return Epoch(*of_run)

    def _validated(self) -> Epoch:
        of_run = self._config.seed, 0, self.validation_images, self.validation_batch * self._world
        if self._has_lanes and self.order == epoch.LANES:
            return LanesEpoch(*of_run, lanes=self.lanes, starts=self._validation_rows.groups)
        return InOrder(*of_run)

    def keep_order(self, order: int, lanes: int) -> None:
        """Go on in the order in which the run began.

        Raises:
            TrainingError: images in Parquet cannot be streamed in it.
        """
        if self._has_lanes and order != epoch.LANES and self._is_in_parquet:
            raise TrainingError(
                "This run began with its decoded images in memory, and images in Parquet cannot be streamed in its "
                "order: go on with --cache memory, or begin anew, with --overwrite or another --output."
            )
        self.order, self.lanes = order, lanes

    def ask_other_nodes(self) -> None:
        """Let other nodes decode, too, where this one is too slow."""
        if self._other_nodes:
            self._other_nodes.ask()

    def close(self) -> None:
        """End the processes that decode, and let go of the rows."""
        if self._decoders is not None:
            self._decoders.close()
        self._opened.close()


def _of_batch(of_step: Callable[..., Ints], first: int, share: tuple[int, int], batch: int) -> Ints:
    return of_step(first + batch, *share)


def _warn_of_few(groups: int) -> None:
    if groups < _FEW_GROUPS:
        log.warning(
            "The training images lie in %d row group(s) of Parquet files. Each is read from its beginning on, so "
            "that some images are read several times, and those that are neighbours are trained on soon after one "
            "another: write smaller groups (row_group_size=1000 of pyarrow.parquet.write_table), or use --cache "
            "memory.",
            groups,
        )
