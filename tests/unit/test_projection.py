"""The benchmark's calculations: doublings, and the part of a job that saturates first at each number of nodes."""

from dataclasses import replace

import pytest

from benchmarks import projection, scale
from benchmarks.projection import Costs, Fleet

COSTS = Costs(
    listing=1e-5, row=1e-5, driver_bytes=2**30, order=1e-7, row_bytes=100,
    image=0.005, image_bytes=50_000, step=0.5, step_images=32, weights=4e6,
)  # fmt: skip


def test_doublings_end_with_the_largest_number():
    assert [scale.doublings(largest) for largest in (0, 1, 2, 3, 8)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]


def test_the_table_shows_the_cost_of_each_doubling():
    lines = scale.table("workers", [("1", 1, 100.0), ("2", 2, 180.0), ("4", 4, 270.0)]).splitlines()[2:]
    assert lines == ["| 1 | 100 | 100.0% |  |", "| 2 | 180 | 90.0% | 10.0% |", "| 4 | 270 | 67.5% | 25.0% |"]


def test_few_nodes_are_limited_by_workers_and_many_by_the_single_driver():
    lowest, before, seconds = projection.project_prediction(COSTS, Fleet(nodes=1), 1e6)
    assert (lowest.part, lowest.images) == ("workers", pytest.approx(1600))
    assert (before, seconds) == (pytest.approx(10), pytest.approx(1e6 / 1600))
    lowest, *_ = projection.project_prediction(COSTS, Fleet(nodes=1000), 1e9)
    assert (lowest.part, lowest.images) == ("the driver", pytest.approx(100_000))


def test_few_prefixes_of_a_bucket_are_a_limit():
    lowest, *_ = projection.project_prediction(COSTS, Fleet(nodes=1000, prefixes=10), 1e9)
    assert (lowest.part, lowest.images) == ("S3's GET requests", 55_000)


def test_large_images_are_limited_by_the_nodes_networks():
    large = replace(COSTS, image=1e-6, image_bytes=projection.NETWORK)
    assert projection.project_prediction(large, Fleet(nodes=3, prefixes=10**6), 1e6)[0].part == "nodes' networks"


def test_all_reduce_sends_at_most_twice_the_gradients_and_lowers_the_efficiency():
    assert projection.all_reduce_seconds(COSTS, 1) == 0
    two, thousand = projection.all_reduce_seconds(COSTS, 2), projection.all_reduce_seconds(COSTS, 1000)
    assert two == pytest.approx(COSTS.weights / projection.NETWORK + 2 * projection.ROUND_TRIP)
    assert thousand > two
    rate, efficiency, seconds = projection.project_training(COSTS, 2, 1e6)
    assert rate == pytest.approx(2 * 32 / (0.5 + two))
    assert efficiency == pytest.approx(0.5 / (0.5 + two))
    assert seconds == pytest.approx(0.05 + 1e6 / rate)  # each finds its own half of the images


def test_the_table_has_a_line_for_each_fleet_and_each_number_of_workers():
    lines = projection.table(COSTS).splitlines()
    assert "| 1000 | 100 | 100,000 | the driver | 2.8 h | 2.8 h | 1.0 GiB |" in lines
    assert sum(line.startswith("| 1000 |") for line in lines) == 3
