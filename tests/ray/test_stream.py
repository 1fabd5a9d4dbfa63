"""The training stream, the in-memory cache and Predictor see the same pixels; bad images keep their rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cnnray.images import checks, reading, stream
from cnnray.images.decode import decode
from cnnray.images.decoders import Decoders
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import build_manifest
from cnnray.images.ranges import split_rows
from cnnray.models import architectures, bundle
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.models.predictor import Predictor
from cnnray.training import data as training_data
from cnnray.training.data import CachedSource, StreamedSource, decode_into_memory
from tests.awkward import awkward_images, bad_images
from tests.configs import decided
from tests.conftest import write_tar

SIZE = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The awkward set, the bad one and a missing file, as bytes by name in the manifest's order, and the manifest."""
    folder = tmp_path_factory.mktemp("awkward")
    contents = awkward_images() | {name: data for name, (data, _) in bad_images().items()}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    contents["missing.png"] = None
    uris = [str(folder / name) for name in contents]
    manifest = pa.table({"id": range(len(uris)), "uri": uris, "target": [0] * len(uris)})
    return list(contents.values()), manifest


@pytest.fixture(scope="module")
def sources(files):
    manifest = files[1]
    decoders = Decoders(2, Geometry.of(SIZE), largest_batch=len(manifest))
    yield StreamedSource(manifest, decoders), CachedSource(decode_into_memory(manifest, Geometry.of(SIZE), 0.25))
    decoders.close()


def copied(batches):
    """Batches whose pixels stay."""
    return [batch | {"image": batch["image"].copy()} for batch in batches]


def blocks_of(dataset):
    """The blocks of a dataset, in the order of its rows."""
    dataset.context.execution_options.preserve_order = True
    return list(dataset.iter_batches(batch_size=None, batch_format="numpy"))


def batched(rows, sizes=None):
    """The arguments of `Source.batches` for rows in batches of these sizes; None: in one."""
    parts = np.split(rows, np.cumsum([len(rows)] if sizes is None else sizes)[:-1])
    return (lambda number: parts[number]), len(parts) if sizes != [] else 0


def _pixels_that_reach_the_network(contents, tmp_path):
    class Recorded(Predictor):
        def probabilities(self, images):
            self.seen = images
            return super().probabilities(images)

    info = BundleInfo(class_names=["a", "b"], image_size=SIZE)
    bundle.save(architectures.build("small_cnn", SIZE, 2), info, tmp_path)
    predictor = Recorded(Bundle.load(str(tmp_path)))
    return predictor.seen if predictor(contents) else None


def test_same_bytes_same_pixels_on_every_path(files, sources, tmp_path):
    contents, manifest = files
    rows = np.random.default_rng(0).permutation(len(manifest))
    sizes = [5, 1, len(rows) - 6]
    streamed, cached = (
        {name: np.concatenate([batch[name] for batch in batches]) for name in ("id", "image", "error", "target")}
        for batches in (copied(source.batches(*batched(rows, sizes))) for source in sources)
    )
    for columns in (streamed, cached):
        assert columns["id"].tolist() == rows.tolist()
    np.testing.assert_array_equal(streamed["image"], cached["image"])
    assert streamed["error"].tolist() == cached["error"].tolist()
    good = [index for index in range(len(rows)) if streamed["error"][index] == ""]
    assert len(good) == len(awkward_images())
    predicted = _pixels_that_reach_the_network([contents[rows[index]] for index in good], tmp_path)
    np.testing.assert_array_equal(predicted, streamed["image"][good])
    np.testing.assert_array_equal(predicted[0], decode(contents[rows[good[0]]], Geometry.of(SIZE)))


def test_few_images_are_read_in_one_pass_with_the_same_results(files, sources, monkeypatch):
    manifest = files[1].append_column("label", pa.array(["a"] * len(files[1])))
    manifest = manifest.append_column(
        "split", pa.array((["train", "validation", "test"] * len(manifest))[: len(manifest)])
    )
    config = decided(image_size=SIZE, max_bad_fraction=0.9)
    few = training_data.read_few(config, manifest.drop_columns("target"), check=True)
    of_tasks = next(sources[1].batches(*batched(np.arange(len(manifest)))))
    for name in ("id", "image", "error"):
        np.testing.assert_array_equal(few.decoded[name], of_tasks[name])
    found = checks.check(manifest, few.examined)
    monkeypatch.setattr(reading, "FEW_BYTES", 0)
    assert training_data.read_few(config, manifest, check=True) is None
    monkeypatch.setattr(reading, "FEW_IMAGES", 0)
    assert training_data.read_few(config, manifest, check=True) is None
    assert stream.check(manifest, 0.25) == found
    assert found.unreadable == len(bad_images()) + 1


def test_bad_images_are_rows_with_their_reason(files, sources):
    _, manifest = files
    (batch,) = sources[0].batches(*batched(np.arange(len(manifest))))
    errors = {uri.rpartition("/")[2]: error for uri, error in zip(batch["uri"], batch["error"], strict=True) if error}
    expected = {name: reason for name, (_, reason) in bad_images().items()} | {"missing.png": "missing"}
    assert {name: error.split(":")[0] for name, error in errors.items()} == expected
    assert not batch["image"][batch["error"] != ""].any()


@pytest.mark.parametrize("kind", ["parquet", "hugging_face", "tar"])
def test_images_inside_containers_are_the_same(files, sources, tmp_path, kind):
    contents, manifest = files
    contents = [data for data in contents if data is not None]  # without the missing file
    if kind == "tar":
        write_tar(tmp_path / "images.tar", {f"{index:02d}.png": data for index, data in enumerate(contents)})
    else:
        column = [{"bytes": data, "path": None} for data in contents] if kind == "hugging_face" else contents
        pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / "images.parquet", row_group_size=7)
    held = build_manifest(str(tmp_path), labelled=False).append_column("target", manifest["target"][: len(contents)])
    source = StreamedSource(held, sources[0]._decoders)
    for rows in (np.arange(len(held)), np.arange(len(held))[::-1], np.asarray([9, 8, 12, 8, 0])):
        (expected,), (batch,) = (copied(s.batches(*batched(rows))) for s in (sources[0], source))
        for name in ("id", "image", "error"):
            np.testing.assert_array_equal(batch[name], expected[name])


def test_parquet_that_breaks_off_gives_an_error_for_each_of_its_images(tmp_path):
    path = tmp_path / "images.parquet"
    images = [data * 50 for data in awkward_images().values() if len(data) < 10_000]
    pyarrow.parquet.write_table(pa.table({"bytes": images}), path, row_group_size=5, compression="none")
    manifest = build_manifest(str(path), labelled=False)
    data = bytearray(path.read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)
    path.write_bytes(data)
    blocks = blocks_of(stream.decoded(manifest, Geometry.of(8), cpus_per_task=0.25))
    assert np.concatenate([block["id"] for block in blocks]).tolist() == list(range(len(images)))
    errors = np.concatenate([block["error"] for block in blocks]).tolist()
    assert errors[0].startswith("unreadable: ")
    assert errors[-1] == ""
    path.unlink()
    (block,) = blocks_of(stream.decoded(manifest, Geometry.of(8), cpus_per_task=0.25))
    assert all(error.startswith("missing: ") for error in block["error"])


def test_blocks_are_small_and_in_order(tmp_path):
    manifest = pa.table({"id": range(1000), "uri": [f"/nowhere/{i}.png" for i in range(1000)]})
    blocks = blocks_of(stream.decoded(manifest, Geometry.of(8), cpus_per_task=0.25))
    assert [len(block["id"]) for block in blocks] == [256, 256, 256, 232]
    assert np.concatenate([block["id"] for block in blocks]).tolist() == list(range(1000))
    # Row groups of Parquet are not cut.
    pyarrow.parquet.write_table(pa.table({"bytes": [b"x"] * 1000}), tmp_path / "x.parquet", row_group_size=300)
    manifest = build_manifest(str(tmp_path / "x.parquet"), labelled=False)
    blocks = blocks_of(stream.decoded(manifest, Geometry.of(8), cpus_per_task=0.25))
    assert [len(block["id"]) for block in blocks] == [300, 300, 300, 100]
    assert np.concatenate([block["id"] for block in blocks]).tolist() == list(range(1000))


def test_batches_may_be_empty(sources):
    rows = np.asarray([3, 1, 2])
    for source in sources:
        batches = list(source.batches(*batched(rows, [0, 2, 0, 1, 0])))
        assert [batch["id"].tolist() for batch in batches] == [[], [3, 1], [], [2], []]
        assert [batch["image"].shape for batch in batches] == [(n, SIZE, SIZE, 3) for n in (0, 2, 0, 1, 0)]
        assert list(source.batches(*batched(rows[:0], []))) == []


def _split(uris, rows, **options):
    return split_rows(pa.chunked_array([uris[:5], uris[5:]], pa.string()), rows, **options)


def test_split_rows_cuts_only_large_row_groups():
    loose = [f"/{number}.png" for number in range(10)]
    group = [f"/a.parquet#000000-{number:09d}" for number in range(7)]
    other = [f"/a.parquet#000001-{number:09d}" for number in range(2)]
    assert _split([], 3) == []
    assert _split(loose, 4) == [(0, 4), (4, 8), (8, 10)]
    assert _split(group + other, 3, cut_groups=True) == [(0, 7), (7, 9)]
    assert _split(other + group + loose, 3) == [(0, 9), (9, 12), (12, 15), (15, 18), (18, 19)]
    large = [f"/b.parquet#000000-{number:09d}" for number in range(50_000)]
    assert _split(other + large, 3) == [(0, 50_002)]
    ranges = _split(other + large, 3, cut_groups=True)
    assert ranges == [(0, 2), *((2 + place, 2 + place + 6250) for place in range(0, 50_000, 6250))]
    assert _split(large[:9000], 3, cut_groups=True) == [(0, 4096), (4096, 8192), (8192, 9000)]
