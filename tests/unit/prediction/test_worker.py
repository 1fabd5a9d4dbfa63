"""The rows that a worker gives for images, good and bad."""

import collections
import dataclasses
import json
import subprocess
import sys

import keras
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from cnnray.images.decode import decode
from cnnray.images.manifest import manifest_from_uris
from cnnray.models.answers import Rules, Threshold
from cnnray.models.bundle import BundleError
from cnnray.models.groups import Groups
from cnnray.models.predictor import Predictor
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.plan import plan_on_cluster
from cnnray.prediction.tally import Tally
from cnnray.prediction.worker import Worker, decode_rows, select_columns
from tests.malformed import malformed_files
from tests.networks import GEOMETRY
from tests.unit.prediction.helpers import make_cluster


def _plan(bundle, **options):
    return plan_on_cluster(bundle, PredictOptions(engine="keras", **options), make_cluster((1, 0)))


def _worker(bundle, **options):
    return Worker(_plan(bundle, **options))


@pytest.mark.parametrize("decoded_in_tasks", [False, True])
def test_a_worker_predicts_as_predictor_does(decoded_in_tasks, bundle, files):
    contents, manifest = files
    manifest = manifest.append_column("weight", pa.array([None, *range(1, len(manifest))], pa.int16()))
    worker, predictor = _worker(bundle, top_k=2), Predictor(bundle, top_k=2)
    rows = manifest
    if decoded_in_tasks:
        rows = pa.concat_tables(decode_rows(manifest.slice(start, 10), GEOMETRY) for start in (0, 10))
        rows = pa.concat_tables([rows, decode_rows(manifest.slice(20), GEOMETRY)])
    rows = pa.concat_tables(worker(rows))
    assert rows.select(manifest.column_names).equals(manifest)
    assert set(rows["model"].to_pylist()) == {bundle.version}
    for row in rows.to_pylist():
        data = contents[row["uri"]]
        if data is None:
            assert (row["status"], row["error"].partition(":")[0]) == ("error", "missing")
            continue
        (prediction,) = predictor([data])
        if row["status"] == "error":
            assert row["error"] == str(prediction)
            assert row["prediction"] is row["confidence"] is row["top_k_labels"] is row["top_k_scores"] is None
        else:
            assert row["error"] is None
            assert row["prediction"] == prediction.label
            assert row["top_k_labels"] == [name for name, _ in prediction.top_k]
            np.testing.assert_allclose(row["top_k_scores"], [score for _, score in prediction.top_k], atol=1e-5)
            assert row["confidence"] == row["top_k_scores"][0]


def test_probabilities_and_embeddings_are_lists_of_fixed_size(bundle, files):
    contents, manifest = files
    rows = pa.concat_tables(_worker(bundle, probabilities=True, embeddings=True, batch_size=5)(manifest))
    assert rows.schema.field("probabilities").type == pa.list_(pa.float32(), 3)
    features = bundle.model.get_layer("logits").input
    assert rows.schema.field("embedding").type == pa.list_(pa.float32(), features.shape[1])
    good = rows.filter(pc.equal(rows["status"], "ok"))
    assert rows["probabilities"].null_count == rows["embedding"].null_count == len(rows) - len(good)
    images = np.stack([decode(contents[uri], GEOMETRY) for uri in good["uri"].to_pylist()])
    expected = np.asarray(keras.Model(bundle.model.inputs, features)(images, training=False))
    np.testing.assert_allclose(np.stack(good["embedding"].to_pylist()), expected, atol=1e-4)
    np.testing.assert_allclose(
        np.stack(good["probabilities"].to_pylist()), Predictor(bundle).probabilities(images), atol=1e-5
    )


def test_rows_have_the_same_columns_when_all_images_are_bad(bundle, files):
    _, manifest = files
    worker = _worker(bundle, probabilities=True, embeddings=True)
    bad = manifest.filter(pc.match_substring(manifest["uri"], "zz.png"))
    assert pa.concat_tables(worker(bad)).schema == pa.concat_tables(worker(manifest)).schema


@pytest.mark.parametrize("embeddings", [False, True])
def test_an_image_without_probabilities_is_an_error(embeddings, bundle, files, monkeypatch):
    """A network with damaged weights gives values that are not finite, int8 rounding only zeros."""
    _, manifest = files
    worker = _worker(bundle, probabilities=True, embeddings=embeddings)
    before = pa.concat_tables(worker(manifest)).to_pylist()
    name = "all_outputs" if embeddings else "probabilities"
    original, calls = getattr(worker._predictor, name), []

    def damaged(images):
        outputs = original(images)
        if not calls and len(images) > 3:
            calls.append(len(images))
            values = np.array(outputs[0] if embeddings else outputs)
            values[[0, 2]] = [[np.nan, 0.5, 0.5], [0, 0, 0]]
            outputs = outputs._replace(probabilities=values) if embeddings else values
        return outputs

    monkeypatch.setattr(worker._predictor, name, damaged)
    after = pa.concat_tables(worker(manifest)).to_pylist()
    assert calls
    first, _, third = [row["id"] for row in before if row["status"] == "ok"][:3]
    changed = {row["id"]: row["error"] for row, other in zip(after, before, strict=True) if row != other}
    assert changed == {
        first: "no probabilities: the network's output is not finite",
        third: "no probabilities: the network's output is zero for each class",
    }
    for row in after:
        assert (row["status"] == "error") == bool(row["error"]) == (row["prediction"] is None)
        assert (row["probabilities"] is None) == bool(row["error"])


def test_a_worker_refuses_a_bundle_that_changed_since_the_plan(bundle):
    plan = dataclasses.replace(_plan(bundle), digest="other")
    with pytest.raises(BundleError, match="was changed while the run was going on: run it again"):
        Worker(plan)


def test_manifest_columns_with_names_of_output_columns_are_renamed():
    manifest = manifest_from_uris(["/a.png"]).append_column("prediction", [["cat"]]).append_column("mine", [[1]])
    assert select_columns(manifest).column_names == ["id", "uri", "original_prediction", "mine"]
    twice = manifest.append_column("original_prediction", [["dog"]])
    assert select_columns(twice).column_names[-1] == "original_prediction"
    assert "original_original_prediction" in select_columns(twice).column_names
    labelled = manifest.set_column(2, "label", [["dog"]])
    assert "label" in select_columns(labelled).column_names


def test_malformed_files_neither_crash_a_worker_nor_fill_its_memory(bundle, tmp_path):
    """Runs in its own process, which a crash would end."""
    files = malformed_files()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    panorama = Image.new("RGB", (20_000, 10_000), "teal")
    for name, options in (("panorama.jpg", {}), ("panorama_progressive.jpg", {"progressive": True})):
        panorama.save(tmp_path / name, "JPEG", quality=50, **options)
        (tmp_path / f"again_{name}").hardlink_to(tmp_path / name)
    program = f"""
import json, resource
from cnnray.images.manifest import manifest_from_uris
from cnnray.models.answers import Rules
from cnnray.models.bundle import Bundle
from cnnray.prediction.config import PredictOptions
from cnnray.prediction.plan import Plan
from cnnray.prediction.pool import Pool
from cnnray.prediction.worker import Worker
from pathlib import Path
pool = Pool(smallest=1, first=1, largest=1)
bundle = Bundle.load({bundle.uri!r})
digest = bundle.digest("model.keras")
plan = Plan(bundle=bundle, engine="keras", options=PredictOptions(), pool=pool, rules=Rules(), digest=digest)
worker = Worker(plan)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = manifest_from_uris([str(path) for path in Path({str(tmp_path)!r}).iterdir()])
rows = [row for table in worker(manifest) for row in table.select(["uri", "status", "error"]).to_pylist()]
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([rows, growth / 1024]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows, growth = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == len(files) + 4
    reasons = collections.Counter((row["error"] or "ok").partition(":")[0] for row in rows)
    assert set(reasons) <= {"ok", "empty", "not an image", "corrupt", "too many pixels", "unsupported"}
    assert reasons["corrupt"] > 100
    assert reasons["ok"] < len(rows) / 3
    assert growth < 1024, f"{growth:.0f} MiB"


def test_rows_of_which_the_bundle_is_unsure(bundle, files):
    _, manifest = files
    plan = _plan(bundle, probabilities=True)
    plain = pa.concat_tables(Worker(plan)(manifest)).to_pylist()
    confidences = sorted(row["confidence"] for row in plain if row["status"] == "ok")
    threshold = Threshold(
        confidence=confidences[len(confidences) // 2], candidate=0.2, images=9, coverage=0.5, observed_precision=1.0
    )
    unsure = dataclasses.replace(plan, rules=Rules(threshold=threshold))
    table = pa.concat_tables(Worker(unsure)(manifest))
    assert table.schema.field("candidates").type == pa.list_(pa.string())
    for row, before in zip(table.to_pylist(), plain, strict=True):
        candidates = row.pop("candidates")
        if before["status"] == "error" or before["confidence"] >= threshold.confidence:
            assert (row, candidates) == (before, None)
            continue
        assert row == before | {"status": "unsure", "prediction": None}
        names = bundle.info.class_names
        wanted = [names[index] for index in threshold.candidates(np.asarray(before["probabilities"], np.float32))]
        assert candidates == wanted
        assert candidates[0] == before["prediction"]
    # A column of the user's of that name is renamed, and only then.
    named = manifest.append_column("candidates", pa.array([7] * len(manifest)))
    for changed, column in ((plan, "candidates"), (unsure, "original_candidates")):
        rows = pa.concat_tables(Worker(changed)(named))
        assert rows[column].to_pylist() == [7] * len(manifest)
    groups = {name: "first" if name == names[0] else "others" for name in names}
    rules = Rules(
        threshold=dataclasses.replace(threshold, group=0.0, group_below=1.0), groups=Groups.of(groups, names)
    )
    grouped = pa.concat_tables(Worker(dataclasses.replace(plan, rules=rules))(manifest)).to_pylist()
    for row, before in zip(grouped, table.to_pylist(), strict=True):
        first, *others = before["probabilities"] or [0]
        named = "first" if first > sum(others) else "others"
        assert row.pop("group") == (named if before["status"] == "unsure" else None)
        assert row == before
    tally = Tally.of(table, 0.0)
    bad = sum(row["status"] == "error" for row in plain)
    assert (tally.rows, tally.errors) == (len(plain), bad)
    assert tally.unsure.total() == len(confidences) - tally.ok == sum(c < threshold.confidence for c in confidences)
    assert tally.classes + tally.unsure == collections.Counter(
        row["prediction"] for row in plain if row["status"] == "ok"
    )
    assert Tally.from_json(tally.as_json()) == tally
