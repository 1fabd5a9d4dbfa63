"""Engines take no more memory with each number of images that they see."""

from pathlib import Path

import numpy as np
import pytest

from cnnray.models.runtimes import OnnxEngine, OpenVinoEngine, powers_of_two


@pytest.mark.parametrize("number", [1, 2, 3, 7, 32, 100])
def test_powers_of_two(number):
    powers = powers_of_two(number)
    assert sum(powers) == number
    assert powers == sorted(set(powers), reverse=True)
    assert all(power.bit_count() == 1 for power in powers)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)


def test_openvino_computes_few_sizes(onnx_bundle, images, monkeypatch):
    engine = OpenVinoEngine(Path(onnx_bundle, "model.onnx"), 1)
    sizes, request = [], engine._request

    class Request:
        def infer(self, inputs):
            sizes.append(len(inputs[0]))
            return request.infer(inputs)

    monkeypatch.setattr(engine, "_request", Request())
    expected = engine(images)
    for number in range(1, 20):
        np.testing.assert_allclose(engine(images[:number]), expected[:number], atol=1e-5)
    assert set(sizes) == {20, 16, 8, 4, 2, 1}
    assert sizes[:1] == [20]
    assert sizes[-3:] == [16, 2, 1]


def test_onnx_runtime_keeps_no_plan_for_each_size(onnx_bundle, images):
    engine = OnnxEngine(Path(onnx_bundle, "model.onnx"), 1)
    assert not engine._session.get_session_options().enable_mem_pattern
    assert engine(images[:3]).shape == (3, 3)
