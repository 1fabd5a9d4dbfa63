"""Random changes to training images that leave their classes what they are: by Keras's layers, and never in a bundle.

They run on the workers, inside the compiled training step, on whole batches. Fractions are of the image's sides or
of the pixels' range.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

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
    """Single switches on top of --augment; what is null is as that says."""

    horizontal_flip: bool | None = None
    """Mirror every second image, left to right. Not for text, digits, or anything else with a right and a left."""
    vertical_flip: bool | None = None
    """Turn every second image upside down."""
    rotation: float | None = None
    """Turn by up to this share of a full turn, either way; 0.1 is 36 degrees."""
    zoom: float | None = None
    """Zoom by up to this share, in or out."""
    translation: float | None = None
    """Shift by up to this share of each side."""
    crop: float | None = None
    """Cut out between this share of the image's area and all of it, with sides of 3:4 to 4:3; 0: do not."""
    contrast: float | None = None
    """Change the contrast by up to this share."""
    brightness: float | None = None
    """Change the brightness by up to this share of the range."""
    saturation: float | None = None
    """Change the saturation by up to this share; at most 1."""
    hue: float | None = None
    """Turn the colours by up to this share of the colour circle; at most 1."""
    noise: float | None = None
    """Add Gaussian noise with this deviation, as a share of the range."""
    blur: float | None = None
    """Share of the images that are blurred by a Gaussian of up to a pixel, at most."""
    erasing: float | None = None
    """Share of the images of which a rectangle of 2 to 33 % is replaced by noise."""
    rand_augment: float | None = None
    """Strength of Keras's RandAugment (after Cubuk et al. 2019): two of eleven changes, the same two for all
    images that a worker has of a step; of its rotation it is the share of a full turn."""
    mix_up: float | None = None
    """Blend pairs of images and of their labels, by shares from Beta(this, this) (Zhang et al. 2018)."""
    cut_mix: float | None = None
    """Paste a rectangle of another image, and mix the labels by area, by shares from Beta(up to this, the same) (Yun
    et al. 2019); with mix_up also, either of them a step."""
    one_of: list[Alternative] | None = None
    """Of these changes each image has only one, chosen at random."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot be, in one sentence that names the switch.
        """
        for name, value in asdict(self).items():
            most = 10 if name == "mix_up" else 1
            if name == "one_of" or value is None or 0 <= value <= most:
                continue
            raise ValueError(f"--augmentations.{name.replace('_', '-')} must be 0 to {most}, not {value}.")
        for name in self.one_of or ():
            if name not in get_args(Alternative):
                raise ValueError(
                    f"--augmentations.one-of {name!r} is not known; there are {', '.join(get_args(Alternative))}."
                )
        if self.one_of is not None and len(set(self.one_of)) != len(self.one_of):
            raise ValueError("--augmentations.one-of names a change twice.")


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
"""What each strength says of every switch."""


def resolved(strength: str, switches: Augmentations) -> Augmentations:
    """The switches with what the strength says of those that are None."""
    return replace(
        STRENGTHS[strength], **{name: value for name, value in asdict(switches).items() if value is not None}
    )


def check_alternatives(strength: str, switches: Augmentations) -> None:
    """
    Raises:
        ValueError: `one_of` names a change that is off, in one sentence.
    """
    found = resolved(strength, switches)
    off = [name for name in switches.one_of or () if not getattr(found, name)]
    if off:
        raise ValueError(f"--augmentations.one-of names {off[0]}, which is off: give --augmentations.{off[0]}, too.")


class Augmenter:
    """Changes batches of training images. It is made, as a network is, inside the strategy's scope.

    Attributes:
        seeds: the variables (int, (2,)) that decide, together with the images, all that it does.
    """

    def __init__(self, switches: Augmentations) -> None:
        """
        Args:
            switches: none of them None (see `resolved`).
        """
        from keras import layers, random

        self._generator = random.SeedGenerator(0)
        kinds = _layers(switches)
        alternatives = [kinds.pop(name) for name in switches.one_of or () if name in kinds]
        self._layers = list(kinds.values())
        if alternatives:
            self._layers.append(self._one_of(alternatives))
        self._mixing = []
        if switches.mix_up:
            self._mixing.append(layers.MixUp(switches.mix_up, seed=0, dtype="float32"))
        if switches.cut_mix:
            self._mixing.append(layers.CutMix(switches.cut_mix, seed=0, dtype="float32"))
        self._tracked = [*self._layers, *alternatives, *self._mixing]

    @property
    def seeds(self) -> list[Any]:
        found = {
            id(variable): variable
            for layer in self._tracked
            for variable in getattr(layer, "variables", [])
            if variable.path.endswith("seed_generator_state")
        }
        return [self._generator.state, *found.values()] if self._tracked else []

    def __call__(self, images: Any, labels: Any) -> tuple[Any, Any]:
        """
        Args:
            images: uint8 (N, size, size, 3).
            labels: float32 (N, classes), the shares of each class.

        Returns:
            uint8 (N, size, size, 3) and float32 (N, classes).
        """
        from keras import ops, random

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
            pixels, labels = (ops.where(first, *(one[key] for one in mixed)) for key in ("images", "labels"))
        return ops.cast(ops.round(pixels * 255), "uint8"), labels

    def _one_of(self, alternatives: list[Any]) -> Callable[..., Any]:
        from keras import ops, random

        def chosen(pixels: Any, training: bool) -> Any:
            choice = random.randint((ops.shape(pixels)[0], 1, 1, 1), 0, len(alternatives), seed=self._generator)
            for number, layer in enumerate(alternatives):
                pixels = ops.where(choice == number, layer(pixels, training=training), pixels)
            return pixels

        return chosen


def _layers(switches: Augmentations) -> dict[str, Any]:
    """The layers by their switches, in the order of use; they take float32 (N, size, size, 3) of 0 to 1."""
    from keras import layers

    common: dict[str, Any] = {"seed": 0, "dtype": "float32"}
    ranged = common | {"value_range": (0, 1)}
    found: dict[str, Any] = {}
    if switches.horizontal_flip:
        found["horizontal_flip"] = layers.RandomFlip("horizontal", **common)
    if switches.vertical_flip:
        found["vertical_flip"] = layers.RandomFlip("vertical", **common)
    if switches.rotation:
        found["rotation"] = layers.RandomRotation(switches.rotation, **common)
    if switches.zoom:
        found["zoom"] = layers.RandomZoom(switches.zoom, **common)
    if switches.translation:
        found["translation"] = layers.RandomTranslation(switches.translation, switches.translation, **common)
    if switches.crop:
        found["crop"] = _RandomResizedCrop(switches.crop)
    if switches.brightness:
        found["brightness"] = layers.RandomBrightness(switches.brightness, **ranged)
    if switches.contrast:
        found["contrast"] = layers.RandomContrast(switches.contrast, **ranged)
    if switches.saturation:
        # Factors are around 0.5, which changes nothing.
        found["saturation"] = layers.RandomSaturation(
            (0.5 - switches.saturation / 2, 0.5 + switches.saturation / 2), **ranged
        )
    if switches.hue:
        found["hue"] = layers.RandomHue(switches.hue, **ranged)
    if switches.rand_augment:
        found["rand_augment"] = layers.RandAugment(factor=switches.rand_augment, **ranged)
    if switches.noise:
        found["noise"] = layers.GaussianNoise(switches.noise, **common)
    if switches.blur:
        share = (switches.blur, switches.blur)
        found["blur"] = layers.RandomGaussianBlur(share, kernel_size=5, sigma=(0.3, 1.0), **ranged)
    if switches.erasing:
        found["erasing"] = layers.RandomErasing((switches.erasing, switches.erasing), **ranged)
    return found


class _RandomResizedCrop:
    """A random part of each image, brought back to the image's size (Szegedy et al. 2014); Keras has none."""

    def __init__(self, smallest: float) -> None:
        """
        Args:
            smallest: share of the image's area.
        """
        from keras import random

        self._smallest = smallest
        self._generator = random.SeedGenerator(0)
        self.variables = [self._generator.state]

    def __call__(self, pixels: Any, training: bool) -> Any:
        from keras import ops

        area = self._uniform(pixels, self._smallest, 1)
        root = ops.exp(self._uniform(pixels, math.log(3 / 4), math.log(4 / 3)) / 2)
        width, height = (ops.minimum(ops.sqrt(area) * side, 1) for side in (root, 1 / root))
        last = pixels.shape[1] - 1
        left, top = (self._uniform(pixels, 0, last) * (1 - side) for side in (width, height))
        nothing = ops.zeros_like(area)
        transform = ops.stack([width, nothing, left, nothing, height, top, nothing, nothing], axis=1)
        return ops.image.affine_transform(pixels, transform, fill_mode="nearest")

    def _uniform(self, pixels: Any, low: float, high: float) -> Any:
        from keras import ops, random

        return random.uniform((ops.shape(pixels)[0],), low, high, seed=self._generator)
