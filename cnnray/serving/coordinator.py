"""One actor for all replicas: adds up what they report of canaries, decides, and changes what all of them serve."""

from typing import Any, Protocol

from cnnray.serving import releases
from cnnray.serving.controller import APPLICATION, ServedSettings
from cnnray.serving.releases import ChangeError, Comparison, Release, Verdict
from cnnray.serving.settings import ModelSettings, Settings


class Store(Protocol):
    """Where the settings of all replicas are."""

    def read(self) -> Settings:
        """The present settings."""
        ...

    def write(self, settings: Settings) -> None:
        """Change them."""
        ...


class Coordinator:
    """Makes one change of the settings after the other.

    Replicas report everything that they have seen of a canary, again and again: when this process is lost, the next
    one learns it anew.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = ServedSettings() if store is None else store
        self._reports: dict[Release, dict[str, Comparison]] = {}
        self._looks: dict[Release, tuple[int, Verdict]] = {}
        """By canary, how many of its images the last look at it saw, and what it said."""

    def report(self, replica: str, seen: dict[Release, Comparison], settings: Settings) -> dict[Release, Verdict]:
        """Take what a replica has seen of canaries so far; carry out what is decided, if the settings say so.

        Returns:
            By canary, the verdict.
        """
        for release, comparison in seen.items():
            reports = self._reports.setdefault(release, {})
            if replica in reports and comparison.canary.images < reports[replica].canary.images:
                # The same canary was deployed once more.
                reports.clear()
                self._looks.pop(release, None)
            reports[replica] = comparison
        return {release: self._judge(release, settings) for release in seen}

    def _judge(self, release: Release, settings: Settings) -> Verdict:
        total = sum(self._reports[release].values(), start=Comparison())
        images, (last, verdict) = total.canary.images, self._looks.get(release, (0, Verdict()))
        if not releases.is_due(images, last):
            return verdict
        verdict = releases.judge(total, settings)
        if releases.acts(verdict, settings):
            try:
                self._store.write(releases.carry_out(self._store.read(), release, verdict))
            except ChangeError:  # somebody has changed the models; the replicas will report what they serve then
                return verdict
        self._looks[release] = images, verdict
        return verdict

    def load(self, model: ModelSettings) -> tuple[Settings, Settings]:
        """Serve a version of a model; see `releases.load`.

        Returns:
            The settings before and after.
        """
        before = self._store.read()
        after = releases.load(before, model)
        self._store.write(after)
        return before, after

    def unload(self, name: str) -> tuple[Settings, Settings]:
        """Serve a model no more. Returns the settings before and after.

        Raises:
            ChangeError: see `releases.unload`.
        """
        before = self._store.read()
        after = releases.unload(before, name)
        self._store.write(after)
        return before, after

    def undo(self, before: Settings, after: Settings) -> None:
        """Go back to the settings before a change, unless there was another one since."""
        if self._store.read() == after:
            self._store.write(before)


class Coordination:
    """The coordinator, seen from a replica. The first replica that needs it starts it; it ends with that replica."""

    def __init__(self, replica: str) -> None:
        """
        Args:
            replica: id of this replica.
        """
        self._replica = replica
        self._handle: Any = None

    async def report(self, seen: dict[Release, Comparison], settings: Settings) -> dict[Release, Verdict]:
        """See `Coordinator.report`."""
        verdicts: dict[Release, Verdict] = await self._call("report", self._replica, seen, settings)
        return verdicts

    async def load(self, model: ModelSettings) -> tuple[Settings, Settings]:
        """See `Coordinator.load`."""
        changed: tuple[Settings, Settings] = await self._call("load", model)
        return changed

    async def unload(self, name: str) -> tuple[Settings, Settings]:
        """See `Coordinator.unload`."""
        changed: tuple[Settings, Settings] = await self._call("unload", name)
        return changed

    async def undo(self, before: Settings, after: Settings) -> None:
        """See `Coordinator.undo`."""
        await self._call("undo", before, after)

    async def _call(self, method: str, *arguments: Any) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        for is_last in (False, True):
            if self._handle is None:
                actor = ray.remote(num_cpus=0)(Coordinator)
                self._handle = actor.options(name=f"{APPLICATION}-coordinator", get_if_exists=True).remote()
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except RayActorError:  # its replica has ended
                self._handle = None
                if is_last:
                    raise
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, ChangeError) else error from None
        raise AssertionError
