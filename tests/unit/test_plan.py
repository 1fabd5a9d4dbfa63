"""The plan of a training: its workers on clusters of all kinds, their shares, and what is refused."""

import pytest

from cnnray import configs
from cnnray.cluster import ClusterError, Node, Resources
from cnnray.models import startup
from cnnray.training import decisions
from cnnray.training.config import TrainConfig
from cnnray.training.plan import check_fit, describe, fewest_workers, place, resource_requests, share_out


def _config(**changes):
    return TrainConfig(**{"data": "/d", "output": "/o"} | configs.upgrade(TrainConfig, changes))


def _decided(**changes):
    facts = decisions.DataFacts(images=5000, classes=10, side=64)
    return decisions.decide(_config(**changes), facts)[0]


@pytest.fixture(autouse=True)
def with_cuda(monkeypatch):
    """The TensorFlow of the tests has none."""
    monkeypatch.setattr(startup, "is_built_for_gpus", lambda: True)


def _gpu_nodes(nodes, gpus, cpus=16, kind="A100"):
    return Resources(tuple(Node(cpus=cpus, gpus=gpus, gpu_type=kind) for _ in range(nodes)))


@pytest.mark.parametrize(
    ("cluster", "changes", "workers", "gpus", "precision"),
    [
        (Resources((Node(cpus=2),)), {}, 1, 0, "float32"),
        (Resources((Node(cpus=64),)), {}, 1, 0, "float32"),
        (Resources((Node(cpus=8),) * 3), {}, 3, 0, "float32"),
        # A small head would keep the others waiting.
        (Resources((Node(cpus=2), *(Node(cpus=16),) * 3)), {}, 3, 0, "float32"),
        (Resources((Node(cpus=0), *(Node(cpus=4),) * 2)), {}, 2, 0, "float32"),
        (Resources((Node(cpus=0),)), {}, 1, 0, "float32"),
        (Resources((Node(cpus=8),) * 100), {}, 64, 0, "float32"),  # an image of each step for each
        (Resources((Node(cpus=8),) * 3), {"max_workers": 2}, 2, 0, "float32"),
        (Resources((Node(cpus=8),) * 3), {"min_workers": 1}, 3, 0, "float32"),
        (Resources((Node(cpus=8),)), {"min_workers": 1}, 2, 0, "float32"),
        (Resources((Node(cpus=8), Node(cpus=2))), {"cpus_per_worker": 2.0}, 1, 0, "float32"),
        (_gpu_nodes(2, 4), {}, 8, 1, "bfloat16"),
        (_gpu_nodes(1, 8, kind="H100"), {}, 8, 1, "bfloat16"),
        (_gpu_nodes(1, 8, kind="T4"), {}, 8, 1, "float32"),
        (_gpu_nodes(1, 8, kind=None), {}, 8, 1, "float32"),
        (_gpu_nodes(1, 8, kind="RTX-A6000"), {}, 8, 1, "bfloat16"),
        (Resources((*_gpu_nodes(1, 4).nodes, *_gpu_nodes(1, 4, kind="V100").nodes)), {}, 8, 1, "float32"),
        (_gpu_nodes(1, 8), {"precision": "float32"}, 8, 1, "float32"),
        (_gpu_nodes(1, 8), {"batch_size": 4}, 4, 1, "bfloat16"),
        (_gpu_nodes(1, 8), {"gpus_per_worker": 0.0}, 1, 0, "float32"),
        (_gpu_nodes(1, 1), {"max_workers": 2}, 2, 0, "float32"),
        (_gpu_nodes(1, 1), {"min_workers": 1, "max_workers": 4}, 4, 1, "bfloat16"),
        (_gpu_nodes(1, 0.5), {}, 1, 0, "float32"),
        (Resources((Node(cpus=8),)), {"gpus_per_worker": 1.0}, 1, 1, "float32"),  # is refused afterwards
    ],
)
def test_one_worker_for_each_gpu_or_else_for_each_node(cluster, changes, workers, gpus, precision):
    placed = place(_decided(**changes), 5000, cluster)
    assert (placed.max_workers, placed.gpus_per_worker, placed.precision) == (workers, gpus, precision)
    assert placed.fewest_workers == (changes.get("min_workers") or workers)


def test_trials_side_by_side_share_the_cluster():
    placed = [place(_decided(), 5000, _gpu_nodes(2, 4), parallel=parallel) for parallel in (1, 2, 8, 9)]
    assert [(config.max_workers, config.gpus_per_worker) for config in placed] == [(8, 1), (4, 1), (1, 1), (1, 0)]


def test_no_more_workers_than_images():
    assert place(_decided(), 3, _gpu_nodes(2, 4)).max_workers == 3


def _lines(cluster, **changes):
    placed = place(_decided(**changes), 5000, cluster)
    return describe(placed, share_out(placed, cluster), cluster, "3 GiB, decoded once and kept in memory")


def test_the_plan_has_three_lines(monkeypatch):
    assert _lines(Resources((Node(cpus=2),))) == [
        "workers: 1, each of 1.5 CPU(s) (2 thread(s)), computing in float32; of a cluster of 1 node(s), 2 CPUs and 0 "
        "GPUs",
        "each step: 64 images, 64 of each worker",
        "images: 3 GiB, decoded once and kept in memory",
    ]
    assert _lines(_gpu_nodes(2, 4), images_per_worker=4)[:2] == [
        "workers: 8, each of 1 GPU (A100) and 1 CPU(s) (1 thread(s)), computing in bfloat16; of a cluster of 2 "
        "node(s), 32 CPUs and 8 GPUs",
        "each step: 64 images, 8 of each worker; at most 4 at once",
    ]
    workers, step, _ = _lines(Resources((Node(cpus=8),) * 3), min_workers=1)
    assert workers.startswith("workers: 1 to 3, each of 6 CPU(s) (6 thread(s)),")
    assert step == "each step: 64 images, 22 of each worker, or more with fewer than 3 workers"
    assert "which are not used (--gpus-per-worker 0, or fewer" in _lines(_gpu_nodes(1, 1), max_workers=2)[0]
    monkeypatch.setattr(startup, "is_built_for_gpus", lambda: False)
    assert _lines(_gpu_nodes(1, 8))[0].startswith("workers: 1, each of 12 CPU(s)")
    assert "which this TensorFlow cannot use: install requirements-gpu.lock" in _lines(_gpu_nodes(1, 8))[0]


def _cluster(*cpus, gpus=0.0):
    return Resources(tuple(Node(cpus=count, gpus=gpus / len(cpus), object_store_bytes=10**9) for count in cpus))


@pytest.mark.parametrize(
    ("cpus", "workers", "per_worker", "threads", "decode"),
    [(2, 2, 0.75, 1, 0.25), (2, 1, 1.5, 2, 0.25), (1, 1, 0.75, 1, 0.125), (8, 2, 3.0, 3, 1.0), (4, 4, 0.75, 1, 0.25)],
)
def test_the_default_shares_leave_cpus_for_decoding(cpus, workers, per_worker, threads, decode):
    shares = share_out(_config(workers=workers), _cluster(cpus))
    assert (shares.cpus_per_worker, shares.threads_per_worker, shares.decode_cpus) == (per_worker, threads, decode)
    assert workers * shares.cpus_per_worker + shares.decode_cpus <= cpus


@pytest.mark.parametrize(
    ("cpus", "gpus", "changes", "decoders"),
    [
        ((2,), 0, {"workers": 1}, 2),
        ((2,), 0, {"workers": 2}, 1),
        ((1,), 0, {"workers": 1}, 1),
        ((8,), 0, {"workers": 2}, 4),
        ((8, 8, 8, 8), 0, {"workers": 2}, 8),
        ((2, 2, 2), 0, {"workers": "1:3"}, 2),
        ((32,), 0, {"workers": 1, "cpus_per_worker": 3.0}, 4),
        ((16,), 4, {"workers": 4, "gpus_per_worker": 1.0}, 4),
        ((30,), 8, {"workers": 8, "gpus_per_worker": 1.0}, 3),
    ],
)
def test_a_worker_has_a_decoder_for_each_cpu_of_its_share(cpus, gpus, changes, decoders):
    assert share_out(_config(**changes), _cluster(*cpus, gpus=gpus)).decoders_per_worker == decoders


def test_gpu_workers_take_one_cpu_each():
    shares = share_out(_config(workers=4, gpus_per_worker=1.0), _cluster(16, gpus=4))
    assert (shares.cpus_per_worker, shares.decode_cpus) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "cpus", "sentence"),
    [
        ({"workers": 3}, 2, r"3 worker\(s\) do not fit 2 CPUs"),
        ({"workers": 2, "cpus_per_worker": 2.0}, 2, r"2 worker\(s\) of 2 CPUs do not fit 2 CPUs"),
        ({"workers": 2, "cpus_per_worker": 1.0}, 2, "leave 0 of the cluster's 2 CPUs"),
        ({"workers": 2, "cpus_per_worker": 0.5, "decode_cpus": 1.5}, 2, "reading the images needs 1.5"),
        ({"gpus_per_worker": 1.0}, 2, "with a GPU each do not fit a cluster of 0 GPUs: lower --max-workers, or use"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(changes, cpus, sentence):
    with pytest.raises(ClusterError, match=sentence):
        share_out(_config(**changes), _cluster(cpus))


def test_each_worker_fits_on_one_node():
    assert share_out(_config(workers=2), _cluster(8, 8, 8, 8)).cpus_per_worker == 8.0
    assert share_out(_config(workers=4), _cluster(2, 2, 2)).cpus_per_worker == 1.0
    with pytest.raises(ClusterError, match=r"Only 1 of 2 worker\(s\) of 3 CPUs and 0 GPUs fit the cluster's 3"):
        share_out(_config(workers=2, cpus_per_worker=3.0), _cluster(4, 2, 2))
    with pytest.raises(ClusterError, match="Only 0 of 2"):
        share_out(_config(workers=2, gpus_per_worker=1.0), Resources((Node(cpus=8), Node(cpus=0.5, gpus=4))))


def test_fractions_of_cpus_leave_room_for_decoding():
    assert share_out(_config(workers=4, cpus_per_worker=0.25), _cluster(2)).decode_cpus == 0.25


@pytest.mark.parametrize(
    ("workers", "nodes", "gpus", "per_worker", "decode"),
    [
        ("1:3", (2, 2, 2), 0, 1.5, 0.25),
        ("1:6", (2, 2, 2), 0, 0.75, 0.25),
        ("1:4", (8, 8), 0, 3.0, 1.0),
        ("1:4", (2,), 0, 0.375, 0.125),
        ("2:4", (16, 16), 4, 1.0, 1.0),
        ("1:2", (4, 1), 0, 1.75, 0.25),
        ("1:3", (10,) * 3, 0, 7.5, 1.0),
    ],
)
def test_elastic_workers_leave_cpus_on_every_node(workers, nodes, gpus, per_worker, decode):
    config = _config(workers=workers, gpus_per_worker=float(bool(gpus)))
    cluster = _cluster(*nodes, gpus=gpus)
    shares = share_out(config, cluster)
    assert (shares.cpus_per_worker, shares.decode_cpus) == (per_worker, decode)
    least, most = map(int, workers.split(":"))
    assert cluster.room_for(shares.cpus_per_worker, bool(gpus)) >= most
    # Ray adds up floating-point numbers: rounding must not cost a worker.
    assert sum([shares.cpus_per_worker] * most) // shares.cpus_per_worker == most
    for node in cluster.nodes:
        fit = min(most, Resources((node,)).room_for(shares.cpus_per_worker, bool(gpus)))
        if fit:
            assert node.cpus - fit * shares.cpus_per_worker >= fit * shares.decode_cpus
            if fit >= least:
                check_fit(config, shares, Resources((node,)))


def test_elastic_workers_that_would_fill_a_node_are_refused():
    with pytest.raises(ClusterError, match=r"2 worker\(s\) of 1 CPUs leave 0 of a node's 2 CPUs, and reading the"):
        share_out(_config(workers="1:3", cpus_per_worker=1.0), _cluster(2, 2, 2))
    with pytest.raises(ClusterError, match=r"leave 0\.5 of a node's 2 CPUs, and reading the images needs 1"):
        share_out(_config(workers="1:3", cpus_per_worker=1.5, decode_cpus=1.0), _cluster(2, 2, 2))
    with pytest.raises(ClusterError, match=r"2 worker\(s\) do not fit 1 CPUs"):
        share_out(_config(workers="2:3"), _cluster(1))


def test_only_the_fewest_elastic_workers_must_fit():
    config = _config(workers="1:8", gpus_per_worker=1.0)
    assert share_out(config, _cluster(8, gpus=1)).cpus_per_worker == 0.75
    with pytest.raises(ClusterError, match=r"1 worker\(s\) with a GPU each do not fit a cluster of 0 GPUs"):
        share_out(config, _cluster(8))
    assert resource_requests(config) == [{"CPU": 1.0, "GPU": 1.0}] * 8 + [{"CPU": 1.0}]
    shares = share_out(config, _cluster(8, gpus=1))
    assert fewest_workers(config, shares) == [{"CPU": 0.75, "GPU": 1.0}]


def test_a_cluster_that_lost_too_many_nodes_is_refused():
    config = _config(workers=2)
    shares = share_out(config, _cluster(2, 2, 2))
    assert (shares.cpus_per_worker, shares.decode_cpus) == (2.0, 1.0)
    check_fit(config, shares, _cluster(2, 2, 2))
    with pytest.raises(ClusterError, match="leave 0 of the cluster's 4 CPUs, and reading the images needs 1"):
        check_fit(config, shares, _cluster(2, 2))
    with pytest.raises(ClusterError, match=r"Only 1 of 2 worker\(s\) of 2 CPUs"):
        check_fit(config, shares, _cluster(2))
    # No single node has all the CPUs that are left.
    with pytest.raises(ClusterError, match="leave 1 of the cluster's 5 CPUs, and reading the images needs 1 on one"):
        check_fit(config, shares, _cluster(2.5, 2.5))


def test_decoding_fits_beside_the_workers_after_other_nodes_are_lost():
    config = _config(workers=2, cpus_per_worker=1.5)
    shares = share_out(config, _cluster(2, 2, 2))
    assert shares.decode_cpus == 0.5
    check_fit(config, shares, _cluster(2, 2))
