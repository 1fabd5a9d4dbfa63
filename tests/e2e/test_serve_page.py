"""The page of a replica with several models, in Chromium: an application behind uvicorn, without Ray Serve."""

import asyncio
import dataclasses
import threading

import pytest
import uvicorn
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from cnnray.cluster import free_port
from cnnray.models.bundle import Bundle
from cnnray.serving.application import create_application
from cnnray.serving.config import ModelVersion, ServeConfig
from cnnray.serving.keys import Key, Keys
from cnnray.serving.service import Service
from tests.awkward import awkward_images
from tests.e2e.conftest import requested_addresses, until
from tests.e2e.service import ask, copy_as_new_version

pytestmark = pytest.mark.browser


@pytest.fixture
def newer(onnx_bundle, tmp_path):
    return copy_as_new_version(onnx_bundle, tmp_path / "newer")


@pytest.fixture
def address(onnx_bundle, newer):
    """Of an application with the models cats, with a canary, and dogs, that wants a key."""
    models = [
        ModelVersion(name="cats", uri=str(onnx_bundle)),
        ModelVersion(name="cats", uri=str(newer), share=0.1),
        ModelVersion(name="dogs", uri=str(newer)),
    ]
    settings = dataclasses.replace(ServeConfig(models=models, engine="onnx").settings, explain=False)
    service, port = Service(threads=1), free_port()
    application = create_application(service, Keys([Key(key="secret")]))
    server = uvicorn.Server(uvicorn.Config(application, port=port, lifespan="off", log_level="warning"))

    async def run():
        await service.change_settings(settings)
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    until(lambda: server.started or not thread.is_alive(), 60, "the application")
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)
    service.close()
    assert not thread.is_alive()


def test_models_versions_keys_and_the_camera(address, browser, onnx_bundle, newer, tmp_path):
    old, new = (Bundle.load(str(uri)).version for uri in (onnx_bundle, newer))
    photo = tmp_path / "photo.png"
    photo.write_bytes(awkward_images()["rgb.png"])
    assert ask(f"{address}/metadata")[0] == 401
    browser.get(address)
    until(lambda: browser.find_element(By.ID, "keys").is_displayed(), 30, "the field of the key")
    assert not browser.find_element(By.ID, "models").is_displayed()

    def classify(field="files"):
        before = len(browser.find_elements(By.TAG_NAME, "article"))
        browser.find_element(By.ID, field).send_keys(str(photo))
        until(lambda: len(browser.find_elements(By.TAG_NAME, "article")) > before, 30, "an article")
        until(lambda: browser.find_element(By.ID, "status").text == "1 image done", 30, "the answer")
        return browser.find_element(By.TAG_NAME, "article").text

    assert "The API key is missing or wrong." in classify()
    key = browser.find_element(By.ID, "key")
    key.send_keys("secret\t")
    until(lambda: browser.find_element(By.ID, "models").is_displayed(), 30, "the models")
    model, version = (Select(browser.find_element(By.ID, name)) for name in ("model", "version"))
    assert [option.text for option in model.options] == ["cats", "dogs"]
    assert [option.text for option in version.options] == [
        "by the shares", f"{old} (90 % of the requests)", f"{new} (10 % of the requests)",
    ]  # fmt: skip
    for wanted in (new, old):
        version.select_by_value(wanted)
        assert wanted in classify()
    model.select_by_value("dogs")
    assert not browser.find_element(By.ID, "versions").is_displayed()
    assert new in classify("camera")
    camera = browser.find_element(By.ID, "camera")
    assert (camera.get_attribute("capture"), camera.get_attribute("accept")) == ("environment", "image/*")
    addresses = requested_addresses(browser)
    assert f"{address}/predict?model=dogs" in addresses
    assert all(other.startswith((f"{address}/", "blob:", "data:")) for other in addresses), addresses
    browser.save_screenshot(str(tmp_path / "models.png"))
