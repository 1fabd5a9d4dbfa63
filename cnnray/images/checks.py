"""What is wrong with a data set: images in two splits or under two labels, unreadable ones, odd sizes, small classes.

Copies are found by a hash of their bytes. Nearly equal images (encoded anew, resized) are found by a perceptual hash
(`imagehash.phash`: the signs of the lowest frequencies), and are held to be equal where small pictures of both are.
"""

import hashlib
import io
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import imagehash
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse.csgraph
from PIL import Image

from cnnray.images import containers
from cnnray.images.containers import Source
from cnnray.images.decode import BadImage, decode
from cnnray.images.reading import load_bytes, threads_for

log = logging.getLogger(__name__)

FEW = 20
"""A class with fewer training images is called small."""
MOST_IN_PASSING = 50_000
"""Images up to which training and evaluation check their data without being asked."""

_AT_ONCE = 64
_LOOKED_AT, _PICTURE = 64, 16
"""Height and width in pixels that images are decoded to, and of the small grey pictures."""
_MOST_BITS, _MOST_LEVELS = 4, 6.0
"""Largest differences of nearly equal images: bits of the hash, of 64, and root mean square of grey levels."""
_BANDS = _MOST_BITS + 1
"""Of hashes that differ in fewer bits than there are bands, one band at least is the same."""
_MOST_IN_BAND, _MOST_LINKS = 2000, 16
_ODD_RATIO, _ODD_SIDE = 5.0, 4.0
_EXAMPLES = 10

SCHEMA = pa.schema(
    [
        ("id", pa.int64()), ("error", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("digest", pa.binary(16)), ("hash", pa.uint64()), ("picture", pa.binary(_PICTURE**2)),
    ]
)  # fmt: skip
"""What `examine` tells of each image; all but the id and the error are null where it cannot be used."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """In a few words."""
    count: int
    """How often it was found."""
    examples: list[str]
    """The first of them, each in words."""

    def __str__(self) -> str:
        more = f", and {self.count - 3} more" if self.count > 3 else ""
        return f"{self.kind}: {'; '.join(self.examples[:3])}{more}"


@dataclass(frozen=True)
class CheckResult:
    """What was looked at, and what was found."""

    images: int
    unreadable: int
    copies: int
    """Images that are a copy of another one."""
    nearly: int
    """Images that are nearly equal to another one, and no copies."""
    sides: tuple[int, int, int]
    """Smallest, median and largest side of all images in pixels."""
    counts: dict[str, dict[str, int]]
    """Images by split ("" where they have none) and label."""
    findings: list[Finding]

    def warn(self) -> None:
        """Log what was found."""
        for finding in self.findings:
            log.warning("data: %s", finding)


# -- one image ------------------------------------------------------------------------------------------------


def examine(table: pa.Table) -> Iterator[pa.Table]:
    """Read images and tell what the checks need of each, in order.

    Args:
        table: rows of a manifest.

    Yields:
        tables of `SCHEMA`.
    """
    if not len(table):
        return
    sources = containers.encoded(table["uri"].to_pylist())
    ids = table["id"].to_pylist()
    with ThreadPoolExecutor(threads_for(table["uri"][0].as_py())) as pool:
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            rows = pool.map(_examine_image, itertools.islice(sources, len(some)))
            yield pa.Table.from_pylist([{"id": one} | row for one, row in zip(some, rows, strict=True)], SCHEMA)


def _examine_image(source: Source) -> dict[str, Any]:
    try:
        data = load_bytes(source)
        pixels = decode(data, _LOOKED_AT)
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except BadImage as error:
        return {"error": str(error)}
    grey = Image.fromarray(pixels).convert("L")
    bits = np.packbits(imagehash.phash(grey).hash)
    return {
        "width": width,
        "height": height,
        "digest": hashlib.blake2b(data, digest_size=16).digest(),
        "hash": int(bits.view(">u8")[0]),
        "picture": grey.resize((_PICTURE, _PICTURE), Image.Resampling.BOX).tobytes(),
    }


# -- all of them ----------------------------------------------------------------------------------------------


def check(manifest: pa.Table, told: pa.Table) -> CheckResult:
    """What is wrong with the images of a manifest.

    Args:
        manifest: rows with `id`, `uri`, `label` and `split`.
        told: what `examine` told of them, in any order.
    """
    told = told.sort_by("id")
    assert told["id"].equals(manifest["id"])
    uris, labels, splits = (manifest[name].to_pylist() for name in ("uri", "label", "split"))
    errors = told["error"].to_pylist()
    good = [place for place, error in enumerate(errors) if error is None]
    digests, hashes = told["digest"].to_pylist(), told["hash"].to_pylist()
    pictures = told["picture"].to_pylist()
    copies = [group for group in _groups(good, digests) if len(group) > 1]
    firsts = np.asarray([group[0] for group in _groups(good, digests)], np.int64)
    near = _near(
        firsts,
        np.asarray([hashes[place] for place in firsts], np.uint64),
        np.frombuffer(b"".join(pictures[place] for place in firsts), np.uint8).reshape(len(firsts), _PICTURE**2),
    )

    def words(group: list[int]) -> str:
        shown = [f"{uris[place]} ({', '.join(filter(None, (splits[place], labels[place])))})" for place in group]
        return " = ".join(shown[:_EXAMPLES] + (["..."] if len(shown) > _EXAMPLES else []))

    findings = []

    def find(kind: str, found: list[str], count: int | None = None) -> None:
        if found:
            findings.append(Finding(kind, count or len(found), found[:_EXAMPLES]))

    for kind, groups in (("the same image", copies), ("nearly the same image", near)):
        for values, where in ((splits, "in two splits"), (labels, "under two labels")):
            mixed = [group for group in groups if len({values[one] for one in group}) > 1]
            find(f"{kind} {where}", [words(group) for group in mixed[:_EXAMPLES]], len(mixed))
    find("unreadable", [f"{uris[place]}: {error}" for place, error in enumerate(errors) if error is not None])
    widths, heights = (told[name].to_numpy()[good].astype(np.int64) for name in ("width", "height"))
    find("an odd size", [f"{uris[good[place]]}: {why}" for place, why in _odd(widths, heights)])
    counts = _counts(labels, splits)
    find(f"fewer than {FEW} {'training ' if 'train' in counts else ''}images", _small_classes(counts))
    sides = np.concatenate([widths, heights]) if good else np.zeros(1, np.int64)
    return CheckResult(
        images=len(manifest),
        unreadable=len(errors) - len(good),
        copies=sum(len(group) - 1 for group in copies),
        nearly=sum(len(group) - 1 for group in near),
        sides=(int(sides.min()), int(np.median(sides)), int(sides.max())),
        counts=counts,
        findings=findings,
    )


def _groups(places: list[int], values: list[Any]) -> list[list[int]]:
    """Places that have the same value, in order."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place in places:
        groups[values[place]].append(place)
    return list(groups.values())


def _near(
    places: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64], pictures: npt.NDArray[np.uint8]
) -> list[list[int]]:
    """Groups of places whose images are nearly equal, each to another one of its group."""
    links = [np.empty((0, 2), np.int64)]
    for band in np.array_split(np.arange(64, dtype=np.uint64), _BANDS):
        mask = np.bitwise_or.reduce(np.uint64(1) << band)
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        for group in np.split(order, cuts):
            # Flat and blank images share their hashes: of so many each is held against the next ones only.
            for number, one in enumerate(group[:-1]):
                others = group[number + 1 : number + 1 + _MOST_IN_BAND]
                others = others[np.bitwise_count(hashes[others] ^ hashes[one]) <= _MOST_BITS]
                if len(others):
                    apart = pictures[others].astype(np.float32) - pictures[one]
                    # A few links of each tie a group of very many together.
                    others = others[np.sqrt((apart**2).mean(1)) <= _MOST_LEVELS][:_MOST_LINKS]
                    links.append(np.stack([np.full(len(others), one), others], 1))
    one, other = np.concatenate(links).T
    size = max(len(places), 1)
    graph = scipy.sparse.coo_array((np.ones(len(one), np.bool_), (one, other)), (size, size))
    _, groups_by_row = scipy.sparse.csgraph.connected_components(graph, directed=False)
    groups = _groups(list(range(size)), groups_by_row.tolist())
    return [places[group].tolist() for group in groups if len(group) > 1]


def _odd(widths: npt.NDArray[np.int64], heights: npt.NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Images whose size is far from that of most."""
    if not len(widths):
        return
    longer, shorter = np.maximum(widths, heights), np.minimum(widths, heights)
    middle = float(np.median(np.concatenate([widths, heights])))
    for place in np.flatnonzero(
        (longer > _ODD_RATIO * shorter) | (longer > _ODD_SIDE * middle) | (shorter * _ODD_SIDE < middle)
    ).tolist():
        yield place, f"{widths[place]}x{heights[place]}, where most sides have {middle:.0f} pixels"


def _counts(labels: list[str | None], splits: list[str | None]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for label, split in zip(labels, splits, strict=True):
        counts[split or ""][label or ""] += 1
    return {split: dict(sorted(some.items())) for split, some in sorted(counts.items())}


def _small_classes(counts: dict[str, dict[str, int]]) -> list[str]:
    """Of the training images, or where nothing is said of splits of all."""
    counted = counts.get("train") or counts.get("", {})
    names = sorted({label for some in counts.values() for label in some if label})
    return [f"{name} ({counted.get(name, 0)})" for name in names if counted and counted.get(name, 0) < FEW]
