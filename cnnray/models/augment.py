"""Augmentation of training images with Keras layers. It is never part of a bundle.

The layers run on the workers, inside the compiled training step, on whole batches. Fractions refer to the sides of
the image or to the range of the pixel values.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from cnnray.images.geometry import Geometry, Size

Strength = Literal["none", "light", "standard", "strong"]
Alternative = Literal[
    "rotation",
    "zoom",
    "translation",
    "crop",
    "contrast",
    "brightness",
    "saturation",
    "hue",
    "noise",
    "blur",
    "erasing",
]


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """Single augmentations that override --augment; null keeps the setting of --augment."""

    horizontal_flip: bool | None = None
    """Mirror half of the images left to right. Not for text, digits, or other images in which left and right
    differ."""
    vertical_flip: bool | None = None
    """Flip half of the images upside down."""
    rotation: float | None = None
    """Rotate by up to this fraction of a full turn in either direction; 0.1 is 36 degrees."""
    zoom: float | None = None
    """Zoom in or out by up to this fraction."""
    translation: float | None = None
    """Shift by up to this fraction of each side."""
    crop: float | None = None
    """Crop to between this fraction and all of the image's area, with aspect ratios of 3:4 to 4:3 (by that of
    --image-size, where it is no square); 0 disables it. With --decode-size the crop is taken from all of that, unless
    one_of names it."""
    contrast: float | None = None
    """Change the contrast by up to this fraction."""
    brightness: float | None = None
    """Change the brightness by up to this fraction of the pixel range."""
    saturation: float | None = None
    """Change the saturation by up to this fraction; at most 1."""
    hue: float | None = None
    """Shift the hue by up to this fraction of the colour circle; at most 1."""
    noise: float | None = None
    """Add Gaussian noise with this standard deviation, as a fraction of the pixel range."""
    blur: float | None = None
    """Fraction of the images that are blurred with a Gaussian of up to one pixel."""
    erasing: float | None = None
    """Fraction of the images in which a rectangle of 2 to 33 % of the area is replaced by noise."""
    rand_augment: float | None = None
    """Strength of Keras's RandAugment (Cubuk et al. 2019): two of eleven augmentations, the same two for all images
    of a worker in a step. Its rotation is up to this fraction of a full turn."""
    mix_up: float | None = None
    """Blend pairs of images and their labels, with weights from Beta(mix_up, mix_up) (Zhang et al. 2018)."""
    cut_mix: float | None = None
    """Paste a rectangle of another image and mix the labels by area, with areas from Beta(alpha, alpha), alpha up to
    this value (Yun et al. 2019). If mix_up is set too, each step applies one of the two."""
    one_of: list[Alternative] | None = None
    """Apply only one of these augmentations to each image, chosen at random."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value is out of range; the message names the flag.
        """
        for name, value in asdict(self).items():
            largest = 10 if name == "mix_up" else 1
            if name == "one_of" or value is None or 0 <= value <= largest:
                continue
            raise ValueError(f"--augmentations.{name.replace('_', '-')} must be 0 to {largest}, not {value}.")
        alternatives = get_args(Alternative)
        for name in self.one_of or ():
            if name not in alternatives:
                expected = ", ".join(alternatives)
                raise ValueError(f"--augmentations.one-of {name!r} is unknown; expected some of {expected}.")
        if self.one_of is not None and len(set(self.one_of)) != len(self.one_of):
            raise ValueError("--augmentations.one-of names an augmentation twice.")


_NONE = Augmentations(
    horizontal_flip=False, vertical_flip=False, rotation=0.0, zoom=0.0, translation=0.0, crop=0.0, contrast=0.0,
    brightness=0.0, saturation=0.0, hue=0.0, noise=0.0, blur=0.0, erasing=0.0, rand_augment=0.0, mix_up=0.0,
    cut_mix=0.0, one_of=[],
)  # fmt: skip
_LIGHT = replace(_NONE, rotation=0.03, zoom=0.1, translation=0.1)
_STANDARD = replace(
    _NONE, horizontal_flip=True, rotation=0.03, crop=0.8, contrast=0.2, brightness=0.1, saturation=0.2, erasing=0.1
)
_STRONG = replace(
    _STANDARD, crop=0.5, brightness=0.2, contrast=0.3, saturation=0.4, hue=0.05, noise=0.05, blur=0.5, erasing=0.25,
    mix_up=0.2, cut_mix=1.0, one_of=["noise", "blur"],
)  # fmt: skip
STRENGTHS: dict[str, Augmentations] = {
    "none": _NONE,
    "light": _LIGHT,
    "standard": _STANDARD,
    "strong": _STRONG,
}
"""The settings of each strength; no field is None."""


def resolve(strength: str, switches: Augmentations) -> Augmentations:
    """Fill the switches that are None with the settings of the strength."""
    return replace(
        STRENGTHS[strength], **{name: value for name, value in asdict(switches).items() if value is not None}
    )


def check_alternatives(strength: str, switches: Augmentations) -> None:
    """
    Raises:
        ValueError: `one_of` names an augmentation that is off.
    """
    settings = resolve(strength, switches)
    off = [name for name in switches.one_of or () if not getattr(settings, name)]
    if off:
        raise ValueError(f"--augmentations.one-of names {off[0]}, which is off: set --augmentations.{off[0]}, too.")


_AFFINE = ("rotation", "zoom", "translation", "crop")
"""The augmentations that move pixels, all of them in one resampling."""


class Augmenter:
    """Augments batches of training images. Create it inside the strategy's scope, as a network.

    Attributes:
        seeds: the variables, int (2,) each, that with the images fully determine the result.
    """

    def __init__(self, switches: Augmentations, geometry: Geometry) -> None:
        """
        Args:
            switches: resolved settings, none of them None (see `resolve`).
            geometry: of the images; they come uncut.
        """
        from keras import layers, random

        self._generator = random.SeedGenerator(0)
        layers_by_switch = _build_layers(switches, geometry.image_size)
        self._centre = geometry.centre if "affine" not in layers_by_switch else None
        alternatives = [layers_by_switch.pop(name) for name in switches.one_of or () if name in layers_by_switch]
        self._layers = list(layers_by_switch.values())
        if alternatives:
            self._layers.append(self._apply_one_of(alternatives))
        self._mixing = []
        if switches.mix_up:
            self._mixing.append(layers.MixUp(switches.mix_up, seed=0, dtype="float32"))
        if switches.cut_mix:
            self._mixing.append(layers.CutMix(switches.cut_mix, seed=0, dtype="float32"))
        self._tracked = [*self._layers, *alternatives, *self._mixing]

    @property
    def seeds(self) -> list[Any]:
        variables = {
            id(variable): variable
            for layer in self._tracked
            for variable in getattr(layer, "variables", [])
            if variable.path.endswith("seed_generator_state")
        }
        return [self._generator.state, *variables.values()] if self._tracked else []

    def __call__(self, images: Any, labels: Any) -> tuple[Any, Any]:
        """
        Args:
            images: uint8 (N, height, width, 3) of `geometry.decode_size`.
            labels: float32 (N, classes), the weight of each class.

        Returns:
            The augmented images, uint8 (N, height, width, 3) of `geometry.image_size`, and their labels, float32
            (N, classes).
        """
        from keras import ops, random

        if self._centre:
            images = self._centre(images)
        if not self._tracked:
            return images, labels
        pixels = ops.cast(images, "float32") / 255
        for layer in self._layers:
            pixels = ops.clip(layer(pixels, training=True), 0, 1)
        mixed = [layer({"images": pixels, "labels": labels}, training=True) for layer in self._mixing]
        if len(mixed) == 1:
            pixels, labels = mixed[0]["images"], mixed[0]["labels"]
        elif mixed:
            first = random.uniform((), seed=self._generator) < 0.5
            pixels, labels = (ops.where(first, *(batch[key] for batch in mixed)) for key in ("images", "labels"))
        return ops.cast(ops.round(pixels * 255), "uint8"), labels

    def _apply_one_of(self, alternatives: list[Any]) -> Callable[..., Any]:
        from keras import ops, random

        def apply(pixels: Any, training: bool) -> Any:
            choice = random.randint((ops.shape(pixels)[0], 1, 1, 1), 0, len(alternatives), seed=self._generator)
            for number, layer in enumerate(alternatives):
                pixels = ops.where(choice == number, layer(pixels, training=training), pixels)
            return pixels

        return apply


def _build_layers(switches: Augmentations, image_size: Size) -> dict[str, Any]:
    """The layers by switch, in the order of application; they take float32 (N, height, width, 3) in 0 to 1."""
    from keras import layers

    common: dict[str, Any] = {"seed": 0, "dtype": "float32"}
    ranged = common | {"value_range": (0, 1)}
    built: dict[str, Any] = {}
    if switches.horizontal_flip:
        built["horizontal_flip"] = layers.RandomFlip("horizontal", **common)
    if switches.vertical_flip:
        built["vertical_flip"] = layers.RandomFlip("vertical", **common)
    affine = {name: getattr(switches, name) for name in _AFFINE if getattr(switches, name)}
    for name in switches.one_of or ():
        if name in affine:
            built[name] = _RandomAffine(image_size, **{name: affine.pop(name)})
    if affine:
        built["affine"] = _RandomAffine(image_size, **affine)
    if switches.brightness:
        built["brightness"] = layers.RandomBrightness(switches.brightness, **ranged)
    if switches.contrast:
        built["contrast"] = layers.RandomContrast(switches.contrast, **ranged)
    if switches.saturation:
        # A factor of 0.5 leaves the image unchanged.
        built["saturation"] = layers.RandomSaturation(
            (0.5 - switches.saturation / 2, 0.5 + switches.saturation / 2), **ranged
        )
    if switches.hue:
        built["hue"] = layers.RandomHue(switches.hue, **ranged)
    if switches.rand_augment:
        built["rand_augment"] = layers.RandAugment(factor=switches.rand_augment, **ranged)
    if switches.noise:
        built["noise"] = layers.GaussianNoise(switches.noise, **common)
    if switches.blur:
        share = (switches.blur, switches.blur)
        built["blur"] = layers.RandomGaussianBlur(share, kernel_size=5, sigma=(0.3, 1.0), **ranged)
    if switches.erasing:
        built["erasing"] = layers.RandomErasing((switches.erasing, switches.erasing), **ranged)
    return built


class _RandomAffine:
    """Rotation, zoom, shift and crop in one resampling: each resampling blurs, and Keras's layers do one each.

    The crop is that of Szegedy et al. 2014. Without it, the centre of a larger image is taken. What comes from beyond
    a border is mirrored at it.
    """

    def __init__(self, image_size: Size, **switches: float) -> None:
        """
        Args:
            image_size: of the result.
            switches: those of `_AFFINE` that are on.
        """
        from keras import random

        self._size, self._switches = image_size, switches
        self._generator = random.SeedGenerator(0)
        self.variables = [self._generator.state]

    def __call__(self, pixels: Any, training: bool) -> Any:
        """Transform images, float32 (N, height, width, 3), at least as large as the result."""
        import tensorflow as tf
        from keras import ops

        given_height, given_width = pixels.shape[1:3]
        # The centre of the part that is taken, and its width and height by those of the result.
        centre_x, centre_y = (given_width - 1) / 2, (given_height - 1) / 2
        x, y = (
            centre + side * self._uniform(pixels, self._switches.get("translation", 0))
            for centre, side in ((centre_x, self._size.width), (centre_y, self._size.height))
        )
        width = height = 1 + self._uniform(pixels, self._switches.get("zoom", 0))
        if crop := self._switches.get("crop"):
            area = (1 + crop) / 2 + self._uniform(pixels, (1 - crop) / 2)
            root = ops.exp(self._uniform(pixels, math.log(4 / 3) / 2))
            # Of the largest part with the aspect ratio of the result, by the result's sides.
            largest = min(given_width / self._size.width, given_height / self._size.height)
            shares = (largest * self._size.width / given_width, largest * self._size.height / given_height)
            part_width, part_height = (
                ops.minimum(ops.sqrt(area) * side * share, 1)
                for side, share in zip((root, 1 / root), shares, strict=True)
            )
            x += centre_x * self._uniform(pixels, 1) * (1 - part_width)
            y += centre_y * self._uniform(pixels, 1) * (1 - part_height)
            width *= part_width * (given_width / self._size.width)
            height *= part_height * (given_height / self._size.height)
        angle = self._uniform(pixels, 2 * math.pi * self._switches.get("rotation", 0))
        # The pixel at (column, row) comes from (a * column + b * row + c, d * column + e * row + f).
        a, b, d, e = ops.cos(angle) * width, -ops.sin(angle) * height, ops.sin(angle) * width, ops.cos(angle) * height
        column, row = (self._size.width - 1) / 2, (self._size.height - 1) / 2
        c, f = x - column * a - row * b, y - column * d - row * e
        transforms = ops.stack([a, b, c, d, e, f, ops.zeros_like(a), ops.zeros_like(a)], axis=1)
        # Keras's affine_transform gives as many pixels as it takes.
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=pixels, transforms=transforms, output_shape=self._size, fill_value=0.0, interpolation="BILINEAR",
            fill_mode="REFLECT",
        )  # fmt: skip

    def _uniform(self, pixels: Any, most: float) -> Any:
        """A number between -most and most for each image, float32 (N,)."""
        from keras import ops, random

        return random.uniform((ops.shape(pixels)[0],), -most, most, seed=self._generator)
