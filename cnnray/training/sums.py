"""Sums over images, which add up over steps and workers to exact means: never means of means."""

from dataclasses import dataclass

TOP_K = 5


@dataclass(frozen=True)
class Sums:
    """Sums over the images of one or more steps."""

    count: float = 0.0
    """Images."""
    loss: float = 0.0
    """Cross-entropy in nats."""
    correct: float = 0.0
    """Images whose most probable class is theirs."""
    top_k: float = 0.0
    """Images whose class is among the `TOP_K` most probable."""
    bad: float = 0.0
    """Images that could not be read; in none of the other sums."""

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, ...]:
        """The sums in the order of the fields."""
        return self.count, self.loss, self.correct, self.top_k, self.bad

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Means over the images: `loss` in nats, `accuracy` and `top_5_accuracy` as shares."""
        count = max(self.count, 1.0)
        return {
            f"{prefix}loss": self.loss / count,
            f"{prefix}accuracy": self.correct / count,
            f"{prefix}top_5_accuracy": self.top_k / count,
        }
