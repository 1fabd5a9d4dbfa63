import io
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

REPOSITORY = Path(__file__).parents[1]


def write_digits(folder: Path, count: int, classes: int = 10) -> Path:
    """The first `count` of scikit-learn's digits as PNG class folders."""
    digits = load_digits()
    chosen = np.flatnonzero(digits.target < classes)[:count]
    for index in chosen:
        path = folder / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 255 / 16).round().astype(np.uint8)).save(path)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Write a tar file of these members."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """200 digits of 10 classes."""
    return write_digits(tmp_path_factory.mktemp("digits"), 200)


@pytest.fixture(scope="session")
def python():
    """The interpreter to start jobs with."""
    return sys.executable


@pytest.fixture(scope="session")
def onnx_bundle(tmp_path_factory, digits):
    """A bundle for 32x32 that tells red, green and blue, exported to ONNX, whose workers start in a second."""
    # Tests that need no bundle need not wait for TensorFlow.
    from tests.networks import write_onnx_bundle

    return write_onnx_bundle(tmp_path_factory.mktemp("bundle"), "small_cnn", 32, f"{digits}/*/*.png")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Say how a test process died, and what Ray's driver in it wrote last: its stderr is lost with it."""
    if error:
        process = node.gateway._io.popen
        print(f"\n{node.gateway.id} (process {process.pid}) ended with {process.wait(10)}")
        for log in Path(tempfile.gettempdir(), "ray").glob(f"session_*/logs/python-core-driver-*_{process.pid}.log"):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[")]
            print(log, *lines[-20:], sep="\n")
