"""Engines take no more memory with each number of images that they see."""

from pathlib import Path

import numpy as np

from cnnray.models.runtimes import OnnxEngine


def test_onnx_runtime_keeps_no_plan_for_each_size(onnx_bundle):
    engine = OnnxEngine(Path(onnx_bundle, "model.onnx"), 1)
    assert not engine._session.get_session_options().enable_mem_pattern
    assert engine(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 3)
