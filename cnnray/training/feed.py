"""What a worker trains and validates on, batch after batch, ahead of its steps."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np

from cnnray.images.decoders import Decoders
from cnnray.images.reading import Batch
from cnnray.training import epoch, other_nodes, rows
from cnnray.training.data import CachedSource, Source, StreamedSource
from cnnray.training.epoch import BalancedEpoch, Epoch, Ints
from cnnray.training.plan import Assignment
from cnnray.training.rows import Rows

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
        self.order = epoch.ORDER
        self._opened = contextlib.ExitStack()
        names = assignment.info.class_names
        splits = self._opened.enter_context(rows.open_rows(assignment.manifest, names, assignment.lease_holder))
        train, validation = splits["train"], splits["validation"]
        self.images, self.validation_images = len(train), len(validation)
        self._rows, self._targets = train, None
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
        cpus = other_nodes.free_cpus(self._rank, self._world) if assignment.uses_other_nodes else []
        cpus = cpus[: _DECODERS_ELSEWHERE * assignment.decoders]
        decoders = self._decoders = Decoders(
            assignment.decoders,
            self._config.image_size,
            self._config.resize,
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
        ordered = self._epoch(number)
        return self._train_source.batches(
            lambda batch: ordered.rows(step + batch, self._rank, self._world), ordered.steps - step
        )

    def _validation(self) -> Iterator[Batch]:
        of_all = self.validation_batch * self._world
        mine = len(range(self._rank, self.validation_images, self._world))

        def rows_of(batch: int) -> Ints:
            last = min((batch + 1) * of_all, self.validation_images)
            return np.arange(batch * of_all + self._rank, last, self._world)

        return self._validation_source.batches(rows_of, math.ceil(mine / max(self.validation_batch, 1)))

    def _epoch(self, number: int) -> Epoch:
        of_run = self._config.seed, number, self.images, self._config.batch_size, self.order
        return Epoch(*of_run) if self._targets is None else BalancedEpoch(*of_run, targets=self._targets)

    def ask_other_nodes(self) -> None:
        """Let other nodes decode, too, where this one is too slow."""
        if self._other_nodes:
            self._other_nodes.ask()

    def close(self) -> None:
        """End the processes that decode, and let go of the rows."""
        if self._decoders is not None:
            self._decoders.close()
        self._opened.close()
