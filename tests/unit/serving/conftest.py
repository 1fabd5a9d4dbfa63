"""A service in this process, and its client."""

import dataclasses

import pytest
from starlette.testclient import TestClient

from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.serving.application import create_application
from cnnray.serving.config import ServeConfig
from cnnray.serving.service import Service
from cnnray.serving.settings import ModelSettings
from tests.awkward import awkward_images
from tests.networks import coloured_noise, fitted

SIZE = 32
GOOD = awkward_images()["rgb.png"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle with three classes."""
    folder = tmp_path_factory.mktemp("bundle")
    model = fitted("small_cnn", SIZE, *coloured_noise(48, SIZE))
    bundles.save(model, BundleInfo(class_names=["red", "green", "blue"], image_size=SIZE), folder)
    return str(folder)


@pytest.fixture(scope="session")
def newer(bundle, tmp_path_factory):
    """Another version of the bundle."""
    folder = tmp_path_factory.mktemp("newer")
    old = Bundle.load(bundle)
    bundles.save(old.model, dataclasses.replace(old.info, temperature=2.0), folder)
    return str(folder)


def settings(*models, **changes):
    versions = tuple(ModelSettings(name=name, uri=uri, share=share) for name, uri, share in models)
    defaults = ServeConfig(bundle="/nowhere", engine="keras", batch_size=8).settings
    return dataclasses.replace(defaults, models=versions, **changes)


@pytest.fixture(scope="module")
def client(bundle):
    with _start_client(settings(("colours", bundle, 1.0))) as client:
        yield client


def _start_client(settings, **options):
    service = Service(threads=2)
    client = TestClient(create_application(service, **options), raise_server_exceptions=False)
    client.app.state.service = service
    client.__enter__()
    client.portal.call(service.change_settings, settings)
    return client


@pytest.fixture
def start_client(bundle):
    """A function that starts a client of a service with other settings."""
    clients = []

    def start(*models, api_key=None, **changes):
        chosen = settings(*models or [("colours", bundle, 1.0)], **changes)
        clients.append(_start_client(chosen, api_key=api_key))
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)
