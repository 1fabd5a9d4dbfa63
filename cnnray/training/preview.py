"""The job of --preview-augmentations: a picture of training images beside augmented versions of them."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cnnray.images import labels, reading, storage
from cnnray.images import manifest as manifests
from cnnray.images.manifest import ManifestError
from cnnray.models import startup
from cnnray.training import data, decisions
from cnnray.training.config import TrainConfig
from cnnray.training.decided import DecidedConfig

PREVIEW = "augmentations.png"
_VERSIONS = 7
_LABEL_HEIGHT, _MARGIN = 14, 4


def preview(config: TrainConfig) -> dict[str, Any]:
    """Write the picture into the output: a row for each image, the original first, then augmented versions of it.

    Augmentations that mix images mix those of the picture.

    Returns:
        `preview` (the uri of the picture) and `images` (its rows).

    Raises:
        ManifestError, OSError: with a sentence for the user.
    """
    manifest = data.build_run_manifest(config)
    config = decisions.for_images(config, manifest)
    rows = manifests.select_split(manifest, "train")
    chosen = np.random.default_rng(config.seed).permutation(len(rows))[: config.preview_augmentations]
    rows = rows.take(np.sort(chosen))
    batch = next(reading.decoded_blocks(rows, config.geometry.uncut, len(rows)))
    good = batch["error"] == ""
    if not good.any():
        raise ManifestError(f"None of the {len(rows)} images of the preview can be read: {batch['error'][0]}.")
    shown = [", ".join(labels.of_image(label)) for label in rows["label"].to_pylist()]
    images, names = batch["image"][good], [shown[index] for index in np.flatnonzero(good)]
    startup.load_tensorflow(gpus=False)
    sheet = _sheet(config.geometry.centre(images), names, _versions(config, images))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    uri = storage.join(config.output, PREVIEW)
    storage.write_bytes(uri, buffer.getvalue())
    return {"preview": uri, "images": len(images)}


def _versions(config: DecidedConfig, images: Any) -> list[Any]:
    """Augmented versions of all images: `_VERSIONS` arrays like `images`."""
    import keras

    from cnnray.models import augment

    augmenter = augment.Augmenter(augment.resolve(config.augment, config.augmentations), config.geometry)
    versions = []
    for version in range(_VERSIONS):
        seeds = np.random.SeedSequence([config.seed, version]).generate_state(2 * len(augmenter.seeds)).reshape(-1, 2)
        for state, seed in zip(augmenter.seeds, seeds >> 1, strict=True):
            state.assign(seed)
        changed, _ = augmenter(images, np.zeros((len(images), 1), np.float32))
        versions.append(keras.ops.convert_to_numpy(changed))
    return versions


def _sheet(images: Any, names: list[str], versions: list[Any]) -> Image.Image:
    height, width = images.shape[1:3]
    factor = max(1, 96 / max(height, width))  # enlarge small images
    height, width = round(height * factor), round(width * factor)
    step = width + _MARGIN
    row_height = height + _MARGIN + _LABEL_HEIGHT
    sheet = Image.new("RGB", (step * (1 + len(versions)) + _MARGIN, row_height * len(images)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (image, name) in enumerate(zip(images, names, strict=True)):
        top = row * row_height
        draw.text((0, top), name, fill="black")
        for column, pixels in enumerate([image, *(version[row] for version in versions)]):
            place = (column * step + (_MARGIN if column else 0), top + _LABEL_HEIGHT)
            sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), place)
    return sheet
