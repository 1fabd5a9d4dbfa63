"""Releases: a canary is compared with the version before it, and goes forward or back by what both have answered."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
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
"""Probability that one look at a canary calls it bad although it keeps its limits. A release has at most 100 looks:
there is another one when it has answered a quarter more images."""
_GROWTH = 1.25
_SLOW = 0.05
"""Share of the canary's requests that may take longer than `latency` times the 95th percentile of the others."""
_BUCKET = math.log(1.1)
"""Times are counted in buckets, each 1.1 times as long as the one before."""
_FEWEST_REQUESTS = 100
"""Answered requests of the other version from which on its usual times and errors are known well enough."""


class ChangeError(BadInputError, ValueError):
    """A change of the models that cannot be made; the message is one sentence for the client."""


@dataclass(kw_only=True)
class Record:
    """How one version has answered."""

    images: int = 0
    """Images that it was given and that could be used."""
    requests: int = 0
    """Requests with such images."""
    failed: int = 0
    """Requests without an answer for an image, by an error of the engine or because it took too long."""
    times: Counter[int] = field(default_factory=Counter)
    """Requests that were answered, by the time from their arrival at the queue to the answer; see `bucket`."""

    def add_request(self, images: int, seconds: float, *, failed: bool) -> None:
        """Add a request. Its images share one time and one failure, so that it counts once."""
        self.images += images
        self.requests += 1
        self.failed += failed
        if not failed:
            self.times[bucket(seconds)] += 1

    def __add__(self, other: "Record") -> "Record":
        return Record(
            images=self.images + other.images,
            requests=self.requests + other.requests,
            failed=self.failed + other.failed,
            times=self.times + other.times,
        )


@dataclass(kw_only=True)
class Comparison:
    """What a canary and the version before it have answered, and whether they agree on the same images."""

    stable: Record = field(default_factory=Record)
    canary: Record = field(default_factory=Record)
    compared: int = 0
    """Images that both have answered, at most one of a request."""
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
    revision: int
    """When it was deployed: another deployment of the same canary is another release."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision about a canary, and its reason."""

    action: str = WAIT
    """`PROMOTE`, `ROLL_BACK` or `WAIT`."""
    reason: str = "nothing has been answered yet"


def bucket(seconds: float) -> int:
    """The number of the bucket in which a time is counted."""
    return math.floor(math.log(max(seconds, 1e-6)) / _BUCKET)


def is_due(images: int, last: int) -> bool:
    """Whether there is to be another look, at this number of images, after the last look at `last`."""
    return images > 0 and images >= _GROWTH * last


@dataclass(frozen=True)
class _Figure:
    """One of the figures by which a canary is judged."""

    bad: int
    total: int
    """Requests or images, of which `bad` are bad."""
    problem: str
    """What is bad about them."""
    limit: float
    """Share that may be bad."""
    certain_limit: float
    """Share that may be bad however little is known of the other version."""

    @property
    def is_exceeded(self) -> bool:
        return self.total > 0 and self.bad / self.total > self.limit


def judge(comparison: Comparison, settings: Settings) -> Verdict:
    """Decide about a canary.

    Each limit of `rollback_on` allows a share to be bad:

    * `errors`: of its requests, without an answer: so much more than of the other version's;
    * `latency`: of its requests, slower than so many times the 95th percentile of the other version: 5 %;
    * `agreement`: of the images that both have answered, with another class: the rest.

    The canary is bad if one of these shares is above its limit with certainty: if its lower bound by Clopper and
    Pearson (1934) is, with an error probability of 1e-4 for all limits of one look. It is good if it has answered
    `promote_after` images, as many were compared (where `agreement` has a limit, and images are compared), enough is
    known of the other version, and no share is above its limit.
    """
    limits = DEFAULT_LIMITS if settings.rollback_on is None else settings.rollback_on
    figures = list(_figures(comparison, limits))
    exceeded = [figure for figure in figures if figure.is_exceeded]
    for figure in exceeded:
        if bound(figure.bad, figure.total, _ALPHA / len(limits), upper=False) > figure.certain_limit:
            return Verdict(action=ROLL_BACK, reason=_describe(figure))
    if exceeded:
        return Verdict(reason=f"{_describe(exceeded[0])}; that may still be chance")
    needed = settings.promote_after or DEFAULT_PROMOTE_AFTER
    canary, stable = comparison.canary, comparison.stable
    progress = f"{canary.images} of {needed} images answered"
    is_done = canary.images >= needed
    if settings.shadow_share > 0 and "agreement" in limits:
        progress += f", {comparison.compared} compared, {comparison.agreed} of them with the same class"
        is_done = is_done and comparison.compared >= needed
    if stable.times.total() < _FEWEST_REQUESTS:
        progress += f", {stable.times.total()} of {_FEWEST_REQUESTS} requests answered by the version before"
        is_done = False
    return Verdict(action=PROMOTE if is_done else WAIT, reason=f"{progress}; no limit is exceeded")


def _figures(comparison: Comparison, limits: Mapping[str, float]) -> Iterator[_Figure]:
    stable, canary = comparison.stable, comparison.canary
    if "errors" in limits and stable.requests:
        usual, highest = stable.failed / stable.requests, bound(stable.failed, stable.requests, _ALPHA, upper=True)
        limit = limits["errors"]
        yield _Figure(canary.failed, canary.requests, "requests have no answer", usual + limit, highest + limit)
    if "latency" in limits and stable.times.total() >= _FEWEST_REQUESTS:
        longest = _percentile(stable.times, 1 - _SLOW) + round(math.log(limits["latency"]) / _BUCKET)
        slow = sum(count for number, count in canary.times.items() if number > longest)
        milliseconds = 1000 * math.exp((longest + 1) * _BUCKET)
        problem = f"requests take longer than {milliseconds:.3g} ms"
        yield _Figure(slow, canary.times.total(), problem, _SLOW, _SLOW)
    if "agreement" in limits:
        limit = 1 - limits["agreement"]
        differ = comparison.compared - comparison.agreed
        yield _Figure(differ, comparison.compared, "compared images have another class than before", limit, limit)


def _describe(figure: _Figure) -> str:
    return f"{figure.bad} of {figure.total} {figure.problem} (the limit is {figure.limit:.2%})"


def bound(bad: int, total: int, alpha: float, *, upper: bool) -> float:
    """A bound of a probability, of which `bad` of `total` were seen, by Clopper and Pearson (1934).

    Args:
        bad: times that it has happened.
        total: times that it could have happened.
        alpha: probability that the bound does not hold.
        upper: the upper bound; else the lower one.
    """
    from scipy.stats import beta  # slow to import

    if upper:
        return 1.0 if bad == total else float(beta.ppf(1 - alpha, bad + 1, total - bad))
    return 0.0 if bad == 0 else float(beta.ppf(alpha, bad, total - bad + 1))


def _percentile(times: Counter[int], share: float) -> int:
    """The bucket below or in which this share of the requests is."""
    left = share * times.total()
    for number in sorted(times):
        left -= times[number]
        if left <= 0:
            return number
    raise ValueError("There are no times.")


# -- changes of what is served ------------------------------------------------------------------------------------


def with_versions_of(settings: Settings, loaded: Settings) -> Settings:
    """The settings, where an entry without a version has that of the bundle that a replica has loaded for it."""
    versions = {(model.name, model.uri): model.version for model in loaded.models}
    return replace(
        settings,
        models=tuple(
            replace(model, version=model.version or versions.get((model.name, model.uri)))
            for model in settings.models
        ),
    )


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
    return Release(
        name=name, stable=stable.version, canary=canary.version, share=canary.share, revision=canary.revision
    )


def acts(verdict: Verdict, settings: Settings) -> bool:
    """Whether the settings say that this verdict is carried out."""
    wanted = {PROMOTE: settings.promote_after, ROLL_BACK: settings.rollback_on}
    return wanted.get(verdict.action) is not None


def carry_out(settings: Settings, release: Release, verdict: Verdict) -> Settings:
    """The settings with all requests for the canary, or for the version before it.

    Raises:
        ChangeError: they are of another release.
    """
    if find_release(settings, release.name) != release:
        raise ChangeError(f"The versions of {release.name} have been changed meanwhile.")
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


def is_decision(verdict: str | None, action: str | None = None) -> bool:
    """Whether a verdict, as `/metadata` shows it, was carried out, or this action was."""
    done = tuple(_DONE.values()) if action is None else _DONE[action]
    return verdict is not None and verdict.startswith(done)


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
        raise ChangeError(f"There is no model {name!r}; served are {', '.join(sorted(names))}.")
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
