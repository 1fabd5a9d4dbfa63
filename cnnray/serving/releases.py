"""Releases: a canary is compared with the version before it, and goes forward or back by what both have answered."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cnnray.errors import BadInputError
from cnnray.serving.settings import ModelSettings, Settings

DEFAULT_LIMITS = {"errors": 0.01, "latency": 2.0, "agreement": 0.9}
"""By figure, how bad a canary may be; see `judge`."""
DEFAULT_PROMOTE_AFTER = 1000
"""Images after which a canary that keeps the limits is called good."""

PROMOTE, ROLL_BACK, WAIT = "promote", "roll back", "wait"
_DONE = {PROMOTE: "promoted", ROLL_BACK: "rolled back"}

_ALPHA = 1e-4
"""Probability that one look at a canary calls it bad although it keeps a limit. A release has at most 100 looks, as
there is another look when it has answered a quarter more images."""
_GROWTH = 1.25
_SLOW = 0.05
"""Share of the canary's images that may take longer than `latency` times what the slowest 5 % of the others take."""
_BUCKET = math.log(1.1)
"""Times are counted in buckets, each 1.1 times as long as the one before."""
_FEWEST_TIMES = 100
"""Images of the other version from which on their slowest 5 % are known well enough."""


class ChangeError(BadInputError, ValueError):
    """A change of the models that cannot be made; the message is one sentence for the client."""


@dataclass(kw_only=True)
class Answers:
    """What one version has answered."""

    images: int = 0
    """Images that it was given and that could be used."""
    failed: int = 0
    """Those without an answer, by an error of the engine or because it took too long."""
    times: Counter[int] = field(default_factory=Counter)
    """Images by the time from their arrival at the queue to the answer; see `bucket`."""

    def add(self, images: int, failed: int, seconds: float) -> None:
        """Add images that came together."""
        self.images += images
        self.failed += failed
        if images > failed:
            self.times[bucket(seconds)] += images - failed

    def __add__(self, other: "Answers") -> "Answers":
        return Answers(
            images=self.images + other.images, failed=self.failed + other.failed, times=self.times + other.times
        )


@dataclass(kw_only=True)
class Comparison:
    """What a canary and the version before it have answered, and whether they agree on the same images."""

    stable: Answers = field(default_factory=Answers)
    canary: Answers = field(default_factory=Answers)
    compared: int = 0
    """Images that both have answered."""
    agreed: int = 0
    """Those to which both gave the same class."""

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            stable=self.stable + other.stable,
            canary=self.canary + other.canary,
            compared=self.compared + other.compared,
            agreed=self.agreed + other.agreed,
        )


@dataclass(frozen=True, kw_only=True)
class Release:
    """A canary that is compared: the newest version of a model, while it has not all requests."""

    name: str
    """Name of the model."""
    stable: str
    """The version before it."""
    canary: str
    share: float
    """Share of the requests that it answers."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to become of a canary, and why, in one sentence."""

    action: str = WAIT
    """`PROMOTE`, `ROLL_BACK` or `WAIT`."""
    reason: str = "nothing has been answered yet"


def bucket(seconds: float) -> int:
    """The number of the bucket in which a time is counted."""
    return math.floor(math.log(max(seconds, 1e-6)) / _BUCKET)


def is_due(images: int, last: int) -> bool:
    """Whether there is to be another look, at this number of images, after the last look at `last`."""
    return images > 0 and images >= _GROWTH * last


def judge(comparison: Comparison, settings: Settings) -> Verdict:
    """Decide about a canary.

    Each limit allows a share of the canary's images to be bad:

    * `errors`: without an answer, so much more of them than of the other version's;
    * `latency`: 5 % slower than so many times the 95th percentile of the other version's times;
    * `agreement`: of those that both have answered, the rest with another class.

    The canary is bad if the share of bad images is larger with certainty: if the lower bound by Clopper and Pearson
    (1934), with an error probability of 1e-4, is above the limit. It is good if it has answered `promote_after`
    images, as many were compared where images are compared, and no share is above its limit.
    """
    limits = DEFAULT_LIMITS if settings.rollback_on is None else settings.rollback_on
    needed = settings.promote_after or DEFAULT_PROMOTE_AFTER
    stable, canary = comparison.stable, comparison.canary
    figures: list[tuple[str, int, int, float]] = []  # what is bad, how many of how many are, and the share allowed
    if "errors" in limits:
        allowed = limits["errors"] + (bound(stable.failed, stable.images, upper=True) if stable.images else 1.0)
        figures.append(("have no answer", canary.failed, canary.images, min(allowed, 1.0)))
    if "latency" in limits and stable.times.total() >= _FEWEST_TIMES:
        usual = _percentile(stable.times, 1 - _SLOW)
        longest = usual + round(math.log(limits["latency"]) / _BUCKET)
        slow = sum(count for place, count in canary.times.items() if place > longest)
        sentence = f"take longer than {1000 * math.exp((longest + 1) * _BUCKET):.3g} ms"
        figures.append((sentence, slow, canary.times.total(), _SLOW))
    if "agreement" in limits and comparison.compared:
        differ = comparison.compared - comparison.agreed
        figures.append(("have another class than before", differ, comparison.compared, 1 - limits["agreement"]))
    above = [figure for figure in figures if figure[2] and figure[1] / figure[2] > figure[3]]
    for what, bad, total, allowed in above:
        if bound(bad, total, upper=False) > allowed:
            return Verdict(action=ROLL_BACK, reason=f"{bad} of {total} images {what}; allowed are {allowed:.2%}")
    if above:
        what, bad, total, allowed = above[0]
        return Verdict(reason=f"{bad} of {total} images {what}, and {allowed:.2%} are allowed: not certain yet")
    compares = settings.shadow_share > 0 and "agreement" in limits
    if canary.images < needed or (compares and comparison.compared < needed):
        seen = f"{canary.images} images" + (f", {comparison.compared} compared" if compares else "")
        return Verdict(reason=f"{seen}, of {needed}, and no limit is exceeded")
    agreement = f", {comparison.agreed} of {comparison.compared} with the class of before" if compares else ""
    return Verdict(action=PROMOTE, reason=f"{canary.images} images{agreement}, and no limit is exceeded")


def bound(bad: int, total: int, *, upper: bool) -> float:
    """A bound of the probability of a bad image, of which `bad` of `total` were: Clopper and Pearson (1934)."""
    from scipy.stats import beta  # slow to import

    if upper:
        return 1.0 if bad == total else float(beta.ppf(1 - _ALPHA, bad + 1, total - bad))
    return 0.0 if bad == 0 else float(beta.ppf(_ALPHA, bad, total - bad + 1))


def _percentile(times: Counter[int], share: float) -> int:
    """The bucket below or in which this share of the images is."""
    left = share * times.total()
    for place in sorted(times):
        left -= times[place]
        if left <= 0:
            return place
    raise ValueError("There are no times.")


# -- changes of what is served ------------------------------------------------------------------------------------


def find_release(settings: Settings, name: str) -> Release | None:
    """The canary of a model; None: all its requests have one version, or it was decided about."""
    versions = [model for model in settings.models if model.name == name]
    if len(versions) < 2 or versions[-1].verdict is not None:
        return None
    stable, canary = versions[-2:]
    # Without requests of its own and without images to compare, there is nothing to learn.
    if canary.share >= 1 or (canary.share <= 0 and settings.shadow_share <= 0):
        return None
    if stable.version is None or canary.version in (None, stable.version):
        return None
    assert canary.version is not None
    return Release(name=name, stable=stable.version, canary=canary.version, share=canary.share)


def acts(verdict: Verdict, settings: Settings) -> bool:
    """Whether the settings say that this verdict is carried out."""
    told = {PROMOTE: settings.promote_after, ROLL_BACK: settings.rollback_on}
    return told.get(verdict.action) is not None


def carry_out(settings: Settings, release: Release, verdict: Verdict) -> Settings:
    """The settings with all requests for the canary, or for the version before it.

    Raises:
        ChangeError: they are of another release.
    """
    if find_release(settings, release.name) != release:
        raise ChangeError(f"{release.name} is served otherwise by now.")
    share = 1.0 if verdict.action == PROMOTE else 0.0
    shares = {release.stable: 1 - share, release.canary: share}
    return replace(
        settings,
        models=tuple(
            replace(
                model,
                share=shares[model.version],
                verdict=f"{_DONE[verdict.action]}: {verdict.reason}" if model.version == release.canary else None,
            )
            if model.name == release.name and model.version in shares
            else model
            for model in settings.models
        ),
    )


def is_decision(verdict: str | None) -> bool:
    """Whether a verdict, as `/metadata` shows it, was carried out."""
    return verdict is not None and verdict.startswith(tuple(_DONE.values()))


def load(settings: Settings, new: ModelSettings) -> Settings:
    """The settings with another version of a model, or with another model.

    Its share decides what becomes of the versions of before: with all requests it replaces them; with fewer, the one
    that has most of the requests goes on to answer the rest.
    """
    others = [model for model in settings.models if model.name == new.name and model.version != new.version]
    stable = max(others, key=lambda model: model.share, default=None)
    if stable is None or new.share >= 1:
        versions = [replace(new, share=1.0)]
    else:
        versions = [replace(stable, share=1 - new.share, verdict=None), new]
    return replace(settings, models=_with_versions(settings.models, new.name, versions))


def unload(settings: Settings, name: str) -> Settings:
    """The settings without a model.

    Raises:
        ChangeError: it is not served, or no other one is.
    """
    names = {model.name for model in settings.models}
    if name not in names:
        raise ChangeError(f"There is no model {name!r}; there are {', '.join(sorted(names))}.")
    if names == {name}:
        raise ChangeError(f"{name} is the only model that is served: it cannot be unloaded.")
    return replace(settings, models=_with_versions(settings.models, name, []))


def _with_versions(
    models: tuple[ModelSettings, ...], name: str, versions: list[ModelSettings]
) -> tuple[ModelSettings, ...]:
    """The models with these versions of one of them, which keeps its place."""
    by_name: Mapping[str, list[ModelSettings]] = {model.name: [] for model in models} | {name: versions}
    for model in models:
        if model.name != name:
            by_name[model.name].append(model)
    return tuple(model for of_name in by_name.values() for model in of_name)
