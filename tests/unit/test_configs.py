"""Rules of a config's fields, differences between runs, and `config.yaml` across versions."""

import subprocess
import sys
from dataclasses import dataclass, field, fields
from typing import ClassVar

import pytest
import yaml

import cnnray
from cnnray import commandline, configs
from cnnray.configs import NewerFormatError, rules
from cnnray.errors import BadInputError
from cnnray.prediction.config import PredictConfig
from cnnray.tracking.config import TrackingConfig
from cnnray.training.config import ClusterConfig, DataConfig, ModelConfig, TrainConfig
from cnnray.training.phases import Phase
from cnnray.training.recipe_config import RecipeConfig
from cnnray.tuning.config import SearchConfig
from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class _Nested:
    zoom: float = 0.1
    crop: float | None = None


@configs.group(resumable=True, searchable=False)
@dataclass(frozen=True, kw_only=True)
class _Machines:
    workers: int = 2
    interval: int = field(default=5, metadata=rules(resumable=False, searchable=True))


@configs.group()
@dataclass(frozen=True, kw_only=True)
class _Config(_Machines):
    RENAMED: ClassVar[configs.Renamed] = {"processes": lambda value: {"workers": int(value)}}

    data: str
    rate: float = 0.1
    nested: _Nested = field(default_factory=_Nested)
    phases: tuple[_Nested, ...] = ()


def test_a_fields_rules_win_over_its_groups_and_those_over_the_defaults():
    assert configs.names(_Config, resumable=True) == {"workers"}
    assert configs.names(_Config, searchable=False) == {"workers"}
    assert configs.names(_Config, resumable=False, searchable=True) == {
        "data",
        "rate",
        "nested",
        "phases",
        "interval",
    }
    assert configs.names(_Config, tracked=False) == set()
    assert configs.groups(_Config) == [
        (_Machines, set()),
        (_Config, {"workers", "interval"}),
    ]


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"workers": 9}, []),
        ({"interval": 9}, ["--interval 9 (now 5)"]),
        ({"rate": 0.5}, ["--rate 0.5 (now 0.1)"]),
        ({"nested": {"zoom": 0.1}}, []),  # written by a version without `crop`
        ({"nested": {"crop": 0.2}}, ["--nested {'zoom': 0.1, 'crop': 0.2} (now {'zoom': 0.1, 'crop': None})"]),
        ({"nested": {"zoom": 0.2}}, ["--nested {'zoom': 0.2, 'crop': None} (now {'zoom': 0.1, 'crop': None})"]),
        ({"phases": [{"zoom": 1.0, "crop": None}]}, ["--phases [{'zoom': 1.0, 'crop': None}] (now [])"]),
        ({"nested": None}, ["--nested None (now {'zoom': 0.1, 'crop': None})"]),
        ({"unknown": 1}, []),
    ],
)
def test_differences_name_the_flags_that_are_not_resumable(changes, differences):
    config = _Config(data="/d")
    assert configs.differences(config, configs.as_dict(config) | changes) == differences


def test_a_field_that_an_earlier_version_lacked_had_its_default():
    earlier = {"data": "/d"}
    assert configs.differences(_Config(data="/d"), earlier) == []
    assert configs.differences(_Config(data="/d", rate=0.3), earlier) == ["--rate 0.1 (now 0.3)"]
    assert configs.differences(_Config(data="/d"), {}) == ["--data None (now /d)"]


def test_resumable_fields_can_be_fixed():
    config = _Config(data="/d", workers=3)
    assert configs.differences(config, {"data": "/d"}) == []
    assert configs.differences(config, {"data": "/d"}, {"workers"}) == ["--workers 2 (now 3)"]
    assert configs.differences(config, {"data": "/d", "workers": 3}, {"workers"}) == []


def test_a_dumped_config_is_loaded_with_its_changes_and_without_its_header():
    config = _Config(data="/d", rate=1e-4, nested=_Nested(zoom=0.5))
    text = configs.dump(config, workers=7)
    assert yaml.safe_load(text)["cnnray"] == {
        "version": cnnray.__version__, "config": configs.CONFIG_FORMAT, "output": configs.OUTPUT_FORMAT,
    }  # fmt: skip
    loaded = configs.load(_Config, text, "c.yaml")
    assert loaded == {
        "data": "/d", "rate": 1e-4, "nested": {"zoom": 0.5, "crop": None}, "phases": [], "workers": 7, "interval": 5,
    }  # fmt: skip


def test_an_unchanged_config_is_the_same_after_dump_and_load():
    config = _Config(data="/d", rate=0.3, nested=_Nested(crop=0.2), phases=(_Nested(zoom=0.5),), workers=4)
    assert configs.differences(config, configs.load(_Config, configs.dump(config), "c.yaml"), {"workers"}) == []
    training = TrainConfig(data="/d", output="/o", epochs=3, phases=[Phase(name="a", epochs=2)], max_workers=4)
    assert TrainConfig(**configs.load(TrainConfig, configs.dump(training), "c.yaml")) == training


@pytest.mark.parametrize("header", ["", "cnnray: null\n", "cnnray: 0.1.0\n", "cnnray: {version: 0.1.0}\n"])
def test_files_without_format_numbers_are_read(header):
    assert configs.load(_Config, f"{header}data: /d\nrate: 0.3\n", "c.yaml") == {"data": "/d", "rate": 0.3}


def test_earlier_names_are_read_and_present_names_win():
    assert configs.load(_Config, "data: /d\nprocesses: 4\n", "c.yaml") == {"data": "/d", "workers": 4}
    assert configs.upgrade(_Config, {"processes": "4", "workers": 1}) == {"workers": 1}


@pytest.mark.parametrize("text", ["data: [", "just text", "- a\n- b", ""])
def test_text_that_is_no_config_is_refused(text):
    with pytest.raises(BadInputError, match=r"c\.yaml is not (YAML|a config)"):
        configs.load(_Config, text, "c.yaml")


@pytest.mark.parametrize("name", ["config", "output"])
def test_a_file_of_a_later_version_is_refused(name):
    values = yaml.safe_load(configs.dump(_Config(data="/d")))
    values["cnnray"] |= {"version": "9.1.0", name: 99}
    sentence = (
        rf"c\.yaml was written by cnnray 9\.1\.0 \({name} format 99\), and cnnray .* reads up to \d: update cnnray"
    )
    with pytest.raises(NewerFormatError, match=sentence):
        configs.load(_Config, yaml.safe_dump(values), "c.yaml")
    formats = {"config": configs.CONFIG_FORMAT, "output": configs.OUTPUT_FORMAT}
    values["cnnray"] |= {name: formats[name]}
    assert configs.load(_Config, yaml.safe_dump(values), "c.yaml")["data"] == "/d"


def test_every_flag_of_a_training_belongs_to_exactly_one_of_five_groups():
    groups = (DataConfig, ModelConfig, RecipeConfig, ClusterConfig, TrackingConfig)
    members = [name for group in groups for name in configs.names(group)]
    assert sorted(members) == sorted(field.name for field in fields(TrainConfig))
    assert configs.groups(TrainConfig) == [(group, set()) for group in groups]


def test_the_rules_are_those_of_version_0_1_0():
    """The sets are the lists of that version, with `workers` as `min_workers` and `max_workers`, and later flags."""
    assert configs.names(TrainConfig, resumable=True) == {
        "epochs", "min_workers", "max_workers", "wait_minutes", "cpus_per_worker", "gpus_per_worker", "decode_cpus",
        "data_checks", "cache", "max_bad_fraction", "max_failures", "overwrite", "output", "preview_augmentations",
        "mlflow", "mlflow_experiment", "mlflow_model", "skip_unreadable", "sanity", "find_learning_rate",
        "dashboard", "images_per_worker",
    }  # fmt: skip
    assert configs.names(SearchConfig, searchable=False) == {
        "output", "overwrite", "preview_augmentations", "search", "trials", "parallel", "metric", "mlflow",
        "mlflow_experiment", "mlflow_model", "sanity", "find_learning_rate", "dashboard",
    }  # fmt: skip
    assert configs.names(TrainConfig, tracked=False) == {
        "overwrite", "preview_augmentations", "mlflow", "mlflow_experiment", "mlflow_model", "sanity",
        "find_learning_rate", "dashboard",
    }  # fmt: skip
    assert configs.names(PredictConfig, resumable=True) == {
        "bundle", "bundle_version", "output", "min_workers", "max_workers", "cpus_per_worker", "gpus_per_worker",
        "decoding",
        "batch_size", "threshold", "max_error_fraction", "retry_errors", "overwrite", "dry_run", "engine",
        "wait_minutes", "skip_unreadable", "dashboard", "update", "verify",
    }  # fmt: skip


def test_all_forms_of_search_give_the_same_config(tmp_path):
    spaces = {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "augmentations.zoom": {"choice": [0, 0.1]}}
    config = SearchConfig(data="/d", output="/o", search=spaces)
    assert config.search == spaces
    earlier_form = ["learning_rate=loguniform(1e-4,1e-2)", "augmentations.zoom=choice([0,0.1])"]
    forms = (
        earlier_form,
        ["{learning-rate: {loguniform: [1e-4, 1e-2]}}", "{augmentations.zoom: {choice: [0, 0.1]}}"],
        ["{learning_rate: {loguniform: [1e-4, 1e-2]}, augmentations.zoom: {choice: [0, 0.1]}}"],
    )
    dashed = ["--learning-rate=loguniform(1e-4,1e-2)", "--augmentations.zoom=choice([0,0.1])"]
    assert SearchConfig(data="/d", output="/o", search=dashed) == config
    for form in forms:
        assert SearchConfig(data="/d", output="/o", search=form) == config
        flags = ["--data", "/d", "--output", "/o", "--search", *form]
        assert commandline.parse(SearchConfig, "jobs/tune.py", flags) == config
    earlier = configs.load(SearchConfig, yaml.safe_dump({"search": earlier_form, "workers": 2}), "c.yaml")
    assert earlier == {"search": spaces, "min_workers": None, "max_workers": 2}
    for search in (spaces, earlier_form):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": "/d", "output": "/o", "search": search}))
        assert commandline.parse(SearchConfig, "jobs/tune.py", ["--config", str(tmp_path / "c.yaml")]) == config


_TRAINING = (
    "The labelled images, and",
    "The network:",
    "How the network is trained:",
    "The workers, and",
    "The MLflow",
)


@pytest.mark.parametrize(
    ("job", "sections"),
    [
        ("train", _TRAINING),
        ("tune", _TRAINING),
        ("predict", ("The engine that runs the network", "The columns of a prediction")),
        ("evaluate", ("The engine that runs the network",)),
    ],
)
def test_the_help_is_in_sections(job, sections):
    program = [sys.executable, f"jobs/{job}.py", "--help"]
    text = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for section in sections:
        assert f"\n{section}" in text
