"""Decoding JPEGs for a training worker, from files and from containers.

Against `read_images` and bare loops of the same decoder and of Pillow.
"""

import functools
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from benchmarks import pixels
from benchmarks.photos import Photos
from benchmarks.report import Comparison, plan_bare_loops
from cnnray.cluster import Resources
from cnnray.images import containers, decode, storage
from cnnray.images.decoders import Decoders
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import build_manifest
from cnnray.training import epoch
from cnnray.training.data import StreamedSource

SIZE = 224
_GROUP = 250
"""Images of a row group."""
_BATCH = 32
_STEPS, _SECONDS = (0.005, 0.02, 0.1), 4.0
"""Seconds of steps that only sleep, in place of a GPU's; and of all steps of a measurement."""


def measure(photos: Photos, resources: Resources, *, images: int = 4000, rounds: int = 3) -> list[Comparison]:
    """Measure each method once per round.

    Args:
        photos: the images, which are resized to 224x224.
        resources: the cluster.
        images: default number of images.
        rounds: number of rounds.
    """
    manifest = photos.manifest(images)
    paths = manifest["uri"].to_pylist()
    bare = plan_bare_loops(resources)
    decoders = Decoders(bare.processes, Geometry.of(SIZE), largest_batch=_BATCH)
    source = StreamedSource(_with_targets(manifest), decoders)

    def ours(step: float = 0.0) -> int:
        """Decode for steps that take so many seconds, at most `_SECONDS` in all."""
        steps = len(manifest) // _BATCH if not step else min(len(manifest) // _BATCH, round(_SECONDS / step))
        count = 0
        for batch in source.batches(lambda number: np.arange(number * _BATCH, (number + 1) * _BATCH), steps):
            time.sleep(step)
            count += len(batch["image"])
        return count

    def in_container(table: pa.Table) -> int:
        """Decode images of a container, those of Parquet in the order of its lanes."""
        of_run = (0, 0, len(table), _BATCH)
        ordered, lanes = epoch.Epoch(*of_run), None
        starts = np.cumsum([0, *(length for _, length in containers.group_runs(table["uri"].chunks))])
        if len(starts) > 2:
            of_lane = containers.bytes_of_lane(table["uri"][0].as_py())
            number = epoch.number_of_lanes(len(starts) - 1, 1, bare.processes, of_lane)
            ordered = epoch.LanesEpoch(*of_run, lanes=number, starts=starts)
            lanes = functools.partial(ordered.lanes_of, rank=0, world=1)
        batches = StreamedSource(_with_targets(table), decoders).batches(ordered.rows, ordered.steps, lanes)
        return sum(len(batch["image"]) for batch in batches)

    def read_images() -> int:
        dataset = ray.data.read_images(paths, size=(SIZE, SIZE), mode="RGB")
        return sum(len(batch["image"]) for batch in dataset.iter_batches(batch_size=_BATCH))

    with get_context("spawn").Pool(bare.processes) as pool:

        def in_processes(decoder: Callable[[bytes], npt.NDArray[np.uint8]]) -> int:
            return sum(pool.imap_unordered(functools.partial(_decode, decoder), paths, chunksize=64))

        methods: dict[str, Callable[[], int]] = {
            "ours": ours,
            "the same decoder": functools.partial(
                in_processes, functools.partial(decode.decode, geometry=Geometry.of(SIZE))
            ),
            "Pillow": functools.partial(in_processes, functools.partial(pixels.with_pillow, size=SIZE)),
            "read_images": read_images,
            **{f"step {seconds}": functools.partial(ours, seconds) for seconds in _STEPS},
        }
        written = _in_containers(paths, photos.folder) if storage.is_local(paths[0]) else {}
        methods |= {name: functools.partial(in_container, table) for name, table in written.items()}
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for method in methods.values():
            method()  # warm-up: starts processes and imports libraries
        for _ in range(rounds):
            for name, method in methods.items():
                start = time.perf_counter()
                count = method()
                rates[name].append(count / (time.perf_counter() - start))
    name = f"{photos.name} to 224x224, delivered to a worker"
    comparisons = [Comparison(name, rates["ours"], "ray.data.read_images", rates["read_images"], 2.9)]
    for peer, target in (("the same decoder", 0.92), ("Pillow", 1.4)):
        label = bare.label(f"{peer}, bare, in {bare.processes} processes")
        comparisons.append(
            Comparison(name, rates["ours"], label, [rate * bare.scale for rate in rates[peer]], target)
        )
    for container in written:
        label = f"the same, from {container}"
        comparisons.append(Comparison(label, rates[container], "from files", rates["ours"], 0.9))
    for seconds in _STEPS:
        allowed = [min(rate * bare.scale, _BATCH / seconds) for rate in rates["the same decoder"]]
        label = f"the same, to steps of {1000 * seconds:g} ms"
        peer = "what the steps, or the same decoder, bare, allow"
        comparisons.append(Comparison(label, rates[f"step {seconds}"], peer, allowed, 0.95))
    return comparisons


def _with_targets(manifest: pa.Table) -> pa.Table:
    return manifest.append_column("target", [np.zeros(len(manifest), np.int64)])


def _in_containers(paths: list[str], folder: Path) -> dict[str, pa.Table]:
    """Manifests of the same images in row groups of a Parquet file, and in a tar shard."""
    parquet, tar = folder / "images.parquet", folder / "images.tar"
    with pq.ParquetWriter(parquet, pa.schema({"image": pa.binary()})) as writer:
        for start in range(0, len(paths), _GROUP):
            writer.write_table(
                pa.table({"image": [Path(path).read_bytes() for path in paths[start : start + _GROUP]]})
            )
    with tarfile.open(tar, "w") as archive:
        for number, path in enumerate(paths):
            archive.add(path, f"{number:08d}{Path(path).suffix}")
    return {
        "Parquet": build_manifest(str(parquet), labelled=False), "tar": build_manifest(str(tar), labelled=False)
    }  # fmt: skip


def _decode(decoder: Callable[[bytes], npt.NDArray[np.uint8]], uri: str) -> int:
    """1, for one image."""
    return len(decoder(storage.read_bytes(uri))[None])
