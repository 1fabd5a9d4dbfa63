"""Compares canaries with the versions before them, in a replica."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from cnnray.images.decode import BadImage
from cnnray.models.answers import Answer
from cnnray.models.runtimes import Images
from cnnray.serving.admission import Admission, Held
from cnnray.serving.bodies import RequestError
from cnnray.serving.coordinator import Coordination
from cnnray.serving.models import Models, NoSuchModelError, ServedModel
from cnnray.serving.pipeline import Encoded, Image, size_of
from cnnray.serving.releases import (
    PROMOTE,
    ROLL_BACK,
    WAIT,
    Comparison,
    Release,
    Verdict,
    find_release,
    is_decision,
)
from cnnray.serving.settings import Settings
from cnnray.tracking.prometheus import ServingMetrics

log = logging.getLogger(__name__)

Answers = list[Answer | BadImage]

_REPORT_SECONDS = 2.0
"""Between two reports to the coordinator."""
_NUMBERS = {PROMOTE: 1, ROLL_BACK: -1}


class Canaries:
    """The canaries of a replica, and what they and the versions before them have answered.

    Attributes:
        verdicts: by canary, what was last said about it.
    """

    def __init__(
        self,
        compute: Callable[[ServedModel, Sequence[Image]], Awaitable[Answers]],
        admission: Admission,
        metrics: ServingMetrics,
        coordination: Coordination | None,
    ) -> None:
        """
        Args:
            compute: has a version answer images.
            admission: bounds what is held for comparisons, too.
            metrics: counts the comparisons.
            coordination: decides; None: nobody does.
        """
        self._compute, self._admission, self._metrics, self._coordination = compute, admission, metrics, coordination
        self.verdicts: dict[Release, Verdict] = {}
        self._comparisons: dict[Release, Comparison] = {}
        self._models: Models | None = None
        self._settings: Settings | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        """Held, because the event loop holds no task."""
        self._reporting: asyncio.Task[None] | None = None

    def follow(self, models: Models, settings: Settings) -> None:
        """Compare the canaries of these settings; what is known of those that stay is kept."""
        self._models, self._settings = models, settings
        self._metrics.end_other_verdicts([(model.name, str(model.version)) for model in settings.models])
        for model in settings.models:
            decision = next((action for action in _NUMBERS if is_decision(model.verdict, action)), WAIT)
            self._metrics.record_verdict(model.name, str(model.version), _NUMBERS.get(decision, 0))
        releases = [release for name in models.names if (release := find_release(settings, name))]
        self._comparisons = {release: self._comparisons.get(release, Comparison()) for release in releases}
        self.verdicts = {release: self.verdicts.get(release, Verdict()) for release in releases}
        if releases and self._coordination and (self._reporting is None or self._reporting.done()):
            self._reporting = asyncio.create_task(self._report(self._coordination))

    def record(self, served: ServedModel, images: int, seconds: float, *, failed: bool) -> None:
        """Record a request.

        Args:
            served: the version that was to answer it.
            images: those that could be used.
            seconds: from its arrival at the queue until it was answered, or its client left.
            failed: whether an image has no answer, by the service's fault.
        """
        self._metrics.record_request_of_version(served.name, served.version, seconds, failed=failed)
        if release := self._release_of(served):
            comparison = self._comparisons[release]
            record = comparison.canary if served.version == release.canary else comparison.stable
            record.add_request(images, seconds, failed=failed)

    def compare_later(self, served: ServedModel, images: Sequence[Image], answers: Answers) -> None:
        """Give one image of a share of the requests to the other version of a release, too, after the answer.

        No request waits for it, and it is left out where much is waiting or held.
        """
        release, settings = self._release_of(served), self._settings
        if (
            release is None
            or settings is None
            or random.random() >= settings.shadow_share
            or self._admission.images > settings.max_queued_images // 4
            or self._admission.bytes > settings.max_bytes_in_flight // 4
        ):
            return
        pairs = [
            (image, answer)
            for image, answer in zip(images, answers, strict=True)
            if not isinstance(image, BadImage) and not isinstance(answer, BadImage)
        ]
        if pairs:
            task = asyncio.create_task(self._compare(release, served, *random.choice(pairs), settings))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _release_of(self, served: ServedModel) -> Release | None:
        for release in self._comparisons:
            if release.name == served.name and served.version in (release.stable, release.canary):
                return release
        return None

    async def _compare(
        self,
        release: Release,
        served: ServedModel,
        image: Encoded | Images,
        answer: Answer,
        settings: Settings,
    ) -> None:
        held = Held(self._admission)
        try:
            assert self._models is not None
            shadow = self._models.choose(
                release.name, release.stable if served.version == release.canary else release.canary
            )
            held.add_bytes(size_of(image), settings)
            (shadowed,) = await self._compute(shadow, [image])
        except (RequestError, NoSuchModelError):  # no room, too slow, or unloaded meanwhile
            return
        except Exception:
            log.exception("%s cannot be compared with the version before it", release.name)
            return
        finally:
            held.release()
        comparison = self._comparisons.get(release)
        if comparison is not None and not isinstance(shadowed, BadImage):
            agree = {*served.names(answer.labels)} == {*shadow.names(shadowed.labels)}
            comparison.compared += 1
            comparison.agreed += agree
            self._metrics.record_comparison(release.name, release.canary, agree=agree)

    async def _report(self, coordination: Coordination) -> None:
        """Tell the coordinator what was seen, as long as there are canaries."""
        while self._comparisons and self._settings is not None:
            await asyncio.sleep(_REPORT_SECONDS)
            try:
                verdicts = await coordination.report(self._comparisons, self._settings)
            except Exception:
                log.exception("the coordinator cannot be reached; nothing changes until it can")
                continue
            for release, verdict in verdicts.items():
                if release in self.verdicts:
                    self.verdicts[release] = verdict
                    self._metrics.record_verdict(release.name, release.canary, _NUMBERS.get(verdict.action, 0))
