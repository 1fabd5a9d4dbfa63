"""More than 300 damaged images and files that are not images, and malformed JSON for every route.

Each has a name that says what was done to it.
"""

import copy
import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from tests.awkward import awkward_images, bad_images

_CUTS = 12
_HEADS = (
    b"\0", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"II*\0",
    b"BM", b"P6\n4 4\n255\n", b"<?xml version='1.0'?><svg/>", b"{}", b"\xef\xbb\xbf", b"PK\x03\x04", b"%PDF-1.7",
    b"\0" * 5000,
)  # fmt: skip


_NOT_JSON = {
    "nothing": b"", "half an object": b"{", "text behind it": b"{} x", "a comma too many": b'{"image": "",}',
    "single quotes": b"{'image': ''}", "a comment": b"{} // x", "Latin-1": '{"image": "\xe9"}'.encode("latin-1"),
    "UTF-16": "{}".encode("utf-16"), "a BOM": b"\xef\xbb\xbf{}", "zeros": bytes(100),
    "100,000 keys, two alike": b'{"99999":0,' + json.dumps({str(key): 0 for key in range(100_000)}).encode()[1:],
    "100,000 open lists": b"[" * 100_000, "100,000 open objects": b'{"image":' * 100_000,
}  # fmt: skip
_WRONG_VALUES = {
    "null": "null", "true": "true", "a fraction": "0.5", "a negative number": "-1", "2 to the 64": str(2**64),
    "5,000 digits": "9" * 5000, "an overflow": "1e999", "NaN": "NaN", "Infinity": "-Infinity", "a string": '"x"',
    "half a surrogate pair": '"\\ud800"', "no list elements": "[]", "no keys": "{}", "a list of null": "[null]",
    "an object": '{"x": {"b64": 1}}', "70 lists": "[" * 70 + "]" * 70, "5,000 lists": "[" * 5000 + "]" * 5000,
    "600 objects": '{"b64":' * 600 + "1" + "}" * 600, "5,000 objects": '{"b64":' * 5000 + "1" + "}" * 5000,
}  # fmt: skip
_MARK = "@@"


def malformed_json(valid: dict[str, Any]) -> dict[str, bytes]:
    """Request bodies, by name, made from a valid one: no JSON, another value at each level, keys that repeat."""
    bodies = dict(_NOT_JSON)
    for path, value in _levels(valid):
        where = ".".join(map(str, path)) or "the top"
        for name, text in _WRONG_VALUES.items():
            bodies[f"{name} at {where}"] = _with_text(valid, path, text)
        if isinstance(value, dict):
            text = json.dumps(value)
            bodies[f"half a surrogate pair as a key at {where}"] = _with_text(
                valid, path, '{"\\ud800": 1, ' + text[1:]
            )
            for key in value:
                twice = f'{{"{key}": null, {text[1:]}'
                bodies[f"{key} twice at {where}"] = _with_text(valid, path, twice)
    return bodies


def _levels(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each value inside a value of JSON, and its path; of lists the first element only."""
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        yield from _levels(child, (*path, key))


def _with_text(value: Any, path: tuple[Any, ...], text: str) -> bytes:
    """JSON of a value in which the text stands at a path."""
    root = [copy.deepcopy(value)]
    *parents, last = (0, *path)
    functools.reduce(lambda place, key: place[key], parents, root)[last] = _MARK
    return json.dumps(root[0]).replace(f'"{_MARK}"', text).encode()


def malformed_files() -> dict[str, bytes]:
    """Encoded files by name; most cannot be decoded, some still can."""
    files = {f"bad_{name}": data for name, (data, _) in bad_images().items() if name != "large.png"}
    whole = _whole()
    for name, data in whole.items():
        files |= {f"cut_{place:05d}_{name}": data[:place] for place in _places(name, data)}
        for seed in range(8):
            files[f"flipped_{seed}_{name}"] = _flipped(data, seed)
        files[f"doubled_{name}"] = data + data
        files[f"with_html_behind_{name}"] = data + b"<html></html>"
        files[f"with_nothing_inside_{name}"] = data[:20] + bytes(len(data) - 20)
        # A file name extension of another format.
        other = "photo.jpg" if not name.endswith("jpg") else "photo.png"
        files[f"named_{name.replace('.', '_')}_{other}"] = data
    for kind, size in (("png", 16), ("gif", 6), ("bmp", 18)):
        for number, (width, height) in enumerate([(65535, 65535), (0, 0), (65535, 1), (0, 7)]):
            files[f"huge_{number}_in_header.{kind}"] = _sized(whole[f"rgb.{kind}"], kind, size, width, height)
    for number, text in enumerate(_HEADS):
        files[f"only_{number}.jpg"] = text
    files["bomb_of_zeros.png"] = _bomb()
    assert len(files) > 300, len(files)
    return files


def fuzzed(seed: int) -> bytes:
    """An image with a few changes: other bytes, or parts cut out, doubled or taken from another image."""
    generator, whole = random.Random(seed), list(_whole().values())
    data = generator.choice(whole)
    for _ in range(generator.randint(1, 4)):
        start, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
        other = generator.choice(whole)
        data = generator.choice(
            [
                _flipped(data, seed) if data else b"",
                data[:end],
                data[:start] + data[end:],
                data[:end] + data[start:],
                data[:start] + other[start:],
                data[:start] + generator.randbytes(min(end - start, 100)) + data[end:],
            ]
        )
    return data


@functools.cache
def _whole() -> dict[str, bytes]:
    colour = Image.fromarray((np.random.default_rng(0).random((40, 60, 3)) * 255).astype(np.uint8))
    awkward = awkward_images()
    whole = {name: awkward[name] for name in ("progressive.jpg", "cmyk.jpg", "alpha.png", "animated.webp")}
    for kind in ("jpg", "png", "gif", "bmp", "webp", "tif", "ppm", "avif", "heic"):
        buffer = io.BytesIO()
        colour.save(buffer, {"jpg": "JPEG", "tif": "TIFF", "heic": "HEIF"}.get(kind, kind.upper()))
        whole[f"rgb.{kind}"] = buffer.getvalue()
    return whole


def _places(name: str, data: bytes) -> list[int]:
    """Where to truncate a file: at the borders of its parts, just behind them, and at even distances."""
    borders = set()
    if name.endswith("jpg"):
        borders = {
            place for place in range(len(data) - 1) if data[place] == 0xFF and data[place + 1] not in (0, 0xFF)
        }
    if name.endswith("png"):
        place = 8
        while place < len(data):
            borders |= {place, place + 4, place + 8}
            place += 12 + struct.unpack(">I", data[place : place + 4])[0]
    if name.endswith("heic"):
        borders = {place - 4 for kind in (b"meta", b"iinf", b"iloc", b"iprp", b"ipco", b"hvcC", b"ipma", b"mdat")
                   for place in [data.find(kind)] if place > 0}  # fmt: skip
    if name.endswith("webp"):
        borders = {4, 8, 12, 16, 20, 30}
    even = {len(data) * part // _CUTS for part in range(_CUTS)}
    close = {border + 2 for border in borders}
    return sorted(place for place in borders | close | even if place < len(data))


def _flipped(data: bytes, seed: int) -> bytes:
    """Change a few bytes, mostly near the start."""
    generator, changed = random.Random(seed), bytearray(data)
    for _ in range(6):
        changed[int(len(data) * generator.random() ** 3)] = generator.randrange(256)
    return bytes(changed)


def _sized(data: bytes, kind: str, place: int, width: int, height: int) -> bytes:
    """Write another width and height into the header."""
    changed = bytearray(data)
    form = {"png": ">II", "gif": "<HH", "bmp": "<ii"}[kind]
    struct.pack_into(form, changed, place, width, height)
    if kind == "png":
        struct.pack_into(">I", changed, 29, zlib.crc32(changed[12:29]))
    return bytes(changed)


def _bomb() -> bytes:
    """A few kilobytes that become 90 million pixels."""
    buffer = io.BytesIO()
    Image.new("L", (9_500, 9_500)).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()
