"""The manifest of a run, and whether training keeps the decoded images in memory."""

import pyarrow as pa
import pytest

from cnnray.cluster import Node, Resources
from cnnray.evaluation import job as evaluation
from cnnray.evaluation.config import EvaluateConfig
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError
from cnnray.training import data
from cnnray.training.config import TrainConfig
from cnnray.training.plan import share_out
from tests.configs import decided

FILES = [f"/d/{index}.png" for index in range(4)]
IN_PARQUET = [f"/d/x.parquet#000000-{index:09d}" for index in range(4)]


@pytest.mark.parametrize(
    ("uris", "cache", "store", "expected"),
    [
        (FILES, "auto", 10**6, True),
        (FILES, "auto", 4 * 10**5, False),  # more than a fifth of the object store
        (FILES, "auto", 10**4, False),
        (FILES, "none", 10**6, False),
        (FILES, "memory", 10**5, True),
        (FILES, "memory", 10**4, "--cache memory has to keep .*: use --cache none"),
        (IN_PARQUET, "auto", 10**6, True),
        (IN_PARQUET, "auto", 10**5, False),
        (IN_PARQUET, "none", 10**6, False),
        (IN_PARQUET, "auto balanced", 10**6, True),
        (FILES, "none balanced", 10**6, False),
        (IN_PARQUET, "none balanced", 10**6, "images in Parquet, .* --sampling balanced draws them one by one"),
    ],
)
def test_images_are_cached_if_they_fit_or_must_be(uris, cache, store, expected):
    cache, _, balanced = cache.partition(" ")
    sampling = {"sampling": "balanced"} if balanced else {}
    config = decided(image_size=90, cache=cache, **sampling)
    manifest = pa.table({"uri": [*uris, "/d/test.png"], "split": ["train"] * 3 + ["validation", "test"]})
    shares = share_out(config, Resources((Node(cpus=4, object_store_bytes=store),)))
    if isinstance(expected, bool):
        assert data.is_cached(config, manifest, shares) is expected
    else:
        with pytest.raises(ManifestError, match=expected):
            data.is_cached(config, manifest, shares)


def _build(tmp_path, splits, **flags):
    rows = [f"{number}.png,{'ab'[number % 2]},{split}" for number, split in enumerate(splits)]
    (tmp_path / "images.csv").write_text("\n".join(["uri,label,split", *rows]))
    config = TrainConfig(data=str(tmp_path / "images.csv"), output="/o", max_workers=1, **flags)
    manifest = data.build_run_manifest(config)
    assert manifest["id"].to_pylist() == list(range(len(manifest)))
    return manifest


def test_test_images_stay_in_the_manifest_and_are_evaluated(tmp_path):
    splits = ["train"] * 20 + ["test"] * 6
    manifest = _build(tmp_path, splits, validation_fraction=0.2)
    assert len(manifest) == 26
    chosen = dict(zip(manifest["uri"].to_pylist(), manifest["split"].to_pylist(), strict=True))
    assert [chosen[f"{tmp_path}/{number}.png"] for number in range(20, 26)] == ["test"] * 6
    assert list(chosen.values()).count("validation") == 4
    # The same images validate as without the test images.
    alone = _build(tmp_path, splits[:20], validation_fraction=0.2)
    assert alone.select(["uri", "split"]).to_pylist() == [
        {"uri": uri, "split": split} for uri, split in chosen.items() if split != "test"
    ]
    manifests.write(manifest, str(tmp_path / "manifest.parquet"))
    config = EvaluateConfig(data=str(tmp_path / "manifest.parquet"), bundle="/b", output="/r")
    rebuilt = manifests.build_manifest(config.data, labelled=True)
    split, rows = evaluation.select_split(rebuilt, config)
    assert split == "test"
    assert rows["split"].to_pylist() == ["test"] * 6


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        (["test"] * 6, "holds no images to train on: all are of the split test"),
        (["train"] * 5 + [""], "some images have a split and some have none"),
        (["validation", "test", "validation"], "no training image has the label 'a'"),
    ],
)
def test_data_without_training_images_are_refused(tmp_path, splits, sentence):
    with pytest.raises(ManifestError, match=sentence):
        _build(tmp_path, splits)


def test_validation_images_of_their_own_leave_the_test_images(tmp_path):
    (tmp_path / "other.csv").write_text("uri,label\nx.png,a\ny.png,b\n")
    manifest = _build(tmp_path, ["train"] * 4 + ["test"] * 2, validation=str(tmp_path / "other.csv"))
    assert manifest["split"].to_pylist() == ["train"] * 4 + ["test"] * 2 + ["validation"] * 2
