"""Small versions of the measurements of `jobs/benchmark.py recipes`, and the effect of class weights."""

import numpy as np

from benchmarks import few_images
from benchmarks.data_sets import load_digits, split
from benchmarks.trainer import make_config, measure_accuracy, train_network


def test_transfer_pays(tmp_path):
    accuracies = few_images.measure_transfer(tmp_path, (0,), epochs=4, fine_tuning=(8,))
    from_random, transferred = (values[0] for values in accuracies.values())
    assert transferred > from_random + 0.05


def test_class_weights_raise_the_recall_of_a_rare_class():
    train, held_out = split(load_digits(), 0)
    rare = np.flatnonzero(train.targets == 8)
    train = train.subset(np.setdiff1d(np.arange(len(train.targets)), rare[len(rare) // 20 :]))
    recall = {}
    for class_weights in ("none", "balanced"):
        config = make_config(architecture="small_cnn", epochs=4, class_weights=class_weights)
        model = train_network(config, train, held_out).model
        recall[class_weights] = measure_accuracy(model, held_out.subset(held_out.targets == 8))
    assert recall["balanced"] > recall["none"] + 0.1
