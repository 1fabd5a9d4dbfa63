"""JPEG files to decoded images in a worker, against bare Pillow and `ray.data.read_images`."""

import io
import time
from multiprocessing import get_context

import numpy as np
import ray.data
from PIL import Image

from benchmarks.photos import Photos
from benchmarks.report import Comparison, bare_loops
from cnnray.cluster import Resources
from cnnray.images import storage
from cnnray.training.data import StreamedSource

SIZE = 224


def ingest(photos: Photos, found: Resources, *, images: int = 4000, rounds: int = 3) -> list[Comparison]:
    """Measure each way once in every round.

    Args:
        photos: the images, which are brought to 224x224.
        found: the cluster.
        images: how many, where `photos` does not say.
        rounds: how often.
    """
    manifest = photos.manifest(images)
    manifest = manifest.append_column("target", [np.zeros(len(manifest), np.int64)])
    paths = manifest["uri"].to_pylist()
    limit = bare_loops(found)
    source = StreamedSource(
        manifest=manifest,
        image_size=SIZE,
        resize="stretch",
        cpus_per_task=1.0,
        memory_bytes=found.object_store_bytes // 2,
    )

    def ours() -> int:
        rows = np.arange(len(manifest))
        sizes = [len(part) for part in np.array_split(rows, max(1, len(rows) // 32))]
        return sum(len(batch["image"]) for batch in source.batches(rows, sizes))

    def read_images() -> int:
        dataset = ray.data.read_images(paths, size=(SIZE, SIZE), mode="RGB")
        return sum(len(batch["image"]) for batch in dataset.iter_batches(batch_size=32))

    rates: dict[str, list[float]] = {"ours": [], "pillow": [], "read_images": []}
    with get_context("spawn").Pool(limit.processes) as pool:

        def pillow() -> int:
            return sum(pool.imap_unordered(_decode_with_pillow, paths, chunksize=64))

        ways = {"ours": ours, "pillow": pillow, "read_images": read_images}
        for way in ways.values():
            way()  # processes are started and libraries loaded
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                count = way()
                rates[name].append(count / (time.perf_counter() - start))
    rates["pillow"] = [rate * limit.times for rate in rates["pillow"]]
    name = f"{photos.name} to 224x224, delivered to a worker"
    peer = limit.named(f"bare Pillow in {limit.processes} processes")
    return [
        Comparison(name, rates["ours"], peer, rates["pillow"], 0.85),
        Comparison(name, rates["ours"], "ray.data.read_images", rates["read_images"], 2.5),
    ]


def _decode_with_pillow(uri: str) -> int:
    with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
        pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return 1 if pixels.shape == (SIZE, SIZE, 3) else 0
