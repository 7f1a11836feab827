"""The rows of one slide on their way home: into whole chunks, checked, and to the disk by a thread of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from .errors import CorruptTiles, RunStopped, SlideError
from .meter import Meter
from .quadtree import QuadTree
from .slide import Slide
from .store import CHUNK_ROWS

MAX_INVALID = 0.01  # of the finest tiles; a slide with more unreadable ones fails


class Shelf(Protocol):
    """Where the rows of a slide go, chunk by chunk: store.Features, or memory."""

    key: str  # of the encoder

    @property
    def dtype(self) -> np.dtype: ...
    def missing_rows(self) -> np.ndarray: ...
    def write_chunk(self, chunk: int, x: np.ndarray, valid: np.ndarray) -> None: ...
    def stored_valid(self) -> np.ndarray: ...


class Held:
    """Features of the `wanted` rows (M,) bool of a slide, in memory; in the type in which they would be stored."""

    def __init__(self, key: str, dtype: str, wanted: np.ndarray) -> None:
        self.key, self.dtype = key, np.dtype(dtype)
        self._wanted, self._valid = wanted, np.ones(len(wanted), bool)
        self._parts: dict[int, np.ndarray] = {}

    def missing_rows(self) -> np.ndarray:
        return self._wanted

    def write_chunk(self, chunk: int, x: np.ndarray, valid: np.ndarray) -> None:
        rows = slice(chunk * CHUNK_ROWS, chunk * CHUNK_ROWS + len(x))
        wanted = self._wanted[rows]
        self._parts[chunk] = x[wanted]
        self._valid[rows] = valid | ~wanted

    def stored_valid(self) -> np.ndarray:
        """(M,) bool: False where a tile could not be read; of those that nobody wanted nothing is known."""
        return self._valid

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """x (n, D) and valid (n,) of the wanted rows."""
        parts = [self._parts[chunk] for chunk in sorted(self._parts)] or [np.zeros((0, 1))]
        return np.concatenate(parts), self._valid[self._wanted]


@dataclass
class Work:
    """A slide that waits for features: how to open it, its tiles, and the (begun) features they go to."""

    slide: str
    open: Callable[[], Slide]
    unchanged: Callable[[], bool]  # asked after the last read: the file is still the one that was opened
    tree: QuadTree
    features: Shelf


NO_TILES = QuadTree(
    grid=np.zeros((0, 2), np.int32),
    xy=np.zeros((0, 2), np.int32),
    tissue=np.zeros(0, np.float32),
    parent=np.zeros(0, np.int32),
    scales=((1.0, 1.0, 0, 0),),
    tile_px=1,
)


class _NoRows:
    key, dtype = "", np.dtype(np.float32)

    def missing_rows(self) -> np.ndarray:
        return np.zeros(0, bool)

    stored_valid = missing_rows

    def write_chunk(self, chunk: int, x: np.ndarray, valid: np.ndarray) -> None:
        raise AssertionError("there are no rows")


def _never() -> Slide:
    raise AssertionError("a slide of which nothing is missing is not opened")


def nothing_of(slide: str) -> Work:
    """No tile of a slide: it passes through the encoder all the same, so that it is told of in its turn."""
    return Work(slide, _never, lambda: True, NO_TILES, _NoRows())


class Writer:
    """One thread that writes chunks; at most `most` bytes wait for it. Use with `with`."""

    def __init__(self, most: int) -> None:
        self._most, self._waiting = most, 0
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error[0] is not None)

    def write(self, task: Callable[[], None], size: int) -> tuple[Future[None], float]:
        """The write, begun or waiting, and the seconds that had to be waited for room."""
        started = perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._waiting + size <= self._most)
            self._waiting += size
        waited = perf_counter() - started

        def done(_: Future[None]) -> None:
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()

        future = self._pool.submit(task)
        future.add_done_callback(done)
        return future, waited


class SlideRows:
    """The rows of a slide that are missing. `meter` is of this slide alone; `error` set: it has failed."""

    def __init__(self, work: Work, dim: int, writer: Writer) -> None:
        self.slide, self.open, self.unchanged, self.tree = work.slide, work.open, work.unchanged, work.tree
        self.missing = work.features.missing_rows()
        self.meter = Meter()
        self.error: SlideError | None = None
        self.read_all = False
        self._features, self._dim, self._writer = work.features, dim, writer
        chunks, counts = np.unique(np.flatnonzero(self.missing) // CHUNK_ROWS, return_counts=True)
        self._left = dict(zip(chunks.tolist(), counts.tolist(), strict=True))
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._written: list[Future[None]] = []
        bottom = work.tree.levels[max(work.tree.encoded_levels)]
        self._finest = bottom.stop - bottom.start
        self._first_finest = len(self.missing) - self._finest
        self._invalid = 0

    @property
    def finished(self) -> bool:
        """True if nothing more is to come: every chunk is on the disk, or the slide has failed and is closed."""
        if self.error is not None:
            return self.read_all
        return self.read_all and not self._left and all(future.done() for future in self._written)

    def put(self, row: int, value: np.ndarray | None) -> None:
        """Take one row, (dim,) float32, None if it could not be read; a chunk is written when its last row is in.

        A slide that loses too many rows has failed from here on.
        """
        chunk, at = divmod(row, CHUNK_ROWS)
        if chunk not in self._open:
            size = min(CHUNK_ROWS, len(self.missing) - chunk * CHUNK_ROWS)
            self._open[chunk] = (np.zeros((size, self._dim), np.float32), np.zeros(size, bool))
        x, valid = self._open[chunk]
        if value is not None:
            x[at], valid[at] = value, True
            self.meter.tiles += 1
        elif row >= self._first_finest:
            self._invalid += 1
            self._refuse_too_many(self._invalid)
        self._left[chunk] -= 1
        if self._left[chunk] == 0 and self.error is None:
            self._raise_what_failed()
            del self._left[chunk], self._open[chunk]
            future, waited = self._writer.write(lambda: self._write(chunk, x, valid), x.nbytes)
            self.meter.stalled += waited
            self._written.append(future)

    def _raise_what_failed(self) -> None:
        for future in self._written:
            if future.done():
                future.result()

    def _write(self, chunk: int, x: np.ndarray, valid: np.ndarray) -> None:
        started = perf_counter()
        self._features.write_chunk(chunk, self._checked(x), valid)
        self.meter.writing += perf_counter() - started

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """The chunk in the type it is stored in; what that type cannot hold is the encoder's fault: the run stops."""
        dtype, who = self._features.dtype, f"{self.slide}: encode: the encoder {self._features.key} gave"
        if not np.isfinite(x).all():
            raise RunStopped(f"{who} inf or NaN; its weights or its inputs are wrong")
        if np.abs(x).max(initial=0) > np.finfo(dtype).max:
            raise RunStopped(f"{who} {np.abs(x).max():g}, which does not fit {dtype}; pass --dtype float32")
        return x.astype(dtype)

    def _refuse_too_many(self, invalid: int) -> None:
        if invalid > MAX_INVALID * self._finest:
            reason = (
                f"at least {invalid} of {self._finest} tiles cannot be decoded, more than {MAX_INVALID:.0%}: "
                "the file is damaged"
            )
            self.error = CorruptTiles(self.slide, "encode", reason)

    def wait(self) -> None:
        """Until all that is to be written is on the disk; whether it was, `settle` says."""
        wait(self._written)

    def settle(self) -> int:
        """Wait for the disk; the unreadable rows in all, also those of chunks that an earlier run wrote.

        Raises what the writer met: RunStopped, errors of the machine.
        """
        for future in self._written:
            future.result()
        if self.error is not None:
            return 0
        valid = self._features.stored_valid()
        self._refuse_too_many(int(np.count_nonzero(~valid[self._first_finest :])))
        return int(np.count_nonzero(~valid))
