"""The access log: a line for each request that was answered, written in the background."""

import json
import logging
import threading
import time
from collections import deque
from datetime import UTC, datetime

_lines = logging.getLogger("cnnray.access")

_PERIOD = 0.5
"""Seconds after which a line is written, with those that came after it."""
_MOST_LINES = 10_000
"""Lines that wait to be written; with a disk that hangs, those that follow are left out."""
_LONGEST_PATH = 1000


class AccessLog:
    """Collects the lines of the requests, so that no request waits for a disk.

    What has come within half a second is one record of the logger `cnnray.access`: lines of JSON, each with `time`
    (UTC, when the answer was complete), `request_id`, `method`, `path`, `status`, `milliseconds` and, if the key of
    the request has a name, `key`. Where lines had to be left out, a line with their number, `left_out`, follows.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, str, str, str, int, float, str | None]] = deque()
        self._left_out = 0
        self._writing = threading.Lock()
        self._timer: threading.Timer | None = None

    def record(self, request_id: str, method: str, path: str, status: int, seconds: float, key: str | None) -> None:
        """Add the line of a request that was answered after `seconds`, for the name of its key."""
        if len(self._waiting) >= _MOST_LINES:
            self._left_out += 1
        else:
            self._waiting.append((time.time(), request_id, method, path[:_LONGEST_PATH], status, seconds, key))
        if self._timer is None:
            self._start_timer()

    def flush(self) -> None:
        """Write what waits."""
        with self._writing:
            lines = [_line(*self._waiting.popleft()) for _ in range(len(self._waiting))]
            left_out, self._left_out = self._left_out, 0
            if left_out:
                lines.append(json.dumps({"time": _utc(time.time()), "left_out": left_out}))
            if lines:
                _lines.info("\n".join(lines))

    def _start_timer(self) -> None:
        self._timer = threading.Timer(_PERIOD, self._write)
        self._timer.start()

    def _write(self) -> None:
        self.flush()
        self._timer = None
        if self._waiting:
            self._start_timer()


def _line(ended: float, request_id: str, method: str, path: str, status: int, seconds: float, key: str | None) -> str:
    line = {
        "time": _utc(ended), "request_id": request_id, "method": method, "path": path, "status": status,
        "milliseconds": round(1000 * seconds, 2),
    }  # fmt: skip
    return json.dumps(line | ({"key": key} if key else {}))


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
