"""One actor for all replicas: adds up what they report of canaries, decides, and changes what all of them serve."""

import asyncio
import time
from dataclasses import replace
from typing import Any, Protocol

from cnnray.serving import releases
from cnnray.serving.bodies import RequestError
from cnnray.serving.controller import ServedSettings
from cnnray.serving.releases import ChangeError, Comparison, Release, Verdict
from cnnray.serving.settings import ModelSettings, Settings

_CALL_SECONDS = 60.0


class Store(Protocol):
    """Where the settings of all replicas are."""

    def read(self) -> Settings:
        """The present settings."""
        ...

    def write(self, before: Settings, after: Settings) -> None:
        """Change them.

        Raises:
            ChangeError: they are not `before`.
        """
        ...


class Coordinator:
    """Makes one change of the settings after the other.

    Replicas report everything that they have seen of a canary, again and again: when this process is lost, the next
    one learns it anew, but for what replicas have seen that have ended.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reports: dict[Release, dict[str, Comparison]] = {}
        self._looks: dict[Release, tuple[int, Verdict]] = {}
        """By canary, how many of its images the last look at it saw, and what it said."""

    def report(self, replica: str, seen: dict[Release, Comparison], settings: Settings) -> dict[Release, Verdict]:
        """Take what a replica has seen of canaries so far; carry out what is decided, if the settings say so.

        Args:
            replica: its id.
            seen: by canary, all that the replica has seen of it.
            settings: that the replica serves.

        Returns:
            By canary, the verdict.
        """
        for release, comparison in seen.items():
            for other in [known for known in self._reports if known.name == release.name]:
                if other.revision < release.revision:  # that release has ended
                    self._reports.pop(other)
                    self._looks.pop(other, None)
            reports = self._reports.setdefault(release, {})
            if replica in reports and comparison.canary.images < reports[replica].canary.images:
                # The same file was deployed once more, by `serve deploy`.
                reports.clear()
                self._looks.pop(release, None)
            reports[replica] = comparison
        return {release: self._judge(release, settings) for release in seen}

    def _judge(self, release: Release, settings: Settings) -> Verdict:
        reports = self._reports[release].values()
        images, (last, verdict) = (
            sum(report.canary.images for report in reports),
            self._looks.get(release, (0, Verdict())),
        )
        if not releases.is_due(images, last):
            return verdict
        verdict = releases.judge(sum(reports, start=Comparison()), settings)
        if releases.acts(verdict, settings):
            before = self._store.read()
            try:
                after = releases.carry_out(releases.with_versions_of(before, settings), release, verdict)
                self._store.write(before, after)
            except ChangeError:  # somebody has changed the models; the replicas will report what they serve then
                return verdict
        self._looks[release] = images, verdict
        return verdict

    def load(self, model: ModelSettings, settings: Settings) -> tuple[Settings, Settings]:
        """Serve a version of a model; see `releases.load`.

        Args:
            model: the version.
            settings: that the replica serves which was asked.

        Returns:
            The settings before and after.

        Raises:
            ChangeError: others have changed the settings at the same time.
        """
        before = self._store.read()
        last = max(served.revision for served in before.models)
        new = replace(model, revision=max(time.time_ns() // 10**6, last + 1))  # clocks may differ
        after = releases.load(releases.with_versions_of(before, settings), new)
        self._store.write(before, after)
        return before, after

    def unload(self, name: str) -> tuple[Settings, Settings]:
        """Serve a model no more. Returns the settings before and after.

        Raises:
            ChangeError: see `releases.unload`; or others have changed the settings at the same time.
        """
        before = self._store.read()
        after = releases.unload(before, name)
        self._store.write(before, after)
        return before, after

    def undo(self, before: Settings, after: Settings) -> None:
        """Go back to the settings before a change.

        Raises:
            ChangeError: there was another one since.
        """
        self._store.write(after, before)


class Coordination:
    """The coordinator, seen from a replica. The first replica that needs it starts it; it ends with that replica."""

    def __init__(self, application: str, deployment: str, replica: str) -> None:
        """
        Args:
            application: name of the application in Serve.
            deployment: name of the deployment.
            replica: id of this replica.
        """
        self._application, self._deployment, self._replica = application, deployment, replica
        self._handle: Any = None

    async def report(self, seen: dict[Release, Comparison], settings: Settings) -> dict[Release, Verdict]:
        """See `Coordinator.report`."""
        verdicts: dict[Release, Verdict] = await self._call("report", self._replica, seen, settings)
        return verdicts

    async def load(self, model: ModelSettings, settings: Settings) -> tuple[Settings, Settings]:
        """See `Coordinator.load`."""
        changed: tuple[Settings, Settings] = await self._call("load", model, settings)
        return changed

    async def unload(self, name: str) -> tuple[Settings, Settings]:
        """See `Coordinator.unload`."""
        changed: tuple[Settings, Settings] = await self._call("unload", name)
        return changed

    async def undo(self, before: Settings, after: Settings) -> None:
        """See `Coordinator.undo`."""
        await self._call("undo", before, after)

    async def _call(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        for is_last in (False, True):
            if self._handle is None:
                self._handle = await asyncio.to_thread(self._find_or_start)
            try:
                async with asyncio.timeout(_CALL_SECONDS):
                    return await getattr(self._handle, method).remote(*arguments)
            except TimeoutError:
                raise RequestError(
                    503, "The coordinator of the replicas does not answer; the change may still be made."
                ) from None
            except RayActorError:  # its replica has ended
                self._handle = None
                if is_last:
                    raise
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, ChangeError) else error from None
        raise AssertionError

    def _find_or_start(self) -> Any:
        import ray
        from ray.serve._private.constants import SERVE_NAMESPACE

        return (
            ray.remote(num_cpus=0)(Coordinator)
            .options(
                name=f"{self._application}-{self._deployment}-coordinator",
                namespace=SERVE_NAMESPACE,
                get_if_exists=True,
            )
            .remote(ServedSettings(self._application, self._deployment))
        )
