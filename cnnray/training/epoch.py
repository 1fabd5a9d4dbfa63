"""The order of an epoch: a pure function of the seed and the epoch, whatever the number of workers.

An epoch is a permutation of the training images, cut into equal steps; step s of worker r of w takes every
w-th image of the step. A position in an epoch is therefore one number, the step, and a run may go on from it with
another number of workers. The permutation of many images is computed place by place, and not stored. Images in
containers that do not fit into memory come in an order in which they are read fast, a function of the number of lanes
that the run began with, too (`LanesEpoch`).
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


ORDER, LANES = 2, 3
"""Numbers of the orders that runs begin with: any image after any other, and that of `LanesEpoch`."""
_STORED = 2**22
"""Images whose order takes little memory: it is stored, and the same as in all versions."""
_ROUNDS = 4
_FEWEST_LANES, _MOST_LANES = 12, 240
_BYTES_OF_LANES = 2**31
"""Memory of a worker for lanes, unless so few take more."""


@dataclass(frozen=True)
class Epoch:
    """The images of an epoch, in order, and its steps."""

    seed: int
    number: int
    """From 0 on."""
    images: int
    batch_size: int
    order: int = ORDER
    """Number of the order: 1, of runs that began with version 0.2 or earlier, is stored for any number of images."""

    @property
    def steps(self) -> int:
        """The number of steps."""
        return steps(self.images, self.batch_size)

    @property
    def is_stored(self) -> bool:
        """Whether the order is a permutation in memory, and not computed place by place."""
        return self.order == 1 or self.images <= _STORED

    def bounds(self, step: int) -> tuple[int, int]:
        """The places in the order where a step begins and ends.

        All steps have the same number of images or one more, and at most `batch_size`. (A short last step, as
        usual, would be noisier than the others, and might leave workers without an image.)
        """
        return step * self.images // self.steps, (step + 1) * self.images // self.steps

    def places(self, step: int, rank: int = 0, world: int = 1) -> Ints:
        """The places of a worker's images in the order, of a step: int64."""
        start, stop = self.bounds(step)
        return np.arange(start + rank, stop, world)

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Ints:
        """The row numbers of a worker's images in a step: int64."""
        return self.at(self.places(step, rank, world))

    def at(self, places: Ints) -> Ints:
        """The row numbers at places of the order: int64, as many.

        Those of many images are a Feistel network over pairs of numbers, whose last few pairs may lead beyond the
        images: it is then applied again (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
        """
        if self.is_stored:
            return self._stored[places]
        low = np.uint64(math.isqrt(self.images))
        high = np.uint64(-(-self.images // int(low)))
        rows, outside = places.astype(np.uint64), np.ones(len(places), bool)
        while outside.any():
            left, right = np.divmod(rows[outside], low)
            for first, second in self._keys:
                left = (left + _hash(right ^ first)) % high
                right = (right + _hash(left ^ second)) % low
            rows[outside] = left * low + right
            outside = rows >= self.images
        return rows.astype(np.int64)

    @functools.cached_property
    def _keys(self) -> npt.NDArray[np.uint64]:
        keys = np.random.SeedSequence([self.seed, self.number]).generate_state(2 * _ROUNDS, np.uint64)
        return keys.astype(np.uint64).reshape(_ROUNDS, 2)

    @functools.cached_property
    def _stored(self) -> Ints:
        return np.random.default_rng([self.seed, self.number]).permutation(self.images)


@dataclass(frozen=True)
class InOrder(Epoch):
    """An epoch in the order of the rows."""

    def at(self, places: Ints) -> Ints:
        """See `Epoch`."""
        return places


@dataclass(frozen=True)
class LanesEpoch(Epoch):
    """An epoch of images that are best read in groups, each from its beginning to its end: row groups of Parquet
    files and blocks of tar files.

    The groups follow one another in an order that each epoch draws anew. This sequence is cut into equal lanes, which
    are read side by side: the image at place p is the next one of lane p modulo their number. Each lane begins at
    another point, as if it were a circle, so that the images of a step are of different groups, some from near the
    beginning and some from near the end. A worker has every w-th lane, if w divides their number; otherwise workers
    read the same lanes, and take different images of them. A row group is read from its beginning on: each lane also
    reads what comes in the group before the image that it begins with, and before the first of its part of the
    sequence. That is a group for each lane: of as many groups as lanes, all images are read twice.
    """

    lanes: int = 1
    """Number of lanes."""
    starts: Ints = field(default_factory=lambda: np.zeros(1, np.int64), compare=False, repr=False)
    """The rows at which groups begin, and the number of images, int64 (groups + 1,)."""

    def places(self, step: int, rank: int = 0, world: int = 1) -> Ints:
        """See `Epoch`. In all steps, a worker has the same lanes."""
        start, stop = self.bounds(step)
        return np.arange(start + (rank - start) % world, stop, world)

    def lanes_of(self, step: int, rank: int, world: int) -> Ints:
        """The lane of each image of `rows`, numbered from 0 on among those of the worker: int64."""
        return self.places(step, rank, world) % self.lanes // math.gcd(self.lanes, world)

    def at(self, places: Ints) -> Ints:
        """See `Epoch`."""
        depth, lane = np.divmod(places, self.lanes)
        lanes, begins, groups, offsets = self._sequence
        in_sequence = lanes[lane] + (begins[lane] + depth) % (lanes[lane + 1] - lanes[lane])
        rows: Ints = in_sequence + offsets[np.searchsorted(groups, in_sequence, side="right") - 1]
        return rows

    @functools.cached_property
    def _sequence(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Where the sequence of groups is cut into lanes, at which of its images each lane begins, where groups begin
        in the sequence, and what leads from their places in it to their rows."""
        generator = np.random.default_rng([self.seed, self.number])
        order = generator.permutation(len(self.starts) - 1)
        groups = np.cumsum(np.diff(self.starts)[order]) - np.diff(self.starts)[order]
        sizes = self.images // self.lanes + (np.arange(self.lanes) < self.images % self.lanes)
        begins = sizes * (generator.permutation(self.lanes) + generator.random()) / self.lanes
        return np.cumsum([0, *sizes]), begins.astype(np.int64), groups, self.starts[:-1][order] - groups


def number_of_lanes(groups: int, workers: int, decoders: int, bytes_of_lane: int) -> int:
    """The number of lanes that a run begins with: as many as groups, if a worker's memory allows, and enough for all
    processes that decode.

    Args:
        groups: number of groups of the training images.
        workers: number that the run begins with; they have as many lanes each, unless there are too few.
        decoders: processes that decode for each worker: the images of a lane are decoded by one of them.
        bytes_of_lane: memory of a lane.
    """
    fitting = _BYTES_OF_LANES * workers // bytes_of_lane
    lanes = max(_FEWEST_LANES, min(max(groups, workers * decoders), fitting, _MOST_LANES))
    return lanes - lanes % workers if lanes > workers else lanes


@dataclass(frozen=True)
class BalancedEpoch(Epoch):
    """An epoch with the same number of images of each class, or one more; which ones, each epoch draws anew.

    The images of a class come equally often, or once more.
    """

    targets: Ints = field(default_factory=lambda: np.empty(0, np.int64), compare=False, repr=False)
    """Class indices of all training images, int64 (images,)."""

    @property
    def is_stored(self) -> bool:
        """Always: the order is drawn from the classes of all images."""
        return True

    @functools.cached_property
    def all_rows(self) -> Ints:
        """The rows of the epoch in order: int64 (images,)."""
        generator = np.random.default_rng([self.seed, self.number])
        of_class = np.split(np.argsort(self.targets, kind="stable"), np.cumsum(np.bincount(self.targets))[:-1])
        of_class = [rows for rows in of_class if len(rows)]
        each, rest = divmod(self.images, len(of_class))
        counts = np.full(len(of_class), each)
        counts[generator.permutation(len(of_class))[:rest]] += 1
        drawn: list[Ints] = []
        for rows, count in zip(of_class, counts.tolist(), strict=True):
            times, more = divmod(count, len(rows))
            drawn += [np.tile(rows, times), generator.permutation(rows)[:more]]
        return generator.permutation(np.concatenate(drawn))

    @property
    def _stored(self) -> Ints:
        return self.all_rows


def steps(images: int, batch_size: int) -> int:
    """The number of steps of an epoch."""
    return -(-images // batch_size)


def tally(ids: Ints) -> Ints:
    """A checksum that tells two collections of ids apart, in any order: int64 (3,).

    Their number, their sum, and the sum of 31 bits of a hash. Tallies of the workers add up; an epoch's must equal
    that of the manifest, or an image was lost or seen twice.
    """
    hashed = (_hash(ids.astype(np.uint64)) & np.uint64(0x7FFFFFFF)).astype(np.int64)
    return np.asarray([len(ids), ids.sum(), hashed.sum()], np.int64)


def _hash(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


TOP_K = 5


@dataclass(frozen=True)
class Sums:
    """Sums over the images of one or more steps."""

    count: float = 0.0
    """Images."""
    loss: float = 0.0
    """Cross-entropy in nats."""
    correct: float = 0.0
    """Images whose most probable class is theirs; with several labels, those of which each label is right where a
    probability of 0.5 is the threshold."""
    top_k: float = 0.0
    """Images whose class is among the `TOP_K` most probable; with several labels 0."""
    bad: float = 0.0
    """Images that could not be read; in none of the other sums."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, ...]:
        """The sums in the order of the fields."""
        return self.count, self.loss, self.correct, self.top_k, self.bad

    def metrics(self, classes: int, prefix: str = "", *, multi_label: bool = False) -> dict[str, float]:
        """Means over the images: `loss` in nats, `accuracy` and `top_5_accuracy` as shares.

        There is no top-5 accuracy for five classes or fewer: it would always be 1. With several labels, the accuracy
        is called `subset_accuracy`, and there is no other.
        """
        count = max(self.count, 1.0)
        if multi_label:
            return {f"{prefix}loss": self.loss / count, f"{prefix}subset_accuracy": self.correct / count}
        values = {f"{prefix}loss": self.loss / count, f"{prefix}accuracy": self.correct / count}
        if classes > TOP_K:
            values[f"{prefix}top_{TOP_K}_accuracy"] = self.top_k / count
        return values
