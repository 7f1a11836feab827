"""Telling whether a slide file is still the same, without reading gigabytes."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .errors import MACHINE_ERRNOS, slide_door
from .objects import ObjectPath
from .places import is_remote

BLOCK = 1 << 16
BLOCKS = 32  # 2 MB are read; a file up to that size is read whole


class Fingerprint(NamedTuple):
    size: int
    mtime_ns: int
    sha256: str


def stamp(path: Path) -> tuple[int, int, int, int]:
    """(size, mtime_ns, inode, device): changes when the file is written to or replaced. Costs one stat."""
    info = path.stat()
    if is_remote(path):
        return info.st_size, info.st_mtime_ns, 0, 0
    return info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev


def device(path: Path) -> int:
    """The device that holds a file or, where it is gone, the nearest folder above it that is there.

    Another one than before: what it lay on is not mounted any more. OSError where the file system is at fault.
    """
    for place in (path, *path.parents):
        try:
            return os.stat(place).st_dev
        except OSError as error:
            if error.errno in MACHINE_ERRNOS:
                raise
    raise AssertionError("there is always a root")


def fingerprint(path: Path) -> Fingerprint:
    """sha256 of the size and of 32 blocks spread evenly over the file, head and tail too. Raises UnreadableSlide."""
    if isinstance(path, ObjectPath):
        return _of_object(path)
    with slide_door(str(path), "open"), open(path, "rb") as file:
        info = os.fstat(file.fileno())
        total = hashlib.sha256(str(info.st_size).encode())
        if info.st_size <= BLOCK * BLOCKS:
            total.update(file.read())
        else:
            for i in range(BLOCKS):
                file.seek((info.st_size - BLOCK) * i // (BLOCKS - 1))
                total.update(file.read(BLOCK))
    return Fingerprint(info.st_size, info.st_mtime_ns, total.hexdigest())


def _of_object(path: ObjectPath) -> Fingerprint:
    """The same of an object, whose blocks are asked for side by side."""
    with slide_door(str(path), "open"):
        info = path.stat()
        size, starts = info.st_size, [0]
        if size > BLOCK * BLOCKS:
            starts = [(size - BLOCK) * i // (BLOCKS - 1) for i in range(BLOCKS)]
        length = size if len(starts) == 1 else BLOCK
        with ThreadPoolExecutor(8) as pool:
            blocks = pool.map(lambda start: path.read_range(start, start + length), starts)
            total = hashlib.sha256(b"".join([str(size).encode(), *blocks]))
    return Fingerprint(size, info.st_mtime_ns, total.hexdigest())
