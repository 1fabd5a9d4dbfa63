import numpy as np
import pytest

from cnnray.training import epoch


@pytest.mark.parametrize("images", [1, 2, 7, 64, 65, 1438])
@pytest.mark.parametrize("batch_size", [2, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_once_in_the_same_steps_whatever_the_workers(images, batch_size, world):
    order, bounds = epoch.order(3, 5, images), epoch.step_bounds(images, batch_size)
    sizes = np.diff(bounds)
    assert sizes.max() <= batch_size
    assert sizes.max() - sizes.min() <= 1
    seen = []
    for rank in range(world):
        rows, parts = epoch.rank_rows(order, bounds, 0, rank, world)
        seen.append(np.split(rows, np.cumsum(parts)[:-1]))
    for step in range(len(bounds) - 1):
        together = np.concatenate([seen[rank][step] for rank in range(world)])
        assert sorted(together) == sorted(order[bounds[step] : bounds[step + 1]])
    assert sorted(np.concatenate([part for rank in seen for part in rank])) == list(range(images))


def test_going_on_reads_the_rest():
    order, bounds = epoch.order(0, 0, 100), epoch.step_bounds(100, 8)
    whole, sizes = epoch.rank_rows(order, bounds, 0, 1, 2)
    rest, rest_sizes = epoch.rank_rows(order, bounds, 4, 1, 2)
    assert rest.tolist() == whole[sum(sizes[:4]) :].tolist()
    assert rest_sizes == sizes[4:]
    assert epoch.rank_rows(order, bounds, len(bounds) - 1, 0, 2)[1] == []


def test_workers_that_come_and_go_change_no_global_batch():
    """A run that goes on from a checkpoint with another number of workers sees the same images in each step."""
    order, bounds = epoch.order(1, 2, 1438), epoch.step_bounds(1438, 64)
    steps = len(bounds) - 1
    batches = []
    for world, first, stop in ((3, 0, 5), (2, 5, 9), (1, 9, 10), (3, 10, steps)):
        parts = []
        for rank in range(world):
            rows, sizes = epoch.rank_rows(order, bounds, first, rank, world)
            parts.append(np.split(rows, np.cumsum(sizes)[:-1])[: stop - first])
        batches += [np.concatenate(step) for step in zip(*parts, strict=True)]
    assert len(batches) == steps
    for step, batch in enumerate(batches):
        assert sorted(batch) == sorted(order[bounds[step] : bounds[step + 1]])


def test_order_is_a_function_of_seed_and_epoch():
    assert epoch.order(1, 2, 50).tolist() == epoch.order(1, 2, 50).tolist()
    assert epoch.order(1, 2, 50).tolist() != epoch.order(1, 3, 50).tolist()
    assert epoch.order(2, 2, 50).tolist() != epoch.order(1, 2, 50).tolist()


def test_tallies_add_up_and_tell_a_lost_or_repeated_image():
    ids = np.arange(1000)
    parts = sum(epoch.tally(part) for part in (ids[::2], ids[1::2]))
    assert parts.tolist() == epoch.tally(ids).tolist()
    assert epoch.tally(ids[:-1]).tolist() != epoch.tally(ids).tolist()
    swapped = ids.copy()
    swapped[[3, 8]] = [4, 7]  # 3 and 8 lost, 4 and 7 twice: same number, same sum
    assert epoch.tally(swapped)[:2].tolist() == epoch.tally(ids)[:2].tolist()
    assert epoch.tally(swapped).tolist() != epoch.tally(ids).tolist()
