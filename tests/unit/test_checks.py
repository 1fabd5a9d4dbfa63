"""What is wrong with a data set, planted."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cnnray.images import checks


def _photo(seed, size=(96, 80)):
    """Smooth shapes, as photos have them."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _check_files(tmp_path, files):
    """Write files, given as (bytes, label, split) by name, and check them."""
    rows = []
    for number, (name, (data, label, split)) in enumerate(sorted(files.items())):
        path = tmp_path / name
        path.write_bytes(data)
        rows.append({"id": number, "uri": str(path), "label": label, "split": split})
    schema = pa.schema([("id", pa.int64()), ("uri", pa.string()), ("label", pa.string()), ("split", pa.string())])
    manifest = pa.Table.from_pylist(rows, schema)
    return checks.check(manifest, pa.concat_tables(checks.examine(manifest)))


@pytest.fixture
def clean():
    return {f"{seed:03d}.png": (_encoded(_photo(seed)), "ab"[seed % 2], "train") for seed in range(60)}


def test_a_clean_set_has_no_findings(tmp_path, clean):
    result = _check_files(tmp_path, clean)
    assert result.findings == []
    assert (result.images, result.unreadable, result.copies, result.nearly) == (60, 0, 0, 0)
    assert result.sides == (80, 88, 96)


def test_planted_faults_are_each_found(tmp_path, clean, caplog):
    photo = _photo(3)
    files = clean | {
        "copy.png": (clean["003.png"][0], "b", "validation"),
        "encoded_anew.jpg": (_encoded(_photo(4), "JPEG", quality=60), "a", "validation"),
        "resized.png": (_encoded(_photo(5).resize((200, 170))), "b", "validation"),
        "other_label.png": (_encoded(_photo(6), "PNG", compress_level=1), "b", "train"),
        "torn.png": (_encoded(photo)[:200], "a", "train"),
        "long.png": (_encoded(_photo(100, (600, 40))), "a", "train"),
        "rare.png": (_encoded(_photo(101)), "rare", "train"),
    }
    result = _check_files(tmp_path, files)
    by_kind = {finding.kind: finding for finding in result.findings}
    assert by_kind.keys() == {
        "the same image in two splits",
        "nearly the same image in two splits",
        "nearly the same image under two labels",
        "unreadable",
        "an odd size",
        "fewer than 20 training images",
    }
    assert "003.png" in by_kind["the same image in two splits"].examples[0]
    near = by_kind["nearly the same image in two splits"]
    assert near.count == 2
    assert {"encoded_anew" in example or "resized" in example for example in near.examples} == {True}
    assert "006.png" in by_kind["nearly the same image under two labels"].examples[0]
    (example,) = by_kind["unreadable"].examples
    assert "torn.png: corrupt: " in example
    assert "600x40" in by_kind["an odd size"].examples[0]
    assert by_kind["fewer than 20 training images"].examples == ["rare (1)"]
    result.warn()
    assert len(caplog.messages) == len(result.findings)


def test_the_same_image_under_two_labels(tmp_path, clean):
    result = _check_files(tmp_path, clean | {"twice.png": (clean["000.png"][0], "b", "train")})
    (finding,) = result.findings
    assert finding.kind == "the same image under two labels"
    assert "000.png (train, a)" in finding.examples[0]
    assert "twice.png (train, b)" in finding.examples[0]
    assert result.copies == 1


def test_blank_and_like_images_are_not_called_the_same(tmp_path):
    files = {}
    for level in range(0, 250, 12):
        files[f"flat{level:03d}.png"] = (_encoded(Image.new("RGB", (40, 40), (level,) * 3)), "a", None)
    assert _check_files(tmp_path, files).nearly == 0


def test_very_many_nearly_equal_images_are_one_group(tmp_path):
    files = {}
    for number in range(120):
        pixels = np.asarray(_photo(1)).copy()
        pixels[number % 80, number % 96] = number
        files[f"{number:03d}.png"] = (_encoded(Image.fromarray(pixels)), "a", ("train", "test")[number % 2])
    result = _check_files(tmp_path, files)
    (finding,) = [finding for finding in result.findings if finding.kind.startswith("nearly")]
    assert (finding.kind, finding.count) == ("nearly the same image in two splits", 1)
    assert finding.examples[0].count(" = ") == 10
    assert (result.nearly, result.copies) == (119, 0)


def test_nothing_readable(tmp_path):
    result = _check_files(tmp_path, {"a.png": (b"", "a", "train"), "b.png": (b"x", "b", "train")})
    assert result.unreadable == 2
    assert result.sides == (0, 0, 0)
