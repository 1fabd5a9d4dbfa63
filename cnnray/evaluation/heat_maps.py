"""Grad-CAM heat maps from a process of their own, which imports TensorFlow while the evaluation does other things."""

import contextlib
import multiprocessing
import signal
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cnnray.models import grad_cam, startup
from cnnray.models.bundle import Bundle, BundleError


class HeatMapProcess:
    """Computes heat maps; a context manager, which ends the process. The process also ends when this one does."""

    def __init__(self, bundle: Bundle) -> None:
        """
        Args:
            bundle: holds the network.
        """
        self._uri = bundle.uri
        self._process: SpawnProcess | None = None
        self._connection: Connection[Any, Any] | None = None

    def start(self) -> None:
        """Let the process import TensorFlow, if it has not been started yet."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._uri), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, images: npt.NDArray[np.uint8], classes: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See `grad_cam.heat_maps`.

        Raises:
            BundleError: the network has no heat maps, or the process has ended, perhaps for want of memory.
        """
        self.start()
        assert self._connection is not None
        try:
            self._connection.send((images, classes))
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise BundleError(f"{self._uri}: the process that computes heat maps has ended.") from None
        if isinstance(answer, Exception):
            raise answer
        return np.asarray(answer, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()


def _serve(connection: "Connection[Any, Any]", uri: str) -> None:
    """Answer requests for heat maps until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job
    startup.load_tensorflow(gpus=False)
    bundle = Bundle.load(uri)
    with contextlib.suppress(EOFError, OSError):
        while True:
            images, classes = connection.recv()
            try:
                connection.send(grad_cam.heat_maps(bundle, images, classes))
            except BundleError as error:
                connection.send(error)
