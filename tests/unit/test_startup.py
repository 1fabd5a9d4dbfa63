"""TensorFlow is loaded without its log lines, which a program that uses the package would print."""

import subprocess
import sys

import pytest

from cnnray.models import architectures, startup
from cnnray.models import bundle as bundles
from cnnray.models.bundle import BundleInfo

PROGRAM = """
import os, sys, threading
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor

threading.Timer(0.5, os.write, (2, b"a line of another thread\\n")).start()
predictor = Predictor(Bundle.load(sys.argv[1]))
print(predictor.probabilities(__import__("numpy").zeros((2, 16, 16, 3), "uint8")).shape, file=sys.stderr)
"""


def test_a_predictor_writes_nothing_and_hides_nothing(tmp_path):
    bundles.save(architectures.build("small_cnn", 16, 2), BundleInfo(class_names=["0", "1"], image_size=16), tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert process.stderr == "a line of another thread\n(2, 2)\n"


def test_a_job_imports_of_keras_what_it_uses():
    program = """
import sys
from cnnray.models import startup
startup.load_tensorflow(gpus=False)
assert not {"matplotlib", "pandas", "sklearn"} & set(sys.modules), set(sys.modules)
import keras, matplotlib, numpy, pandas, sklearn
keras.Sequential([keras.layers.Dense(2)]).predict(numpy.zeros((1, 2)), verbose=0)
"""
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)


@pytest.mark.parametrize(
    ("given", "gpus", "warns"), [("0", True, True), ("0", False, False), ("", True, False), ("-1", True, False)]
)
def test_a_gpu_that_tensorflow_cannot_use_is_no_secret(given, gpus, warns, monkeypatch, caplog):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    startup.load_tensorflow(gpus=gpus)
    assert ("requirements-gpu.lock" in caplog.text) == warns


def test_what_is_written_before_a_failure_is_kept(capfd):
    def fail():
        with startup._without_log_lines():
            print("of Python", file=sys.stderr, flush=True)
            startup.os.write(2, b"I0000 00:00:17 1 port.cc:153] of TensorFlow\nof a library\n")
            raise ImportError("x")

    with pytest.raises(ImportError):
        fail()
    assert capfd.readouterr().err == "of Python\nof a library\n"


def test_stderr_is_discarded_while_it_is_suppressed(capfd):
    with startup.suppress_stderr():
        print("of Python", file=sys.stderr, flush=True)
        startup.os.write(2, b"of a library\n")
    print("behind", file=sys.stderr)
    assert capfd.readouterr().err == "behind\n"
