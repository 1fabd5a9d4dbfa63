"""Which runs need no Ray."""

import pytest

from cnnray import cluster
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.plan import fits_this_process


@pytest.mark.parametrize(
    ("images", "options", "environment", "gpus", "fits"),
    [
        (4096, {}, {}, False, True),
        (4097, {}, {}, False, False),
        (1, {"dashboard": True}, {}, False, False),
        (1, {"max_workers": 1}, {}, False, False),
        (1, {"cpus_per_worker": 1.0}, {}, False, False),
        (1, {"min_workers": 1}, {}, False, False),
        (1, {"decoding": "tasks"}, {}, False, False),
        (1, {}, {"RAY_ADDRESS": "auto"}, False, False),
        (1, {}, {}, True, False),
    ],
)
def test_few_images_are_classified_without_ray(images, options, environment, gpus, fits, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "is_connected", lambda: False)
    monkeypatch.setattr(cluster, "may_have_gpus", lambda: gpus)
    assert fits_this_process(PredictOptions(**options), images) is fits
