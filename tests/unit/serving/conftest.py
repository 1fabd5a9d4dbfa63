"""A service in this process, and its client."""

import dataclasses

import pytest
from starlette.testclient import TestClient

from cnnray.images.decode import BadImage
from cnnray.models import bundle as bundles
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.serving.application import create_application
from cnnray.serving.config import ServeConfig
from cnnray.serving.keys import Keys
from cnnray.serving.service import Service
from cnnray.serving.settings import ModelSettings
from tests.awkward import awkward_images, bad_images
from tests.networks import save_cut

GOOD = awkward_images()["rgb.png"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle with three classes."""
    folder = tmp_path_factory.mktemp("bundle")
    save_cut(folder)
    return str(folder)


@pytest.fixture(scope="session")
def newer(bundle, tmp_path_factory):
    """Another version of the bundle."""
    folder = tmp_path_factory.mktemp("newer")
    old = Bundle.load(bundle)
    bundles.save(old.model, dataclasses.replace(old.info, temperature=2.0), folder)
    return str(folder)


@pytest.fixture(scope="session")
def relabelled(bundle, tmp_path_factory):
    """The bundle with other names for its classes."""
    folder = tmp_path_factory.mktemp("relabelled")
    old = Bundle.load(bundle)
    names = [f"other {name}" for name in old.info.class_names]
    bundles.save(old.model, dataclasses.replace(old.info, class_names=names), folder)
    return str(folder)


@pytest.fixture(scope="session")
def expected(bundle):
    """By name of the awkward and the bad images: the bytes, and the answer of `Predictor`."""
    contents = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    answers = Predictor(Bundle.load(bundle))([*contents.values()])
    return {name: (data, answer) for (name, data), answer in zip(contents.items(), answers, strict=True)}


def check_answer(answer, expected):
    """Check an answer of /predict by that of `Predictor`."""
    if isinstance(expected, BadImage):
        assert expected.reason in answer["error"]
        return
    assert answer["prediction"] == expected.label
    assert answer["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    scores = {score["class"]: score["confidence"] for score in answer["all_predictions"]}
    assert list(scores) == [name for name, _ in expected.top_k]
    assert scores == pytest.approx(dict(expected.top_k), abs=1e-5)


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
    client.__enter__()
    client.portal.call(service.change_settings, settings)
    client.service = service
    return client


@pytest.fixture
def start_client(bundle):
    """A function that starts a client of a service with other settings."""
    clients = []

    def start(*models, keys=(), **changes):
        chosen = settings(*models or [("colours", bundle, 1.0)], **changes)
        clients.append(_start_client(chosen, keys=Keys([*keys])))
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)
