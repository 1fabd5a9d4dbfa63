"""Small versions of the measurements of `jobs/benchmark.py recipes`, and the effect of class weights."""

import numpy as np

from benchmarks.data_sets import Labelled, load_digits, split
from benchmarks.trainer import make_config, measure_accuracy, train_network


def test_transfer_pays(tmp_path):
    data = load_digits()
    low, high = data.subset(data.targets < 5), data.subset(data.targets >= 5)
    high = Labelled(high.images, high.targets - 5)
    weights = tmp_path / "model.keras"
    train_network(make_config(architecture="small_cnn", epochs=4), low, low, evaluate_every=4).model.save(weights)
    few = np.concatenate([np.flatnonzero(high.targets == target)[:10] for target in range(5)])
    others = np.setdiff1d(np.arange(len(high.targets)), few)
    config = make_config(architecture="small_cnn", epochs=8, batch_size=10)
    from_random, transferred = (
        train_network(config, high.subset(few), high.subset(others), weights=start).accuracy
        for start in (None, weights)
    )
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
