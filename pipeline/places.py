"""Where files lie: on a disk or on an object store, by the same few operations.

A place is a Path, or an ObjectPath that has those of its methods that are used on places. What differs stands here:
a file on a disk is written aside and renamed, an object is put whole; folders on a disk are walked and deleted.
"""

import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from .errors import UsageError
from .objects import AT_ONCE, ObjectPath, object_path, unlink_objects
from .ranges import RangedFile

X = TypeVar("X")
Y = TypeVar("Y")


def placed(text: str | Path) -> Path:
    """A folder or file that a user names, absolute. Raises UsageError for an address that is not understood."""
    path = typed(text)
    return path if is_remote(path) else Path(os.path.abspath(path))


def typed(text: str | Path) -> Path:
    """The same as it was typed, for what is told of it."""
    if is_remote(text):
        return cast(Path, text)
    words = str(text)
    if words.startswith("s3://"):
        return cast(Path, object_path(words))  # it has what is used of a Path
    scheme, sign, _ = words.partition("://")
    if sign and scheme.isalnum() and not os.path.exists(words):
        raise UsageError(f"{scheme}://: an output folder or slides lie on a disk, or at s3://bucket/folder")
    return Path(text)


def on_disk(text: str | Path) -> Path:
    """The same for what reads and writes on disks only. Raises UsageError."""
    path = typed(text)
    if is_remote(path):
        raise UsageError(f"{path}: this command works in a folder on a disk; copy it to one first")
    return path


def is_remote(path: object) -> bool:
    return isinstance(path, ObjectPath)


def put(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole: a killed writer leaves a `.partial`, never half a file of the right name."""
    if is_remote(path):
        path.write_bytes(data)
        return
    folder, name = os.path.split(path)
    part = os.path.join(folder, f"{os.fsdecode(os.fsencode(name)[:200])}.{uuid.uuid4().hex}.partial")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            os.unlink(part)
        raise


def opened(path: Path) -> io.BufferedReader:
    """A file to read; `read_at` reads it from many threads."""
    if isinstance(path, ObjectPath):
        return io.BufferedReader(RangedFile(path))
    return open(path, "rb")


def read_at(file: io.BufferedReader) -> Callable[[int, int], bytes]:
    """(count, offset) → the bytes that stand there; its position is not used."""
    raw: object = file.raw
    return raw.pread if isinstance(raw, RangedFile) else partial(os.pread, file.fileno())


@contextmanager
def honest(file: io.BufferedReader) -> Iterator[None]:
    """Around a library that reads a file: what it makes of a read that failed is not what the file says."""
    try:
        yield
    finally:
        raw: object = file.raw
        if isinstance(raw, RangedFile) and raw.fault is not None:
            raise raw.fault


def remove_tree(path: Path, ignore_errors: bool = False) -> None:
    """A folder and all in it."""
    if isinstance(path, ObjectPath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def unlink_all(paths: Sequence[Path]) -> None:
    """Files that may be gone already."""
    objects = [cast(ObjectPath, path) for path in paths if is_remote(path)]
    if objects:
        unlink_objects(objects)
    for path in paths if not objects else ():
        path.unlink(missing_ok=True)


def of_each(function: Callable[[X], Y], items: Sequence[X], where: Path) -> list[Y]:
    """function(item) of each, which asks `where`: one after the other on a disk, side by side on an object store."""
    if not is_remote(where):
        return list(map(function, items))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, items))


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk."""
    if isinstance(root, ObjectPath):
        yield from cast(Iterator[tuple[Path, list[str], list[str]]], root.walk())
        return
    for folder, names, files in os.walk(root):
        yield Path(folder), names, files
