"""A file is written beside its place and put there whole: whoever reads it sees the old or the new one, never half."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write what is then to stand at `path`. If that fails, on a full disk say, nothing is left of it."""
    part = path.with_name(f"{os.fsdecode(os.fsencode(path.name)[:200])}.{os.getpid()}.partial")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
