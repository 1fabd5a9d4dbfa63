"""What a worker trains and validates on, batch after batch, ahead of its steps."""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from cnnray.images import manifest as manifests
from cnnray.images.decoders import Decoders
from cnnray.images.reading import Batch
from cnnray.training import epoch, other_nodes
from cnnray.training.data import CachedSource, Source, StreamedSource
from cnnray.training.plan import Assignment

_DECODERS_ELSEWHERE = 4
"""Processes on other nodes, for each on the worker's own node, at most."""


class Feed:
    """A worker's share of the images of a run.

    Images are decoded in the order in which batches are asked for. Those of the next part of the run (validation, the
    next epoch) are asked for before the last ones of this part are there.

    Attributes:
        images, validation_images: numbers of images, over all workers.
        bounds: see `epoch.step_bounds`.
        tally: `epoch.tally` of all training images.
        validation_batch: most images of a batch for validation.
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
        manifest = manifests.with_targets(manifests.read(assignment.manifest))
        train, validation = (manifests.select_split(manifest, split) for split in ("train", "validation"))
        self.images, self.validation_images = len(train), len(validation)
        self.bounds = epoch.step_bounds(self.images, self._config.batch_size)
        self.tally = epoch.tally(train["id"].to_numpy())
        self.validation_batch = min(at_once, math.ceil(self.validation_images / world))
        self._decoders: Decoders | None = None
        self._other_nodes: other_nodes.OtherNodes | None = None
        self._train_source, self._validation_source = self._sources(assignment, train, validation)
        self._next_train: Iterator[Batch] | None = None
        self._next_validation: Iterator[Batch] | None = None

    def _sources(self, assignment: Assignment, train: pa.Table, validation: pa.Table) -> tuple[Source, Source]:
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

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.bounds) - 1

    def share(self, step: int) -> int:
        """The most images of a step that any worker has."""
        return math.ceil(int(self.bounds[step + 1] - self.bounds[step]) / self._world)

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
        order = epoch.order(self._config.seed, number, self.images)
        return self._train_source.batches(*epoch.rank_rows(order, self.bounds, step, self._rank, self._world))

    def _validation(self) -> Iterator[Batch]:
        rows, size = np.arange(self._rank, self.validation_images, self._world), self.validation_batch
        sizes = [len(rows[start : start + size]) for start in range(0, len(rows), size)]
        return self._validation_source.batches(rows, sizes)

    def ask_other_nodes(self) -> None:
        """Let other nodes decode, too, where this one is too slow."""
        if self._other_nodes:
            self._other_nodes.ask()

    def close(self) -> None:
        """End the processes that decode."""
        if self._decoders is not None:
            self._decoders.close()
