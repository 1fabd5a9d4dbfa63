"""Every augmentation changes what its switch says and nothing else, and equal seeds give equal images."""

from dataclasses import asdict, replace

import keras
import numpy as np
import pytest
from PIL import Image

from cnnray.images.geometry import Geometry
from cnnray.models import augment
from cnnray.models.augment import STRENGTHS, Augmentations, Augmenter
from cnnray.training.config import TrainConfig
from cnnray.training.preview import preview

NONE = STRENGTHS["none"]
SWITCHES = {
    "horizontal_flip": True, "vertical_flip": True, "rotation": 0.1, "zoom": 0.1, "translation": 0.1, "crop": 0.5,
    "contrast": 0.3, "brightness": 0.3, "saturation": 0.8, "hue": 0.3, "noise": 0.1, "blur": 1.0, "erasing": 1.0,
    "rand_augment": 0.2, "mix_up": 0.4, "cut_mix": 1.0, "one_of": ["noise", "blur"],
}  # fmt: skip


def _images(count=6, size=24):
    generator = np.random.default_rng(0)
    small = generator.integers(30, 226, (count, 6, 6, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in small]
    )


def _run(augmenter, images, seed=1):
    labels = np.eye(3, dtype=np.float32)[np.arange(len(images)) % 3]
    for number, state in enumerate(augmenter.seeds):
        state.assign([seed, number])
    return [keras.ops.convert_to_numpy(array) for array in augmenter(images, labels)]


def test_every_switch_is_tested():
    assert set(SWITCHES) == set(asdict(NONE))
    assert all(None not in asdict(switches).values() for switches in STRENGTHS.values())


@pytest.mark.parametrize("name", [*SWITCHES, *STRENGTHS])
def test_a_switch_changes_images_deterministically_by_its_seeds(name):
    images = _images()
    switches = STRENGTHS[name] if name in STRENGTHS else replace(NONE, **{name: SWITCHES[name]})
    if name == "one_of":
        switches = replace(switches, noise=0.1, blur=1.0)
    augmenter = Augmenter(switches, Geometry.of(24))
    changed, labels = _run(augmenter, images)
    again, _ = _run(augmenter, images)
    other, _ = _run(augmenter, images, seed=2)
    assert (changed.dtype, changed.shape) == (np.uint8, images.shape)
    np.testing.assert_array_equal(changed, again)
    if name == "none":
        np.testing.assert_array_equal(changed, images)
        assert not augmenter.seeds
        return
    assert (changed != images).any()
    assert (changed != other).any()
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
    mixed = name in ("mix_up", "cut_mix", "strong")
    assert (set(labels.ravel()) == {0, 1}) == (not mixed)


def test_flips_mirror_half_of_the_images():
    images = _images(count=64, size=8)
    changed, _ = _run(Augmenter(replace(NONE, horizontal_flip=True), Geometry.of(8)), images)
    kept = (changed == images).all((1, 2, 3))
    mirrored = (changed == images[:, :, ::-1]).all((1, 2, 3))
    assert (kept | mirrored).all()
    assert 15 < mirrored.sum() < 49


def test_each_image_gets_one_of_the_alternatives():
    images = _images(count=40, size=8)
    augmenter = Augmenter(
        replace(NONE, brightness=0.5, erasing=1.0, one_of=["brightness", "erasing"]), Geometry.of(8)
    )
    changed, _ = _run(augmenter, images)
    # Erasing leaves most pixels unchanged, brightness none. Both together would leave none, and add noise.
    untouched = (changed == images).mean((1, 2, 3))
    erased = untouched > 0.3
    assert 5 < erased.sum() < 35
    difference = changed.astype(int) - images
    shift = np.abs(difference[~erased] - np.median(difference[~erased], (1, 2, 3), keepdims=True))
    assert np.median(shift) <= 1


def test_a_crop_is_a_part_of_the_image():
    ramp = np.broadcast_to(np.linspace(0, 255, 32)[None, None, :, None], (50, 32, 32, 3)).astype(np.uint8)
    changed, _ = _run(Augmenter(replace(NONE, crop=0.25), Geometry.of(32)), ramp)
    widths = (changed[:, 0, -1, 0].astype(int) - changed[:, 0, 0, 0]) / 255
    assert (np.diff(changed[:, 0, :, 0].astype(int), axis=1) >= 0).all()
    assert widths.min() >= np.sqrt(0.25 * 3 / 4) - 0.02
    assert widths.max() <= 1
    assert widths.std() > 0.05


def test_rotation_zoom_and_shift_are_within_their_bounds():
    size, centre = 64, 31.5
    columns, rows = np.meshgrid(np.arange(size), np.arange(size))
    where = np.stack([columns * 4, rows * 4, np.zeros_like(rows)], -1).astype(np.uint8)
    augmenter = Augmenter(replace(NONE, rotation=0.05, zoom=0.2, translation=0.1), Geometry.of(size))
    changed, _ = _run(augmenter, np.stack([where] * 40))
    middle = slice(24, 40)  # nothing of it comes from beyond a border
    positions = np.stack([columns - centre, rows - centre, np.ones_like(rows)], -1)[middle, middle].reshape(-1, 3)
    angles, zooms, shifts = [], [], []
    for image in changed:
        sources = image[middle, middle, :2].reshape(-1, 2) / 4 - centre
        ((a, d), (b, e), shift), *_ = np.linalg.lstsq(positions, sources, rcond=None)
        np.testing.assert_allclose([a, b], [e, -d], atol=0.01)  # a rotation and a zoom, and nothing else
        angles.append(np.arctan2(d, a) / (2 * np.pi))
        zooms.append(np.hypot(a, d))
        shifts.append(shift / size)
    for values, low, high in ((angles, -0.05, 0.05), (zooms, 0.8, 1.2), (shifts, -0.1, 0.1)):
        assert low - 0.005 < np.min(values) < low * 0.6 + high * 0.4
        assert low * 0.4 + high * 0.6 < np.max(values) < high + 0.005


def test_mix_up_blends_images_and_labels_alike():
    images = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 120, 240)] * 8)
    changed, labels = _run(Augmenter(replace(NONE, mix_up=1.0), Geometry.of(4)), images)
    np.testing.assert_allclose(changed[:, 0, 0, 0], labels @ [0, 120, 240], atol=1)
    assert ((labels > 0.05) & (labels < 0.95)).any()


def test_cut_mix_pastes_areas_that_match_its_labels():
    images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 120, 240)] * 8)
    changed, labels = _run(Augmenter(replace(NONE, cut_mix=1.0), Geometry.of(32)), images)
    assert set(np.unique(changed)) <= {0, 120, 240}
    np.testing.assert_allclose(changed.mean((1, 2, 3)), labels @ [0, 120, 240], atol=240 * 0.12)


def test_switches_override_a_strength():
    settings = augment.resolve("standard", Augmentations(horizontal_flip=False, rotation=0.0, noise=0.1))
    assert settings == replace(STRENGTHS["standard"], horizontal_flip=False, rotation=0.0, noise=0.1)
    assert not augment.resolve("light", Augmentations()).horizontal_flip


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"rotation": -0.1}, "--augmentations.rotation must be 0 to 1, not -0.1"),
        ({"cut_mix": 2}, "--augmentations.cut-mix must be 0 to 1, not 2"),
        ({"one_of": ["noise", "fog"]}, "--augmentations.one-of 'fog' is unknown"),
        ({"one_of": ["noise", "noise"]}, "names an augmentation twice"),
    ],
)
def test_switches_out_of_range_are_refused(switches, sentence):
    with pytest.raises(ValueError, match=sentence):
        Augmentations(**switches)


def test_a_contact_sheet_shows_originals_beside_augmented_images(tmp_path):
    for number, image in enumerate(_images(12)):
        (tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / "ab"[number % 2] / f"{number}.png")
    config = TrainConfig(
        data=str(tmp_path / "data"), output=str(tmp_path / "out"), image_size="24x16", decode_size=24,
        architecture="small_cnn", augment="standard", preview_augmentations=4,
    )  # fmt: skip
    line = preview(config)
    assert line == {"preview": str(tmp_path / "out" / "augmentations.png"), "images": 4}
    with Image.open(line["preview"]) as sheet:
        assert sheet.size == (8 * 68 + 4, 4 * 114)
        first, second = (np.asarray(sheet)[14:110, left : left + 64] for left in (0, 68))
    originals = [np.asarray(Image.open(path)) for path in (tmp_path / "data").rglob("*.png")]
    assert (second != first).any()
    assert any((first[2::4, 2::4] == original[:, 4:20]).all() for original in originals)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["augmentations.png"]


def _wheres(height, width, count=30):
    """Images whose red and green say the column and the row of each pixel."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    where = np.stack([columns * 4, rows * 4, np.zeros_like(rows)], -1).astype(np.uint8)
    return np.stack([where] * count)


LARGER = Geometry.of("32x24", decode_size="40x48")


@pytest.mark.parametrize("switches", [{}, {"horizontal_flip": True}, {"crop": 0.5, "one_of": ["crop"]}])
def test_what_does_not_move_pixels_takes_the_centre_of_a_larger_image(switches):
    images = _wheres(40, 48)
    changed, _ = _run(Augmenter(replace(NONE, **switches), LARGER), images)
    assert changed.shape == (30, 32, 24, 3)
    centre = images[:, 4:36, 12:36]
    if "one_of" in switches:  # a crop of the centre
        columns, rows = changed[..., 0] / 4.0, changed[..., 1] / 4.0
        assert 12 <= columns.min() < columns.max() <= 35
        assert 4 <= rows.min() < rows.max() <= 35
        assert (changed != centre).any()
    else:
        kept, mirrored = ((changed == these).all((1, 2, 3)) for these in (centre, centre[:, :, ::-1]))
        assert (kept | mirrored).all()
        assert mirrored.any() == bool(switches)


def test_a_crop_of_a_larger_image_reaches_all_of_it_and_keeps_the_aspect_ratio_of_the_result():
    changed, _ = _run(Augmenter(replace(NONE, crop=0.1), LARGER), _wheres(40, 48, 400))
    columns, rows = changed[..., 0] / 4.0, changed[..., 1] / 4.0
    assert changed.shape == (400, 32, 24, 3)
    assert columns.min() < 1 < 46 < columns.max()
    assert rows.min() < 1 < 38 < rows.max()
    widths = (columns[:, 0, -1] - columns[:, 0, 0]) * 24 / 23
    heights = (rows[:, -1, 0] - rows[:, 0, 0]) * 32 / 31
    areas, ratios = (
        widths * heights / (30 * 40),
        widths / heights / (24 / 32),
    )  # 30x40 is the largest of its aspect ratio
    assert 0.08 < areas.min() < 0.16
    assert areas.max() > 0.9
    assert np.abs(areas.mean() - 0.55) < 0.05
    assert 0.7 < ratios.min() < 0.8 < 1.25 < ratios.max() < 1.4


def test_without_a_crop_shifts_and_turns_begin_at_the_centre_of_a_larger_image():
    changed, _ = _run(Augmenter(replace(NONE, translation=0.1), LARGER), _wheres(40, 48, 200))
    columns, rows = changed[..., 0] / 4.0, changed[..., 1] / 4.0
    np.testing.assert_allclose(columns[:, 0, -1] - columns[:, 0, 0], 23, atol=0.5)  # nothing is scaled
    np.testing.assert_allclose(rows[:, -1, 0] - rows[:, 0, 0], 31, atol=0.5)
    assert np.abs(columns[:, 0, 0] - 12).max() <= 2.4 + 0.25  # a tenth of the 24 columns of the result
    assert np.abs(rows[:, 0, 0] - 4).max() <= 3.2 + 0.25
    assert columns[:, 0, 0].std() > 1
