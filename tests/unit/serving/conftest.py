"""A service of this process, and its client."""

import dataclasses

import pytest
from starlette.testclient import TestClient

from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.serving.application import application
from cnnray.serving.config import ServeConfig
from cnnray.serving.service import Service
from cnnray.serving.settings import ModelSettings
from tests.awkward import awkward_images
from tests.networks import coloured_noise, fitted

SIZE = 32
GOOD = awkward_images()["rgb.png"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle of three classes."""
    folder = tmp_path_factory.mktemp("bundle")
    model = fitted("small_cnn", SIZE, *coloured_noise(48, SIZE))
    bundles.save(model, BundleInfo(class_names=["red", "green", "blue"], image_size=SIZE), folder)
    return str(folder)


@pytest.fixture(scope="session")
def newer(bundle, tmp_path_factory):
    """Another version of it."""
    folder = tmp_path_factory.mktemp("newer")
    old = Bundle.load(bundle)
    bundles.save(old.model, dataclasses.replace(old.info, temperature=2.0), folder)
    return str(folder)


def settings(*models, **changes):
    named = tuple(ModelSettings(name=name, uri=uri, share=share) for name, uri, share in models)
    stated = ServeConfig(bundle="/nowhere", engine="keras", batch_size=8).settings
    return dataclasses.replace(stated, models=named, **changes)


@pytest.fixture(scope="module")
def client(bundle):
    with _client(settings(("colours", bundle, 1.0))) as found:
        yield found


def _client(chosen, **options):
    service = Service(threads=2)
    client = TestClient(application(service, **options), raise_server_exceptions=False)
    client.app.state.service = service
    client.__enter__()
    client.portal.call(service.change, chosen)
    return client


@pytest.fixture
def another(bundle):
    """A function that gives a client of other settings."""
    opened = []

    def open_one(*models, api_key=None, **changes):
        opened.append(_client(settings(*models or [("colours", bundle, 1.0)], **changes), api_key=api_key))
        return opened[-1]

    yield open_one
    for one in opened:
        one.__exit__(None, None, None)
