"""What a worker process sets before it works: signals, memory, threads; and how it ends where something hangs.

Preloaded by Dask.
"""

import atexit
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGE = 1 << 30
_lock = threading.Lock()
_deadlines: dict[str, float] = {}


@contextmanager
def importing() -> Iterator[None]:
    """Around large imports: what they make stays, and to look through it again and again is a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # nor is it looked through later


def dask_setup(worker: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal comes here too, but only the client answers it
    atexit.register(_leave)
    set_up_process()


def _leave() -> None:
    """The last to be called, as it was registered first: Python takes 0.8 s to take apart what torch has imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def set_up_process() -> None:
    """Keep freed memory, and read with one thread a reader.

    By default glibc gives large blocks back to the system at once, and an encoder asks for the same ones with every
    batch: on a virtual machine half of its time went into page faults. One arena, for only the main one grows without
    limit; the others would fall back to mapping.
    """
    import cv2

    cv2.setNumThreads(1)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 1)
            mallopt(M_MMAP_THRESHOLD, LARGE)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def expect(what: str, seconds: float | None) -> None:
    """End this process unless `what` is expected anew within `seconds`, or not any more (None).

    A library that hangs in C may never let Python run again, so that no thread of ours could end it: faulthandler's
    watchdog is a thread in C. It writes where all threads are; that nobody would read in the midst of progress bars.
    """
    with _lock:
        _deadlines.pop(what, None)
        if seconds is not None:
            _deadlines[what] = time.monotonic() + seconds
        if _deadlines:
            left = max(0.01, min(_deadlines.values()) - time.monotonic())
            faulthandler.dump_traceback_later(left, exit=True, file=_nowhere())
        else:
            faulthandler.cancel_dump_traceback_later()


@cache
def _nowhere() -> IO[str]:
    return open(os.devnull, "w")  # as long as the process lives


class Watch:
    """Of a task that has several slides in hand: it ends the process if nothing at all is `heard` for `seconds`."""

    def __init__(self, what: str, seconds: float) -> None:
        self._what, self._seconds, self._in_hand = what, seconds, 0
        self._lock = threading.Lock()

    def heard(self, more: int = 0) -> None:
        """A sign of life; `more` slides (or less) are in hand from now on."""
        with self._lock:
            self._in_hand += more
            expect(self._what, self._seconds if self._in_hand else None)

    def close(self) -> None:
        expect(self._what, None)
