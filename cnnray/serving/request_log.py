"""The request log: what a replica has answered, as Parquet files in a folder or bucket.

There is a row for each image of the requests that are logged; see `SCHEMA`. The files lie in a folder for each day
(UTC), `date=YYYY-MM-DD`, and `jobs/evaluate.py --drift` reads them.
"""

import contextlib
import hashlib
import io
import logging
import queue
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image as PillowImage

from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.models.predictor import rank_classes
from cnnray.models.runtimes import Probabilities
from cnnray.serving.models import ServedModel
from cnnray.serving.pipeline import Encoded, Image, size_of
from cnnray.serving.settings import LogSettings

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("ms", "UTC")),
        ("request_id", pa.string()),
        ("index", pa.int32()),
        ("model", pa.string()),
        ("version", pa.string()),
        ("prediction", pa.string()),
        ("confidence", pa.float32()),
        ("top_k_labels", pa.list_(pa.string())),
        ("top_k_scores", pa.list_(pa.float32())),
        ("error", pa.string()),
        ("seconds", pa.float32()),
        ("sha256", pa.string()),
        ("image", pa.binary()),
    ]
)
"""`index` is the image's place in its request. `prediction` is the most probable class, `seconds` the time from the
request's body to its answers, `sha256` that of the bytes that were sent (of pixels, for those). `image` holds these
bytes (pixels as PNG) if they are kept, else null. An image without a prediction has an `error`,
`REASON: explanation`."""
_TOP_K = 5
_MOST_ROWS, _MOST_SECONDS, _MOST_BYTES = 20_000, 60.0, 16 * 2**20
"""A file is written when it has so many rows or bytes, or its first row is so old."""
_MOST_HELD = 64 * 2**20
"""Largest number of bytes that wait to be written; what is more is left out, and counted."""
_BYTES_OF_A_ROW = 500
"""Estimate of what a row holds besides its image."""
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
"""Seconds before a file is tried again that could not be written."""
_CLEANING_SECONDS = 3600.0
_NEVER = float("inf")
_FOLDER, _DAY = "date=", re.compile(r"date=(\d{4}-\d\d-\d\d)")

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that the running task answers."""


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """The images of a request, and their answers."""

    moment: float
    """In seconds since 1970."""
    request_id: str
    model: str
    version: str
    class_names: list[str]
    images: Sequence[Image]
    answers: Sequence[Probabilities | BadImage]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes that it holds, at least."""
        return sum(_BYTES_OF_A_ROW + size_of(image) for image in self.images)


class RequestLog:
    """Writes the request log in a thread of its own. No request waits for it: what cannot be written is left out."""

    def __init__(self, settings: LogSettings, count: Callable[..., None]) -> None:
        """
        Args:
            settings: what is logged, and where.
            count: called with the numbers of images `written` and `lost`.
        """
        self.settings = settings
        self._count = count
        self._name = uuid.uuid4().hex[:12]
        self._files = 0
        self._answered: queue.SimpleQueue[_Answered | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._held = 0
        """Bytes in the queue, and in rows that are not written."""
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def add(
        self,
        served: ServedModel,
        images: Sequence[Image],
        answers: Sequence[Probabilities | BadImage],
        seconds: float,
    ) -> None:
        """Log the answers to the request of this task, if it belongs to the share that is logged.

        Args:
            served: the version that has answered.
            images: of the request.
            answers: to them, in order.
            seconds: that it took.
        """
        if random.random() >= self.settings.share:
            return
        answered = _Answered(
            moment=time.time(), request_id=request_id.get(), model=served.name, version=served.version,
            class_names=served.bundle.info.class_names, images=images, answers=answers, seconds=seconds,
        )  # fmt: skip
        with self._lock:
            fits = self._held + answered.size <= _MOST_HELD
            if fits:
                self._held += answered.size
        if fits:
            self._answered.put(answered)
        else:
            self._count(lost=len(images))

    def close(self, seconds: float = 10.0) -> None:
        """Write what is left, as far as that takes no longer than so many seconds."""
        self._answered.put(None)
        self._thread.join(seconds)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        rows, size = _no_rows(), 0
        pause, write_at, clean_at = _FIRST_PAUSE, _NEVER, time.monotonic()
        is_open = True
        while is_open:
            if time.monotonic() >= clean_at:
                self._clean()
                clean_at = time.monotonic() + _CLEANING_SECONDS
            with contextlib.suppress(queue.Empty):
                answered = self._answered.get(timeout=max(0.0, min(write_at, clean_at) - time.monotonic()))
                is_open = answered is not None
                if answered is not None:
                    size += self._take_in(answered, rows)
                    if write_at == _NEVER:
                        write_at = time.monotonic() + _MOST_SECONDS
            is_full = pause == _FIRST_PAUSE and (len(rows) >= _MOST_ROWS or size >= _MOST_BYTES)
            if not rows or (is_open and not is_full and time.monotonic() < write_at):
                continue
            if self._write(rows):
                self._release(size)
                rows, size, pause, write_at = _no_rows(), 0, _FIRST_PAUSE, _NEVER
            else:  # and is tried again, with what comes meanwhile
                write_at = time.monotonic() + pause
                pause = min(2 * pause, _LONGEST_PAUSE)
        if rows:
            self._count(lost=len(rows))

    def _take_in(self, answered: _Answered, rows: list[dict[str, Any]]) -> int:
        """Add the rows of a request, and return how many bytes they hold."""
        for index, (image, answer) in enumerate(zip(answered.images, answered.answers, strict=True)):
            data = _bytes_of(image)
            row = {
                "time": datetime.fromtimestamp(answered.moment, UTC), "request_id": answered.request_id,
                "index": index, "model": answered.model, "version": answered.version, "seconds": answered.seconds,
                "sha256": hashlib.sha256(data).hexdigest() if len(data) else None,
                "image": _file_of(image) if self.settings.images else None,
            }  # fmt: skip
            if isinstance(answer, BadImage):
                row["error"] = f"{answer.reason}: {answer}"
            else:
                (order,) = rank_classes(answer[None], _TOP_K)
                labels, scores = [answered.class_names[place] for place in order], answer[order]
                row |= {"top_k_labels": labels, "top_k_scores": scores}
                row |= {"prediction": labels[0], "confidence": scores[0]}
            rows.append(row)
        if self.settings.images:
            return answered.size
        kept = _BYTES_OF_A_ROW * len(answered.images)
        self._release(answered.size - kept)
        return kept

    def _write(self, rows: list[dict[str, Any]]) -> bool:
        """Write a file, and return whether that succeeded."""
        now = datetime.now(UTC)
        name = f"{now:%H%M%S}-{self._name}-{self._files:06d}.parquet"
        uri = storage.join(self.settings.place, f"{_FOLDER}{now:%Y-%m-%d}", name)
        buffer = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
            storage.write_bytes(uri, buffer.getvalue())
        except Exception as error:  # whatever it is, the thread must go on
            log.warning("the request log cannot be written, and is tried again: %s", error)
            return False
        self._files += 1
        self._count(written=len(rows))
        return True

    def _clean(self) -> None:
        """Delete the folders of days that are too old."""
        first = (datetime.now(UTC) - timedelta(days=self.settings.days)).date()
        try:
            for folder in storage.folders(self.settings.place):
                day = _DAY.fullmatch(storage.name(folder))
                if day and date.fromisoformat(day[1]) < first:
                    storage.delete_folder(folder)
                    log.info("deleted %s of the request log", folder)
        except FileNotFoundError:  # nothing was written yet
            pass
        except Exception as error:
            log.warning("old files of the request log cannot be deleted: %s", error)

    def _release(self, size: int) -> None:
        with self._lock:
            self._held -= size


def _no_rows() -> list[dict[str, Any]]:
    return []


def _bytes_of(image: Image) -> bytes:
    """What was sent."""
    if isinstance(image, Encoded):
        return image.data
    return b"" if isinstance(image, BadImage) else image.tobytes()


def _file_of(image: Image) -> bytes | None:
    """The image as a file."""
    if isinstance(image, Encoded):
        return image.data
    if isinstance(image, BadImage):
        return None
    buffer = io.BytesIO()
    PillowImage.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
