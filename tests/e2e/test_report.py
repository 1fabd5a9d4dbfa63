"""The report of an evaluation in Chromium (make test-browser)."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.by import By

from cnnray.models import architectures
from cnnray.models import bundle as bundles
from cnnray.models.bundle import BundleInfo
from tests.e2e.conftest import requested_addresses


@pytest.fixture(params=[2, 10, 200])
def report(request, start_job, tmp_path):
    """The report of a network with random weights on three images per class and one broken file."""
    names = [f"class {number} <of> {request.param}" for number in range(request.param)]
    generator = np.random.default_rng(0)
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / names[0] / "bad & broken.png").touch()
    bundles.save(
        architectures.build("small_cnn", 32, len(names)), BundleInfo(class_names=names, image_size=32),
        tmp_path / "bundle",
    )  # fmt: skip
    job = start_job(
        "evaluate", "--bundle", tmp_path / "bundle", "--data", tmp_path / "data", "--output", tmp_path / "out"
    )
    assert job.wait(200) == 0, job.err.read_text()
    line = json.loads(job.out.read_text().splitlines()[-1])
    assert (line["images"], line["errors"]) == (3 * len(names) + 1, 1)
    return line["report"], len(names)


@pytest.mark.browser
def test_the_report_needs_no_other_files_and_its_table_sorts(report, browser, tmp_path):
    uri, classes = report
    copy = shutil.copy(uri, tmp_path / "copy.html")
    browser.get(f"file://{copy}")
    rows = browser.find_elements(By.CSS_SELECTOR, "#classes tbody tr")
    assert len(rows) == classes
    assert rows[1].find_element(By.TAG_NAME, "td").text == f"class 1 <of> {classes}"

    def column(number):
        cells = browser.find_elements(By.CSS_SELECTOR, f"#classes tbody td:nth-child({number})")
        return [cell.text for cell in cells]

    head = browser.find_elements(By.CSS_SELECTOR, "#classes th")[2]  # predicted
    for order in ("descending", "ascending"):
        head.find_element(By.TAG_NAME, "button").click()
        assert head.get_attribute("aria-sort") == order
        values = [int(text) for text in column(3)]
        assert values == sorted(values, reverse=order == "descending")
    browser.find_element(By.CSS_SELECTOR, "#classes th button").click()
    assert column(1)[:2] == [f"class {number} <of> {classes}" for number in range(2)]
    assert "bad & broken.png" in browser.find_element(By.ID, "errors").text
    images = browser.find_elements(By.TAG_NAME, "img")
    assert len(images) >= 9
    assert all(browser.execute_script("return arguments[0].naturalWidth", image) > 100 for image in images)
    wide = browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert wide <= 0
    assert browser.get_log("browser") == []
    assert {address for address in requested_addresses(browser) if not address.startswith("data:")} == {
        f"file://{copy}"
    }
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.set_window_size(1200, height // 2)
    browser.save_screenshot(str(tmp_path / "report.png"))
