"""Validation counts every image exactly once, for any number of images."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from cnnray.images import manifest as manifests
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import build_manifest
from cnnray.models.bundle import BundleInfo
from cnnray.training.plan import Assignment
from tests.configs import decided
from tests.ray.workers import run_on_workers

KINDS = [*((size, "files") for size in (1, 7, 64, 65)), (1, "parquet"), (65, "parquet")]


def _validate(rank, world, assignments):
    import tensorflow as tf

    from cnnray.images import containers, reading
    from cnnray.images.decode import decode
    from cnnray.training.worker import _Worker

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    results = {}
    for kind, assignment in assignments.items():
        with strategy.scope():
            worker = _Worker(assignment, strategy)
        sums, _ = worker._validate(worker.feed.validation())
        rows = manifests.select_split(manifests.read(assignment.manifest), "validation").to_pylist()
        images = [
            decode(reading.load_bytes(s), Geometry.of(16)) for s in containers.encoded([row["uri"] for row in rows])
        ]
        probabilities = np.asarray(worker.steps.inference(np.stack(images), training=False))
        worker.feed.close()
        results[kind] = sums.metrics(10), sums.count, probabilities, [int(row["label"]) for row in rows]
    return results


@pytest.fixture(scope="module")
def validated(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    files = build_manifest(str(digits), labelled=True)
    images = [Path(uri).read_bytes() for uri in files["uri"].to_pylist()]
    pyarrow.parquet.write_table(
        pa.table({"image": images, "label": files["label"]}), folder / "0.parquet", row_group_size=9
    )
    manifests_of = {"files": files, "parquet": build_manifest(str(folder / "0.parquet"), labelled=True)}
    assignments = {}
    for size, kind in KINDS:
        manifest = manifests_of[kind]
        split = np.where(np.arange(len(manifest)) % (len(manifest) // size) == 0, "validation", "train")
        split[np.flatnonzero(split == "validation")[size:]] = "train"
        table = manifest.set_column(manifest.column_names.index("split"), "split", pa.array(split))
        path = str(folder / f"{size}-{kind}-manifest")
        manifests.write(table, path)
        assignments[size, kind] = Assignment(
            config=decided(data=str(digits), output=str(folder), image_size=16, batch_size=16),
            info=BundleInfo(class_names=manifests.class_names(manifest), image_size=16),
            manifest=path,
            weights=None,
            threads=1,
            decoders=1,
            uses_other_nodes=False,
            cached={},
            has_lanes=kind == "parquet",
            is_in_parquet=kind == "parquet",
            started=0.0,
            lease_holder="",
        )
    return run_on_workers(_validate, 2, folder, assignments)


@pytest.mark.parametrize(("size", "kind"), KINDS)
def test_validation_equals_scikit_learn(validated, size, kind):
    for rank in range(2):
        metrics, count, probabilities, labels = validated[rank][size, kind]
        assert count == size == len(labels)
        classes = np.arange(10)
        normalized = probabilities.astype(np.float64)
        normalized /= normalized.sum(1, keepdims=True)
        assert metrics["loss"] == pytest.approx(log_loss(labels, normalized, labels=classes), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)), abs=1e-12)
        assert metrics["top_5_accuracy"] == pytest.approx(
            top_k_accuracy_score(labels, probabilities, k=5, labels=classes), abs=1e-12
        )
