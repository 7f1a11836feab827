"""Telling whether a slide file is still the same, without reading gigabytes."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from .errors import MACHINE_ERRNOS, slide_door

BLOCK = 1 << 16
BLOCKS = 32  # 2 MB are read; a file up to that size is read whole


class Fingerprint(NamedTuple):
    size: int
    mtime_ns: int
    sha256: str


def stamp(path: Path) -> tuple[int, int, int, int]:
    """(size, mtime_ns, inode, device): changes when the file is written to or replaced. Costs one stat."""
    info = os.stat(path)
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
