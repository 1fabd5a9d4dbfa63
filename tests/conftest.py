import io
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
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


def write_digit_grids(folder: Path, count: int, classes: int = 5) -> Path:
    """Images of two rows of two places, each with one of scikit-learn's digits or none, as PNG files of 16x16.

    Returns:
        The Parquet table of the images, whose labels are the digits that each has: often several, sometimes none.
    """
    digits, generator = load_digits(), np.random.default_rng(0)
    chosen = np.flatnonzero(digits.target < classes)
    rows: dict[str, list[Any]] = {"uri": [], "label": []}
    for number in range(count):
        pixels, labels = np.zeros((16, 16)), []
        for top, left in ((0, 0), (0, 8), (8, 0), (8, 8)):
            if generator.random() < 0.5:
                digit = generator.choice(chosen)
                pixels[top : top + 8, left : left + 8] = digits.images[digit]
                labels.append(str(digits.target[digit]))
        rows["uri"].append(f"{number:04d}.png")
        rows["label"].append(labels)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(folder / rows["uri"][-1])
    pyarrow.parquet.write_table(pa.table(rows), folder / "images.parquet")
    return folder / "images.parquet"


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
