"""How an image of any shape becomes the pixels that a network takes: it is resized, and its centre cut out."""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

ResizeRule = Literal["stretch", "crop", "pad"]
RESIZE_RULES: tuple[ResizeRule, ...] = get_args(ResizeRule)


class Size(NamedTuple):
    """A height and a width in pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, stated: "int | str | Size") -> "Size":
        """The size that a flag or a bundle states: `224` for 224x224, or `224x320`, the height first.

        Raises:
            ValueError: it is neither.
        """
        if isinstance(stated, Size):
            return stated
        if isinstance(stated, int | str) and (sides := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", str(stated))):
            height, width = (int(side or sides[1]) for side in sides.groups())
            if height and width:
                return cls(height, width)
        raise ValueError(f"{stated!r} is no size in pixels, such as 224 or 224x320 (height x width)")

    @property
    def stated(self) -> int | str:
        """What `of` takes, for JSON and YAML; of a square a number."""
        return self.height if self.height == self.width else str(self)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: (height, width, 3)."""
        return self.height, self.width, 3

    @property
    def bytes(self) -> int:
        """Of an image."""
        return self.height * self.width * 3

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class Geometry:
    """An image is resized to `decode_size` by the rule `resize`; `image_size` is cut out of the centre of that."""

    image_size: Size
    """What the network takes."""
    resize: ResizeRule
    """`stretch` changes the aspect ratio, `crop` keeps it and cuts what is too long around the centre, `pad` keeps it
    and fills what is too short with black."""
    decode_size: Size
    """Between `image_size` and twice that: training's crops of the whole are resampled without anti-aliasing."""

    @classmethod
    def of(
        cls,
        image_size: int | str | Size,
        resize: ResizeRule = "stretch",
        decode_size: int | str | Size | None = None,
    ) -> "Geometry":
        """The geometry of sizes as `Size.of` takes them.

        Args:
            image_size: what the network takes.
            resize: the rule.
            decode_size: None: `image_size`, of which nothing is cut.

        Raises:
            ValueError: a size is none, or `decode_size` is too small or too large.
        """
        size = Size.of(image_size)
        decoded = size if decode_size is None else Size.of(decode_size)
        if not all(side <= whole <= 2 * side for side, whole in zip(size, decoded, strict=True)):
            raise ValueError(f"{decoded} is not between {size} and twice that")
        return cls(size, resize, decoded)

    @property
    def uncut(self) -> "Geometry":
        """The whole image of `decode_size`, of which training takes other parts than the centre, too."""
        return Geometry(self.decode_size, self.resize, self.decode_size)

    @property
    def is_cut(self) -> bool:
        """Whether images are larger before they are cut."""
        return self.decode_size != self.image_size

    def centre(self, images: Any) -> Any:
        """Cut `image_size` out of images of `decode_size`.

        Args:
            images: (..., height, width, 3), an array or a tensor.
        """
        (height, width), (decoded_height, decoded_width) = self.image_size, self.decode_size
        top, left = (decoded_height - height) // 2, (decoded_width - width) // 2
        return images[..., top : top + height, left : left + width, :]

    def scaled(self, longest: int) -> "Geometry":
        """The same part of images, with this longer side in pixels."""
        factor = longest / max(self.image_size)

        def scale(size: Size) -> Size:
            return Size(*(max(1, round(side * factor)) for side in size))

        return Geometry(scale(self.image_size), self.resize, scale(self.decode_size))
