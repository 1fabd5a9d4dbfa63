"""JPEG files to decoded images in a worker, against bare Pillow and `ray.data.read_images`."""

import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import ray.data
from PIL import Image

from cnnray.benchmarks.report import Comparison, write_photos
from cnnray.cluster import Resources
from cnnray.images.manifest import manifest_of
from cnnray.training.source import StreamedSource

SIZE = 224


def ingest(folder: Path, found: Resources, *, images: int = 6000, rounds: int = 5) -> list[Comparison]:
    """Measure, on a cluster of this machine's cores, each way once in every round.

    Args:
        folder: where the photos are written.
        found: the cluster.
        images: number of JPEGs of 500x375, brought to 224x224.
        rounds: how often.
    """
    manifest = manifest_of(str(write_photos(folder / "photos_to_read", images)), labelled=True)
    manifest = manifest.append_column("target", [np.zeros(len(manifest), np.int64)])
    paths = manifest["uri"].to_pylist()
    processes = max(1, int(found.cpus))
    source = StreamedSource(
        manifest=manifest,
        image_size=SIZE,
        resize="stretch",
        cpus_per_task=1.0,
        memory_bytes=found.object_store_bytes // 2,
    )

    def ours() -> int:
        rows = np.arange(len(manifest))
        sizes = [len(part) for part in np.array_split(rows, len(rows) // 32)]
        return sum(len(batch["image"]) for batch in source.batches(rows, sizes))

    def read_images() -> int:
        dataset = ray.data.read_images(paths, size=(SIZE, SIZE), mode="RGB")
        return sum(len(batch["image"]) for batch in dataset.iter_batches(batch_size=32))

    rates: dict[str, list[float]] = {"ours": [], "pillow": [], "read_images": []}
    with get_context("spawn").Pool(processes) as pool:

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
    name = "JPEG 500x375 to 224x224, delivered to a worker"
    return [
        Comparison(name, rates["ours"], f"bare Pillow in {processes} processes", rates["pillow"], 0.85),
        Comparison(name, rates["ours"], "ray.data.read_images", rates["read_images"], 2.5),
    ]


def _decode_with_pillow(path: str) -> int:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return 1 if pixels.shape == (SIZE, SIZE, 3) else 0
