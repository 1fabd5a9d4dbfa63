"""The output of a training: the names of its files, the run that it holds, and the end of a run."""

import csv
import io
import json
import logging
import time
from typing import Any

from cnnray import configs
from cnnray.errors import PermanentError, TransientError
from cnnray.images import storage
from cnnray.images.lease import lease
from cnnray.models import bundle
from cnnray.tracking.mlflow import RECORD
from cnnray.training import checkpoint, decided, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.decided import PlannedConfig

log = logging.getLogger(__name__)

CONFIG, MANIFEST, SUMMARY = "config.yaml", "manifest.parquet", "summary.json"
BUNDLE, CHECKPOINTS, TENSORBOARD = "bundle", "checkpoints", "tensorboard"
HISTORY, BAD_IMAGES, IMAGENET = "history.csv", "bad_images.csv", "imagenet.weights.h5"
IMAGES_PER_WORKER = "images_per_worker.txt"
# In the order of deletion: without its summary a run is not finished.
_FILES = (SUMMARY, HISTORY, BAD_IMAGES, MANIFEST, IMAGENET, IMAGES_PER_WORKER, RECORD)
_FOLDERS = (CHECKPOINTS, TENSORBOARD, BUNDLE)


class TrainingError(PermanentError, RuntimeError):
    """A run that cannot start or failed; the message is one sentence for the user."""


class TooLittleMemoryError(TransientError, MemoryError):
    """A worker ran out of memory, and the workers that take over take fewer images at once."""


def earlier_run(config: TrainConfig) -> dict[str, Any] | None:
    """The config of the run that the output holds, by field, if this run goes on with it; else None.

    Raises:
        TrainingError: the output holds another run, or files of something else.
        NewerFormatError: a later version of cnnray wrote it.
    """
    uri = storage.join(config.output, CONFIG)
    try:
        text = storage.read_bytes(uri)
    except FileNotFoundError:
        foreign = [part for part in (*_FOLDERS, *_FILES) if storage.exists(storage.join(config.output, part))]
        if foreign:
            raise TrainingError(
                f"{config.output} holds {', '.join(foreign)}, but no {CONFIG} of a run; give another --output."
            ) from None
        return None
    earlier = configs.load(TrainConfig, text, uri)
    differences = decided.differences(config, earlier)
    if differences and config.overwrite:
        return None
    if differences:
        raise TrainingError(
            f"{config.output} holds a run with {', '.join(differences)}; give another --output, or --overwrite."
        )
    if not storage.is_file(storage.join(config.output, MANIFEST)):
        return None
    return earlier


def finished(config: TrainConfig, earlier: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished run, unless this one asks for more epochs."""
    try:
        summary: dict[str, Any] = json.loads(storage.read_bytes(storage.join(config.output, SUMMARY)))
    except FileNotFoundError:
        return None
    asks_for_more = config.epochs is not None and config.epochs > int(earlier["epochs"])
    return None if asks_for_more else summary


def delete_run(output: str) -> None:
    """Delete all of a run but its config."""
    for part in _FILES:
        storage.delete_file(storage.join(output, part))
    for part in _FOLDERS:
        storage.delete_folder(storage.join(output, part))


def write_config(config: PlannedConfig) -> None:
    """Make the output that of this run, which is not finished."""
    storage.delete_file(storage.join(config.output, SUMMARY))
    storage.write_bytes(storage.join(config.output, CONFIG), configs.dump(config))


def drop_torn_checkpoints(output: str) -> None:
    """Delete the checkpoints where Ray's list of them is damaged: Ray was killed while it wrote the list.

    The run then begins anew, and ends with the same weights.
    """
    try:
        json.loads(storage.read_bytes(storage.join(output, CHECKPOINTS, "checkpoint_manager_snapshot.json")))
    except FileNotFoundError:
        return
    except ValueError:
        log.warning("the list of checkpoints in %s is damaged; starting over", output)
        storage.delete_folder(storage.join(output, CHECKPOINTS))


def finish(config: PlannedConfig, images: int, best: Any, latest: Any, started: float) -> dict[str, Any]:
    """Write what a run ends with: the bundle, the list of bad images, and last the summary.

    Args:
        config: of the run.
        images: training images.
        best: Ray's checkpoint whose weights become the bundle.
        latest: Ray's checkpoint that knows all epochs.
        started: when the job began, in seconds since the epoch.

    Returns:
        The summary.
    """
    target = storage.join(config.output, BUNDLE)
    with lease(target):  # an export may be writing to it
        bundle.replace(target, storage.join(_uri(config, best), checkpoint.BUNDLE))
    state = json.loads(storage.read_bytes(storage.join(_uri(config, latest), checkpoint.PROGRESS)))
    files = [file.uri for file in storage.files(_uri(config, latest)) if file.uri.endswith(".jsonl")]
    bad = checkpoint.read_bad_images(storage.read_bytes(uri) for uri in files)
    if bad:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=["id", "uri", "error"])
        writer.writeheader()
        writer.writerows(bad[key] for key in sorted(bad))
        storage.write_bytes(storage.join(config.output, BAD_IMAGES), text.getvalue().encode())
        log.warning("%d images could not be read; they are listed in %s", len(bad), BAD_IMAGES)
    info = bundle.read_info(target)
    counts = [info.class_counts.get(name, 0) for name in info.class_names]
    loss = state["history"][-1]["loss"]
    has_learned = recipe.has_learned(config, loss, counts, images)
    if not has_learned:
        log.warning(
            "The network has learned nothing: its training loss at the end (%.4f) is that of guessing (%.4f). %s",
            loss, recipe.guessing_loss(config, counts, images), recipe.advice(config),
        )  # fmt: skip
    summary = {
        "bundle": target,
        "epochs": state["epoch"],
        "has_learned": has_learned,
        "metrics": info.metrics,
        "images_per_second": round(state["images"] / max(state["seconds"], 1e-9), 2),
        "seconds_to_first_step": round(state["seconds_to_first_step"], 2),
        "seconds": round(time.time() - started, 2),
    }
    storage.write_bytes(storage.join(config.output, SUMMARY), json.dumps(summary, indent=2).encode())
    return summary


def _uri(config: TrainConfig, saved: Any) -> str:
    """Where one of Ray's checkpoints is, as `storage` takes it."""
    scheme = config.output.partition("://")[0]
    return str(saved.path) if storage.is_local(config.output) else f"{scheme}://{saved.path}"
