"""Small versions of the measurements of `jobs/benchmark.py recipes`, and the effect of class weights."""

import numpy as np

from benchmarks import recipes
from cnnray.training.config import TrainConfig


def test_transfer_pays(tmp_path):
    accuracies = recipes.measure_transfer(tmp_path, (0,), epochs=4, fine_tuning=(8,))
    from_random, transferred = (values[0] for values in accuracies.values())
    assert transferred > from_random + 0.05


def test_class_weights_raise_the_recall_of_a_rare_class():
    train, held_out = recipes.split(recipes.load_digits(), 0)
    rare = np.flatnonzero(train.targets == 8)
    train = train.subset(np.setdiff1d(np.arange(len(train.targets)), rare[len(rare) // 20 :]))
    recall = {}
    for class_weights in ("none", "balanced"):
        config = TrainConfig(
            data="/none", output="/nowhere", architecture="small_cnn", image_size=recipes.SIZE, epochs=4,
            class_weights=class_weights,
        )  # fmt: skip
        model, _ = recipes.train_network(config, train, held_out)
        recall[class_weights] = recipes.measure_accuracy(model, held_out.subset(held_out.targets == 8))
    assert recall["balanced"] > recall["none"] + 0.1
