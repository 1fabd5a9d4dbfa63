"""The images that are measured with: the user's own, or photos that are made."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_sample_images

from cnnray.images import containers
from cnnray.images.manifest import ManifestError, manifest_of


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Where images come from, and how many of them."""

    folder: Path
    """Where photos are made; on several nodes one that all of them see."""
    data: str | None = None
    """The user's own images, as jobs take them, in files of their own; None: photos are made."""
    images: int | None = None
    """Instead of each measurement's own number."""

    def manifest(self, count: int) -> pa.Table:
        """A manifest of so many images, or of `images`; of the user's own at most all, from everywhere among them.

        Raises:
            ManifestError, OSError: there are none, or they lie in Parquet or tar files, which the peers do not read.
        """
        count = self.images or count
        source = self.data or str(write(self.folder / "photos", count))
        manifest = manifest_of(source, labelled=False)
        if containers.is_inside(manifest["uri"][0].as_py()):
            raise ManifestError(f"{source} holds images in containers, and the benchmark's peers read files only.")
        return manifest.take(np.unique(np.linspace(0, len(manifest) - 1, min(count, len(manifest))).astype(np.int64)))

    @property
    def name(self) -> str:
        """What they are, in a table."""
        return "images" if self.data else "JPEG 500x375"


def write(folder: Path, count: int, classes: int = 10) -> Path:
    """Write JPEGs of 500x375 pixels and 20 to 60 KB into class folders: cuts from the two photos that scikit-learn
    brings. Those that are there are left."""
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
        left, top = (int(generator.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
        cut = photo.resize((500, 375), box=(left, top, left + width, top + height))
        cut.save(path, quality=int(generator.integers(75, 93)))
    return folder
