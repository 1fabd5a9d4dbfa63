"""The images that benchmarks use: the user's own, or generated photos."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_sample_images

from cnnray.images import containers
from cnnray.images.manifest import ManifestError, build_manifest


@dataclass(frozen=True, kw_only=True)
class Photos:
    """The source and the number of the images."""

    folder: Path
    """Folder for generated photos; with several nodes, a shared one."""
    data: str | None = None
    """The user's images, one file each, in the forms that the jobs accept; None: generate photos."""
    images: int | None = None
    """Number of images; None: each benchmark's own number."""

    def manifest(self, count: int) -> pa.Table:
        """Build a manifest of `images` images, or of `count` if that is None.

        The user's images are sampled at equal distances; if there are fewer, the manifest has all of them.

        Raises:
            ManifestError, OSError: there are no images, or they are in Parquet or tar files, which the peers cannot
            read.
        """
        count = self.images or count
        source = self.data or str(write(self.folder / "photos", count))
        manifest = build_manifest(source, labelled=False)
        if containers.is_inside(manifest["uri"][0].as_py()):
            raise ManifestError(
                f"{source} holds images in containers, but the benchmark's peers read only image files."
            )
        return manifest.take(np.unique(np.linspace(0, len(manifest) - 1, min(count, len(manifest))).astype(np.int64)))

    @property
    def name(self) -> str:
        """The name of the images in a table."""
        return "images" if self.data else "JPEG 500x375"


def write(folder: Path, count: int, classes: int = 10) -> Path:
    """Write JPEGs of 500x375 pixels and 20 to 60 KB into class folders: random crops of scikit-learn's two photos.

    Files that exist are kept.
    """
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for index in range(count):
        path = folder / f"class{index % classes}" / f"{index:06d}.jpg"
        if path.exists():
            continue
        generator = np.random.default_rng(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = photos[index % len(photos)]
        width = int(generator.integers(400, photo.width))
        height = width * 3 // 4 if width * 3 // 4 <= photo.height else photo.height
        left, top = (
            int(generator.integers(0, margin + 1)) for margin in (photo.width - width, photo.height - height)
        )
        crop = photo.resize((500, 375), box=(left, top, left + width, top + height))
        crop.save(path, quality=int(generator.integers(75, 93)))
    return folder
