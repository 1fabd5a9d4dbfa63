"""Small versions of what jobs/benchmark.py recipes measures, and what class weights are for."""

import numpy as np

from benchmarks import recipes
from cnnray.training.config import TrainConfig


def test_transfer_pays(tmp_path):
    found = recipes.transfer(tmp_path, (0,), epochs=4, fine_tuning=(8,))
    alone, transferred = (values[0] for values in found.values())
    assert transferred > alone + 0.05


def test_class_weights_raise_the_recall_of_a_rare_class():
    train, held_out = recipes.split(recipes.digits(), 0)
    rare = np.flatnonzero(train.targets == 8)
    train = train.of(np.setdiff1d(np.arange(len(train.targets)), rare[len(rare) // 20 :]))
    recall = {}
    for class_weights in ("none", "balanced"):
        config = TrainConfig(
            data="/none", output="/nowhere", architecture="small_cnn", image_size=recipes.SIZE, epochs=4,
            class_weights=class_weights,
        )  # fmt: skip
        model, _ = recipes.trained(config, train, held_out)
        recall[class_weights] = recipes.accuracy(model, held_out.of(held_out.targets == 8))
    assert recall["balanced"] > recall["none"] + 0.1
