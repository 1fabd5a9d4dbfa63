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
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cnnray.errors import TransientError
from cnnray.images import turns
from cnnray.images.decoder_process import Settings
from cnnray.images.geometry import Geometry
from cnnray.images.reading import Batch
from cnnray.images.turns import Lanes, PendingBatch, Stream, Turn

CRASHED = "crashed: it ended the process that decoded it, each time"
"""The error of such an image."""
_PROGRAM = "cnnray.images.decoder_process"
_TURNS_OF_A_PROCESS = 2
"""The images of one are decoded while those of the other are read."""
_MAX_CRASHES, _MAX_FAILED_STARTS = 2, 3
"""Of a turn, and then of an image; and of processes that end before they are ready, one after another."""
_LEAST_BATCHES = 4
"""That the memory has room for: the one in use, the one before it, and those that are decoded ahead."""
_MOST_BYTES = 2**30
"""Of the memory, unless so few batches take more."""
_PATIENCE = 20
"""Seconds after which a process of another machine that does not answer is given up."""


class DecoderError(TransientError, RuntimeError):
    """A process that decodes images cannot start; the message is one sentence for the user."""


class _Process:
    """A process on this machine that decodes, and the turns that it has."""

    def __init__(self, settings: Settings, memory: int) -> None:
        mine, theirs = socket.socketpair()
        folders = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
        command = [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno()), str(memory)]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno(), memory], env=environment, stdin=subprocess.DEVNULL
            )
        self.connection: Any = Connection(mine.detach())
        self.turns: collections.deque[Turn] = collections.deque()
        self.is_ready = False
        self.connection.send(settings)

    def end(self) -> int:
        """End it, and return its exit code."""
        self.connection.close()
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
        geometry: Geometry,
        *,
        largest_batch: int,
        elsewhere: int = 0,
        keep_unavailable: bool = False,
    ) -> None:
        """
        Args:
            processes: number of them on this machine.
            geometry: see `decode`.
            largest_batch: most images of a batch.
            elsewhere: most processes that join from other machines.
            keep_unavailable: see `reading.decoded_blocks`.
        """
        largest_batch = max(largest_batch, 1)
        bytes_of_a_batch = largest_batch * geometry.image_size.bytes
        most = max(_LEAST_BATCHES, _MOST_BYTES // bytes_of_a_batch)
        # A process has some turns, and as many wait for it.
        of_a_process = 2 * _TURNS_OF_A_PROCESS * max(turns.LENGTH.values()) / largest_batch
        slots = min(max(_LEAST_BATCHES, 2 + math.ceil(processes * of_a_process)), most)
        all_slots = min(slots + math.ceil(elsewhere * of_a_process), most)
        self._slots_of_another = math.ceil(of_a_process)
        self._memory = _shared_memory(all_slots * bytes_of_a_batch)
        pixels = np.frombuffer(mmap.mmap(self._memory, all_slots * bytes_of_a_batch), np.uint8)
        self._images = pixels.reshape(all_slots, largest_batch, *geometry.image_size.shape)
        self._settings = Settings(
            geometry=geometry, keep_unavailable=keep_unavailable, images=all_slots * largest_batch
        )
        self._changed = threading.Condition(threading.RLock())
        self._free = collections.deque(range(slots))
        self._unused = collections.deque(range(slots, all_slots))
        """Slots for what processes of other machines decode."""
        self._streams: collections.deque[Stream] = collections.deque()
        """With batches that have no place in memory yet."""
        self._batches: dict[tuple[Stream, int], PendingBatch] = {}
        """That the consumer has not taken."""
        self._turns: collections.deque[Turn] = collections.deque()
        """That no process has."""
        self._failure: Exception | None = None
        self._failed_starts = 0
        self.waited = 0.0
        self._woken, self._wake = (Connection(end.detach()) for end in socket.socketpair())
        self._listener: socket.socket | None = None
        self._processes = [_Process(self._settings, self._memory) for _ in range(processes)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def batches(self, rows: Callable[[int], pa.Table], count: int, lanes: Lanes | None = None) -> Iterator[Batch]:
        """Decode images, after those of earlier streams. It begins at once, before the first batch is asked for.

        Args:
            rows: the rows of each batch, with `uri`, by its number; at most `largest_batch`.
            count: number of batches.
            lanes: the lane of each row of a batch: images of a lane are decoded one after another in one process of
                this machine. None: an image does not matter for the next one.

        Raises:
            CnnrayError: as `reading.decoded_blocks`.
            DecoderError: a process cannot start.

        Yields:
            the batches of `reading.decoded_blocks`. The pixels of one are there until the next but one, or the end of
            the stream, is asked for.
        """
        stream = Stream(rows, count, lanes)
        self._streams.append(stream)
        self._wake_up()
        return self._received(stream)

    def close(self) -> None:
        """End the processes."""
        with self._changed:  # also where two threads do
            if self._wake.closed:
                return
            self._wake.close()
        self._thread.join()
        os.close(self._memory)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()

    def _wake_up(self) -> None:
        if self._failure is None:
            with contextlib.suppress(OSError):  # closed
                self._wake.send_bytes(b"1")

    # -- the consumer's thread ---------------------------------------------------------------------------------

    def _received(self, stream: Stream) -> Iterator[Batch]:
        held: collections.deque[PendingBatch] = collections.deque()
        try:
            for number in range(stream.batches):
                batch = self._wait_for(stream, number)
                held.append(batch)
                columns = {name: batch.rows[name].to_numpy() for name in batch.rows.column_names}
                yield columns | {"image": self._images[batch.slot, : len(batch.rows)], "error": batch.errors}
                if len(held) == 2:
                    self._free.append(held.popleft().slot)
                    self._wake_up()
        finally:
            self._drop(stream, held)

    def _wait_for(self, stream: Stream, number: int) -> PendingBatch:
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

    def _drop(self, stream: Stream, held: Sequence[PendingBatch]) -> None:
        """Forget the rest of a stream."""
        with self._changed:
            stream.begun = stream.batches
            for key in [key for key in self._batches if key[0] is stream]:
                batch = self._batches.pop(key)
                batch.is_dropped = True
                waiting = [turn for turn in self._turns if turn.batch is batch]
                for turn in waiting:
                    self._turns.remove(turn)
                batch.turns_left -= len(waiting)
                if not batch.turns_left:
                    self._free.append(batch.slot)
            self._free.extend(batch.slot for batch in held)
        self._wake_up()

    # -- the thread that hands out turns -----------------------------------------------------------------------

    def _run(self) -> None:
        failure: Exception = DecoderError("The processes that decode images were ended.")
        try:
            while True:
                self._begin_batches()
                self._hand_out()
                ready = wait([self._woken, *(process.connection for process in self._processes)])
                if self._woken in ready and not _received_byte(self._woken):
                    return
                for process in [process for process in self._processes if process.connection in ready]:
                    self._receive(process)
        except Exception as error:
            failure = error
        finally:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
            for process in self._processes:
                process.end()

    def _begin_batches(self) -> None:
        while self._free and self._streams:
            stream = self._streams[0]
            number = stream.begun
            if number == stream.batches:
                self._streams.popleft()
                continue
            lanes = None if stream.lanes is None else stream.lanes(number)
            batch = PendingBatch(stream.rows(number), self._free.popleft())
            cut = turns.of(batch, lanes, len(self._processes))
            batch.turns_left = len(cut)
            with self._changed:
                if stream.begun > number:  # dropped meanwhile
                    self._free.append(batch.slot)
                    continue
                stream.begun += 1
                self._batches[stream, number] = batch
                self._turns += cut
                self._changed.notify_all()

    def _hand_out(self) -> None:
        for count in range(_TURNS_OF_A_PROCESS):
            for number, process in enumerate(self._processes):
                if process.is_ready and len(process.turns) == count and (turn := self._next_turn(number)):
                    process.turns.append(turn)
                    first = turn.batch.slot * self._images.shape[1]
                    with contextlib.suppress(OSError):  # it has crashed, as its answer will tell
                        places = [first + place for place in turn.places]
                        process.connection.send((places, turn.uris, turn.lanes))

    def _next_turn(self, process: int) -> Turn | None:
        with self._changed:
            turn = next((turn for turn in self._turns if turn.process in (None, process)), None)
            if turn is not None:
                self._turns.remove(turn)
            return turn

    def _receive(self, process: _Process) -> None:
        try:
            answer = process.connection.recv()
        except (EOFError, OSError):
            self._replace(process)
            return
        if not process.is_ready:
            process.is_ready, self._failed_starts = True, 0
            return
        self._end_turn(process.turns.popleft(), answer)

    def _end_turn(self, turn: Turn, answer: list[str] | Exception | None) -> None:
        """Take what a process answered: the images' errors, None where there are none, or what ends the stream."""
        with self._changed:
            if isinstance(answer, Exception):
                turn.batch.error = answer
            elif answer is not None:
                turn.batch.errors[turn.places] = answer
            turn.batch.turns_left -= 1
            if turn.batch.is_dropped and not turn.batch.turns_left:
                self._free.append(turn.batch.slot)
            self._changed.notify_all()

    def _again(self, turns: Sequence[Turn]) -> None:
        """Let other processes have turns."""
        with self._changed:
            for turn in reversed(turns):
                if turn.batch.is_dropped:
                    self._end_turn(turn, None)
                else:
                    self._turns.appendleft(turn)
            self._changed.notify_all()

    def _replace(self, process: _Process) -> None:
        """Give the turns of a process that has crashed to others, and start another one if it was of this machine.

        Raises:
            DecoderError: too many have crashed before they were ready.
        """
        code = process.end()
        self._failed_starts += not process.is_ready
        if self._failed_starts == _MAX_FAILED_STARTS:
            raise DecoderError(f"Processes that decode images end when they start, with exit code {code}.")
        again = list(process.turns)
        if again:
            first = again[0]
            first.crashes += 1
            if first.crashes == _MAX_CRASHES and len(first.uris) > 1:
                # One of the images: the next crash of a single one is its own.
                singles = [first.single(index) for index in range(len(first.uris))]
                with self._changed:
                    first.batch.turns_left += len(singles) - 1
                again[:1] = singles
            elif first.crashes == _MAX_CRASHES:
                self._images[first.batch.slot, first.places] = 0
                self._end_turn(again.pop(0), [CRASHED])
        self._again(again)
        self._processes[self._processes.index(process)] = _Process(self._settings, self._memory)

    # -- processes of other machines, a thread for each --------------------------------------------------------

    def invite(self, host: str) -> tuple[tuple[str, int], bytes]:
        """Let processes of other machines `join`. They are given turns while more wait than this machine takes next.

        Args:
            host: address of this machine.

        Returns:
            what they call `join` with.
        """
        key = secrets.token_bytes(32)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        threading.Thread(target=self._accept, args=[self._listener, key], daemon=True).start()
        return self._listener.getsockname()[:2], key

    def _accept(self, listener: socket.socket, key: bytes) -> None:
        while not self._wake.closed:
            with contextlib.suppress(OSError):
                accepted, _ = listener.accept()
                threading.Thread(target=self._serve, args=[accepted, key], daemon=True).start()

    def _serve(self, accepted: socket.socket, key: bytes) -> None:
        """Give turns to a process of another machine. If it is lost or does not answer, another one has its turn."""
        patience = struct.pack("ll", _PATIENCE, 0)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        turn = None
        with contextlib.suppress(OSError, EOFError, AuthenticationError), _authenticated(accepted, key) as connection:
            connection.send(self._settings)
            with self._changed:
                self._free += [self._unused.popleft() for _ in range(min(self._slots_of_another, len(self._unused)))]
            self._wake_up()
            while (turn := self._turn_for_other()) is not None:
                connection.send(turn.uris)
                answer = connection.recv()
                if not isinstance(answer, Exception):
                    images = np.empty((len(turn.places), *self._images.shape[2:]), np.uint8)
                    connection.recv_bytes_into(images.data.cast("B"))
                    self._images[turn.batch.slot, turn.places] = images
                self._end_turn(turn, answer)
                turn = None
                self._wake_up()
        if turn is not None:
            self._again([turn])
            self._wake_up()

    def _turn_for_other(self) -> Turn | None:
        """The last turn that is of no lanes, once more wait than this machine takes next; None at the end."""
        with self._changed:
            while self._failure is None:
                free = [turn for turn in self._turns if turn.lanes is None]
                if len(free) > _TURNS_OF_A_PROCESS * len(self._processes):
                    self._turns.remove(free[-1])
                    return free[-1]
                self._changed.wait()
        return None


@contextlib.contextmanager
def _authenticated(accepted: socket.socket, key: bytes) -> Iterator[Any]:
    """The connection of a process that has called `join` with this key."""
    with Connection(accepted.detach()) as connection:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        yield connection


def _received_byte(connection: Connection) -> bool:
    """Whether a byte came; False at the end of the connection."""
    try:
        connection.recv_bytes()
    except EOFError:
        return False
    return True


def _shared_memory(size: int) -> int:
    """The descriptor of a file in memory, which no name leads to."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("cnnray-images")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.truncate(memory, size)
    return memory
