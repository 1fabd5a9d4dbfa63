"""Compares canaries with the versions before them, in a replica."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from cnnray.images.decode import BadImage
from cnnray.models.runtimes import Images, Probabilities
from cnnray.serving.admission import Admission, Held
from cnnray.serving.bodies import RequestError
from cnnray.serving.coordinator import Coordination
from cnnray.serving.models import Models, ServedModel
from cnnray.serving.pipeline import Encoded
from cnnray.serving.releases import PROMOTE, ROLL_BACK, Comparison, Release, Verdict, find_release
from cnnray.serving.settings import Settings
from cnnray.tracking.prometheus import ServingMetrics

log = logging.getLogger(__name__)

Image = Encoded | Images | BadImage
"""An image of a request: encoded, pixels, or why it could not be read from the request."""
Answers = list[Probabilities | BadImage]

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
        releases = [release for name in models.names if (release := find_release(settings, name))]
        self._comparisons = {release: self._comparisons.get(release, Comparison()) for release in releases}
        self.verdicts = {release: self.verdicts.get(release, Verdict()) for release in releases}
        if releases and self._coordination and (self._reporting is None or self._reporting.done()):
            self._reporting = asyncio.create_task(self._report(self._coordination))

    def record(self, served: ServedModel, images: int, failed: int, seconds: float) -> None:
        """Record images that came together.

        Args:
            served: the version that was to answer them.
            images: those that could be used.
            failed: those without an answer, by the service's fault.
            seconds: from their arrival until they were answered.
        """
        self._metrics.record_answers(served.name, served.version, images - failed, failed, seconds)
        if release := self._release_of(served):
            comparison = self._comparisons[release]
            answers = comparison.canary if served.version == release.canary else comparison.stable
            answers.add(images, failed, seconds)

    def compare_later(self, served: ServedModel, images: Sequence[Image], answers: Answers) -> None:
        """Give a share of the requests to the other version of a release, too, once they have been answered.

        That waits for no request, and is left out where much is waiting.
        """
        release, settings = self._release_of(served), self._settings
        if (
            release is not None
            and settings is not None
            and random.random() < settings.shadow_share
            and self._admission.images <= settings.max_queued_images // 4
        ):
            task = asyncio.create_task(self._compare(release, served, images, answers, settings))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _release_of(self, served: ServedModel) -> Release | None:
        for release in self._comparisons:
            if release.name == served.name and served.version in (release.stable, release.canary):
                return release
        return None

    async def _compare(
        self, release: Release, served: ServedModel, images: Sequence[Image], answers: Answers, settings: Settings
    ) -> None:
        assert self._models is not None
        other = release.stable if served.version == release.canary else release.canary
        shadow, held = self._models.choose(release.name, other), Held(self._admission)
        sizes = [len(image.data) for image in images if isinstance(image, Encoded)]
        try:
            held.add_bytes(sum(sizes), settings)
            others = await self._compute(shadow, images)
        except RequestError:  # no room, or it took too long
            return
        except Exception:
            log.exception("%s %s does not answer", shadow.name, shadow.version)
            return
        finally:
            held.release()
        if release not in self._comparisons:  # decided meanwhile
            return
        for answer, shadowed in zip(answers, others, strict=True):
            if not isinstance(answer, BadImage) and not isinstance(shadowed, BadImage):
                agree = _label(served, answer) == _label(shadow, shadowed)
                self._comparisons[release].compared += 1
                self._comparisons[release].agreed += agree
                self._metrics.record_comparison(release.name, release.canary, agree=agree)

    async def _report(self, coordination: Coordination) -> None:
        """Tell the coordinator what was seen, as long as there are canaries."""
        while self._comparisons and self._settings is not None:
            await asyncio.sleep(_REPORT_SECONDS)
            try:
                verdicts = await coordination.report(self._comparisons, self._settings)
            except Exception:
                log.exception("the coordinator cannot be reached; its replicas go on to serve what they serve")
                continue
            for release, verdict in verdicts.items():
                if release in self.verdicts:
                    self.verdicts[release] = verdict
                self._metrics.record_verdict(release.name, release.canary, _NUMBERS.get(verdict.action, 0))


def _label(served: ServedModel, row: Probabilities) -> str:
    return served.bundle.info.class_names[int(row.argmax())]
