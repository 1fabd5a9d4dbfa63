"""Micro-batches of encoded images and pixels."""

import threading

import numpy as np
import pytest

from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import Geometry
from cnnray.models.answers import Rules
from cnnray.serving.pipeline import Encoded, Pipeline
from tests.awkward import awkward_images

GOOD, SIZE = awkward_images()["rgb.png"], Geometry.of(16)


def _mean(images):
    return images.reshape(len(images), -1, 3).mean(1, dtype=np.float32)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_image_has_its_row_or_its_error_in_order(threads):
    stages, sizes = [], []

    def predict(images):
        sizes.append(len(images))
        return _mean(images)

    def observe(stage, seconds):
        stages.append((stage, len(seconds)))

    pipeline = Pipeline(predict, Rules(), SIZE, observe, threads=threads)
    pixels, black = decode(GOOD, SIZE), np.zeros((16, 16, 3), np.uint8)
    images = [pixels, Encoded(b"nothing", 10**6), Encoded(GOOD, 10**6), black, Encoded(GOOD, 10)]
    first, broken, second, zero, large = pipeline(images)
    np.testing.assert_array_equal(first.probabilities, _mean(pixels[None])[0])
    np.testing.assert_array_equal(second.probabilities, first.probabilities)
    assert (broken.reason, zero.reason, large.reason) == ("not an image", "no probabilities", "too many pixels")
    assert sorted(stages) == [("decode", 1)] * 3 + [("predict", 3)]
    assert sizes == [5]  # the batch keeps its size


def test_a_batch_without_a_usable_image_does_not_reach_the_network():
    pipeline = Pipeline(lambda images: 1 / 0, Rules(), SIZE, lambda stage, seconds: None, threads=1)
    assert [type(answer) for answer in pipeline([Encoded(b"x", 9), Encoded(b"", 9)])] == [BadImage, BadImage]


def test_a_network_with_too_few_rows_is_an_error():
    pipeline = Pipeline(lambda images: _mean(images)[1:], Rules(), SIZE, lambda stage, seconds: None, threads=1)
    with pytest.raises(ValueError, match="gave 1 rows for 2 images"):
        pipeline([np.ones((16, 16, 3), np.uint8)] * 2)


def test_the_network_runs_on_one_batch_at_a_time():
    running, most = [], []

    def predict(images):
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.02)
        running.pop()
        return _mean(images)

    pipeline = Pipeline(predict, Rules(), SIZE, lambda stage, seconds: None, threads=2)
    threads = [threading.Thread(target=pipeline, args=([Encoded(GOOD, 10**6)],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_each_image_is_progress():
    going_on, seconds = threading.Event(), []

    def predict(images):
        seconds.append(pipeline.seconds_without_progress)
        going_on.wait(0.1)
        seconds.append(pipeline.seconds_without_progress)
        return _mean(images)

    pipeline = Pipeline(predict, Rules(), SIZE, lambda stage, seconds: None, threads=1)
    assert pipeline.seconds_without_progress == 0
    pipeline([Encoded(GOOD, 10**6)])
    assert seconds[0] < 0.1 <= seconds[1]
    assert pipeline.seconds_without_progress == 0
