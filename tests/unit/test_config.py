"""Configs: flags and YAML, mistakes in them, and the shares of a cluster that the workers get."""

import subprocess
import sys

import pytest
import yaml

from cnnray import commandline, configs
from cnnray.cluster import ClusterError, Node, Resources
from cnnray.models.augment import Augmentations
from cnnray.serving.config import ServeConfig
from cnnray.training.config import TrainConfig
from cnnray.training.decided import differences
from cnnray.training.phases import Phase
from cnnray.training.plan import check_fit, resource_requests, share_out
from cnnray.tuning.config import SearchConfig


def _config(**changes):
    return TrainConfig(**{"data": "/d", "output": "/o"} | configs.upgrade(TrainConfig, changes))


def test_a_submitted_job_takes_no_relative_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(data="d", output="o").output == f"{tmp_path}/o"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for relative in ({"data": "d"}, {"output": "runs/o"}, {"validation": "./v"}):
        ((field, value),) = relative.items()
        with pytest.raises(ValueError, match=f"--{field} {value} is a relative path, and a submitted job"):
            TrainConfig(**{"data": "/d", "output": "/o"} | relative)
    with pytest.raises(ValueError, match="--bundle b is a relative path"):
        ServeConfig(bundle="cats=/a,dogs=b")
    with pytest.raises(ValueError, match=r"--write-config c.yaml is a relative path"):
        ServeConfig(bundle="/a", write_config="c.yaml")
    assert TrainConfig(data="s3://b/d", output="~/o").output.startswith("/")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"batch_size": 1, "max_workers": 2}, "at least --max-workers 2"),
        ({"image_size": 15, "architecture": "vgg_bn"}, "16 to 4096 pixels for vgg_bn"),
        ({"image_size": 0}, "1 to 4096 pixels, not 0"),
        ({"image_size": 100_000}, "--image-size must be"),
        ({"architecture": "resnet50", "image_size": 31}, "32 to 4096"),
        ({"validation_fraction": 0}, "--validation-fraction must be more than 0"),
        ({"validation_fraction": 1.0}, "less than 1"),
        ({"folds": 1}, "--folds must be at least 2"),
        ({"folds": 3, "fold": 3}, "--fold must be 0 to 2, and is 3"),
        ({"fold": 1}, "--fold needs --folds, and is 1"),
        ({"group": "patient", "validation_fraction": 0.6}, "--validation-fraction with --group is at most 0.5"),
        ({"validation": "/v", "group": "patient"}, "--folds and --group divide --data"),
        ({"learning_rate": 0}, "--learning-rate must be more than 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be more than 0"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker must be more than 0"),
        ({"gpus_per_worker": 2}, "raise --max-workers"),
        ({"dropout": 1}, "--dropout"),
        ({"weights": "imagenet", "architecture": "vgg_bn"}, "there are none of vgg_bn"),
        ({"weights": "imagenet"}, "give --architecture, too"),
        ({"data": ""}, "--data is empty"),
        ({"seed": -1}, "--seed must be"),
        ({"seed": 2**32}, "--seed must be"),
        ({"checkpoint_every_steps": 0}, "--checkpoint-every-steps"),
        ({"max_failures": -1}, "--max-failures"),
        ({"workers": 0}, "--max-workers must be at least 1"),
        ({"workers": "0:2"}, "--min-workers must be at least 1"),
        ({"workers": "4:1"}, "--min-workers 4 is more than --max-workers 1"),
        ({"workers": "1:"}, "--workers '1:': expected a number, or MIN:MAX"),
        ({"workers": "1:2:3"}, "expected a number, or MIN:MAX"),
        ({"workers": "-1:3"}, "--min-workers must be at least 1"),
        ({"workers": "many"}, "expected a number, or MIN:MAX"),
        (
            {"workers": "1:80", "batch_size": 64},
            "--batch-size 64 is over all workers: it must be at least --max-workers 80",
        ),
        ({"workers": "1:3", "cpus_per_worker": 0.3}, "--cpus-per-worker 0.3 .* expected sixteenths, such as 0.3125"),
        ({"workers": "1:3", "gpus_per_worker": 0.01}, "--gpus-per-worker 0.01 .*, such as 0.0625"),
        ({"wait_minutes": -1}, "--wait-minutes must be at least 0"),
    ],
)
def test_impossible_values_name_their_flag(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        _config(**changes)


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
        ({"workers": 3}, 2, "3 workers do not fit 2 CPUs"),
        ({"workers": 2, "cpus_per_worker": 2.0}, 2, "2 workers of 2 CPUs do not fit 2 CPUs"),
        ({"workers": 2, "cpus_per_worker": 1.0}, 2, "leave 0 of the cluster's 2 CPUs"),
        ({"workers": 2, "cpus_per_worker": 0.5, "decode_cpus": 1.5}, 2, "reading the images needs 1.5"),
        ({"gpus_per_worker": 1.0}, 2, "do not fit a cluster of 0 GPUs"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(changes, cpus, sentence):
    with pytest.raises(ClusterError, match=sentence):
        share_out(_config(**changes), _cluster(cpus))


def test_each_worker_fits_on_one_node():
    assert share_out(_config(workers=2), _cluster(8, 8, 8, 8)).cpus_per_worker == 8.0
    assert share_out(_config(workers=4), _cluster(2, 2, 2)).cpus_per_worker == 1.0
    with pytest.raises(ClusterError, match="Only 1 of 2 workers of 3 CPUs and 0 GPUs fit the cluster's 3"):
        share_out(_config(workers=2, cpus_per_worker=3.0), _cluster(4, 2, 2))
    with pytest.raises(ClusterError, match="Only 0 of 2"):
        share_out(_config(workers=2, gpus_per_worker=1.0), Resources((Node(cpus=8), Node(cpus=0.5, gpus=4))))


def test_fractions_of_cpus_leave_room_for_decoding():
    assert share_out(_config(workers=4, cpus_per_worker=0.25), _cluster(2)).decode_cpus == 0.25


@pytest.mark.parametrize(("text", "fewest", "most"), [("3", 3, 3), ("1:4", 1, 4), ("2:2", 2, 2), ("16:16", 16, 16)])
def test_the_earlier_flag_workers_is_read(text, fewest, most, tmp_path):
    required = ["--data", "/d", "--output", "/o"]
    for arguments in (
        ["--workers", text],
        [f"--workers={text}"],
        ["--min-workers", str(fewest), "--max-workers", str(most)],
    ):
        config = commandline.parse(TrainConfig, "jobs/train.py", [*required, *arguments])
        assert (config.fewest_workers, config.max_workers) == (fewest, most)
        assert config.is_elastic == (fewest < most)
    # YAML 1.1 would read 1:4 as 64.
    (tmp_path / "c.yaml").write_text(f"learning_rate: 1e-3\nworkers: {text}  # or more\nepochs: 3\n")
    config = commandline.parse(TrainConfig, "jobs/train.py", [*required, "--config", str(tmp_path / "c.yaml")])
    assert (config.fewest_workers, config.max_workers, config.learning_rate, config.epochs) == (fewest, most, 1e-3, 3)
    assert TrainConfig(**configs.load(TrainConfig, configs.dump(config), "config.yaml")) == config


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
    with pytest.raises(ClusterError, match="2 workers of 1 CPUs leave 0 of a node's 2 CPUs, and reading the images"):
        share_out(_config(workers="1:3", cpus_per_worker=1.0), _cluster(2, 2, 2))
    with pytest.raises(ClusterError, match=r"leave 0\.5 of a node's 2 CPUs, and reading the images needs 1"):
        share_out(_config(workers="1:3", cpus_per_worker=1.5, decode_cpus=1.0), _cluster(2, 2, 2))
    with pytest.raises(ClusterError, match="2 workers do not fit 1 CPUs"):
        share_out(_config(workers="2:3"), _cluster(1))


def test_only_the_fewest_elastic_workers_must_fit():
    config = _config(workers="1:8", gpus_per_worker=1.0)
    assert share_out(config, _cluster(8, gpus=1)).cpus_per_worker == 0.75
    with pytest.raises(ClusterError, match="1 workers of 1 GPUs do not fit a cluster of 0 GPUs"):
        share_out(config, _cluster(8))
    assert resource_requests(config) == [{"CPU": 1.0, "GPU": 1.0}] * 8 + [{"CPU": 1.0}]


def test_a_cluster_that_lost_too_many_nodes_is_refused():
    config = _config(workers=2)
    shares = share_out(config, _cluster(2, 2, 2))
    assert (shares.cpus_per_worker, shares.decode_cpus) == (2.0, 1.0)
    check_fit(config, shares, _cluster(2, 2, 2))
    with pytest.raises(ClusterError, match="leave 0 of the cluster's 4 CPUs, and reading the images needs 1"):
        check_fit(config, shares, _cluster(2, 2))
    with pytest.raises(ClusterError, match="Only 1 of 2 workers of 2 CPUs"):
        check_fit(config, shares, _cluster(2))
    # No single node has all the CPUs that are left.
    with pytest.raises(ClusterError, match="leave 1 of the cluster's 5 CPUs, and reading the images needs 1 on one"):
        check_fit(config, shares, _cluster(2.5, 2.5))


def test_decoding_fits_beside_the_workers_after_other_nodes_are_lost():
    config = _config(workers=2, cpus_per_worker=1.5)
    shares = share_out(config, _cluster(2, 2, 2))
    assert shares.decode_cpus == 0.5
    check_fit(config, shares, _cluster(2, 2))


def test_a_search_has_a_fixed_number_of_workers():
    with pytest.raises(ValueError, match="--min-workers: the trials of a search have a fixed number"):
        SearchConfig(data="/d", output="/o", search={"dropout": {"choice": [0]}}, min_workers=1)


def test_only_flags_that_change_the_training_prevent_a_resume():
    earlier = configs.as_dict(_config(schedule="constant"))
    assert (
        differences(_config(epochs=99, workers="1:4", wait_minutes=3, cache="none", schedule="constant"), earlier)
        == []
    )
    assert differences(_config(seed=7, schedule="constant"), earlier) == ["--seed 0 (now 7)"]


def test_nested_flags_and_lists_are_parsed(tmp_path):
    config = commandline.parse(
        SearchConfig, "jobs/tune.py",
        ["--data", "/d", "--output", "/o", "--search", "dropout=choice([0])", "augment=choice(['none'])",
         "--augmentations.horizontal-flip", "false", "--phases", "[{name: a, epochs: 2}]"],
    )  # fmt: skip
    assert config.search == {"dropout": {"choice": [0]}, "augment": {"choice": ["none"]}}
    assert config.augmentations == Augmentations(horizontal_flip=False)
    assert config.phases == [Phase(name="a", epochs=2)]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(configs.as_dict(config)))
    assert commandline.parse(SearchConfig, "jobs/tune.py", ["--config", str(tmp_path / "c.yaml")]) == config


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--augmentations.rotation", "3"], "--augmentations.rotation must be 0 to 1"),
        (["--phases", "[{name: a, epochs: 0}]"], "a has 0 epochs"),
        (["--phases", "[{name: a, epoch: 2}]"], "epoch"),
        (["--phases", "none"], "phases"),
        (["--augment", "heavy"], "augment"),
    ],
)
def test_mistakes_in_nested_flags_get_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        commandline.parse(TrainConfig, "jobs/train.py", ["--data", "/d", "--output", "/o", *flags])
    message = capsys.readouterr().err
    assert sentence in message
    assert len(message.strip().splitlines()) == 1


def test_a_terminated_job_says_that_it_can_be_resumed():
    job = "import os; from cnnray import commandline; commandline.run(lambda: os.kill(os.getpid(), 15))"
    completed = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stdout) == (143, "")
    assert completed.stderr == "Stopped; the same command goes on from what was done.\n"


def test_stdout_holds_the_result_alone(tmp_path):
    job = (
        "from cnnray import commandline; from cnnray.prediction.config import PredictConfig; "
        "commandline.main(PredictConfig, 'jobs/predict.py', lambda config: print('a worker died') or {'images': 1})"
    )
    flags = ["--bundle", str(tmp_path), "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    completed = subprocess.run([sys.executable, "-c", job, *flags], capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, '{"images": 1}\n', "a worker died\n")
