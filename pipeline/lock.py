"""One run at a time in an output folder.

A lock of the operating system on OUT/.lock: it ends with the process, however that ends, so nothing is left to be
deleted by hand. The file's text names the holder, for the message, and the run, so that work which outlived its run
(on a cluster whose client was killed) notices that it is not wanted any more.
"""

import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import RunStopped, UsageError

NAME = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[str]:
    """Hold OUT; yields the id of this run. Raises UsageError naming host and pid if another run holds it."""
    # Not inherited by child processes (PEP 446): a fork that outlives us would keep the lock.
    try:
        handle = os.open(out / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UsageError(f"{out / NAME} cannot be written to: {error.strerror}") from error
    try:
        try:
            _take(handle)
        except BlockingIOError as error:
            raise UsageError(
                f"{out} is in use by {_holder(out)}; wait for it, or give another folder with -o"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without locks: nothing can be promised there, so go on as the only run.
        run = uuid.uuid4().hex
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": time.strftime("%Y-%m-%d %H:%M:%S"),
            "run": run,
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)
        yield run
    finally:
        os.close(handle)


def _take(handle: int) -> None:
    """The lock, tried for half a second: `status` holds it for a moment to see whether it is free."""
    for attempt in range(11):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == 10:
                raise
            time.sleep(0.05)


def _read(out: Path) -> dict[str, object]:
    try:
        about = json.loads((out / NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _holder(out: Path) -> str:
    about = _read(out)
    return f"process {about.get('pid', '?')} on {about.get('host', '?')}, running since {about.get('start', '?')}"


def was_locked(out: Path) -> bool:
    """True if a run has been here."""
    return (out / NAME).exists()


def running(out: Path) -> str:
    """Who holds the folder now, "" if nobody does."""
    try:
        handle = os.open(out / NAME, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except OSError:
        return _holder(out)
    finally:
        os.close(handle)


def require_current(out: Path, run: str) -> None:
    """RunStopped if another run has taken the folder over since `run` began."""
    if _read(out).get("run") != run:
        raise RunStopped(f"another run has taken over {out}")
