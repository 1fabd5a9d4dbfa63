"""The progress bar."""

import logging

from cnnray.progress import ProgressBar


def test_the_time_left_is_not_known_before_the_first_image(caplog):
    caplog.set_level(logging.INFO)
    ProgressBar(100).close()
    assert caplog.messages == ["0/100 images  0 images/s  ? left  "]
