"""The order of the images in an epoch, and how steps and workers share it."""

import math
from collections import Counter

import numpy as np
import pytest

from cnnray.training import epoch
from cnnray.training.epoch import BalancedEpoch, Epoch, LanesEpoch


@pytest.mark.parametrize(("classes", "names"), [(2, 2), (5, 2), (6, 3), (1000, 3)])
def test_there_is_a_top_5_accuracy_for_more_than_five_classes(classes, names):
    metrics = epoch.Sums(count=4, loss=2, correct=1, top_k=3).metrics(classes, "val_")
    assert metrics == dict(list({"val_loss": 0.5, "val_accuracy": 0.25, "val_top_5_accuracy": 0.75}.items())[:names])


@pytest.fixture(params=["stored", "computed"])
def kind(request, monkeypatch):
    """Orders of few images are stored, and those of many are computed."""
    if request.param == "computed":
        monkeypatch.setattr(epoch, "_STORED", 0)
    return request.param


def _whole(ordered):
    return ordered.at(np.arange(ordered.images))


@pytest.mark.parametrize("images", [1, 2, 7, 64, 65, 1438])
@pytest.mark.parametrize("batch_size", [2, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_steps_have_the_same_images_for_any_number_of_workers(images, batch_size, world, kind):
    ordered = Epoch(3, 5, images, batch_size)
    order, seen = _whole(ordered), []
    assert sorted(order) == list(range(images))
    sizes = [stop - start for start, stop in map(ordered.bounds, range(ordered.steps))]
    assert (sum(sizes), max(sizes) <= batch_size, max(sizes) - min(sizes) <= 1) == (images, True, True)
    for step in range(ordered.steps):
        shares = [ordered.rows(step, rank, world) for rank in range(world)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        start, stop = ordered.bounds(step)
        assert sorted(np.concatenate(shares)) == sorted(order[start:stop])
        seen += np.concatenate(shares).tolist()
    assert sorted(seen) == list(range(images))


def test_the_order_depends_on_seed_and_epoch_only(kind):
    orders = [_whole(Epoch(seed, number, 50, 8)).tolist() for seed, number in ((1, 2), (1, 2), (1, 3), (2, 2))]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 3
    assert _whole(Epoch(1, 2, 50, 7)).tolist() == orders[0]


def test_every_order_is_as_likely_as_any_other(kind):
    """Also of few images: all 24 orders of four."""
    counts = Counter(tuple(_whole(Epoch(1, number, 4, 2)).tolist()) for number in range(12_000))
    assert len(counts) == 24
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 50  # chi-squared, p = 0.001
    firsts = np.bincount([int(Epoch(1, number, 100, 2).at(np.zeros(1, np.int64))[0]) for number in range(10_000)])
    assert ((firsts - 100) ** 2 / 100).sum() < 149


def test_runs_of_earlier_versions_keep_their_order(monkeypatch):
    expected = np.random.default_rng([3, 1]).permutation(100)
    np.testing.assert_array_equal(_whole(Epoch(3, 1, 100, 8)), expected)
    monkeypatch.setattr(epoch, "_STORED", 0)
    np.testing.assert_array_equal(_whole(Epoch(3, 1, 100, 8, order=1)), expected)
    assert _whole(Epoch(3, 1, 100, 8)).tolist() != expected.tolist()


def test_the_order_of_a_billion_images_takes_no_memory():
    ordered = Epoch(0, 0, 10**9, 64)
    rows = np.concatenate([ordered.rows(step) for step in (0, 1, 2, ordered.steps - 1)])
    assert len(set(rows.tolist())) == len(rows) == 256
    assert rows.max() < 10**9
    assert "_stored" not in vars(ordered)


LANES = 24
GROUPS = [[1], [7], [3, 1, 5], [40] * 13, [9] * 60 + [1], [100] * 250]


@pytest.mark.parametrize("lengths", GROUPS, ids=lambda lengths: str(len(lengths)))
def test_lanes_read_row_groups_from_their_beginning_to_their_end(lengths):
    starts = np.cumsum([0, *lengths])
    images = int(starts[-1])
    ordered = LanesEpoch(3, 5, images, 16, lanes=LANES, starts=starts)
    rows = _whole(ordered)
    assert sorted(rows) == list(range(images))
    groups = np.searchsorted(starts, rows, side="right") - 1
    for lane in range(ordered.lanes):
        mine, of_group = rows[lane :: ordered.lanes], groups[lane :: ordered.lanes]
        assert abs(len(mine) - images / ordered.lanes) < 1
        begins = np.flatnonzero(np.diff(mine) != 1) + 1  # elsewhere, row after row
        assert sum(row not in starts for row in mine[begins]) <= 1  # where the lane was cut
        assert len(begins) <= len(set(of_group.tolist())) + 1
    other = LanesEpoch(3, 6, images, 16, lanes=LANES, starts=starts)
    assert len(lengths) < 13 or _whole(other).tolist() != rows.tolist()
    assert _whole(LanesEpoch(3, 5, images, 8, lanes=LANES, starts=starts)).tolist() == rows.tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("lengths", GROUPS, ids=lambda lengths: str(len(lengths)))
def test_workers_share_the_lanes(lengths, world):
    starts = np.cumsum([0, *lengths])
    ordered = LanesEpoch(3, 5, int(starts[-1]), 16, lanes=LANES, starts=starts)
    read, of_worker = [set() for _ in range(world)], LANES // math.gcd(LANES, world)
    for step in range(ordered.steps):
        start, stop = ordered.bounds(step)
        shares = [ordered.rows(step, rank, world) for rank in range(world)]
        assert sorted(np.concatenate(shares)) == sorted(ordered.at(np.arange(start, stop)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for rank in range(world):
            lanes = ordered.lanes_of(step, rank, world)
            assert len(lanes) == len(shares[rank])
            assert (lanes < of_worker).all()
            read[rank] |= set((ordered.places(step, rank, world) % ordered.lanes).tolist())
    assert max(map(len, read)) <= of_worker
    if LANES % world == 0:
        assert sum(map(len, read)) == len(set.union(*read))


def test_neighbours_in_the_order_of_lanes_are_of_all_classes():
    """Also where files are sorted by class, each or all together."""
    starts = np.arange(0, 24_001, 100)
    ordered = LanesEpoch(0, 0, 24_000, 60, lanes=240, starts=starts)
    for labels in (np.arange(24_000) // 2400, np.arange(24_000) % 100 // 10):
        steps = labels[_whole(ordered)].reshape(-1, 60)
        classes = [len(set(step.tolist())) for step in steps]
        shuffled = labels[_whole(Epoch(0, 0, 24_000, 60))].reshape(-1, 60)
        assert np.mean(classes) > 0.98 * np.mean([len(set(step.tolist())) for step in shuffled])


def test_tallies_add_up_and_reveal_a_lost_or_repeated_image():
    ids = np.arange(1000)
    parts = sum(epoch.tally(part) for part in (ids[::2], ids[1::2]))
    assert parts.tolist() == epoch.tally(ids).tolist()
    assert epoch.tally(ids[:-1]).tolist() != epoch.tally(ids).tolist()
    swapped = ids.copy()
    swapped[[3, 8]] = [4, 7]  # 3 and 8 are lost, 4 and 7 repeated: the count and the sum stay the same
    assert epoch.tally(swapped)[:2].tolist() == epoch.tally(ids)[:2].tolist()
    assert epoch.tally(swapped).tolist() != epoch.tally(ids).tolist()


def test_a_balanced_epoch_has_as_many_images_of_each_class():
    targets = np.repeat([0, 1, 3], [700, 290, 10])
    np.random.default_rng(0).shuffle(targets)
    orders = [BalancedEpoch(1, number, 1000, 64, targets=targets) for number in (0, 0, 1)]
    first, again, second = (_whole(ordered) for ordered in orders)
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != second.tolist()
    for rows in (first, second):
        assert sorted(np.bincount(targets[rows])) == [0, 333, 333, 334]
        times = np.bincount(rows, minlength=1000)
        for number in (0, 1, 3):
            of_class = times[targets == number]
            assert of_class.max() - of_class.min() == 1
    # A class's images are spread over the whole epoch.
    assert abs(np.flatnonzero(targets[first] == 3).mean() - 500) < 50
    steps = np.concatenate([orders[0].rows(step, rank, 2) for step in range(orders[0].steps) for rank in range(2)])
    assert sorted(steps) == sorted(first)
