"""Preloaded by worker processes: Ctrl-C in a terminal reaches them too, but only the client answers it."""

import signal


def dask_setup(worker: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
