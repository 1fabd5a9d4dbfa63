"""Runs functions on workers as `driver` runs the training loop, and defines prediction workers that crash."""

import functools
import os
import pickle
import signal
import sys
from pathlib import Path

import ray.cloudpickle
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cnnray.images import decode, reading
from cnnray.models import startup
from cnnray.prediction import worker
from cnnray.training.backend import MultiWorkerConfig


def run_on_workers(function, workers, folder, *arguments):
    """Run `function(rank, world, *arguments)` inside a MultiWorkerMirroredStrategy's group.

    Returns:
        The results by rank.
    """
    folder = Path(folder)
    # Workers cannot import the tests.
    modules = [sys.modules[name] for name in (function.__module__, __name__)]
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        DataParallelTrainer(
            functools.partial(_call, function, str(folder), arguments),
            backend_config=MultiWorkerConfig(),
            scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(
                storage_path=str(folder), logging_config=ray.train.LoggingConfig(log_level="WARNING")
            ),
        ).fit()
    finally:
        # Classes of other tests must not be pickled by value: their patches of a module would have no effect.
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)
    return [pickle.loads((folder / f"{workers}-{rank}.pickle").read_bytes()) for rank in range(workers)]


def _call(function, folder, arguments):
    startup.load_tensorflow(gpus=False)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    result = function(rank, world, *arguments)
    Path(folder, f"{world}-{rank}.pickle").write_bytes(pickle.dumps(result))


def decode_or_die(data, geometry, decode=decode.decode):
    """Decode an image, or kill the process if the data ends with b"poison", as a crash in a C library would."""
    if data.endswith(b"poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(data, geometry)


def decoded_or_die(*arguments, decoded=worker.decode_rows):
    """A decoding task that decodes with `decode_or_die`."""
    reading.decode = decode_or_die
    return decoded(*arguments)


class CrashedByAnImage(worker.Worker):
    """A prediction worker that decodes with `decode_or_die`."""

    decode_rows = staticmethod(decoded_or_die)

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        reading.decode = decode_or_die


class CrashedByItsBundle(worker.Worker):
    """A prediction worker that is killed while it loads its bundle, as if it had run out of memory."""

    def __init__(self, *arguments, **options):
        worker.Predictor = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(*arguments, **options)
