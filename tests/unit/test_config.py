"""Configs: flags and YAML, and mistakes in them."""

import subprocess
import sys

import pytest
import yaml

from cnnray import commandline, configs
from cnnray.models.augment import Augmentations
from cnnray.serving.config import ServeConfig
from cnnray.training.config import TrainConfig
from cnnray.training.decided import differences
from cnnray.training.phases import Phase
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
        ({"image_size": 0}, "--image-size: 0 is no size in pixels"),
        ({"image_size": 100_000}, "--image-size must be"),
        ({"architecture": "resnet50", "image_size": 31}, "32 to 4096"),
        ({"architecture": "resnet50", "image_size": "64x31"}, "32 to 4096 pixels for resnet50, not 64x31"),
        ({"image_size": "64x5000"}, "1 to 4096 pixels, not 64x5000"),
        ({"image_size": "64 x 64"}, r"--image-size: '64 x 64' is no size in pixels, such as 224 or 224x320"),
        ({"decode_size": "big"}, "--decode-size: 'big' is no size in pixels"),
        ({"image_size": 64, "decode_size": 60}, "--decode-size: 60x60 is not between 64x64 and twice that"),
        ({"image_size": 64, "decode_size": "64x129"}, "--decode-size: 64x129 is not between 64x64 and twice that"),
        ({"decode_size": 64}, "--decode-size needs --image-size"),
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
        ({"gpus_per_worker": 2}, r"--gpus-per-worker must be 0 or 1, not 2: .* more workers \(--max-workers\)"),
        ({"gpus_per_worker": 0.5}, "must be 0 or 1, not 0.5: workers cannot share a GPU"),
        ({"images_per_worker": 0}, "--images-per-worker must be at least 1"),
        ({"dropout": 1}, "--dropout"),
        ({"weights": "imagenet", "architecture": "vgg_bn"}, "there are none of vgg_bn"),
        ({"weights": "imagenet"}, "give --architecture, too"),
        ({"keep_head": True}, "--keep-head needs a bundle for --weights, which is none"),
        ({"sampling": "balanced", "class_weights": "balanced"}, "do the same: give one of them"),
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
        ({"wait_minutes": -1}, "--wait-minutes must be at least 0"),
    ],
)
def test_impossible_values_name_their_flag(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        _config(**changes)


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
