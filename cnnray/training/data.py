"""The images of a run: its manifest with a split for every row, and their pixels, streamed anew in each epoch or
decoded once into Ray's object store.

Ray is imported where it is first needed, so that mistakes in a manifest are reported without waiting for it.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import cluster
from cnnray.images import checks, labels, parquet, reading, splits, tar
from cnnray.images import manifest as manifests
from cnnray.images.decoders import Decoders
from cnnray.images.geometry import Geometry
from cnnray.images.listing import SPLITS
from cnnray.images.manifest import ManifestError
from cnnray.images.reading import Batch, concatenated
from cnnray.images.turns import Lanes
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DecidedConfig
from cnnray.training.epoch import Ints
from cnnray.training.plan import Shares

log = logging.getLogger(__name__)

_USED_SPLITS = ("train", "validation")
_BLOCK_COLUMNS = ("id", "target", "image", "error", "uri")
_FEW_DECODED_BYTES = 2**28
"""Most bytes of decoded images that `read_few` keeps."""


def build_run_manifest(config: TrainConfig) -> pa.Table:
    """Build the manifest of a run, with a split for every row.

    Raises:
        ManifestError, OSError: the input gives no manifest that can be trained on.
    """
    manifest = _labelled(config, config.data)
    if config.group is not None and config.group not in manifest.column_names:
        raise ManifestError(f"{config.data} has no column {config.group!r} for --group.")
    given = set(pc.unique(manifest["split"]).to_pylist())
    if None in given and given - {None, "test"}:
        raise ManifestError(f"{config.data}: some images have a split and some have none.")
    if config.validation is not None:
        if config.validation == config.data:
            raise ManifestError("--validation is the same as --data.")
        validation = _labelled(config, config.validation)
        manifest = manifests.with_validation(manifest, validation)
    elif given == {"test"}:
        raise ManifestError(f"{config.data} holds no images to train on: all are of the split test.")
    elif "validation" not in given:
        manifest = _split(config, manifest)
    elif config.folds or config.group:
        raise ManifestError(f"{config.data} says which images validate: --folds and --group do not go with that.")
    manifest = manifest.select(["id", "uri", "label", "split"])
    train = _labels(manifest, "train")
    if missing := sorted(set(manifests.class_names(manifest)) - set(labels.names(train))):
        why = ": all of its images validate, by --group or --folds" if config.group or config.folds else ""
        raise ManifestError(f"{config.data}: no training image has the label {missing[0]!r}{why}.")
    if len(train) < config.most_workers:
        raise ManifestError(f"{config.data} holds {len(train)} training images for {config.most_workers} workers.")
    return manifest


def _labelled(config: TrainConfig, source: str) -> pa.Table:
    manifest = manifests.build_manifest(
        source, labelled=True, multi_label=bool(config.multi_label), label_separator=config.label_separator
    )
    if config.multi_label is False and manifests.is_multi_label(manifest):
        raise ManifestError(f"{source} has lists of labels, which --multi-label false excludes.")
    return manifest


def _split(config: TrainConfig, manifest: pa.Table) -> pa.Table:
    if config.folds is not None:
        return splits.with_fold(manifest, config.folds, config.fold, config.seed, config.group)
    return splits.split_off_validation(manifest, config.validation_fraction, config.seed, config.group)


def log_counts(manifest: pa.Table) -> None:
    """Log the number of images and classes."""
    train, validation, test = (_labels(manifest, split) for split in SPLITS)
    kept = f", and {len(test)} for testing" if len(test) else ""
    log.info(
        "%d training and %d validation images of %d classes%s",
        len(train),
        len(validation),
        len(labels.names(train)),
        kept,
    )


@dataclass(frozen=True)
class FewImages:
    """What one pass over a small data set in this process finds."""

    examined: pa.Table | None
    """See `checks.examine`; None where they are not checked."""
    decoded: Batch | None
    """The images of all rows, in order (see `reading.decoded_blocks`); None where they take too much memory."""


def read_few(config: DecidedConfig, manifest: pa.Table, *, check: bool) -> FewImages | None:
    """Read the images of a small data set; None for a large one.

    Args:
        config: the flags.
        manifest: of the run.
        check: whether to examine them, if --data-checks asks for it.

    Raises:
        UnavailableError: storage is in trouble.
    """
    is_examined = check and config.data_checks
    is_decoded = config.cache != "none" and _decoded_bytes(config, manifest) <= _FEW_DECODED_BYTES
    if not (is_examined or is_decoded):
        return None
    parts = reading.loaded_if_few(manifests.with_targets(manifest))
    if parts is None:
        return None
    examined: list[pa.Table] = []
    decoded: list[Batch] = []
    for part, encoded in parts:
        if is_examined:
            examined += checks.examine(part, iter(encoded))
        if is_decoded:
            decoded += reading.decoded_blocks(
                part,
                config.geometry.uncut,
                len(part),
                sources=iter(encoded),
                keep_unavailable=config.skip_unreadable,
            )
    return FewImages(pa.concat_tables(examined) if examined else None, concatenated(decoded) if decoded else None)


def check_images(config: TrainConfig, manifest: pa.Table, shares: Shares, few: FewImages | None = None) -> None:
    """Check all images, if there are not too many, and log what is wrong with them.

    Args:
        config: the flags.
        manifest: of the run.
        shares: of the cluster.
        few: what `read_few` found.

    Raises:
        ManifestError: too many cannot be read.
        UnavailableError: storage is in trouble.
    """
    from cnnray.images import stream

    if not config.data_checks:
        return
    if few is not None and few.examined is not None:
        checked = checks.check(manifest, few.examined, keep_unavailable=config.skip_unreadable)
    else:
        stream.silence_progress()
        found = stream.check_if_small(manifest, shares.decode_cpus, keep_unavailable=config.skip_unreadable)
        if found is None:
            return
        checked = found
    checked.warn()
    if checked.unreadable > config.max_bad_fraction * checked.images:
        raise ManifestError(
            f"{checked.unreadable} of {checked.images} images cannot be read: more than --max-bad-fraction "
            f"{config.max_bad_fraction} allows."
        )


def is_cached(config: DecidedConfig, manifest: pa.Table, shares: Shares) -> bool:
    """Whether to keep the decoded images in memory.

    Raises:
        ManifestError: they have to be kept, and do not fit; or they cannot be streamed.
    """
    needed = _decoded_bytes(config, _used(manifest.select(["split"])))
    if config.cache == "memory" and needed > shares.store_bytes:
        raise ManifestError(
            f"--cache memory has to keep {needed / 2**30:.1f} GiB of decoded images, and the smallest object store "
            f"of the cluster has {shares.store_bytes / 2**30:.1f} GiB: use --cache none."
        )
    is_cached = config.cache == "memory" or (config.cache == "auto" and needed <= shares.cache_bytes)
    if not is_cached and config.sampling == "balanced" and is_in_parquet(manifest):
        raise ManifestError(
            f"{config.data} holds images in Parquet, which are read in the order of their row groups, and "
            "--sampling balanced draws them one by one: use --cache memory, --class-weights balanced, or tar shards."
        )
    return is_cached


def need_lanes(config: TrainConfig, manifest: pa.Table) -> bool:
    """Whether streamed images come in the order of `epoch.LanesEpoch`."""
    is_in_tar = config.sampling != "balanced" and tar.holds_some_of_a_bucket(_used_uris(manifest))
    return is_in_tar or is_in_parquet(manifest)


def is_in_parquet(manifest: pa.Table) -> bool:
    """Whether some of the images that are used are in Parquet files."""
    return parquet.holds_some(_used_uris(manifest))


def describe(config: DecidedConfig, manifest: pa.Table, shares: Shares) -> str:
    """What becomes of the decoded images, for the plan."""
    mebibytes = _decoded_bytes(config, _used(manifest.select(["split"]))) / 2**20
    size = f"{mebibytes:,.1f} MiB of {config.geometry.decode_size} pixels"
    if is_cached(config, manifest, shares):
        return f"{size}, decoded once and kept in memory"
    lanes = ", read in many places of the files side by side" if need_lanes(config, manifest) else ""
    return f"{size}, decoded anew in each epoch by {shares.decoders_per_worker} process(es) for each worker{lanes}"


def decode_splits_into_memory(
    config: DecidedConfig, manifest: pa.Table, shares: Shares, few: FewImages | None = None
) -> dict[str, list[Any]]:
    """References to the decoded blocks of each split in memory.

    Args:
        config: the flags.
        manifest: of the run.
        shares: of the cluster.
        few: what `read_few` found.

    Raises:
        CnnrayError: storage is in trouble.
    """
    import ray

    from cnnray.images import stream

    rows = _used(manifests.with_targets(manifest)).drop_columns(["label"])
    if few is not None and few.decoded is not None:
        of_splits = manifest["split"].to_numpy(zero_copy_only=False)
        cached = {
            split: [ray.put({name: few.decoded[name][of_splits == split] for name in _BLOCK_COLUMNS})]
            for split in _USED_SPLITS
        }
    else:
        stream.silence_progress()
        try:
            cached = {
                split: decode_into_memory(
                    manifests.select_split(rows, split),
                    config.geometry.uncut,
                    shares.decode_cpus,
                    keep_unavailable=config.skip_unreadable,
                )
                for split in _USED_SPLITS
            }
        except ray.exceptions.RayError as error:
            raise cluster.user_error(error) or error from None
    return cached


def _decoded_bytes(config: DecidedConfig, rows: pa.Table) -> int:
    return len(rows) * config.geometry.decode_size.bytes


def _labels(manifest: pa.Table, split: str) -> pa.ChunkedArray:
    return manifest["label"].filter(pc.equal(manifest["split"], split))


def _used(manifest: pa.Table) -> pa.Table:
    is_used = pc.is_in(manifest["split"], pa.array(_USED_SPLITS))
    return manifest if pc.all(is_used).as_py() else manifest.filter(is_used)


def _used_uris(manifest: pa.Table) -> pa.ChunkedArray:
    return _used(manifest.select(["uri", "split"]))["uri"]


class Source(Protocol):
    """Where a worker's images come from: gives the images of chosen rows of a manifest, in order."""

    def batches(self, rows: Callable[[int], Ints], count: int, lanes: Lanes | None = None) -> Iterator[Batch]:
        """The images of rows: dicts of `id` int64 (n,), `target` int64 (n,) (see `manifest.with_targets`), `image`
        uint8 (n, height, width, 3), `error` (n,) strings and `uri` (n,) strings.

        The pixels of a batch may be gone when the next but one is asked for.

        Args:
            rows: the row numbers of each batch, by its own number.
            count: number of batches.
            lanes: see `Decoders.batches`.
        """
        ...


class Taken(Protocol):
    """Rows with `id`, `target` and `uri`, such as a `rows.Rows` or a table."""

    def take(self, rows: Ints) -> pa.Table:
        """The rows with these numbers."""
        ...


class StreamedSource:
    """Reads and decodes while the network trains, in processes on the worker's node.

    Each worker reads its own rows. Ray Train's shared pipeline (`streaming_split`) drops rows to make equal shards,
    and gives a block to the worker that asks first, so that no two runs are the same.
    """

    def __init__(self, manifest: Taken, decoders: Decoders) -> None:
        """
        Args:
            manifest: of the split.
            decoders: may be those of other sources, too.
        """
        self._manifest, self._decoders = manifest, decoders

    def batches(self, rows: Callable[[int], Ints], count: int, lanes: Lanes | None = None) -> Iterator[Batch]:
        """See `Source`. Decoding begins at once, after what was asked for before."""
        return self._decoders.batches(lambda number: self._manifest.take(rows(number)), count, lanes)


class CachedSource:
    """Takes images from blocks in Ray's object store, which the workers of a node share."""

    def __init__(self, blocks: list[Any]) -> None:
        """
        Args:
            blocks: references to blocks that `decode_splits_into_memory` made.
        """
        import ray

        self._blocks = [_columns(block) if isinstance(block, pa.Table) else block for block in ray.get(blocks)]
        lengths = [len(block["id"]) for block in self._blocks]
        self._block_of = np.repeat(np.arange(len(lengths)), lengths)
        self._row_of = np.concatenate([np.arange(length) for length in lengths])

    def batches(self, rows: Callable[[int], Ints], count: int, lanes: Lanes | None = None) -> Iterator[Batch]:
        """See `Source`."""
        for number in range(count):
            places = [(self._blocks[self._block_of[row]], self._row_of[row]) for row in rows(number)]
            yield {
                name: np.stack([block[name][row] for block, row in places]) if places else column[:0]
                for name, column in self._blocks[0].items()
            }


def decode_into_memory(
    manifest: pa.Table,
    geometry: Geometry,
    cpus_per_task: float,
    *,
    keep_unavailable: bool = False,
) -> list[Any]:
    """Decode a whole manifest into the object store.

    Returns:
        References to the blocks, in the manifest's order.
    """
    from cnnray.images import stream

    dataset = stream.decoded(manifest, geometry, cpus_per_task=cpus_per_task, keep_unavailable=keep_unavailable)
    dataset.context.execution_options.preserve_order = True
    return list(dataset.materialize().to_arrow_refs())


def _columns(table: pa.Table) -> Batch:
    # Tensor columns come as one fixed-shape chunk a block; their NumPy views share the store's memory.
    columns = {}
    for name in _BLOCK_COLUMNS:
        column = table[name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        columns[name] = column.to_numpy(zero_copy_only=False)
    return columns
