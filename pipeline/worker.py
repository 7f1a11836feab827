"""What a worker process sets before it works: signals, memory, threads. Preloaded by Dask."""

import atexit
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGE = 1 << 30


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
