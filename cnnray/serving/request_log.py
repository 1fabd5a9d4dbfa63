"""The request log: what a replica has answered, as Parquet files in a folder or bucket.

There is a row for each image of the requests that are logged; see `SCHEMA`. The files lie in a folder for each day
(UTC), `date=YYYY-MM-DD`, and `jobs/evaluate.py --drift` reads them.
"""

import contextlib
import functools
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
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image as PillowImage

from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.models.answers import Answer, Rules, rank_classes
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
        ("labels", pa.list_(pa.string())),
        ("unsure", pa.bool_()),
        ("group", pa.string()),
        ("error", pa.string()),
        ("seconds", pa.float32()),
        ("sha256", pa.string()),
        ("image", pa.binary()),
    ]
)
"""`index` is the image's place in its request. `prediction` is the most probable class, and `unsure` whether it was
withheld; `group` is the one that was named then, if the model has groups of classes. Of a bundle with several labels,
`labels` are those that the image has, and `prediction` is the first of them, or null. (`unsure`, `group` and `labels`
are null of other bundles, and left out of files of only such.) `seconds` is the time from the request's body to its
answers, `sha256` that of the bytes that were sent (of pixels, for those). `image` holds these bytes (pixels as PNG)
if they are kept, else null. An image without a prediction has an `error`, `REASON: explanation`."""
_OF_SOME = ("labels", "unsure", "group")
"""Columns that not all models have."""
_TOP_K = 5
_MOST_ROWS, _MOST_SECONDS, _MOST_BYTES = 20_000, 60.0, 16 * 2**20
"""A file is written when it has so many rows or bytes, or its first row is so old."""
_MOST_HELD = 64 * 2**20
"""Largest number of bytes that wait to be written; what is more is left out, and counted."""
_BYTES_OF_A_ROW = 1200
"""What a row holds besides its image, about."""
_ROWS_AT_ONCE = 256
"""Rows that become columns at once: more would hold the interpreter for too long."""
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
"""Seconds before a file is tried again that could not be written."""
_CLEANING_SECONDS = 3600.0
_LOOK_SECONDS = 0.5
"""Between two looks whether a file was written, while another one is due."""
_NEVER = float("inf")
_FOLDER, _DAY = "date=", re.compile(r"date=(\d{4}-\d\d-\d\d)")
_FILE = re.compile(r"\d{6}-[0-9a-f]{12}-\d{6,}\.parquet")

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
    rules: Rules
    images: Sequence[Image]
    answers: Sequence[Answer | BadImage]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes that it holds, about."""
        answers = sum(answer.nbytes for answer in self.answers if not isinstance(answer, BadImage))
        return answers + sum(_BYTES_OF_A_ROW + size_of(image) for image in self.images)


class _File:
    """Rows that become a file.

    Attributes:
        name: of the file.
        size: bytes that the rows hold, about.
        due: when the file is to be written, by the monotonic clock.
        dropped: rows that could not become columns.
    """

    def __init__(self, name: str) -> None:
        self.name, self.size, self.due, self.dropped = name, 0, _NEVER, 0
        self._rows: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []

    def __len__(self) -> int:
        return len(self._rows) + sum(map(len, self._tables))

    def add(self, rows: list[dict[str, Any]], size: int) -> None:
        """Add rows that hold so many bytes."""
        if self.due == _NEVER:
            self.due = time.monotonic() + _MOST_SECONDS
        self._rows += rows
        self.size += size
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._make_columns()

    def encoded(self) -> bytes:
        """As Parquet."""
        self._make_columns()
        buffer = io.BytesIO()
        table = pa.concat_tables(self._tables)
        table = table.drop_columns([name for name in _OF_SOME if table[name].null_count == len(table)])
        pyarrow.parquet.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()

    @property
    def is_due(self) -> bool:
        """Whether it is to be written."""
        return len(self) >= _MOST_ROWS or self.size >= _MOST_BYTES or time.monotonic() >= self.due

    def _make_columns(self) -> None:
        rows, self._rows = self._rows, []
        try:
            self._tables.append(pa.Table.from_pylist(rows, SCHEMA))
        except Exception:  # whatever it is, the threads must go on
            log.exception("%d images cannot be logged", len(rows))
            self.dropped += len(rows)


class RequestLog:
    """Writes the request log in threads of its own. No request waits for it: what cannot be written is left out.

    One thread makes rows, and another one writes them, so that images are not held while storage is slow.
    """

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
        self._closed = threading.Event()
        self._to_do: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """For the thread that writes and cleans up."""
        self._writing = False
        self._threads = [
            threading.Thread(target=target, name=f"request-log{name}", daemon=True)
            for target, name in ((self._run, ""), (self._run_writer, "-writer"))
        ]
        for thread in self._threads:
            thread.start()

    def add(
        self,
        served: ServedModel,
        images: Sequence[Image],
        answers: Sequence[Answer | BadImage],
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
            class_names=served.bundle.info.class_names, rules=served.rules, images=images, answers=answers,
            seconds=seconds,
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
        end = time.monotonic() + seconds
        self._closed.set()
        self._answered.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # -- the threads ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        file, clean_at, is_open = self._next_file(), time.monotonic(), True
        while is_open:
            if time.monotonic() >= clean_at:
                self._to_do.put(self._clean)
                clean_at = time.monotonic() + _CLEANING_SECONDS
            due = min(file.due, clean_at) - time.monotonic()
            with contextlib.suppress(queue.Empty):
                answered = self._answered.get(timeout=max(due, _LOOK_SECONDS if self._writing else 0.0))
                is_open = answered is not None
                if answered is not None:
                    self._take_in(answered, file)
            if (len(file) or file.dropped) and (not is_open or (file.is_due and not self._writing)):
                self._writing = True
                self._to_do.put(functools.partial(self._write, file))
                file = self._next_file()
        self._to_do.put(None)

    def _run_writer(self) -> None:
        for do in iter(self._to_do.get, None):
            do()

    def _next_file(self) -> _File:
        self._files += 1
        return _File(f"{datetime.now(UTC):%H%M%S}-{self._name}-{self._files:06d}.parquet")

    def _take_in(self, answered: _Answered, file: _File) -> None:
        """Add the rows of a request to a file."""
        try:
            rows = self._rows_of(answered)
        except Exception:  # whatever it is, the thread must go on
            log.exception("a request cannot be logged")
            self._release(answered.size)
            self._count(lost=len(answered.images))
            return
        kept = sum(_BYTES_OF_A_ROW + len(row["image"] or b"") for row in rows)
        self._release(answered.size - kept)
        file.add(rows, kept)

    def _rows_of(self, answered: _Answered) -> list[dict[str, Any]]:
        rows = []
        for index, (image, answer) in enumerate(zip(answered.images, answered.answers, strict=True)):
            data = _bytes_of(image)
            row = {
                "time": datetime.fromtimestamp(answered.moment, UTC), "request_id": answered.request_id,
                "index": index, "model": answered.model, "version": answered.version, "seconds": answered.seconds,
                "sha256": hashlib.sha256(data).hexdigest() if len(data) else None,
                "image": _file_of(image) if self.settings.images else None,
            }  # fmt: skip
            if isinstance(answer, BadImage):
                row["error"] = str(answer)
            else:
                names = answered.class_names
                (order,) = rank_classes(answer.probabilities[None], _TOP_K)
                labels = [names[place] for place in answer.labels]
                row |= {
                    "top_k_labels": [names[place] for place in order], "top_k_scores": answer.probabilities[order],
                    "prediction": labels[0] if labels else None, "confidence": answer.confidence,
                }  # fmt: skip
                if answered.rules.multi_label:
                    row["labels"] = labels
                if answered.rules.threshold:
                    row["unsure"] = answer.status == "unsure"
                if answered.rules.groups:
                    row["group"] = answered.rules.group_name(answer)
            rows.append(row)
        return rows

    def _write(self, file: _File) -> None:
        uri = storage.join(self.settings.place, f"{_FOLDER}{datetime.now(UTC):%Y-%m-%d}", file.name)
        try:
            written = self._put(uri, file.encoded())
        except Exception:  # such as of memory
            log.exception("%s of the request log cannot be made", uri)
            written = False
        self._count(**{"written" if written else "lost": len(file)})
        self._count(lost=file.dropped)
        self._release(file.size)
        self._writing = False

    def _put(self, uri: str, data: bytes) -> bool:
        """Write a file, again and again until that succeeds or the log is closed; return whether it succeeded."""
        pause = _FIRST_PAUSE
        while True:
            try:
                storage.write_bytes(uri, data)
                return True
            except Exception as error:  # whatever it is, the thread must go on
                log.warning("%s of the request log cannot be written: %s", uri, error)
                if self._closed.is_set():
                    return False
            self._closed.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _clean(self) -> None:
        """Delete the files of days that are too old, and of this kind alone."""
        try:
            first = (datetime.now(UTC) - timedelta(days=self.settings.days)).date()
            for folder in storage.folders(self.settings.place):
                day = _day_of(storage.name(folder))
                if day is not None and day < first:
                    # Other replicas clean up, too.
                    with contextlib.suppress(FileNotFoundError):
                        _delete_files(folder)
        except FileNotFoundError:  # nothing was written yet
            pass
        except Exception as error:
            log.warning("old files of the request log cannot be deleted: %s", error)

    def _release(self, size: int) -> None:
        with self._lock:
            self._held -= size


def _delete_files(folder: str) -> None:
    """Delete the files of the log in a folder, and the folder where they were all that it held."""
    ours = [file.uri for file in storage.files(folder) if _FILE.fullmatch(storage.name(file.uri))]
    for uri in ours:
        storage.delete_file(uri)
    if ours:
        if storage.is_local(folder):
            with contextlib.suppress(OSError):  # it holds others' files
                Path(folder).rmdir()
        log.info("deleted %d files of the request log, %s", len(ours), folder)


def _day_of(folder: str) -> date | None:
    """The day that a folder is for; None for another folder."""
    match = _DAY.fullmatch(folder)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:  # such as 2020-02-30
        return None


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
