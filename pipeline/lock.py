"""One process at a time in a folder.

A lock of the operating system on FOLDER/.lock: it ends with the process, however that ends, so nothing is left to be
deleted by hand. The file's text names the holder, for the message.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder. Raises UsageError naming host and pid if another process holds it."""
    # Not inherited by child processes (PEP 446): a fork that outlives us would keep the lock.
    handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder} is in use by {_holder(folder)}; wait for it, or give another name") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without locks: nothing can be promised there, so go on as the only one.
        about = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about).encode(), 0)
        yield
    finally:
        os.close(handle)


def _holder(folder: Path) -> str:
    try:
        about = dict(json.loads((folder / NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        about = {}
    return f"process {about.get('pid', '?')} on {about.get('host', '?')}, running since {about.get('start', '?')}"
