"""How many images fit into the memory of a worker: half as many after each error of too little memory.

The number is in the output, so that the workers that take over begin with it, and a run that goes on, too.
"""

import contextlib
import math

import tensorflow as tf

from cnnray.images import storage
from cnnray.training.decided import PlannedConfig
from cnnray.training.output import IMAGES_PER_WORKER, TooLittleMemoryError, TrainingError

_SIGNS = ("resource_exhausted", "out of memory", "oom when", "alloc_failed")
"""Parts of messages of TensorFlow and CUDA, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether TensorFlow had too little memory, of whatever class its error is."""
    is_sign = any(sign in str(error).lower() for sign in _SIGNS)
    return isinstance(error, tf.errors.ResourceExhaustedError) or (isinstance(error, tf.errors.OpError) and is_sign)


def images_at_once(config: PlannedConfig, world: int) -> int:
    """The most images that a worker takes at once.

    Args:
        config: of the run.
        world: number of workers.
    """
    share = math.ceil(config.batch_size / world)
    limits = [share if config.images_per_worker is None else min(share, config.images_per_worker)]
    with contextlib.suppress(FileNotFoundError):
        limits.append(int(storage.read_bytes(storage.join(config.output, IMAGES_PER_WORKER))))
    return min(limits)


def halve(config: PlannedConfig, images: int) -> TooLittleMemoryError | TrainingError:
    """Let the next workers take half as many images at once.

    Args:
        config: of the run.
        images: that this worker took at once.

    Returns:
        The error to raise in this worker. After the first kind the run goes on, after the second it ends.
    """
    if images == 1:
        return TrainingError(
            "A worker ran out of memory with a single image at once: begin anew, with --overwrite or another "
            f"--output, with a smaller --image-size (it was {config.image_size}) or a smaller network."
        )
    fewer = images // 2
    storage.write_bytes(storage.join(config.output, IMAGES_PER_WORKER), str(fewer).encode())
    return TooLittleMemoryError(
        f"A worker ran out of memory with {images} images at once; the run goes on with {fewer}."
    )
