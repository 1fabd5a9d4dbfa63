"""Decoding JPEG files for a training worker, against bare Pillow and `ray.data.read_images`."""

import io
import time
from multiprocessing import get_context

import numpy as np
import ray.data
from PIL import Image

from benchmarks.photos import Photos
from benchmarks.report import Comparison, plan_bare_loops
from cnnray.cluster import Resources
from cnnray.images import storage
from cnnray.training.data import StreamedSource

SIZE = 224


def measure(photos: Photos, resources: Resources, *, images: int = 4000, rounds: int = 3) -> list[Comparison]:
    """Measure each method once per round.

    Args:
        photos: the images, which are resized to 224x224.
        resources: the cluster.
        images: default number of images.
        rounds: number of rounds.
    """
    manifest = photos.manifest(images)
    manifest = manifest.append_column("target", [np.zeros(len(manifest), np.int64)])
    paths = manifest["uri"].to_pylist()
    bare = plan_bare_loops(resources)
    source = StreamedSource(
        manifest=manifest,
        image_size=SIZE,
        resize="stretch",
        cpus_per_task=1.0,
        memory_bytes=resources.object_store_bytes // 2,
    )

    def ours() -> int:
        rows = np.arange(len(manifest))
        sizes = [len(part) for part in np.array_split(rows, max(1, len(rows) // 32))]
        return sum(len(batch["image"]) for batch in source.batches(rows, sizes))

    def read_images() -> int:
        dataset = ray.data.read_images(paths, size=(SIZE, SIZE), mode="RGB")
        return sum(len(batch["image"]) for batch in dataset.iter_batches(batch_size=32))

    rates: dict[str, list[float]] = {"ours": [], "pillow": [], "read_images": []}
    with get_context("spawn").Pool(bare.processes) as pool:

        def pillow() -> int:
            return sum(pool.imap_unordered(_decode_with_pillow, paths, chunksize=64))

        methods = {"ours": ours, "pillow": pillow, "read_images": read_images}
        for method in methods.values():
            method()  # warm-up: starts processes and imports libraries
        for _ in range(rounds):
            for name, method in methods.items():
                start = time.perf_counter()
                count = method()
                rates[name].append(count / (time.perf_counter() - start))
    rates["pillow"] = [rate * bare.scale for rate in rates["pillow"]]
    name = f"{photos.name} to 224x224, delivered to a worker"
    peer = bare.label(f"bare Pillow in {bare.processes} processes")
    return [
        Comparison(name, rates["ours"], peer, rates["pillow"], 0.85),
        Comparison(name, rates["ours"], "ray.data.read_images", rates["read_images"], 2.5),
    ]


def _decode_with_pillow(uri: str) -> int:
    with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
        pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return 1 if pixels.shape == (SIZE, SIZE, 3) else 0
