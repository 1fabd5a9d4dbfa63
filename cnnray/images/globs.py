"""Find files by patterns.

`*` and `?` do not match `/`; `**` stands for folders of any depth, or none. Hidden files and folders (a leading dot)
match no wildcard. These are the rules of Python's `glob`, for remote files, too. A part of the pattern that exists by
this very name (`Photos [2023]`) is that folder.
"""

import fnmatch
import re
from collections.abc import Iterator

from cnnray.images import storage

_WILDCARDS = re.compile(r"[*?[]")


def is_glob(source: str) -> bool:
    """Whether a path or address has wildcards."""
    return bool(_WILDCARDS.search(source))


def split_pattern(pattern: str) -> tuple[str, list[str]]:
    """The folder in front of the first wildcard, and the parts of the pattern below it."""
    parts = pattern.split("/")
    for number, part in enumerate(parts):
        if is_glob(part) and not storage.exists("/".join(parts[: number + 1])):
            return "/".join(parts[:number]) or "/", parts[number:]
    raise AssertionError(f"{pattern} has no wildcard")


def walk(root: str, parts: list[str]) -> Iterator[storage.StoredFile]:
    """The files that match, in the order of their uris. Folders that cannot hold a match are not read.

    Args:
        root: see `split_pattern`.
        parts: see `split_pattern`.

    Raises:
        OSError: storage that cannot be read.
    """
    below = len(root.rstrip("/")) + 1

    def selects(uri: str, is_folder: bool) -> bool:
        return (_may_hold if is_folder else _matches)(uri[below:].split("/"), parts)

    if not storage.is_local(root) or storage.exists(root):
        yield from storage.walk(root, selects)


def _matches(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(path)
        return any(_matches(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _may_hold(folder: list[str], pattern: list[str]) -> bool:
    """Whether a file below the folder may match."""
    if not folder or not pattern or pattern[0] == "**":
        return bool(pattern)
    return fnmatch.fnmatchcase(folder[0], pattern[0]) and _may_hold(folder[1:], pattern[1:])
