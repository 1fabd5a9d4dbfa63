"""Grad-CAM heat maps from a process of their own: it imports TensorFlow, which the caller need not do or wait for."""

import contextlib
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from cnnray.models import grad_cam, startup
from cnnray.models.bundle import Bundle, BundleError

_OPACITY = 0.45


class HeatMapsLostError(BundleError):
    """The process that computes heat maps has ended."""


class HeatMapProcess:
    """Computes heat maps; a context manager, which ends the process. The process also ends when this one does."""

    def __init__(self, bundle: Bundle, version: str | None = None, *, niceness: int = 0) -> None:
        """
        Args:
            bundle: holds the network.
            version: that it must have when the process loads it; None: any.
            niceness: added to that of this process, so that it gives way to others.
        """
        self._uri, self._version, self._niceness = bundle.uri, version, niceness
        self._process: SpawnProcess | None = None
        self._connection: Connection[Any, Any] | None = None

    def start(self) -> None:
        """Let the process import TensorFlow, if it has not been started yet."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._uri, self._version, self._niceness), daemon=True
        )
        self._process.start()
        theirs.close()

    def __call__(self, images: npt.NDArray[np.uint8], classes: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See `grad_cam.heat_maps`.

        Raises:
            BundleError: the network has no heat maps.
            HeatMapsLostError: the process has ended, perhaps for want of memory.
        """
        self.start()
        assert self._connection is not None
        try:
            self._connection.send((images, classes))
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise HeatMapsLostError(f"{self._uri}: the process that computes heat maps has ended.") from None
        if isinstance(answer, Exception):
            raise answer
        return np.asarray(answer, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End the process; a call that waits for it raises `HeatMapsLostError`."""
        if self._process is not None and self._process.pid is not None and self._connection is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()


def overlay(pixels: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Overlay an image, uint8 (height, width, 3), with a heat map, float32 (h, w) in 0...1, resized to the image.

    The colours go from blue by green to red.
    """
    resized = Image.fromarray(heat).resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.BILINEAR)
    colours = np.clip(1.5 - np.abs(4 * np.asarray(resized)[..., None] - (3, 2, 1)), 0, 1)
    return np.asarray((1 - _OPACITY) * pixels + _OPACITY * 255 * colours, np.uint8)


def _serve(connection: "Connection[Any, Any]", uri: str, version: str | None, niceness: int) -> None:
    """Answer requests for heat maps until the other end of the connection is closed."""
    os.nice(niceness)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the job
    startup.load_tensorflow(gpus=False)
    bundle: Bundle | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            images, classes = connection.recv()
            try:
                bundle = bundle or _load(uri, version)
                answer: Any = grad_cam.heat_maps(bundle, images, classes)
            except BundleError as error:
                answer = error
            connection.send(answer)


def _load(uri: str, version: str | None) -> Bundle:
    """
    Raises:
        BundleError: the bundle cannot be loaded, or is another one.
    """
    try:
        bundle = Bundle.load(uri)
        if version not in (None, bundle.version):
            raise BundleError(f"{uri} holds {bundle.version} now, which cannot explain the answers of {version}.")
        _ = bundle.model
    except OSError as error:
        raise BundleError(f"{uri} cannot be read: {error}") from None
    return bundle
