"""Many short trainings side by side, one thread each, on a GPU if there is one; results outlive the process.

A long study is run again with the same file until all of its results are there.
"""

import json
import logging
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cnnray.cpus import usable_cpus

log = logging.getLogger(__name__)

Key = tuple[str | int, ...]
"""What tells a run from the others of a file: JSON values."""


def complete(
    file: Path, keys: Iterable[Key], run: Callable[..., dict[str, Any]], processes: int | None = None
) -> dict[Key, dict[str, Any]]:
    """Run what the file has no result of, and append each result as it comes.

    Args:
        file: JSON lines, one for each run.
        keys: of the runs, in the order in which they are begun.
        run: a function of a module; its arguments are the parts of a key, its result JSON values.
        processes: how many run at once, each with its share of the cores as threads; None: one for each core.

    Returns:
        The result of each key.
    """
    keys = list(keys)
    results = read(file)
    missing = [key for key in keys if key not in results]
    log.info("%s: %d of %d runs are to do", file, len(missing), len(keys))
    processes = processes or usable_cpus()
    threads = usable_cpus() // processes
    # Each process serves many runs, because TensorFlow's import takes seconds.
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_load_tensorflow, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(run, *key): key for key in missing}
        try:
            for done in as_completed(futures):
                key, result = futures[done], done.result()
                results[key] = result
                with file.open("a") as lines:
                    lines.write(json.dumps([*key, result]) + "\n")
                log.info("%s: %s", ", ".join(map(str, key)), {k: v for k, v in result.items() if k != "epochs"})
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {key: results[key] for key in keys}


def read(file: Path) -> dict[Key, dict[str, Any]]:
    """The results of a file so far."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("]")]
    return {tuple(key): result for *key, result in lines}


def _load_tensorflow(threads: int) -> None:
    from cnnray.models import startup

    startup.load_tensorflow()
    import tensorflow as tf

    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    tf.config.experimental.enable_tensor_float_32_execution(False)  # float32 as on CPUs
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(2 if has_gpu else 1)
