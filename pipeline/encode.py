"""Tiles of many slides → full batches → an encoder → rows in the store.

Batches run over slide boundaries: the tail of one slide and the head of the next share one, and rows find their way
home by (slide, row). A slide that fails takes only its own tiles with it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from extractors import Encoder

from .errors import CorruptTiles, RunStopped, SlideError, UnreadableSlide
from .quadtree import QuadTree
from .slide import Slide
from .store import CHUNK_ROWS, Features
from .stream import stream_tiles

BATCH = 64
MAX_INVALID = 0.01  # of the finest tiles; a slide with more unreadable ones fails


@dataclass
class Work:
    """A slide that waits for features: how to open it, its tiles, and the (begun) features they go to."""

    slide: str
    open: Callable[[], Slide]
    unchanged: Callable[[], bool]  # asked after the last read: the file is still the one that was opened
    tree: QuadTree
    features: Features


@dataclass(frozen=True)
class Encoded:
    """What became of one slide: its rows encoded now, its unreadable ones in all, and where the time went."""

    slide: str
    rows: int = 0
    invalid: int = 0
    reading: float = 0.0
    encoding: float = 0.0
    error: SlideError | None = None

    @property
    def bound_by(self) -> str:
        return "reading" if self.reading > self.encoding else "encoding"


@dataclass
class _Batch:
    """Tiles of any slides, in the order they were read."""

    encoder: Encoder
    pad: bool
    on_tiles: Callable[[int], None]
    tiles: list[tuple["_Rows", int, np.ndarray]] = field(default_factory=list)

    def flush(self) -> None:
        """Encode what has gathered and hand every row to its slide."""
        live = [(rows, row, pixels) for rows, row, pixels in self.tiles if rows.error is None]
        self.tiles = []
        if not live:
            return
        started = perf_counter()
        pixels = np.stack([pixels for _, _, pixels in live])
        if (
            self.pad and len(pixels) < BATCH
        ):  # one batch shape on a GPU: kernels chosen by shape differ in the last bits
            pixels = np.concatenate([pixels, np.zeros((BATCH - len(pixels), *pixels.shape[1:]), np.uint8)])
        values = self.encoder.encode(pixels).numpy()[: len(live)]
        share = (perf_counter() - started) / len(live)
        for (rows, row, _), value in zip(live, values, strict=True):
            rows.encoding += share
            rows.put(row, value)
        self.on_tiles(len(live))


class _Rows:
    """The rows of one slide on their way into its chunks."""

    def __init__(self, work: Work, dim: int) -> None:
        self.work, self.dim = work, dim
        self.missing = work.features.missing_rows()
        self.left = {
            int(c): int(n)
            for c, n in zip(*np.unique(np.flatnonzero(self.missing) // CHUNK_ROWS, return_counts=True), strict=True)
        }
        self.open: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        bottom = max(work.tree.encoded_levels)
        finest = work.tree.levels[bottom]
        self.finest_rows = finest.stop - finest.start
        self.first_finest = len(self.missing) - self.finest_rows
        self.invalid = self.count = 0
        self.reading = self.encoding = 0.0
        self.read_all = False
        self.error: SlideError | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or (self.read_all and not self.left)

    def put(self, row: int, value: np.ndarray | None) -> None:
        """Take one row, None if it could not be read; a chunk is written when its last row is in."""
        chunk, at = divmod(row, CHUNK_ROWS)
        if chunk not in self.open:
            size = min(CHUNK_ROWS, len(self.missing) - chunk * CHUNK_ROWS)
            self.open[chunk] = (np.zeros((size, self.dim), np.float32), np.zeros(size, bool))
        x, valid = self.open[chunk]
        if value is not None:
            x[at], valid[at] = value, True
            self.count += 1
        elif row >= self.first_finest:
            self.invalid += 1
            self._refuse_too_many(self.invalid)
        self.left[chunk] -= 1
        if self.left[chunk] == 0:
            del self.left[chunk], self.open[chunk]
            self.work.features.write_chunk(chunk, self._checked(x), valid)

    def _refuse_too_many(self, invalid: int) -> None:
        if invalid > MAX_INVALID * self.finest_rows:
            reason = (
                f"at least {invalid} of {self.finest_rows} tiles cannot be decoded, more than {MAX_INVALID:.0%}: "
                "the file is damaged"
            )
            raise CorruptTiles(self.work.slide, "encode", reason)

    def _checked(self, x: np.ndarray) -> np.ndarray:
        """The chunk in the type it is stored in; what that type cannot hold is the encoder's fault: the run stops."""
        dtype, who = self.work.features.dtype, f"{self.work.slide}: encode: the encoder {self.work.features.key} gave"
        if not np.isfinite(x).all():
            raise RunStopped(f"{who} inf or NaN; its weights or its inputs are wrong")
        if np.abs(x).max(initial=0) > np.finfo(dtype).max:
            raise RunStopped(f"{who} {np.abs(x).max():g}, which does not fit {dtype}; pass --dtype float32")
        return x.astype(dtype)

    def result(self) -> Encoded:
        invalid = 0
        if self.error is None:
            # All of them, also those of chunks that an earlier run wrote.
            valid = self.work.features.stored_valid()
            invalid = int(np.count_nonzero(~valid))
            try:
                self._refuse_too_many(int(np.count_nonzero(~valid[self.first_finest :])))
            except CorruptTiles as error:
                self.error = error
        return Encoded(self.work.slide, self.count, invalid, self.reading, self.encoding, self.error)


def encode_slides(
    works: Iterable[Work],
    encoder: Encoder,
    device: str = "cpu",
    on_tiles: Callable[[int], None] = lambda count: None,
) -> Iterator[Encoded]:
    """Encode what each slide misses; yields a slide when its last chunk is written. `encoder` is loaded.

    A SlideError is that slide's result; RunStopped and errors of the machine go through.
    """
    batch = _Batch(encoder, device != "cpu", on_tiles)
    unfinished: list[_Rows] = []
    for work in works:
        rows = _Rows(work, encoder.facts.dim)
        unfinished.append(rows)
        try:
            for row, pixels in _timed(rows):
                if pixels is None:
                    rows.put(row, None)
                    continue
                batch.tiles.append((rows, row, pixels))
                if len(batch.tiles) == BATCH:
                    batch.flush()
            rows.read_all = True
        except SlideError as error:
            rows.error = error
        yield from (done.result() for done in unfinished if done.finished)
        unfinished = [rows for rows in unfinished if not rows.finished]
    batch.flush()
    yield from (rows.result() for rows in unfinished)


def _timed(rows: _Rows) -> Iterator[tuple[int, np.ndarray | None]]:
    """The missing tiles of a slide, with the time that reading takes."""
    if not rows.missing.any():
        return
    started = perf_counter()
    with rows.work.open() as slide, closing(stream_tiles(slide, rows.work.tree, rows.missing)) as tiles:
        for tile in tiles:
            rows.reading += perf_counter() - started
            yield tile
            started = perf_counter()
    if not rows.work.unchanged():
        raise UnreadableSlide(
            rows.work.slide, "encode", "the file changed while it was read; run again when it is whole"
        )
