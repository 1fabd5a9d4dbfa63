"""Tables and the chart of the study of training recipes."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report


@dataclass(frozen=True)
class Study:
    """The results of recipes on sets, with several seeds."""

    epochs: dict[tuple[str, str, int], list[list[float]]]
    """By set, recipe and seed, of each epoch: the images seen so far, the training loss, the held-out loss, and the
    held-out accuracy."""
    rates: dict[str, float]
    """Of each recipe, in images/s."""
    held_out: dict[str, int]
    """Number of held-out images of each set."""

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(name for name, _, _ in self.epochs))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(seed for _, _, seed in self.epochs))

    def accuracies(self, name: str, recipe: str) -> list[float]:
        """Of the bundle, that is of the best epoch, by seed."""
        return [max(epoch[-1] for epoch in self.epochs[name, recipe, seed]) for seed in self.seeds]

    def mean(self, name: str, recipe: str) -> float:
        return statistics.mean(self.accuracies(name, recipe))

    def curve(self, name: str, recipe: str, seed: int) -> list[tuple[float, float]]:
        """Seconds of training, and the held-out accuracy, after each epoch."""
        epochs = self.epochs[name, recipe, seed]
        return [(images / self.rates[recipe], accuracy) for images, _, _, accuracy in epochs]

    def log_error(self, name: str, recipe: str) -> float:
        """The logarithm of the share of errors. Half an image more keeps it finite, and bounds what a single image of
        an easy set can weigh."""
        return math.log(1 - self.mean(name, recipe) + 0.5 / self.held_out[name])


def accuracies(study: Study) -> str:
    """Recipes by sets: mean and standard deviation, and the error relative to the first recipe's over all sets."""
    first = next(iter(study.rates))
    lines = [
        f"| recipe | images/s | {' | '.join(study.sets)} | errors |",
        "|---|---|" + "---|" * (len(study.sets) + 1),
    ]
    for recipe, rate in study.rates.items():
        cells = [report.mean_and_spread(study.accuracies(name, recipe)) for name in study.sets]
        cells.append(f"{relative_error(study, recipe, first):.2f}")
        lines.append(f"| {recipe} | {rate:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def relative_error(study: Study, recipe: str, base: str, left_out: str | None = None) -> float:
    """The geometric mean over sets, but one, of a recipe's errors as a multiple of another's."""
    return math.exp(
        statistics.mean(
            study.log_error(name, recipe) - study.log_error(name, base) for name in study.sets if name != left_out
        )
    )


def choose(study: Study) -> dict[str, str]:
    """For each set, the recipe with the fewest errors on the other sets.

    Errors are averaged over sets as their logarithm, so that hard sets do not outweigh easy ones.
    """
    first = next(iter(study.rates))

    def errors(recipe: str, left_out: str) -> float:
        return relative_error(study, recipe, first, left_out)

    return {name: min(study.rates, key=lambda recipe: errors(recipe, name)) for name in study.sets}


def leave_one_set_out(study: Study, before: str) -> str:
    """For each set, the accuracy of the recipe that was chosen on the other sets, beside the former default's."""
    lines = [f"| set | chosen on the other sets | its accuracy here | {before} |", "|---|---|---|---|"]
    for name, recipe in choose(study).items():
        lines.append(
            f"| {name} | {recipe} | **{report.mean_and_spread(study.accuracies(name, recipe))}** "
            f"| {report.mean_and_spread(study.accuracies(name, before))} |"
        )
    return "\n".join(lines)


def times(study: Study, before: str, after: str) -> str:
    """The seconds that each recipe takes, and those after which the second reaches the first one's accuracy."""
    lines = [
        f"| set | {before}: seconds | accuracy | {after}: seconds | accuracy | until {before}'s accuracy | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in study.sets:
        wholes = {recipe: study.curve(name, recipe, study.seeds[0])[-1][0] for recipe in (before, after)}
        reached = []
        for seed, wanted in zip(study.seeds, study.accuracies(name, before), strict=True):
            reached.append(
                next((time for time, accuracy in study.curve(name, after, seed) if accuracy >= wanted), math.inf)
            )
        median = statistics.median(reached)
        lines.append(
            f"| {name} | {wholes[before]:.0f} | {report.mean_and_spread(study.accuracies(name, before))} "
            f"| {wholes[after]:.0f} | {report.mean_and_spread(study.accuracies(name, after))} "
            + ("| not reached | |" if math.isinf(median) else f"| {median:.0f} | {median / wholes[before]:.2f} |")
        )
    return "\n".join(lines)


def draw(study: Study, recipes: list[str], path: Path) -> None:
    """One plot for each set: the held-out accuracy, mean over the seeds, by seconds of training."""
    from matplotlib import pyplot

    columns = 3
    rows = math.ceil(len(study.sets) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes.flat, study.sets, strict=False):
        for recipe in recipes:
            curves = [study.curve(name, recipe, seed) for seed in study.seeds]
            seconds = [time for time, _ in curves[0]]
            means = [statistics.mean(accuracy for _, accuracy in points) for points in zip(*curves, strict=True)]
            axis.plot(seconds, means, label=recipe, marker="." if len(means) < 20 else None)
        axis.set(title=name, xlim=(0, None), ylim=(0, 1))
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("seconds of training")
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out accuracy")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
