"""Importing TensorFlow and Keras in a process that belongs to a job."""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator


def load_tensorflow(*, gpus: bool) -> None:
    """Import TensorFlow and Keras without the lines that TensorFlow's libraries log before they read any setting.

    For programs only, not for libraries: it suppresses stderr of the whole process for a few seconds.

    Args:
        gpus: whether TensorFlow may use the GPUs visible to the process.
    """
    with suppress_stderr():
        import tensorflow as tf

        importlib.import_module("keras")
        if not gpus:
            tf.config.set_visible_devices([], "GPU")
    logging.getLogger("tensorflow").setLevel(logging.WARNING)


@contextlib.contextmanager
def suppress_stderr() -> Iterator[None]:
    """Discard stderr of the whole process, including output of native libraries. For programs only."""
    original = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)
        os.close(devnull)
