"""What can go wrong, in two kinds.

SlideError            this slide is at fault: it becomes one `failed` row and the batch goes on
├── UnreadableSlide   no reader opens it, or its structure is damaged
├── MissingMpp        its resolution is not known, or not believable
├── TooCoarse         its best level is coarser than what was asked for
├── CorruptTiles      more of its pixels are unreadable than a slide may miss
└── BrokenBag         its store is incomplete, damaged or of another schema
UsageError            the request is at fault: exit 1, nothing was written
RunStopped            the machine is at fault (disk full, mount gone): exit 4, the same command resumes

A slide without tissue is an outcome (`empty`), not an error.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# Errors of the machine and not of the file that was touched: they would fail every other slide too.
MACHINE_ERRNOS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTCONN, errno.EROFS}
)


class SlideError(Exception):
    """One slide cannot be processed. `path` names it; `stage`: open, segment, tile, encode, store, predict.

    `prepare` is the stage where it cannot be said which of the first three it was.
    """

    def __init__(self, path: str, stage: str, reason: str) -> None:
        # All arguments go to Exception, so that the error survives pickling between processes.
        super().__init__(path, stage, reason)
        self.path = path
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.stage}: {self.reason}"


class UnreadableSlide(SlideError):
    pass


class MissingMpp(SlideError):
    pass


class TooCoarse(SlideError):
    pass


class CorruptTiles(SlideError):
    pass


class BrokenBag(SlideError):
    pass


class UsageError(Exception):
    """The command cannot be carried out as given; nothing has been written."""


class RunStopped(Exception):
    """The run had to stop; what is complete stays, and the same command resumes."""


def nearest(name: str, known: list[str], what: str) -> str:
    """One line about an unknown name: the nearest known one, then all of them."""
    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known))}"


def is_machine_fault(error: BaseException) -> bool:
    """True if the error, or one it came from, says that the machine and not the slide is at fault."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno in MACHINE_ERRNOS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def descriptors_exhausted() -> bool:
    """Libraries hide errno (OpenSlide reports EMFILE as "unsupported file"), so ask the machine itself."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in MACHINE_ERRNOS
    return False


@contextmanager
def machine_door() -> Iterator[None]:
    """Around what writes an output folder: a full disk, one that went away or became read-only stops the run."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a connection, and not of a file
            raise
        raise RunStopped(f"{error.strerror}{f': {error.filename}' if error.filename else ''}") from error


@contextmanager
def slide_door(path: str, stage: str, kind: type[SlideError] = UnreadableSlide) -> Iterator[None]:
    """Everything a library raises on a slide leaves as a SlideError, unless the machine is at fault.

    The only broad `except` of the pipeline: decoders were seen to raise anything from ZeroDivisionError to IndexError.
    """
    try:
        yield
    except (SlideError, UsageError, RunStopped):
        raise
    except Exception as error:
        if is_machine_fault(error) and not isinstance(error, MemoryError):
            raise
        if descriptors_exhausted():
            raise OSError(errno.EMFILE, "too many open files; raise the limit with `ulimit -n`") from error
        text = " ".join(str(error).split())
        raise kind(path, stage, (text or f"a {type(error).__name__} of the library that reads it")[:500]) from error
