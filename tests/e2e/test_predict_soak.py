"""A million images (make soak): memory stays flat, speed stays constant, and a kill halfway costs little.

CNNRAY_SOAK_IMAGES sets another number of images.
"""

import io
import json
import os
import shutil
import threading
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.models import bundle as bundles
from cnnray.models.bundle import BundleInfo
from cnnray.models.export import ExportConfig, export
from tests.e2e.conftest import until
from tests.networks import coloured_noise, fitted

IMAGES = int(os.environ.get("CNNRAY_SOAK_IMAGES", 1_000_000))
SIZE = 32
NAMES = ["red", "green", "blue"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def encoded():
    """Small JPEG files as bytes, and their class names."""
    images, targets = coloured_noise(99, SIZE, seed=1)
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files, [NAMES[target] for target in targets]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, encoded):
    """A bundle with int8 engines whose accuracy was measured."""
    folder, images = tmp_path_factory.mktemp("bundle"), tmp_path_factory.mktemp("calibration")
    bundles.save(
        fitted("small_cnn", SIZE, *coloured_noise(96, SIZE)), BundleInfo(class_names=NAMES, image_size=SIZE), folder
    )
    for number, (data, name) in enumerate(zip(*encoded, strict=True)):
        (images / name).mkdir(exist_ok=True)
        (images / name / f"{number}.jpg").write_bytes(data)
    export(ExportConfig(bundle=str(folder), calibration=str(images), formats=["onnx", "onnx-int8"]))
    return folder


@pytest.fixture(params=["packed", "loose"])
def images(request, tmp_path, encoded):
    """A million images in Parquet files, or in as many files."""
    folder, files = tmp_path / "images", encoded[0]
    folder.mkdir()
    if request.param == "packed":
        per_file = 50_000
        for start in range(0, IMAGES, per_file):
            rows = [files[number % len(files)] for number in range(start, min(start + per_file, IMAGES))]
            path = folder / f"{start:08d}.parquet"
            pyarrow.parquet.write_table(pa.table({"image": rows}), path, row_group_size=1000, use_dictionary=False)
    else:
        for number in range(IMAGES):
            path = folder / f"{number // 1000:04d}" / f"{number % 1000:03d}.jpg"
            path.parent.mkdir(exist_ok=True)
            group = folder / f"{number // 40_000 * 40:04d}" / f"{number % len(files):03d}.jpg"
            if number % 40_000 < len(files):
                path.write_bytes(files[number % len(files)])
            else:
                path.hardlink_to(group)  # a file can have 65,000 hard links
    yield request.param, folder
    shutil.rmtree(folder)


class Memory(threading.Thread):
    """Samples the memory of a job's processes every two seconds: MiB that they share with no other process."""

    def __init__(self, job):
        super().__init__(daemon=True)
        self._job, self._ended = job, threading.Event()
        self.driver, self.workers, self.times = [], [], []

    def run(self):
        while not self._ended.wait(2):
            try:
                driver = self._job.driver()
                workers = [child for child, name in self._job.named_children() if "RangeWorker" in name]
                sizes = [child.memory_full_info().uss / 2**20 for child in workers]
                self.driver.append(driver.memory_full_info().uss / 2**20)
                self.workers.append(max(sizes, default=0))
                self.times.append(time.time())
            except psutil.Error:
                continue

    def stop(self, last_part):
        """End, and keep the samples from before the last part (in seconds since the epoch): then come checks."""
        self._ended.set()
        self.join()
        self.most_of_checks = max(self.driver)
        count = sum(taken < last_part for taken in self.times)
        self.driver, self.workers = self.driver[:count], self.workers[:count]


def _part_times(output):
    return sorted(path.stat().st_mtime for path in output.glob("part-*"))


def test_a_million_images(images, bundle, start_job, tmp_path, capsys):
    kind, folder = images
    output = tmp_path / "out"
    command = ["predict", "--bundle", bundle, "--input", folder, "--output", output]
    started = time.time()
    job = start_job(*command)
    memory = Memory(job)
    memory.start()
    parts = IMAGES // (5000 if kind == "packed" else 4096)  # a part consists of whole row groups

    def running():
        assert job.process.poll() is None, job.err.read_text()
        return True

    until(lambda: running() and len(list(output.glob("part-*"))) > parts / 2, 5000, "half of the parts")
    job.end()
    before = _part_times(output)
    memory.stop(before[-1])

    restarted = time.time()
    second_job = start_job(*command, "--verify")
    second_memory = Memory(second_job)
    second_memory.start()
    until(lambda: len(list(output.glob("part-*"))) > len(before), 300, "a part after the restart")
    resumed_after = time.time() - restarted
    assert second_job.wait(5000) == 0, second_job.err.read_text()
    second_memory.stop(_part_times(output)[-1])
    assert "output files are those of the manifest" in second_job.err.read_text()
    line = json.loads(second_job.out.read_text().splitlines()[-1])

    rows = pa.concat_tables(
        pyarrow.parquet.read_table(path, columns=["id", "status"]) for path in sorted(output.glob("part-*"))
    )
    assert np.array_equal(rows["id"].to_numpy(), np.arange(IMAGES))
    assert pc.all(pc.equal(rows["status"], "ok")).as_py()
    times = _part_times(output)
    rates = [_tenth_rates(half, IMAGES / len(times)) for half in (before, times[len(before) :])]
    with capsys.disabled():
        print(
            f"\n{kind}: {IMAGES} images, engine {line['engine']}; {before[0] - started:.0f} s to the first part; "
            f"killed at {len(before)} parts, {line['resumed']} images resumed, first new part after "
            f"{resumed_after:.0f} s; {time.time() - started:.0f} s in total"
        )
        for name, (first, last), sampled in (
            ("first half", rates[0], memory),
            ("second half", rates[1], second_memory),
        ):
            quarter = len(sampled.driver) // 4
            print(
                f"  {name}: first tenth {first:.0f}, last tenth {last:.0f} images/s ({last / first:.3f}); MiB of the "
                f"driver {sampled.driver[quarter]:.0f} to {sampled.driver[-1]:.0f}, of the largest worker "
                f"{sampled.workers[quarter]:.0f} to {sampled.workers[-2]:.0f} (most {max(sampled.workers):.0f}); "
                f"most of the driver with the checks of --verify {sampled.most_of_checks:.0f}"
            )
    assert resumed_after < 120
    for sampled in (memory, second_memory):
        quarter = len(sampled.driver) // 4
        assert max(sampled.driver[quarter:]) < 1.3 * sampled.driver[quarter]
        assert max(sampled.workers[quarter:]) < 1.3 * sampled.workers[quarter]


def _tenth_rates(times, rows):
    """Images/s of the first and of the last tenth of parts with these write times and this number of rows."""
    tenth = max(2, len(times) // 10)
    return tuple(rows * (tenth - 1) / (part[-1] - part[0]) for part in (times[:tenth], times[-tenth:]))
