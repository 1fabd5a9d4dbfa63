"""Progress of a job: a bar on a terminal, a line every few seconds in a log."""

import logging
import math
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

_REFRESH_SECONDS = 10.0


class ProgressBar:
    """Shows the number of finished images and of all images, images/s and the time left."""

    def __init__(self, total: int, done: int = 0) -> None:
        """
        Args:
            total: number of images.
            done: number of images that earlier runs have finished.
        """
        self._total, self._done, self._new = total, done, 0
        self._started = self._shown = time.monotonic()
        self._bar = tqdm(total=total, initial=done, unit=" images", disable=not sys.stderr.isatty(), file=sys.stderr)

    @property
    def images_per_second(self) -> float:
        """Images per second since the start."""
        return self._new / max(time.monotonic() - self._started, 1e-9)

    def set_total(self, total: int, done: int) -> None:
        """Set the number of images, and of those that earlier runs have finished, while they are being listed."""
        if total != self._total or done != self._done:
            self._total, self._done = total, done
            self._bar.total, self._bar.initial = total, done
            self._bar.n = done + self._new

    def add(self, images: int, note: str = "") -> None:
        """Count finished images; log a line if the last one is old enough."""
        self._new += images
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(images)
        if self._bar.disable and time.monotonic() - self._shown >= _REFRESH_SECONDS:
            self._log(note)

    def _log(self, note: str = "") -> None:
        self._shown = time.monotonic()
        done, rate = self._done + self._new, self.images_per_second
        left = (self._total - done) / rate if rate else math.inf
        log.info("%d/%d images  %.0f images/s  %s left  %s", done, self._total, rate, duration(left), note)

    def close(self) -> None:
        """Log the last line, and remove the bar."""
        if self._bar.disable:
            self._log()
        self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as `45s`, `3m10s` or `2h05m`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
