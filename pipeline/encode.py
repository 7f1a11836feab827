"""Tiles of many slides → full batches → an encoder → rows in the store.

Batches run over slide boundaries: the tail of one slide and the head of the next share one, and rows find their way
home by (slide, row). Reading and writing have threads of their own; this one only keeps the encoder busy. A slide that
fails takes only its own tiles with it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from extractors import Encoder, Pending

from .doubling import Doubling
from .errors import RunStopped, SlideError
from .feed import Feed
from .lanes import Lanes
from .meter import Meter
from .rows import SlideRows, Work, Writer
from .stream import Tile

if TYPE_CHECKING:
    from torch import Tensor

ON_CPU = 16  # tiles a batch on a CPU, which gains nothing from more
SMALLEST, LARGEST = 16, 1024  # batches that are tried on a GPU
WRITER_BYTES = 64 << 20


Home = tuple[SlideRows, int]  # of a tile: its slide, its row


@dataclass(frozen=True)
class Settings:
    """How the work is done; None: found by trying. No feature depends on it, but see `batch_size`.

    batch_size: the last bits of features may depend on it, so what was found on a GPU is told, and given here again
    when a run is resumed. threads: cores that may be used. readers: threads that read at a time; None: as many as help,
    within `threads`.
    """

    batch_size: int | None = None
    readers: int | None = None
    threads: int = 1
    queue_bytes: int = 512 << 20


@dataclass(frozen=True)
class Encoded:
    """What became of one slide: its unreadable rows in all, and where the time went.

    tile_seconds: of the device for a tile, in the fastest batch of all slides so far.
    """

    slide: str
    invalid: int = 0
    error: SlideError | None = None
    meter: Meter = field(default_factory=Meter)
    batch_size: int = 0
    tile_seconds: float = math.inf


class Batches:
    """Tiles of any slides in the order they were read, in batches of one shape.

    On some devices a tile's last bits depend on the shape of its batch (bf16 on AMX, most GPUs), so there is one shape
    only: the last batch is filled up with anything.
    """

    def __init__(self, lanes: Lanes, px: int, batch_size: int | None, on_tiles: Callable[[int], None]) -> None:
        self.px = px
        self._lanes, self._on_tiles = lanes, on_tiles
        size = batch_size or (None if lanes.gpu else ON_CPU)
        self.size = Doubling(size or SMALLEST, size or LARGEST)
        self.tile_seconds = math.inf  # of the device, in the fastest batch
        self._homes: list[Home] = []
        self._flying: deque[tuple[Pending, Tensor, list[Home]]] = deque()
        self._spare: list[Tensor] = []
        while not self.size.settled:
            self._try_on_nothing()
        self._buffer = self._empty()

    def _empty(self) -> Tensor:
        import torch

        shape = (self.size.value, self.px, self.px, 3)
        while self._spare:
            if (buffer := self._spare.pop()).shape == shape:
                return buffer
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=self._lanes.gpu)

    def _try_on_nothing(self) -> None:
        """The shape is found before the first tile, and kept."""
        try:
            pending = self._lanes.start(self._empty())
            pending.result()
            self.size.report(self.size.value, pending.seconds)
        except (RuntimeError, MemoryError) as error:
            _require_out_of_memory(error)
            self.size.refuse()

    def add(self, rows: SlideRows, tile: Tile) -> None:
        if rows.error is not None:
            return
        if tile.pixels is None:
            rows.put(tile.row, None)
            return
        self._buffer.numpy()[len(self._homes)] = tile.pixels
        self._homes.append((rows, tile.row))
        if len(self._homes) == len(self._buffer):
            self._forget_failed()
        if len(self._homes) == len(self._buffer):
            self._launch()

    def flush(self) -> None:
        """Encode what has gathered and bring everything home."""
        self._forget_failed()
        self._launch()
        while self._flying:
            self._land()

    def _forget_failed(self) -> None:
        """Tiles of slides that have failed meanwhile make room for others."""
        kept = [at for at, (rows, _) in enumerate(self._homes) if rows.error is None]
        if len(kept) < len(self._homes):
            self._buffer[: len(kept)] = self._buffer[kept]
            self._homes = [self._homes[at] for at in kept]

    def _launch(self) -> None:
        """Begin the batch, and wait for the oldest where all lanes have one."""
        if self._homes:
            self._buffer[len(self._homes) :] = 0
            self._start(self._buffer, self._homes)
            while len(self._flying) > self._lanes.count:
                self._land()
            self._homes, self._buffer = [], self._empty()

    def _start(self, tiles: Tensor, homes: list[Home]) -> None:
        try:
            self._flying.append((self._lanes.start(tiles), tiles, homes))
        except (RuntimeError, MemoryError) as error:
            self._start_smaller(tiles, homes, error)

    def _start_smaller(self, tiles: Tensor, homes: list[Home], error: RuntimeError | MemoryError) -> None:
        """Where the device's memory does not suffice: in halves, and so from then on."""
        import torch

        _require_out_of_memory(error)
        if len(tiles) == 1:
            raise RunStopped(f"the memory of the device does not suffice for one tile: {error}") from error
        self.size.cap(len(tiles) // 2)
        at = 0
        while at < len(homes):
            size = self.size.value  # less than half, once that was too much as well
            part = tiles[at : at + size]  # the last is filled up with anything
            self._start(torch.cat([part, tiles[: size - len(part)]]), homes[at : at + size])
            at += size
            while self._flying:  # whether that was little enough is known before the next is begun
                self._land()

    def _land(self) -> None:
        pending, tiles, homes = self._flying.popleft()
        try:
            values = pending.result().numpy()
        except (RuntimeError, MemoryError) as error:
            self._start_smaller(tiles, homes, error)
            return
        seconds = pending.seconds / self._lanes.count
        share = seconds / len(homes)
        self.tile_seconds = min(self.tile_seconds, seconds / len(tiles))
        for (rows, row), value in zip(homes, values[: len(homes)], strict=True):
            rows.meter.encoding += share
            if rows.error is None:
                rows.put(row, value)
        if tiles.shape[0] == self.size.value:
            self._spare.append(tiles)
        self._on_tiles(len(homes))


def _require_out_of_memory(error: BaseException) -> None:
    """Raise what is no lack of memory; torch says that of a CPU in words only."""
    import torch

    lacking = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    if not lacking:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encode_slides(
    works: Iterable[Work | None],
    encoder: Encoder,
    device: str = "cpu",
    on_tiles: Callable[[int, Meter], None] = lambda count, so_far: None,
    settings: Settings = Settings(),
) -> Iterator[Encoded]:
    """Encode what each slide misses; yields a slide when its last chunk is on the disk. `encoder` is loaded.

    `works` is taken from by another thread, ahead of what is encoded; None: there is none for now, so what has gathered
    is encoded at once. A SlideError is that slide's result; RunStopped and errors of the machine are raised.
    """
    batches: Batches | None = None
    unfinished: list[SlideRows] = []
    finished = Meter()

    def tell(count: int) -> None:
        so_far = sum((rows.meter for rows in unfinished), finished + Meter())
        so_far.spend(perf_counter() - clock, feed.readers.value)  # since it was last given to a slide
        on_tiles(count, so_far)

    with Writer(WRITER_BYTES) as writer, Lanes(encoder, device, settings.threads) as lanes:
        sources = (None if work is None else SlideRows(work, encoder.facts.dim, writer) for work in works)
        with Feed(sources, settings.readers, settings.threads, settings.queue_bytes) as feed:
            clock = perf_counter()
            for item in feed:
                if item is None:
                    if batches is not None:
                        batches.flush()
                    for rows in unfinished:
                        rows.wait()
                else:
                    rows, tiles = item
                    if rows not in unfinished:
                        unfinished.append(rows)
                    if tiles:
                        if batches is None or batches.px != rows.tree.tile_px:
                            if batches is not None:
                                batches.flush()
                            batches = Batches(lanes, rows.tree.tile_px, settings.batch_size, tell)
                        for tile in tiles:
                            batches.add(rows, tile)
                    rows.read_all = tiles is None
                    rows.meter.spend(perf_counter() - clock, feed.readers.value)
                    clock = perf_counter()
                for rows in [rows for rows in unfinished if rows.finished]:
                    unfinished.remove(rows)
                    finished += rows.meter
                    yield _result(rows, batches)
        if batches is not None and unfinished:
            batches.flush()
            unfinished[-1].meter.spend(perf_counter() - clock, feed.readers.value)
        yield from (_result(rows, batches) for rows in unfinished)


def _result(rows: SlideRows, batches: Batches | None) -> Encoded:
    invalid = rows.settle()
    if batches is None:
        return Encoded(rows.slide, invalid, rows.error, rows.meter)
    return Encoded(rows.slide, invalid, rows.error, rows.meter, batches.size.value, batches.tile_seconds)
