"""The order of the images in an epoch, and how steps and workers share it."""

import numpy as np
import pytest

from cnnray.training import epoch


@pytest.mark.parametrize(("classes", "names"), [(2, 2), (5, 2), (6, 3), (1000, 3)])
def test_there_is_a_top_5_accuracy_for_more_than_five_classes(classes, names):
    metrics = epoch.Sums(count=4, loss=2, correct=1, top_k=3).metrics(classes, "val_")
    assert metrics == dict(list({"val_loss": 0.5, "val_accuracy": 0.25, "val_top_5_accuracy": 0.75}.items())[:names])


@pytest.mark.parametrize("images", [1, 2, 7, 64, 65, 1438])
@pytest.mark.parametrize("batch_size", [2, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_steps_have_the_same_images_for_any_number_of_workers(images, batch_size, world):
    order, bounds = epoch.order(3, 5, images), epoch.step_bounds(images, batch_size)
    sizes = np.diff(bounds)
    assert sizes.max() <= batch_size
    assert sizes.max() - sizes.min() <= 1
    steps_by_rank = []
    for rank in range(world):
        rows, parts = epoch.rank_rows(order, bounds, 0, rank, world)
        steps_by_rank.append(np.split(rows, np.cumsum(parts)[:-1]))
    for step in range(len(bounds) - 1):
        batch = np.concatenate([steps_by_rank[rank][step] for rank in range(world)])
        assert sorted(batch) == sorted(order[bounds[step] : bounds[step + 1]])
    assert sorted(np.concatenate([part for steps in steps_by_rank for part in steps])) == list(range(images))


def test_a_resume_reads_the_remaining_steps():
    order, bounds = epoch.order(0, 0, 100), epoch.step_bounds(100, 8)
    whole, sizes = epoch.rank_rows(order, bounds, 0, 1, 2)
    rest, rest_sizes = epoch.rank_rows(order, bounds, 4, 1, 2)
    assert rest.tolist() == whole[sum(sizes[:4]) :].tolist()
    assert rest_sizes == sizes[4:]
    assert epoch.rank_rows(order, bounds, len(bounds) - 1, 0, 2)[1] == []


def test_a_changed_number_of_workers_changes_no_global_batch():
    """A run that resumes with another number of workers gets the same images in each step."""
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


def test_the_order_depends_on_seed_and_epoch_only():
    assert epoch.order(1, 2, 50).tolist() == epoch.order(1, 2, 50).tolist()
    assert epoch.order(1, 2, 50).tolist() != epoch.order(1, 3, 50).tolist()
    assert epoch.order(2, 2, 50).tolist() != epoch.order(1, 2, 50).tolist()


def test_tallies_add_up_and_reveal_a_lost_or_repeated_image():
    ids = np.arange(1000)
    parts = sum(epoch.tally(part) for part in (ids[::2], ids[1::2]))
    assert parts.tolist() == epoch.tally(ids).tolist()
    assert epoch.tally(ids[:-1]).tolist() != epoch.tally(ids).tolist()
    swapped = ids.copy()
    swapped[[3, 8]] = [4, 7]  # 3 and 8 are lost, 4 and 7 repeated: the count and the sum stay the same
    assert epoch.tally(swapped)[:2].tolist() == epoch.tally(ids)[:2].tolist()
    assert epoch.tally(swapped).tolist() != epoch.tally(ids).tolist()
