"""Importing TensorFlow and Keras: without what cnnray does not use of them, and without the lines that they log."""

import contextlib
import importlib
import importlib.metadata
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

log = logging.getLogger(__name__)

_LOG_LINES = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|[IW]\d{4} \d\d:|E\d{4} \d\d:.* failed call to cuInit"
    rb"|To enable the following instructions:"
)
"""Beginnings of lines about the machine; the one about cuInit says that it has no GPU."""
_UNUSED = ("matplotlib", "pandas", "sklearn")
"""Keras imports these where they are installed, for plots, data frames and scikit-learn's interface. They take almost
half of the time of `import tensorflow`."""


def load_tensorflow(*, gpus: bool = True) -> None:
    """Import TensorFlow and Keras for a process of cnnray's own, and let TensorFlow look for GPUs.

    TensorFlow takes a GPU's memory as it needs it, not all of it at once, so that processes can share a GPU.

    What is written to stderr meanwhile, for several seconds, comes afterwards, without TensorFlow's own lines. Keras
    then takes the modules of `_UNUSED` for not installed; other threads must not import them meanwhile.

    Args:
        gpus: whether TensorFlow may use the GPUs visible to the process.
    """
    with _hidden(_UNUSED):
        _load(gpus=gpus)


def ensure_tensorflow() -> None:
    """Import TensorFlow and Keras, with all that they offer, if this process has not imported TensorFlow yet."""
    if "tensorflow" not in sys.modules:
        _load(gpus=True)


def _load(*, gpus: bool) -> None:
    with _without_log_lines():
        import tensorflow as tf

        importlib.import_module("keras")
        found = tf.config.list_physical_devices("GPU")
        if not gpus:
            tf.config.set_visible_devices([], "GPU")
        for gpu in found if gpus else ():
            tf.config.experimental.set_memory_growth(gpu, True)
    if gpus and not found and was_given_gpu():
        log.warning(
            "TensorFlow finds no GPU, though this process has been given one, and computes on CPUs: it needs "
            "NVIDIA's driver and the packages of requirements-gpu.lock."
        )
    logging.getLogger("tensorflow").setLevel(logging.WARNING)


def is_built_for_gpus() -> bool:
    """Whether the installed TensorFlow may use GPUs: it is not the package without CUDA."""
    try:
        importlib.metadata.version("tensorflow-cpu")
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def was_given_gpu() -> bool:
    """Whether this process has asked Ray for a GPU, or the user has named one in the environment."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "") not in ("", "-1", "NoDevFiles")


@contextlib.contextmanager
def _hidden(modules: Sequence[str]) -> Iterator[None]:
    """Let imports of these modules fail, but for those that are imported already."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Hold stderr of the whole process back, and write it at the end, without lines of TensorFlow's libraries."""
    with tempfile.TemporaryFile() as held:
        try:
            with _redirected(held.fileno()):
                yield
        finally:
            held.seek(0)
            others = [line for line in held if not _LOG_LINES.match(line)]
            with contextlib.suppress(OSError), os.fdopen(os.dup(2), "wb") as stderr:
                stderr.writelines(others)


@contextlib.contextmanager
def suppress_stderr() -> Iterator[None]:
    """Discard stderr of the whole process, including output of native libraries. For programs only."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        with _redirected(devnull):
            yield
    finally:
        os.close(devnull)


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Let the file `target` take what this process and its libraries write to stderr."""
    numbers = {2}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # replaced by what is no file, or closed
        numbers.add(sys.stderr.fileno())
    originals = {number: os.dup(number) for number in numbers}
    for number in numbers:
        os.dup2(target, number)
    try:
        yield
    finally:
        for number, original in originals.items():
            os.dup2(original, number)
            os.close(original)
