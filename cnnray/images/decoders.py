"""Decodes images in processes: of this machine, into memory that they share with this process, and of other machines.

Batches come in order. The next ones are decoded while one is in use, also those of the streams that come after it. No
pixel is copied within a machine. A process ends when the connection to it does, so that none is left behind by a
process that is killed.
"""

import collections
import contextlib
import math
import mmap
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cnnray.errors import TransientError
from cnnray.images import reading
from cnnray.images.decoder_process import Settings
from cnnray.images.reading import Batch
from cnnray.images.resize import ResizeRule

CRASHED = "crashed: it ended the process that decoded it, each time"
"""The error of such an image."""
_PROGRAM = "cnnray.images.decoder_process"
_TURN = {"local": 16, "remote": 32}
"""Images that a process is given at once."""
_TURNS_OF_A_PROCESS = 2
"""The images of one are decoded while those of the other are read."""
_MAX_CRASHES, _MAX_FAILED_STARTS = 2, 3
"""Of a turn, and then of an image; and of processes that end before they are ready, one after another."""
_LEAST_BATCHES, _MOST_BYTES = 4, 2**31
"""Of the shared memory: the batch in use, the one before it, and those that are decoded ahead."""


class DecoderError(TransientError, RuntimeError):
    """A process that decodes images cannot start; the message is one sentence for the user."""


class _Batch:
    """A batch that is being decoded."""

    def __init__(self, rows: pa.Table, slot: int) -> None:
        self.rows, self.slot = rows, slot
        self.errors = np.full(len(rows), "", object)
        self.turns_left = 0
        self.error: Exception | None = None
        """Ends the stream."""
        self.is_dropped = False


@dataclass(eq=False)
class _Turn:
    """Neighbouring images of a batch, which one process decodes."""

    batch: _Batch
    start: int
    uris: list[str]
    crashes: int = 0


@dataclass(eq=False)
class _Stream:
    rows: Callable[[int, int], pa.Table]
    bounds: list[int]
    """Where each batch begins, and the last one ends."""
    begun: int = 0
    """Batches that have a place in memory."""


class _Process:
    """A process that decodes, on another machine, and the turns that it has."""

    is_here = False

    def __init__(self, connection: Any, settings: Settings) -> None:
        self.connection = connection
        self.turns: collections.deque[_Turn] = collections.deque()
        self.is_ready = False
        self.connection.send(settings)

    def receive(self, into: reading.Images) -> Any:
        """What it answers: first that it is ready, then the errors of a turn, whose pixels are then in `into`."""
        answer = self.connection.recv()
        if self.is_ready and not isinstance(answer, Exception):
            self.connection.recv_bytes_into(into.data.cast("B"))
        return answer

    def end(self) -> int | None:
        """End it, and return its exit code, if that is known."""
        self.connection.close()
        return None


class _ProcessHere(_Process):
    """A process on this machine, which shares the memory."""

    is_here = True

    def __init__(self, settings: Settings, memory: int) -> None:
        mine, theirs = socket.socketpair()
        folders = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
        command = [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno()), str(memory)]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno(), memory], env=environment, stdin=subprocess.DEVNULL
            )
        super().__init__(Connection(mine.detach()), settings)

    def receive(self, into: reading.Images) -> Any:
        """See `_Process`."""
        return self.connection.recv()

    def end(self) -> int | None:
        """See `_Process`."""
        super().end()
        self._process.kill()
        return self._process.wait()


class Decoders:
    """Processes that decode the images of streams, one stream after another.

    Attributes:
        waited: seconds that were spent waiting for batches.
    """

    def __init__(
        self,
        processes: int,
        size: int,
        resize: ResizeRule,
        *,
        largest_batch: int,
        elsewhere: int = 0,
        keep_unavailable: bool = False,
    ) -> None:
        """
        Args:
            processes: number of them on this machine.
            size: height and width in pixels.
            resize: see `decode`.
            largest_batch: most images of a batch.
            elsewhere: number of processes that will join from other machines.
            keep_unavailable: see `reading.decoded_blocks`.
        """
        largest_batch = max(largest_batch, 1)
        bytes_of_a_batch = largest_batch * size * size * 3
        at_once = 2 * _TURNS_OF_A_PROCESS * (processes + elsewhere) * max(_TURN.values())
        slots = max(_LEAST_BATCHES, min(2 + math.ceil(at_once / largest_batch), _MOST_BYTES // bytes_of_a_batch))
        self._memory = _shared_memory(slots * bytes_of_a_batch)
        pixels = np.frombuffer(mmap.mmap(self._memory, slots * bytes_of_a_batch), np.uint8)
        self._images = pixels.reshape(slots, largest_batch, size, size, 3)
        self._settings = Settings(
            size=size, resize=resize, keep_unavailable=keep_unavailable, images=slots * largest_batch
        )
        self._changed = threading.Condition()
        self._free = collections.deque(range(slots))
        self._streams: collections.deque[_Stream] = collections.deque()
        """With batches that have no place in memory yet."""
        self._batches: dict[tuple[_Stream, int], _Batch] = {}
        """That the consumer has not taken."""
        self._turns: collections.deque[_Turn] = collections.deque()
        """That no process has."""
        self._failure: Exception | None = None
        self._failed_starts = 0
        self.waited = 0.0
        self._woken, self._wake = (Connection(end.detach()) for end in socket.socketpair())
        self._listener: Listener | None = None
        self._joining: collections.deque[_Process] = collections.deque()
        self._processes: list[_Process] = [_ProcessHere(self._settings, self._memory) for _ in range(processes)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def batches(self, rows: Callable[[int, int], pa.Table], sizes: Sequence[int]) -> Iterator[Batch]:
        """Decode images, after those of earlier streams. It begins at once, before the first batch is asked for.

        Args:
            rows: gives the rows from a place of the stream to another, with `uri`.
            sizes: images of each batch, at most `largest_batch`.

        Raises:
            CnnrayError: as `reading.decoded_blocks`.
            DecoderError: a process cannot start.

        Yields:
            the batches of `reading.decoded_blocks`. The pixels of one are there until the next but one is asked for.
        """
        stream = _Stream(rows, np.cumsum([0, *sizes]).tolist())
        self._streams.append(stream)
        self._wake_up()
        return self._received(stream)

    def invite(self, host: str) -> tuple[tuple[str, int], bytes]:
        """Let processes of other machines `join`. They are given turns while more wait than this machine takes next.

        Args:
            host: address of this machine.

        Returns:
            what they call `join` with.
        """
        key = secrets.token_bytes(32)
        self._listener = Listener((host, 0), family="AF_INET6" if ":" in host else "AF_INET", authkey=key)
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()
        address: Any = self._listener.address
        return address[:2], key

    def _accept(self, listener: Listener) -> None:
        while not self._wake.closed:
            with contextlib.suppress(OSError, EOFError, AuthenticationError):  # of others that connect
                self._joining.append(_Process(listener.accept(), self._settings))
                self._wake_up()

    def close(self) -> None:
        """End the processes."""
        if self._wake.closed:
            return
        self._wake.close()
        self._thread.join()
        os.close(self._memory)
        if self._listener is not None:
            self._listener.close()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # closed
            self._wake.send_bytes(b"1")

    # -- the consumer's thread ---------------------------------------------------------------------------------

    def _received(self, stream: _Stream) -> Iterator[Batch]:
        held: collections.deque[_Batch] = collections.deque()
        try:
            for number in range(len(stream.bounds) - 1):
                batch = self._wait_for(stream, number)
                held.append(batch)
                columns = {name: batch.rows[name].to_numpy() for name in batch.rows.column_names}
                yield columns | {"image": self._images[batch.slot, : len(batch.rows)], "error": batch.errors}
                if len(held) == 2:
                    self._free.append(held.popleft().slot)
                    self._wake_up()
        finally:
            self._drop(stream, held)

    def _wait_for(self, stream: _Stream, number: int) -> _Batch:
        started = time.monotonic()
        with self._changed:
            while True:
                batch = self._batches.get((stream, number))
                if error := self._failure or (batch.error if batch else None):
                    raise error
                if batch is not None and not batch.turns_left:
                    self.waited += time.monotonic() - started
                    return self._batches.pop((stream, number))
                self._changed.wait()

    def _drop(self, stream: _Stream, held: Sequence[_Batch]) -> None:
        """Forget the rest of a stream."""
        with self._changed:
            stream.begun = len(stream.bounds) - 1
            for key in [key for key in self._batches if key[0] is stream]:
                batch = self._batches.pop(key)
                batch.is_dropped = True
                if not batch.turns_left:
                    self._free.append(batch.slot)
            self._free.extend(batch.slot for batch in held)
        self._wake_up()

    # -- the thread that hands out turns -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._processes += [self._joining.popleft() for _ in range(len(self._joining))]
                self._begin_batches()
                self._hand_out()
                ready = wait([self._woken, *(process.connection for process in self._processes)])
                if self._woken in ready:
                    self._woken.recv_bytes()
                for process in [process for process in self._processes if process.connection in ready]:
                    self._receive(process)
        except EOFError:  # of `close`
            pass
        except Exception as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            for process in (*self._processes, *self._joining):
                process.end()

    def _begin_batches(self) -> None:
        while self._free and self._streams:
            stream = self._streams[0]
            number = stream.begun
            if number == len(stream.bounds) - 1:
                self._streams.popleft()
                continue
            batch = _Batch(stream.rows(*stream.bounds[number : number + 2]), self._free.popleft())
            uris = batch.rows["uri"].to_pylist()
            length = _TURN[reading.place_of(uris[0])] if uris else 1
            turns = [_Turn(batch, start, uris[start : start + length]) for start in range(0, len(uris), length)]
            batch.turns_left = len(turns)
            with self._changed:
                if stream.begun > number:  # dropped meanwhile
                    self._free.append(batch.slot)
                    continue
                stream.begun += 1
                self._batches[stream, number] = batch
                self._changed.notify_all()
            self._turns += turns

    def _hand_out(self) -> None:
        next_here = _TURNS_OF_A_PROCESS * sum(process.is_here for process in self._processes)
        for count in range(_TURNS_OF_A_PROCESS):
            for process in self._processes:
                kept = 0 if process.is_here else next_here
                while process.is_ready and len(process.turns) == count and len(self._turns) > kept:
                    turn = self._turns.popleft() if process.is_here else self._turns.pop()
                    if turn.batch.is_dropped:
                        self._end_turn(turn)
                        continue
                    process.turns.append(turn)
                    first = turn.batch.slot * self._images.shape[1] + turn.start
                    with contextlib.suppress(OSError):  # it has crashed, as its answer will tell
                        process.connection.send((first, turn.uris))

    def _receive(self, process: _Process) -> None:
        turn = process.turns[0] if process.turns else None
        batch = turn.batch if turn else None
        places = slice(turn.start, turn.start + len(turn.uris)) if turn else slice(0, 0)
        try:
            answer = process.receive(self._images[batch.slot if batch else 0, places])
        except (EOFError, OSError):
            self._replace(process)
            return
        if turn is None or batch is None:
            process.is_ready, self._failed_starts = True, 0
            return
        process.turns.popleft()
        if isinstance(answer, Exception):
            batch.error = answer
        elif answer is not None:
            batch.errors[places] = answer
        self._end_turn(turn)

    def _end_turn(self, turn: _Turn) -> None:
        with self._changed:
            turn.batch.turns_left -= 1
            if turn.batch.is_dropped and not turn.batch.turns_left:
                self._free.append(turn.batch.slot)
            self._changed.notify_all()

    def _replace(self, process: _Process) -> None:
        """Give the turns of a process that has crashed to others, and start another one if it was of this machine.

        Raises:
            DecoderError: too many have crashed before they were ready.
        """
        code = process.end()
        self._failed_starts += process.is_here and not process.is_ready
        if self._failed_starts == _MAX_FAILED_STARTS:
            raise DecoderError(f"Processes that decode images end when they start, with exit code {code}.")
        again = list(process.turns)
        if again:
            first = again[0]
            first.crashes += 1
            if first.crashes == _MAX_CRASHES and len(first.uris) > 1:
                # One of the images: the next crash of a single one is its own.
                singles = [_Turn(first.batch, first.start + i, [uri], 1) for i, uri in enumerate(first.uris)]
                with self._changed:
                    first.batch.turns_left += len(singles) - 1
                again[:1] = singles
            elif first.crashes == _MAX_CRASHES:
                self._images[first.batch.slot, first.start] = 0
                first.batch.errors[first.start] = CRASHED
                self._end_turn(again.pop(0))
        self._turns.extendleft(reversed(again))
        place = self._processes.index(process)
        self._processes[place : place + 1] = [_ProcessHere(self._settings, self._memory)] if process.is_here else []


def _shared_memory(size: int) -> int:
    """The descriptor of a file in memory, which no name leads to."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("cnnray-images")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.truncate(memory, size)
    return memory
