"""The rows of a run's manifest on a worker: files that are mapped into memory, of which a machine has one copy.

They are Arrow's, in a temporary folder. A process holds a shared lock of the folder as long as it uses it, and, as
long as it writes the files, an exclusive lock of another file. A folder that nobody uses is deleted by who used it
last, or, if that process was killed, by the next one that comes.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnnray.cpus import usable_cpus
from cnnray.images import ahead, containers, labels, parquet, storage
from cnnray.images.labels import LabelSets
from cnnray.images.retries import patient
from cnnray.training import epoch
from cnnray.training.epoch import Ints

SPLITS = ("train", "validation")
_ROOT = f"cnnray-rows-{os.getuid()}"
_LOCK, _WRITING, _FACTS, _KEYS = "lock", "writing", "facts.json", "label_sets"
_COLUMNS = pa.schema([("id", pa.int64()), ("target", pa.int64()), ("uri", pa.string())])
_BATCH = 2**11
"""Rows of a record batch: to take one of them reads the batch."""
_MANY = 2**23
"""Manifests of so many rows or more are compressed, because the disk would take longer to write them as they are."""


class Rows:
    """The rows of a split: `id` and `target`, int64, and `uri`.

    Attributes:
        tally: `epoch.tally` of all ids.
        label_sets: of which targets are the numbers; None: targets are classes.
    """

    def __init__(
        self, file: Path, tally: Sequence[int], batches: Sequence[int], label_sets: LabelSets | None = None
    ) -> None:
        """
        Args:
            file: that `open_rows` wrote.
            tally: see `tally`.
            batches: number of rows in each batch of the file.
            label_sets: where images may have several labels.
        """
        self.label_sets = label_sets
        self.tally = np.asarray(tally, np.int64)
        self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self._starts = np.cumsum([0, *batches])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> Any:
        """A column of all rows, as an array."""
        parts = [self._reader.get_batch(number)[name].to_numpy() for number in range(len(self._starts) - 1)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @functools.cached_property
    def groups(self) -> Ints:
        """The rows at which a group of `containers.group_runs` begins, and the number of rows, int64 (groups + 1,).

        An image in a file of its own is a group.
        """
        runs = containers.group_runs(self._reader.get_batch(number)["uri"] for number in range(len(self._starts) - 1))
        lengths = [np.ones(length, np.int64) if group is None else [length] for group, length in runs]
        return np.cumsum(np.concatenate([[0], *lengths])).astype(np.int64)

    @property
    def example(self) -> str:
        """The uri of an image."""
        uri: str = self._reader.get_batch(0)["uri"][0].as_py()
        return uri

    def take(self, rows: Ints) -> pa.Table:
        """The rows with these numbers, in their order."""
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[batches]
        pairs = zip(batches.tolist(), places.tolist(), strict=True)
        parts = [self._reader.get_batch(batch).slice(place, 1) for batch, place in pairs]
        return pa.Table.from_batches(parts, _COLUMNS).combine_chunks()


@contextlib.contextmanager
def open_rows(manifest: str, class_names: Sequence[str], run: str) -> Iterator[dict[str, Rows]]:
    """The rows of each split of a manifest. The first process of a machine writes them, and others wait for it.

    Args:
        manifest: uri of the run's manifest.
        class_names: `target` is the index of a row's label in these, or, with several labels, that of its label set
            among all of the manifest (see `labels.distinct_keys`).
        run: names this start of the job, after which the manifest may be another one.

    Raises:
        ManifestError, OSError: the manifest cannot be read, or the temporary folder has too little room.
    """
    root = Path(tempfile.gettempdir(), _ROOT)
    folder = root / hashlib.sha256(f"{manifest} {run}".encode()).hexdigest()[:32]
    root.mkdir(mode=0o700, exist_ok=True)
    for other in set(root.iterdir()) - {folder}:
        _delete_unused(other)
    try:
        with _used(folder):
            with storage.translated_errors(str(folder)), (folder / _WRITING).open("w") as writing:
                fcntl.flock(writing, fcntl.LOCK_EX)
                if not (folder / _FACTS).exists():
                    _write(manifest, class_names, folder)
            facts = json.loads((folder / _FACTS).read_bytes())
            sets = LabelSets(_read_keys(folder), class_names) if (folder / _KEYS).exists() else None
            yield {split: Rows(folder / split, **facts[split], label_sets=sets) for split in SPLITS}
    finally:
        _delete_unused(folder)


def _used(folder: Path) -> IO[str]:
    """Make a folder, and keep it from being deleted until what is returned is closed."""
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:  # deleted meanwhile
            lock = opened.enter_context((folder / _LOCK).open("w"))
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_of(folder, lock):
                opened.pop_all()
                return lock


def _delete_unused(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_of(folder, lock):
            # Out of the way first: another process may make the folder anew, and finds nothing of this one.
            shutil.rmtree(folder.rename(folder.with_name(f"unused-{uuid.uuid4().hex}")))


def _is_of(folder: Path, lock: IO[str]) -> bool:
    """Whether the folder is the one whose lock was opened, and not one that was made since by the same name."""
    return os.path.samestat(os.fstat(lock.fileno()), (folder / _LOCK).stat())


@patient
def _write(manifest: str, class_names: Sequence[str], folder: Path) -> None:
    """Write the rows of each split, and then the facts of their files."""
    names = pa.array(class_names, pa.string())
    with parquet.open_file(manifest) as opened:
        groups, many = opened.num_row_groups, opened.metadata.num_rows >= _MANY
        several = pa.types.is_list(opened.schema_arrow.field("label").type)
    if several:
        names = _write_keys(manifest, groups, folder)
    few = ["split"] if several else ["label", "split"]
    options = pa.ipc.IpcWriteOptions(compression="lz4" if many else None)
    facts: dict[str, Any] = {split: {"tally": epoch.tally(np.empty(0, np.int64)), "batches": []} for split in SPLITS}
    with contextlib.ExitStack() as files:
        writers = {
            split: files.enter_context(pa.ipc.new_file(folder / split, _COLUMNS, options=options)) for split in SPLITS
        }
        for parts in ahead.mapped(lambda group: _read(manifest, group, names, few), range(groups), usable_cpus()):
            for split, part in parts.items():
                batches = part.combine_chunks().to_batches(_BATCH)
                for batch in batches:
                    writers[split].write_batch(batch)
                facts[split]["tally"] += epoch.tally(part["id"].to_numpy())
                facts[split]["batches"] += map(len, batches)
    for values in facts.values():
        values["tally"] = values["tally"].tolist()
    written = folder / f"{_FACTS}.new"
    written.write_text(json.dumps(facts))
    written.rename(folder / _FACTS)  # whole or not there, also after a kill


def _write_keys(manifest: str, groups: int, folder: Path) -> pa.Array:
    """Write the keys of all label sets of a manifest, and give them."""
    distinct: set[str] = set()
    with parquet.open_file(manifest) as opened:
        for group in range(groups):
            column = opened.read_row_group(group, ["label"])["label"]
            distinct.update(labels.distinct_keys(column).to_pylist())
    table = pa.table({"key": pa.array(sorted(distinct), pa.string())})
    with pa.ipc.new_file(folder / _KEYS, table.schema) as writer:
        writer.write_table(table)
    return table["key"].combine_chunks()


def _read_keys(folder: Path) -> pa.Array:
    with pa.ipc.open_file(folder / _KEYS) as reader:
        return reader.read_all()["key"].combine_chunks()


def _read(manifest: str, group: int, names: pa.Array, few: list[str]) -> dict[str, pa.Table]:
    """The rows of a row group of the manifest, by split. Columns of few values are read as they are: as numbers."""
    with parquet.open_file(manifest, read_dictionary=few) as opened:
        table = opened.read_row_group(group, ["id", "uri", "label", "split"], use_threads=False)
    if labels.are_several(table["label"]):
        targets = pc.index_in(labels.keys(table["label"]), names).cast(pa.int64())
    else:
        column = table["label"].combine_chunks()
        targets = pc.index_in(column.dictionary, names).cast(pa.int64()).take(column.indices)
    rows = pa.table([table["id"], targets, table["uri"]], schema=_COLUMNS)
    return {split: rows.filter(pc.equal(table["split"], split)) for split in SPLITS}
