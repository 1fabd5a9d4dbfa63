"""The order of an epoch: a pure function of the seed and the epoch, whatever the number of workers.

An epoch is a permutation of the training images, cut into equal steps; step s of worker r of w takes every
w-th image of the step from the r-th on. A position in an epoch is therefore one number, the step, and a run
may go on from it with another number of workers.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def order(seed: int, epoch: int, images: int) -> Ints:
    """The permutation of `images` row numbers of an epoch: int64 (images,)."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def steps(images: int, batch_size: int) -> int:
    """The number of steps of an epoch."""
    return -(-images // batch_size)


def step_bounds(images: int, batch_size: int) -> Ints:
    """Where each step begins in the order, and after the last, where it ends: int64 (steps + 1,).

    All steps have the same number of images or one more, and at most `batch_size`. (A short last step, as
    usual, would be noisier than the others, and might leave workers without an image.)
    """
    count = steps(images, batch_size)
    return np.arange(count + 1, dtype=np.int64) * images // count


def rank_rows(epoch_order: Ints, bounds: Ints, first_step: int, rank: int, world: int) -> tuple[Ints, list[int]]:
    """What a worker reads from `first_step` to the end of an epoch.

    Returns:
        Row numbers, int64, in the order of reading, and the length of each step's part.
    """
    parts = [
        epoch_order[start + rank : stop : world]
        for start, stop in zip(bounds[first_step:-1], bounds[first_step + 1 :], strict=True)
    ]
    return np.concatenate([np.empty(0, np.int64), *parts]), [len(part) for part in parts]


def tally(ids: Ints) -> Ints:
    """A checksum that tells two collections of ids apart, in any order: int64 (3,).

    Their number, their sum, and the sum of 31 bits of a hash (splitmix64, Steele et al. 2014). Tallies of the
    workers add up; an epoch's must equal that of the manifest, or an image was lost or seen twice.
    """
    values = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashed = ((values ^ (values >> np.uint64(31))) & np.uint64(0x7FFFFFFF)).astype(np.int64)
    return np.asarray([len(ids), ids.sum(), hashed.sum()], np.int64)


TOP_K = 5


@dataclass(frozen=True)
class Sums:
    """Sums over the images of one or more steps."""

    count: float = 0.0
    """Images."""
    loss: float = 0.0
    """Cross-entropy in nats."""
    correct: float = 0.0
    """Images whose most probable class is theirs."""
    top_k: float = 0.0
    """Images whose class is among the `TOP_K` most probable."""
    bad: float = 0.0
    """Images that could not be read; in none of the other sums."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, ...]:
        """The sums in the order of the fields."""
        return self.count, self.loss, self.correct, self.top_k, self.bad

    def metrics(self, classes: int, prefix: str = "") -> dict[str, float]:
        """Means over the images: `loss` in nats, `accuracy` and `top_5_accuracy` as shares.

        There is no top-5 accuracy for five classes or fewer: it would always be 1.
        """
        count = max(self.count, 1.0)
        values = {f"{prefix}loss": self.loss / count, f"{prefix}accuracy": self.correct / count}
        if classes > TOP_K:
            values[f"{prefix}top_{TOP_K}_accuracy"] = self.top_k / count
        return values
