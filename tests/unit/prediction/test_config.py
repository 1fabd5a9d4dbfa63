"""The flags of a prediction run."""

import pytest

from cnnray import commandline
from cnnray.flags import flag_name
from cnnray.prediction.config import PredictConfig

FLAGS = ["--bundle", "/b", "--input", "/in", "--output", "/out"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": "tensorrt"}, "--engine 'tensorrt': expected auto, keras, keras-bfloat16, onnx"),
        ({"engine": "onnx", "embeddings": True}, "--embeddings needs --engine keras, not onnx"),
        ({"top_k": 0}, "--top-k must be at least 1, not 0"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker must be more than 0"),
        ({"gpus_per_worker": 2}, "--gpus-per-worker must be 0 to 1"),
        ({"min_workers": 3, "max_workers": 2}, "--min-workers 3 is more than --max-workers 2"),
        ({"max_error_fraction": 1.5}, "--max-error-fraction must be 0 to 1"),
        ({"output": ""}, "--output is empty"),
        ({"output": "/in/out"}, "--output /in/out lies in --input /in"),
        ({"input": "ftp://x"}, "neither a local path nor"),
    ],
)
def test_impossible_flags_are_refused(changes, sentence):
    with pytest.raises((ValueError, OSError), match=sentence):
        PredictConfig(**{"bundle": "/b", "input": "/in", "output": "/out"} | changes)


@pytest.mark.parametrize("flags", [["--shards", "2", "--shard", "1"], ["--shards", "8"]])
def test_shards_of_a_run_are_refused_with_a_sentence(flags, capsys):
    with pytest.raises(SystemExit):
        commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, *flags])
    assert "--shards and --shard are gone: one run classifies any number of images" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["update", "verify", "retry_errors", "overwrite", "dry_run"])
def test_what_a_run_does_with_an_earlier_one_is_a_flag(flag):
    for arguments in ([], ["true"]):
        config = commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, flag_name(flag), *arguments])
        assert config == PredictConfig(bundle="/b", input="/in", output="/out", **{flag: True})


def test_a_single_shard_is_the_whole_run(tmp_path):
    expected = PredictConfig(bundle="/b", input="/in", output="/out")
    assert commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, "--shards", "1"]) == expected
    assert commandline.parse(PredictConfig, "jobs/predict.py", [*FLAGS, "--shards", "1", "--shard", "0"]) == expected
    (tmp_path / "config.yaml").write_text("bundle: /b\ninput: /in\noutput: /out\nshards: 1\nshard: 0\n")
    written = ["--config", str(tmp_path / "config.yaml")]
    assert commandline.parse(PredictConfig, "jobs/predict.py", written) == expected
