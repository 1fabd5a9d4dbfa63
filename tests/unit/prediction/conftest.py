"""A bundle, images, and a run that has classified all of its ranges."""

import pytest

from cnnray.images.manifest import manifest_from_uris
from cnnray.models.bundle import Bundle
from cnnray.prediction.ranges import Task
from tests.awkward import awkward_images, bad_images
from tests.networks import save_cut
from tests.unit.prediction.helpers import make_config, range_worker, write_manifest


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle of three classes."""
    folder = tmp_path_factory.mktemp("bundle")
    save_cut(folder)
    return Bundle.load(str(folder))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The awkward images, the bad ones and a missing file: bytes by path, and their manifest."""
    folder = tmp_path_factory.mktemp("images")
    contents = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    files = {str(folder / name): data for name, data in contents.items()} | {str(folder / "zz.png"): None}
    return files, manifest_from_uris(list(files))


@pytest.fixture
def committed(tmp_path):
    """A run whose three ranges are committed: its config, ranges and receipts."""
    ranges = write_manifest(tmp_path / "manifest", 26)
    worker, _ = range_worker(tmp_path)
    receipts = [worker.run(Task(range=range_)) for range_ in ranges]
    return make_config(tmp_path), ranges, receipts
