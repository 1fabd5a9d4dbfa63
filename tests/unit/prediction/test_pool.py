"""How many workers a cluster has room for, and how large they are."""

import pytest

from cnnray.cluster import ClusterError
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.pool import Pool, plan_pool
from tests.unit.prediction.helpers import make_cluster


@pytest.mark.parametrize(
    ("nodes", "engine", "options", "expected"),
    [
        ([(2, 0)], "onnx", {}, Pool(smallest=1, first=2, largest=2)),
        ([(0.5, 0)], "onnx", {}, Pool(smallest=1, first=1, largest=1, cpus=0.5)),
        ([(8, 0), (8, 0)], "onnx", {"cpus_per_worker": 4}, Pool(smallest=1, first=4, largest=4, cpus=4)),
        ([(2, 0)], "onnx", {"max_workers": 9}, Pool(smallest=1, first=2, largest=9)),
        ([(4, 0)], "onnx", {"decoding": "tasks"}, Pool(smallest=1, first=2, largest=2, decode_cpus=1)),
        ([(8, 2)], "keras", {}, Pool(smallest=1, first=2, largest=2, cpus=4, gpus=1)),
        ([(8, 2)], "keras-bfloat16", {}, Pool(smallest=1, first=2, largest=2, cpus=4, gpus=1)),
        ([(8, 2)], "keras", {"gpus_per_worker": 0}, Pool(smallest=1, first=8, largest=8)),
        ([(8, 2)], "onnx-int8", {}, Pool(smallest=1, first=8, largest=8)),
        ([(4, 1), (16, 0)], "keras", {}, Pool(smallest=1, first=1, largest=1, gpus=1, decode_cpus=1)),
        ([(4, 1), (16, 0)], "keras", {"decoding": "workers"}, Pool(smallest=1, first=1, largest=1, cpus=4, gpus=1)),
    ],
)
def test_the_pool_fits_the_cluster(nodes, engine, options, expected):
    assert plan_pool(PredictOptions(**options), engine, make_cluster(*nodes)) == expected


@pytest.mark.parametrize(
    ("nodes", "options", "sentence"),
    [
        ([(2, 0), (2, 0)], {"cpus_per_worker": 4}, "No worker of 4 CPUs and 0 GPUs fits the cluster's 2 node"),
        ([(2, 0)], {"gpus_per_worker": 1}, "No worker of 1 CPUs and 1 GPUs fits"),
        ([(2, 0)], {"decoding": "tasks", "max_workers": 2}, "2 workers of 1 CPUs leave none of the cluster's 2"),
        ([(2, 0), (2, 0)], {"decoding": "tasks", "cpus_per_worker": 1, "max_workers": 4}, "leave none"),
        ([(0, 0)], {}, "The cluster has no CPUs"),
        ([(2, 0)], {"min_workers": 3}, "--min-workers 3 do not fit the cluster, which has room for 2"),
    ],
)
def test_pools_that_would_wait_for_ever_are_refused(nodes, options, sentence):
    with pytest.raises(ClusterError, match=sentence):
        plan_pool(PredictOptions(**options), "onnx", make_cluster(*nodes))
