"""Engines run a bundle's network on decoded images: their names, how to load one, and the choice of the fastest.

An engine maps uint8 (N, height, width, 3) to float32 probabilities (N, classes), at the temperature that the bundle
has now. The grouping of images into batches changes a probability by less than 1e-5. In int8 engines it changes
nothing (LiteRT), or the rounding (ONNX Runtime), as in bfloat16.
"""

import functools
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnnray.cpus import usable_cpus
from cnnray.models.answers import FLOAT32, Rules, Threshold
from cnnray.models.bundle import MODEL, Bundle, BundleError
from cnnray.models.formats import FORMATS
from cnnray.models.groups import Groups
from cnnray.models.runtimes import (
    Engine,
    FileEngine,
    Images,
    KerasEngine,
    LiteRTEngine,
    OnnxEngine,
    OpenVinoEngine,
    Probabilities,
    RescaledEngine,
    SavedModelEngine,
)

log = logging.getLogger(__name__)

KERAS, KERAS_BFLOAT16, SAVED_MODEL = "keras", "keras-bfloat16", "saved_model"
KERAS_POLICIES = {KERAS: "float32", KERAS_BFLOAT16: "mixed_bfloat16"}
"""The engines that run the Keras model itself, on a GPU where there is one, with the dtype policy of its layers."""
BATCH_SIZE = 64
"""Default of the largest batch that a network gets."""


@dataclass(frozen=True)
class Runner:
    """How an exported file is run."""

    format: str
    """The format of the file, one of `FORMATS`."""
    load: Callable[[Path, int], FileEngine]
    """Loads a file for calls with this number of threads."""
    tolerance: float | None = None
    """Largest accepted difference of a probability from Keras's. None: the network is quantized, and only its
    accuracy is judged."""
    why_unavailable: Callable[[], str] = str
    """Returns why the engine cannot run in this process, or an empty string."""


@functools.cache
def _why_no_openvino() -> str:
    installed = importlib.util.find_spec("openvino")
    return "" if installed else "OpenVINO is not installed (the extra openvino of cnnray)"


@functools.cache
def _why_no_bfloat16() -> str:
    if reason := _why_no_openvino():
        return reason
    import openvino

    supported = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "" if supported else "this CPU does not compute in bfloat16"


_FLOAT32_TOLERANCE = 1e-4
RUNNERS = {
    SAVED_MODEL: Runner("saved_model", SavedModelEngine, _FLOAT32_TOLERANCE),
    "onnx": Runner("onnx", OnnxEngine, _FLOAT32_TOLERANCE),
    "onnx-int8": Runner("onnx-int8", OnnxEngine),
    "litert": Runner("litert", LiteRTEngine, _FLOAT32_TOLERANCE),
    # Rounding to float16 changes a weight by up to 5e-4 of its value, in every layer.
    "litert-float16": Runner("litert-float16", LiteRTEngine, 5e-2),
    "litert-int8": Runner("litert-int8", LiteRTEngine),
    "openvino-bfloat16": Runner(
        "onnx", functools.partial(OpenVinoEngine, precision="bf16"), why_unavailable=_why_no_bfloat16
    ),
    "openvino-int8": Runner("onnx-int8", OpenVinoEngine, why_unavailable=_why_no_openvino),
}
"""The engines that run exported files, by name."""
ENGINES = (*KERAS_POLICIES, *(name for name in RUNNERS if name != SAVED_MODEL))
"""The names that a job accepts besides `auto`. SavedModels are exported for other programs: `keras` is as fast."""


def load_engine(bundle: Bundle, name: str, threads: int | None = None) -> Engine:
    """Load an engine.

    Args:
        bundle: must hold the file that the engine runs.
        name: one of `ENGINES`.
        threads: CPU threads of a call; None: all that this process may use.

    Raises:
        BundleError: the bundle does not hold the file, the file cannot be run, or its shapes contradict the bundle.
    """
    threads = threads or usable_cpus()
    check_exported(bundle, name)
    if name in KERAS_POLICIES:
        return KerasEngine(bundle, threads, KERAS_POLICIES[name])
    file = FORMATS[RUNNERS[name].format].path
    with bundle.local_copy(file) as path:
        if not path.is_file():
            raise BundleError(f"{bundle.uri} lists an export to {name}, but holds no {file}.")
        engine = load_file_engine(name, path, threads, bundle)
    exported = float(bundle.info.exports[name].get("temperature", 1.0))
    if exported == bundle.info.temperature:
        return engine
    return RescaledEngine(engine, exported / bundle.info.temperature, multi_label=bundle.info.is_multi_label)


def load_file_engine(name: str, path: Path, threads: int, bundle: Bundle) -> Engine:
    """Load the engine of an exported file, whether or not the bundle lists it.

    Raises:
        BundleError: the file cannot be run, or its shapes contradict the bundle.
    """
    try:
        engine = RUNNERS[name].load(path, threads)
    except Exception as error:  # every library raises its own exceptions
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{bundle.uri}: {path.name} cannot be loaded: {reason}") from None
    if isinstance(engine, LiteRTEngine):
        engine.multi_label = bundle.info.is_multi_label
    size, classes = bundle.info.geometry.image_size, len(bundle.info.class_names)
    if engine.shape != size.shape or engine.classes != classes:
        raise BundleError(
            f"{bundle.uri}: {path.name} takes {engine.shape} and gives {engine.classes} probabilities; the bundle "
            f"has images of {size} and {classes} classes."
        )
    return engine


def arithmetic(name: str) -> str:
    """What engines must share to give the same probabilities, up to 1e-4: `FLOAT32`, or else their name."""
    return FLOAT32 if name == KERAS or tolerance(name) == _FLOAT32_TOLERANCE else name


def export_id(bundle: Bundle, name: str) -> str:
    """Identifies the file of an engine with an `arithmetic` of its own; empty for the others, and for Keras.

    It is a hash of the measurements of the export, which hold times: another export has another one.
    """
    if name not in RUNNERS or arithmetic(name) == FLOAT32:
        return ""
    return hashlib.sha256(json.dumps(bundle.info.exports.get(name), sort_keys=True).encode()).hexdigest()[:16]


def find_threshold(bundle: Bundle, name: str) -> Threshold | None:
    """The threshold of an engine; None: the bundle answers for every image.

    Raises:
        BundleError: the bundle has thresholds, but none for this engine.
    """
    decision = bundle.info.decision
    if decision is None:
        return None
    if (threshold := _threshold(bundle, name)) is None:
        known = ", ".join("the float32 engines" if key == FLOAT32 else key for key in decision.thresholds)
        raise BundleError(
            f"{bundle.uri} has no confidence threshold for {name} as it is exported now (it has those of {known}): "
            f"jobs/evaluate.py --target-precision {decision.precision:g} publishes a bundle with thresholds for all "
            "of its exports."
        )
    return threshold


def find_rules(bundle: Bundle, name: str, *, withholds: bool = True) -> Rules:
    """How the probabilities of an engine become answers.

    Args:
        bundle: that it runs.
        name: of the engine.
        withholds: False: each image gets its most probable class, also below the threshold of the bundle.

    Raises:
        BundleError: see `find_threshold`.
    """
    threshold = find_threshold(bundle, name) if withholds else None
    groups = bundle.info.groups
    return Rules(
        threshold=threshold,
        label_thresholds=bundle.info.thresholds,
        groups=Groups.of(groups, bundle.info.class_names) if groups and threshold else None,
    )


def _threshold(bundle: Bundle, name: str) -> Threshold | None:
    assert bundle.info.decision is not None
    threshold = bundle.info.decision.thresholds.get(arithmetic(name))
    return threshold if threshold and threshold.export == export_id(bundle, name) else None


def check_exported(bundle: Bundle, name: str) -> None:
    """
    Raises:
        BundleError: the engine is unknown, the bundle does not list its file, or it cannot run in this process.
    """
    _check_listed(bundle, name)
    if reason := why_unavailable(name):
        raise BundleError(f"The engine {name} cannot be used here: {reason}.")


def _check_listed(bundle: Bundle, name: str) -> None:
    if name not in ENGINES:
        raise BundleError(f"The engine {name!r} is unknown; expected one of {', '.join(ENGINES)}.")
    if name == KERAS:
        return
    if name not in bundle.info.exports:
        listed = ", ".join([KERAS, *(other for other in bundle.info.exports if other in ENGINES and other != KERAS)])
        raise BundleError(f"{bundle.uri} was not exported to {name} (it has {listed}): run jobs/export.py.")


def digest(bundle: Bundle, name: str) -> str:
    """The SHA-256 of the file that an engine runs, here or on another machine.

    Raises:
        BundleError: the engine is unknown, or the bundle does not list its file, or does not hold it.
        OSError: the storage cannot be read.
    """
    _check_listed(bundle, name)
    return bundle.digest(MODEL if name in KERAS_POLICIES else FORMATS[RUNNERS[name].format].path)


def predict_in_batches(engine: Engine, images: Images, size: int = BATCH_SIZE) -> Probabilities:
    """Run an engine on any number of images, in batches of at most `size`."""
    if isinstance(engine, KerasEngine):
        return engine.outputs_in_batches(images, size).probabilities
    parts = [engine(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate(parts) if parts else np.empty((0, engine.classes), np.float32)


def choose(bundle: Bundle, *, gpus: bool, batch_size: int) -> str:
    """Resolve the engine `auto`: Keras on a GPU, otherwise the fastest engine that export verified.

    On a GPU, Keras computes in bfloat16 if export has verified it. Export measures speed on CPUs only.

    A quantized engine (int8, bfloat16) is chosen only if its accuracy was measured on labelled images. An engine that
    cannot run in this process is never chosen, nor one for which a bundle with thresholds has none.

    Args:
        bundle: `info.exports` holds the measurements.
        gpus: whether the process has a GPU.
        batch_size: images per call; the measurement at batch size 1 or 32 decides, whichever is nearer.
    """
    if gpus and _may_answer(bundle, KERAS_BFLOAT16) and _is_verified(bundle, KERAS_BFLOAT16):
        log.info("engine %s: there is a GPU", KERAS_BFLOAT16)
        return KERAS_BFLOAT16
    if gpus and _may_answer(bundle, KERAS):
        log.info("engine %s: there is a GPU (export --formats keras-bfloat16 verifies a faster one)", KERAS)
        return KERAS
    key = "1" if batch_size < 6 else "32"
    speeds = {
        name: float(report["times_keras"][key])
        for name, report in bundle.info.exports.items()
        if name in ENGINES and _is_verified(bundle, name) and not why_unavailable(name) and _may_answer(bundle, name)
    }
    if not speeds:
        reason = "no verified exports" if bundle.info.decision is None else "no other engine with a threshold"
        log.info("engine keras: the bundle has %s (jobs/export.py makes them)", reason)
        return KERAS
    fastest = max(speeds, key=lambda name: speeds[name])
    measured = ", ".join(f"{name} {speed:.2f}" for name, speed in sorted(speeds.items(), key=lambda item: -item[1]))
    log.info("engine %s: the fastest in export's measurement at batch %s (times Keras: %s)", fastest, key, measured)
    return fastest


def tolerance(name: str) -> float | None:
    """See `Runner.tolerance`."""
    return RUNNERS[name].tolerance if name in RUNNERS else None


def _is_verified(bundle: Bundle, name: str) -> bool:
    """Whether an engine was exported, and its answers are known to be good enough."""
    report = bundle.info.exports.get(name)
    if report is None:
        return False
    return name == KERAS or tolerance(name) is not None or report["accuracy"] is not None


def _may_answer(bundle: Bundle, name: str) -> bool:
    return bundle.info.decision is None or _threshold(bundle, name) is not None


def why_unavailable(name: str) -> str:
    """Why an engine cannot run in this process, or an empty string."""
    return RUNNERS[name].why_unavailable() if name in RUNNERS else ""
