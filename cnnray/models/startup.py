"""Loading TensorFlow and Keras in a process that is a job's own."""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator


def load_tensorflow(*, gpus: bool) -> None:
    """Import TensorFlow and Keras without the dozen lines that TensorFlow's libraries log while they are
    loaded, before any setting of theirs is read.

    For programs only: it turns the whole process's stderr away for a few seconds.

    Args:
        gpus: whether TensorFlow may use the GPUs that the process sees.
    """
    with without_stderr():
        import tensorflow as tf

        importlib.import_module("keras")
        if not gpus:
            tf.config.set_visible_devices([], "GPU")
    logging.getLogger("tensorflow").setLevel(logging.WARNING)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Turn the whole process's stderr away, also of libraries that know no logger. For programs only."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
