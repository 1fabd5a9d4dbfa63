"""List the files below a folder or prefix. Only `storage` uses this module."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import obstore

from cnnray.images import ahead
from cnnray.images.object_stores import (
    NotFoundError,
    StorageError,
    is_local,
    locate,
    repeated,
    request,
    translated_errors,
)  # fmt: skip

PAGE = 1000
"""Files that one request lists."""
_FEW_FILES = 50
"""Folders that have fewer files in the mean are not listed one by one."""
_THREADS = 16

Selects = Callable[[str, bool], bool]
"""Called with the uri of a file or folder, and whether it is a folder: whether to take it, or to look into it."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a listing."""

    uri: str
    """Absolute path or address."""
    size: int
    """In bytes."""
    version: str
    """Changes when the content of the file does."""


def stored_file(uri: str) -> StoredFile | None:
    """The size and version of one file; None if there is none by this name."""
    try:
        with translated_errors(uri):
            return _local_file(uri) if is_local(uri) else _remote_file(uri, request(obstore.head, uri))
    except NotFoundError:
        return None


def folders(root: str) -> list[str]:
    """The folders directly below `root`, sorted; hidden ones (a leading dot) left out."""
    with translated_errors(root):
        paths = [item.path for item in os.scandir(root) if item.is_dir()] if is_local(root) else _level(root)[0]
    return sorted(path for path in paths if not _is_hidden(path))


def walk(root: str, selects: Selects | None = None) -> Iterator[StoredFile]:
    """All files below `root`, at any depth, in the order of their uris; hidden files and folders are left out.

    The files are never all in memory. In a bucket, the folders directly below `root` are listed in parallel, unless
    the first two pages show few files, most files in no folder, or small folders; each listing is at most some pages
    ahead of the consumer.

    Args:
        root: a folder or prefix.
        selects: leaves out files, and folders with all that is below them; None: takes all.

    Raises:
        StorageError: a local file name is not UTF-8, or a bucket lists its files in another order.
        OSError: storage that cannot be read.
    """
    with translated_errors(root):
        yield from _local_walk(root, selects) if is_local(root) else _remote_walk(root, selects)


def _is_hidden(uri: str) -> bool:
    return uri.rstrip("/").rsplit("/", 1)[-1].startswith(".")


# -- local ----------------------------------------------------------------------------------------------------


def _local_walk(root: str, selects: Selects | None) -> Iterator[StoredFile]:
    # Names, and not entries of `scandir`: a folder may have millions.
    names = []
    with os.scandir(root) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            if entry.name.startswith(".") or not (is_folder or entry.is_file()):
                continue
            if selects is None or selects(entry.path, is_folder):
                names.append(entry.name + "/" * is_folder)
    names.sort()  # the order of uris, since folders end in /
    prefix = f"{root.rstrip('/')}/"
    for name in names:
        path = prefix + name
        if name.endswith("/"):
            yield from _local_walk(path[:-1], selects)
            continue
        try:
            path.encode()
        except UnicodeEncodeError:
            raise StorageError(f"The file name {os.fsencode(path)!r} is not UTF-8: rename it.") from None
        try:
            file = _local_file(path)
        except FileNotFoundError:
            continue  # deleted since
        yield file


def _local_file(path: str) -> StoredFile:
    status = os.stat(path)  # noqa: PTH116 - faster
    return StoredFile(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


# -- remote ---------------------------------------------------------------------------------------------------


def _remote_walk(root: str, selects: Selects | None) -> Iterator[StoredFile]:
    last = ""
    with ThreadPoolExecutor(_THREADS) as pool:
        for page in _pages_in_parallel(root, selects):
            # An empty object may be called KEY/ and stand for a folder; obstore gives its name as KEY.
            empty = [file.uri for file in page if not file.size]
            no_files = {uri for uri, is_key in zip(empty, pool.map(_is_key, empty), strict=True) if not is_key}
            for file in page:
                if file.uri in no_files or not (selects is None or selects(file.uri, False)):
                    continue
                if file.uri > last:
                    last = file.uri
                    yield file
                elif file.size:
                    raise StorageError(f"{root} is not listed in the order of its keys ({file.uri} is after {last}).")


def _is_key(uri: str) -> bool:
    return stored_file(uri) is not None


def _pages_in_parallel(root: str, selects: Selects | None) -> Iterator[list[StoredFile]]:
    pages = remote_pages(root)
    first = list(itertools.islice(pages, 2))
    names = [file.uri[len(root) + 1 :].split("/") for page in first for file in page]
    folders_seen = [name[0] for name in names if len(name) > 1]
    in_folders = 2 * len(folders_seen) > len(names)
    if len(first) < 2 or not in_folders or len(set(folders_seen)) * _FEW_FILES > len(folders_seen):
        yield from itertools.chain(first, pages)
        return
    folders, files = _level(root)
    if selects is not None:
        folders = [folder for folder in folders if selects(folder, True)]
    places: list[tuple[str, StoredFile | None]] = [(f"{folder}/", None) for folder in folders]
    places += [(file.uri, file) for file in files]
    places.sort(key=lambda place: place[0])
    yield from ahead.chained(_place_pages(places), _THREADS)


def _place_pages(places: list[tuple[str, StoredFile | None]]) -> Iterator[Iterator[list[StoredFile]]]:
    """The pages of each folder, and of the files between two folders."""
    for is_folder, group in itertools.groupby(places, lambda place: place[1] is None):
        if is_folder:
            yield from (remote_pages(uri.rstrip("/")) for uri, _ in group)
        else:
            yield iter([[file for _, file in group if file]])


def _level(root: str) -> tuple[list[str], list[StoredFile]]:
    """Folders and files directly below a remote `root`, hidden ones left out."""
    store, key = locate(root)
    level: Any = repeated(obstore.list_with_delimiter, store, key or None)
    base = root.removesuffix(key).rstrip("/") + "/"
    below = [base + path for path in level["common_prefixes"] if not _is_hidden(path)]
    return below, list(_stored(root, key, level["objects"], hidden=False))


def remote_pages(root: str, *, hidden: bool = False) -> Iterator[list[StoredFile]]:
    """Remote files below `root` at any depth, as the pages of a listing arrive; also empty objects for folders."""
    with translated_errors(root):
        store, key = locate(root)
        last, pages = None, None

        def next_page() -> Any:
            nonlocal pages
            begun, pages = pages or obstore.list(store, key or None, offset=last, chunk_size=PAGE), None
            page = next(begun, None)
            pages = begun  # one that has failed does not go on
            return page

        while page := repeated(next_page):
            last = page[-1]["path"]
            yield list(_stored(root, key, page, hidden=hidden))


def _stored(root: str, key: str, objects: Iterable[Any], *, hidden: bool) -> Iterator[StoredFile]:
    for item in objects:
        below = item["path"][len(key) :].lstrip("/")  # empty for an object KEY/, which stands for the folder itself
        if below and (hidden or "/." not in f"/{below}"):
            yield _remote_file(f"{root.rstrip('/')}/{below}", item)


def _remote_file(uri: str, item: Any) -> StoredFile:
    tag = (item["e_tag"] or "").replace('"', "")
    return StoredFile(uri, item["size"], tag or f"{item['size']}-{item['last_modified'].timestamp()}")
