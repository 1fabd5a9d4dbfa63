"""Groups of classes: what a bundle can still say of an image whose class it is unsure of."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Groups:
    """Groups of a bundle's classes. Each class is in one."""

    names: tuple[str, ...]
    """Of the groups, in alphabetical order."""
    of_classes: tuple[int, ...]
    """For each class, the index of its group."""

    @classmethod
    def of(cls, groups: Mapping[str, str], class_names: Sequence[str]) -> "Groups":
        """
        Args:
            groups: by class, the name of its group.
            class_names: of the bundle, in order.
        """
        names = tuple(sorted({groups[name] for name in class_names}))
        return cls(names, tuple(names.index(groups[name]) for name in class_names))

    @functools.cached_property
    def membership(self) -> Probabilities:
        """1 where a class is in a group, else 0: float32 (classes, groups)."""
        return np.eye(len(self.names), dtype=np.float32)[list(self.of_classes)]

    def probabilities(self, probabilities: Probabilities) -> Probabilities:
        """The probability of each group: the sum over its classes.

        Args:
            probabilities: float32 (N, classes).

        Returns:
            float32 (N, groups).
        """
        return np.asarray(probabilities @ self.membership, np.float32)
