"""What a run trains on: its manifest with every row's split decided, and whether the pixels are kept in memory."""

import logging
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.images import containers
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError
from cnnray.training.budget import Budget
from cnnray.training.config import TrainConfig

log = logging.getLogger(__name__)


def manifest_of_run(config: TrainConfig) -> pa.Table:
    """The run's manifest, with every row's split decided.

    Raises:
        ManifestError, OSError: with a sentence.
    """
    manifest = manifests.manifest_of(config.data, labelled=True).select(["id", "uri", "label", "split"])
    if config.validation is not None:
        if config.validation == config.data:
            raise ManifestError("--validation is the same as --data.")
        train_rows = manifests.rows_of(manifest, "train")
        train_rows = train_rows if len(train_rows) else manifest
        validation = manifests.manifest_of(config.validation, labelled=True)
        manifest = manifests.with_validation(train_rows, validation)
    elif manifest["split"].null_count == len(manifest):
        manifest = manifests.split_off_validation(manifest, config.validation_fraction, config.seed)
    elif manifest["split"].null_count:
        raise ManifestError(f"{config.data}: some images have a split and some have none.")
    elif not len(manifests.rows_of(manifest, "validation")):
        train_rows = manifests.rows_of(manifest, "train").drop_columns(["id"])
        train_rows = train_rows.add_column(0, "id", pa.array(range(len(train_rows)), pa.int64()))
        manifest = manifests.split_off_validation(train_rows, config.validation_fraction, config.seed)
    train, validation = (manifests.rows_of(manifest, split) for split in ("train", "validation"))
    missing = sorted(set(manifests.class_names(manifest)) - set(manifests.class_names(train)))
    if missing:
        raise ManifestError(f"{config.data}: no training image has the label {missing[0]!r}.")
    if len(train) < config.most_workers:
        raise ManifestError(f"{config.data} holds {len(train)} training images for {config.most_workers} workers.")
    return manifest


def describe(manifest: pa.Table) -> None:
    train, validation = (manifests.rows_of(manifest, split) for split in ("train", "validation"))
    classes = len(manifests.class_names(train))
    log.info("%d training and %d validation images of %d classes", len(train), len(validation), classes)


def check_images(config: TrainConfig, manifest: pa.Table, shares: Budget) -> None:
    """Look at all images, where they are not too many, and log what is wrong with them.

    Raises:
        ManifestError: too many cannot be read.
    """
    from cnnray.images import stream

    if config.data_checks:
        stream.be_quiet()
        if checked := stream.checked_in_passing(manifest, shares.decode_cpus):
            checked.warn()
            if checked.unreadable > config.max_bad_fraction * checked.images:
                raise ManifestError(
                    f"{checked.unreadable} of {checked.images} images cannot be read: more than --max-bad-fraction "
                    f"{config.max_bad_fraction} allows."
                )


def is_cached(config: TrainConfig, manifest: pa.Table, shares: Budget) -> bool:
    """Whether the decoded images are to be kept in memory.

    Raises:
        ManifestError: they would have to be, and it is too small.
    """
    rows = _used(manifest)
    needed = len(rows) * config.image_size**2 * 3
    fits = needed <= shares.store_bytes
    sizes = f"{needed / 2**30:.1f} GiB of decoded images, and the smallest object store of the cluster has " + (
        f"{shares.store_bytes / 2**30:.1f} GiB"
    )
    if config.cache == "memory" and not fits:
        raise ManifestError(f"--cache memory has to keep {sizes}: use --cache none.")
    if not any(containers.group_of(uri) for uri in rows["uri"].to_pylist()):
        return config.cache == "memory" or (config.cache == "auto" and needed <= shares.cache_bytes)
    if config.cache == "none" or not fits:
        raise ManifestError(
            f"{config.data} holds images in Parquet, which training must keep in memory, as it takes them in another "
            f"order every epoch ({sizes}): use --cache auto, a smaller --image-size, or a folder of the images."
        )
    return True


def decoded_into_memory(config: TrainConfig, manifest: pa.Table, shares: Budget) -> dict[str, list[Any]]:
    """References to the decoded blocks of each split in memory."""
    from cnnray.images import stream
    from cnnray.training.source import decode_into_memory

    stream.be_quiet()
    rows = manifests.with_targets(_used(manifest))
    cached = {
        split: decode_into_memory(
            manifests.rows_of(rows, split), config.image_size, config.resize, shares.decode_cpus
        )
        for split in ("train", "validation")
    }
    log.info(
        "%d decoded images are kept in memory (%.0f MiB)", len(rows), len(rows) * config.image_size**2 * 3 / 2**20
    )
    return cached


def _used(manifest: pa.Table) -> pa.Table:
    return manifest.filter(pc.is_in(manifest["split"], pa.array(["train", "validation"])))
