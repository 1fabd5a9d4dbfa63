"""Find problems of a data set: images in two splits or under two labels, unreadable images, odd sizes, small classes.

Copies are found by a hash of their bytes. Near copies (encoded again, resized) are found by a perceptual hash
(the lowest frequencies, above or below their median), and confirmed by comparing small grey pictures of both.
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

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from cnnray.errors import CnnrayError
from cnnray.images import containers, labels, reading, storage
from cnnray.images.containers import Source
from cnnray.images.decode import BadImage, decode
from cnnray.images.geometry import Geometry
from cnnray.images.reading import load_bytes, threads_for

log = logging.getLogger(__name__)

FEW = 20
"""A class with fewer training images counts as small."""
MAX_AUTOMATIC = 50_000
"""Images up to which training and evaluation check their data by themselves."""

_IMAGES_AT_ONCE = 64
"""Images whose results one table of `examine` holds."""
_DECODED, _PICTURE_SIZE = Geometry.of(64), 16
"""What images are decoded to, and the height and width of the small grey pictures, in pixels."""
_HASHED_SIZE = 32
_COSINES = np.cos(np.pi / _HASHED_SIZE * np.outer(np.arange(8), np.arange(_HASHED_SIZE) + 0.5))
"""The eight lowest frequencies of a discrete cosine transform (type 2)."""
_MAX_BITS, _MAX_LEVELS = 4, 6.0
"""Largest differences between near copies: bits of the 64-bit hash, and the root mean square in grey levels."""
_BANDS = _MAX_BITS + 1
"""Two hashes that differ in fewer bits than there are bands have at least one band in common."""
_MAX_IN_BAND, _MAX_LINKS = 2000, 16
"""Limits for each image: others in a band that it is compared with, and near copies that are kept."""
_ODD_RATIO, _ODD_SIDE = 5.0, 4.0
"""A size is odd beyond this aspect ratio, or with a side this many times longer or shorter than the median."""
_EXAMPLES = 10

SCHEMA = pa.schema(
    [
        ("id", pa.int64()), ("error", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("digest", pa.binary(16)), ("hash", pa.uint64()), ("picture", pa.binary(_PICTURE_SIZE**2)),
    ]
)  # fmt: skip
"""The rows of `examine`; all but the id and the error are null for an image that cannot be used."""


@dataclass(frozen=True)
class Finding:
    """One kind of problem in a data set."""

    kind: str
    """The problem in a few words."""
    count: int
    """How often it occurs."""
    examples: list[str]
    """Descriptions of the first occurrences."""

    def __str__(self) -> str:
        more = f", and {self.count - 3} more" if self.count > 3 else ""
        return f"{self.kind}: {'; '.join(self.examples[:3])}{more}"


@dataclass(frozen=True)
class CheckResult:
    """The images that were checked, and the problems."""

    images: int
    unreadable: int
    copies: int
    """Images that are a copy of another one."""
    nearly: int
    """Images that are a near copy of another one, and not a copy."""
    sides: tuple[int, int, int]
    """Smallest, median and largest side of all images in pixels."""
    counts: dict[str, dict[str, int]]
    """Number of images by split ("" for none) and label."""
    findings: list[Finding]

    def warn(self) -> None:
        """Log the problems."""
        for finding in self.findings:
            log.warning("data: %s", finding)


# -- one image ------------------------------------------------------------------------------------------------


def examine(table: pa.Table, sources: Iterator[Source] | None = None) -> Iterator[pa.Table]:
    """Read images, and extract what the checks need of each, in order.

    Args:
        table: rows of a manifest.
        sources: one for each row (see `containers.encoded`); None for those of the table's uris.

    Yields:
        tables of `SCHEMA`.
    """
    if not len(table):
        return
    sources = containers.encoded(table["uri"].to_pylist()) if sources is None else sources
    ids = table["id"].to_pylist()
    with ThreadPoolExecutor(threads_for(table["uri"][0].as_py())) as pool:
        for start in range(0, len(ids), _IMAGES_AT_ONCE):
            chunk = ids[start : start + _IMAGES_AT_ONCE]
            rows = pool.map(_examine_image, itertools.islice(sources, len(chunk)))
            yield pa.Table.from_pylist([{"id": id_} | row for id_, row in zip(chunk, rows, strict=True)], SCHEMA)


def _examine_image(source: Source) -> dict[str, Any]:
    try:
        data = load_bytes(source)
        pixels = decode(data, _DECODED)
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except BadImage as error:
        return {"error": str(error)}
    except CnnrayError as error:
        return {"error": reading.unavailable(error)}
    grey = Image.fromarray(pixels).convert("L")
    return {
        "width": width,
        "height": height,
        "digest": hashlib.blake2b(data, digest_size=16).digest(),
        "hash": _perceptual_hash(grey),
        "picture": grey.resize((_PICTURE_SIZE, _PICTURE_SIZE), Image.Resampling.BOX).tobytes(),
    }


# -- all images ----------------------------------------------------------------------------------------------


def _perceptual_hash(grey: Image.Image) -> int:
    """Which of the 64 lowest frequencies of an image are above their median, as 64 bits: pHash (Zauner 2010)."""
    pixels = np.asarray(grey.resize((_HASHED_SIZE, _HASHED_SIZE), Image.Resampling.LANCZOS), np.float64)
    low = _COSINES @ pixels @ _COSINES.T
    return int(np.packbits(low > np.median(low)).view(">u8")[0])


def check(manifest: pa.Table, examined: pa.Table, *, keep_unavailable: bool = False) -> CheckResult:
    """Find out what is wrong with the images of a manifest.

    Args:
        manifest: rows with `id`, `uri`, `label` and `split`.
        examined: the rows that `examine` gave for them, in any order.
        keep_unavailable: whether images whose storage is in trouble count as unreadable.

    Raises:
        UnavailableError: storage is in trouble, and `keep_unavailable` is not set.
    """
    unavailable = examined["error"].filter(reading.is_unavailable(examined["error"]))
    if len(unavailable) and not keep_unavailable:
        raise storage.UnavailableError(f"{len(unavailable)} of {len(examined)} images are {unavailable[0]}")
    examined = examined.sort_by("id")
    assert examined["id"].equals(manifest["id"])
    uris, splits = (manifest[name].to_pylist() for name in ("uri", "split"))
    found = [labels.of_image(label) for label in manifest["label"].to_pylist()]
    errors = examined["error"].to_pylist()
    good = [row for row, error in enumerate(errors) if error is None]
    digests, hashes = examined["digest"].to_pylist(), examined["hash"].to_pylist()
    pictures = examined["picture"].to_pylist()
    copies = [group for group in _groups(good, digests) if len(group) > 1]
    firsts = np.asarray([group[0] for group in _groups(good, digests)], np.int64)
    near = _near_copies(
        firsts,
        np.asarray([hashes[row] for row in firsts], np.uint64),
        np.frombuffer(b"".join(pictures[row] for row in firsts), np.uint8).reshape(len(firsts), _PICTURE_SIZE**2),
    )

    def describe(group: list[int]) -> str:
        images = [f"{uris[row]} ({', '.join(filter(None, (splits[row], *found[row])))})" for row in group]
        return " = ".join(images[:_EXAMPLES] + (["..."] if len(images) > _EXAMPLES else []))

    findings = []

    def report(kind: str, examples: list[str], count: int | None = None) -> None:
        if examples:
            findings.append(Finding(kind, count or len(examples), examples[:_EXAMPLES]))

    for kind, groups in (("the same image", copies), ("nearly the same image", near)):
        for values, where in ((splits, "in two splits"), (found, "under two labels")):
            mixed = [group for group in groups if len({values[row] for row in group}) > 1]
            report(f"{kind} {where}", [describe(group) for group in mixed[:_EXAMPLES]], len(mixed))
    report("unreadable", [f"{uris[row]}: {error}" for row, error in enumerate(errors) if error is not None])
    widths, heights = (examined[name].to_numpy()[good].astype(np.int64) for name in ("width", "height"))
    report("an odd size", [f"{uris[good[index]]}: {size}" for index, size in _odd_sizes(widths, heights)])
    counts = _counts(found, splits)
    report(f"fewer than {FEW} {'training ' if 'train' in counts else ''}images", _small_classes(counts))
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


def _groups(rows: list[int], values: list[Any]) -> list[list[int]]:
    """Group the rows that have the same value; rows and groups stay in order."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row in rows:
        groups[values[row]].append(row)
    return list(groups.values())


def _near_copies(
    rows: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64], pictures: npt.NDArray[np.uint8]
) -> list[list[int]]:
    """Groups of rows in which each image is a near copy of at least one other.

    Args:
        rows: (n,), the rows to compare, no two of them copies.
        hashes: (n,), their perceptual hashes.
        pictures: (n, 256), their small grey pictures.
    """
    links = [np.empty((0, 2), np.int64)]
    for band in np.array_split(np.arange(64, dtype=np.uint64), _BANDS):
        mask = np.bitwise_or.reduce(np.uint64(1) << band)
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        for group in np.split(order, cuts):
            # Flat and blank images share their hashes and form large groups: limit the comparisons of each image.
            for number, row in enumerate(group[:-1]):
                others = group[number + 1 : number + 1 + _MAX_IN_BAND]
                others = others[np.bitwise_count(hashes[others] ^ hashes[row]) <= _MAX_BITS]
                if len(others):
                    difference = pictures[others].astype(np.float32) - pictures[row]
                    # A few links for each image are enough to connect a large group.
                    others = others[np.sqrt((difference**2).mean(1)) <= _MAX_LEVELS][:_MAX_LINKS]
                    links.append(np.stack([np.full(len(others), row), others], 1))
    import scipy.sparse.csgraph  # half a second

    first, second = np.concatenate(links).T
    size = max(len(rows), 1)
    graph = scipy.sparse.coo_array((np.ones(len(first), np.bool_), (first, second)), (size, size))
    _, groups_by_row = scipy.sparse.csgraph.connected_components(graph, directed=False)
    groups = _groups(list(range(size)), groups_by_row.tolist())
    return [rows[group].tolist() for group in groups if len(group) > 1]


def _odd_sizes(widths: npt.NDArray[np.int64], heights: npt.NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """Index and description of the images whose size is far from the median."""
    if not len(widths):
        return
    longer, shorter = np.maximum(widths, heights), np.minimum(widths, heights)
    middle = float(np.median(np.concatenate([widths, heights])))
    for index in np.flatnonzero(
        (longer > _ODD_RATIO * shorter) | (longer > _ODD_SIDE * middle) | (shorter * _ODD_SIDE < middle)
    ).tolist():
        yield index, f"{widths[index]}x{heights[index]}, where most sides have {middle:.0f} pixels"


def _counts(found: list[tuple[str, ...]], splits: list[str | None]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for of_image, split in zip(found, splits, strict=True):
        counts[split or ""].update(of_image or ("",))
    return {split: dict(sorted(by_label.items())) for split, by_label in sorted(counts.items())}


def _small_classes(counts: dict[str, dict[str, int]]) -> list[str]:
    """The small classes among the training images, or among all images if they have no splits."""
    counted = counts.get("train") or counts.get("", {})
    names = sorted({label for by_label in counts.values() for label in by_label if label})
    return [f"{name} ({counted.get(name, 0)})" for name in names if counted and counted.get(name, 0) < FEW]
