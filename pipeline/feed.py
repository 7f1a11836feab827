"""One queue of blocks over many slides: threads read ahead while the encoder works, within a number of bytes.

The next slides are opened and read while this one is encoded. Blocks come in order, so nothing depends on which thread
was faster.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter
from typing import Generic, Protocol, TypeVar

import numpy as np

from .doubling import Doubling
from .errors import SlideError, UnreadableSlide
from .meter import Meter
from .quadtree import QuadTree
from .slide import Slide
from .stream import Block, Part, Tile, TileReader

IDLE_S = 0.5  # without a slide for so long, the encoder takes what it has
TRIAL_S = 0.5  # of work with one number of readers, before another is tried
WAITS = 0.1  # share of its time that the encoder may wait before more readers are tried
PATIENCE_S = 5  # at the end, with a slide that is just being opened


class Source(Protocol):
    """A slide that waits for its tiles. `error` set: it has failed, and no more of it is read."""

    slide: str
    open: Callable[[], Slide]
    unchanged: Callable[[], bool]
    tree: QuadTree
    missing: np.ndarray  # (M,) bool over the encoded rows: which are wanted
    error: SlideError | None
    meter: Meter


S = TypeVar("S", bound=Source)


class Budget:
    """Bytes that may be in flight. One block is always let through, however large."""

    def __init__(self, most: int) -> None:
        self.most, self.used, self.peak = most, 0, 0
        self._changed = threading.Condition()
        self._closed = False

    def take(self, count: int) -> bool:
        """Wait for room; False if there is no more to be done."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self.used or self.used + count <= self.most)
            self.used += count
            self.peak = max(self.peak, self.used)
            return not self._closed

    def give(self, count: int) -> None:
        with self._changed:
            self.used -= count
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Gate:
    """Lets as many threads through at a time as `limit` says, which may change, in the order in which they came.

    Without an order a thread that leaves and comes back is in again before those that wait, and the block that the
    encoder waits for is read last.
    """

    def __init__(self, limit: Doubling) -> None:
        self.limit = limit
        self._came = self._left = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            number, self._came = self._came, self._came + 1
            self._changed.wait_for(lambda: number < self._left + self.limit.value)

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._left += 1
            self._changed.notify_all()


class _Pause:
    """In the queue of slides: whoever gives them has none for now."""


class _Reading(Generic[S]):
    """A slide on its way through the threads: its blocks in order, each a future and its bytes; None after the last."""

    def __init__(self, source: S) -> None:
        self.source = source
        self.slide: Slide | None = None
        self.reader: TileReader | None = None
        self.parts: queue.SimpleQueue[tuple[Future[Part], int] | None] = queue.SimpleQueue()
        self.ended = False

    def next_part(self) -> tuple[Future[Part], int] | None:
        item = None if self.ended else self.parts.get()
        self.ended = item is None
        return item

    def close(self) -> None:
        if self.slide is not None:
            self.source.meter.decoded += self.slide.cost.pixels
            self.source.meter.disk += self.slide.cost.disk
            self.slide.close()
            self.slide = None


class Feed(Generic[S]):
    """Tiles of many slides, in order. Iterate inside `with`; see `__iter__`.

    sources: None among them: there is none for now. readers: threads that read at a time; None = found by trying, up
    to `most_readers`.
    """

    def __init__(self, sources: Iterable[S | None], readers: int | None, most_readers: int, queue_bytes: int) -> None:
        most = readers or max(1, most_readers)
        self.readers = Doubling(readers or max(1, most // 4), most)
        self.budget = Budget(queue_bytes)
        self._gate = Gate(self.readers)
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="reader")
        self._fifo: queue.Queue[_Reading[S] | BaseException | _Pause | None] = queue.Queue()
        self._stopped = False
        self._current: _Reading[S] | None = None
        self._trial = (perf_counter(), 0, 0.0)  # since when, bytes taken, seconds waited
        self._feeder = threading.Thread(target=self._run, args=(iter(sources),), name="feeder", daemon=True)
        self._lock = threading.Lock()

    def __enter__(self) -> "Feed[S]":
        self._feeder.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop reading, wait for the threads, close what is open."""
        with self._lock:
            self._stopped = True
        self.budget.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._feeder.join(PATIENCE_S)  # it may be waiting for a slide from elsewhere
        if self._current is not None:
            self._current.close()
        with suppress(queue.Empty):
            while True:
                if isinstance(left := self._fifo.get_nowait(), _Reading):
                    left.close()

    # -- the feeder's thread --

    def _run(self, sources: Iterator[S | None]) -> None:
        reading: _Reading[S] | None = None
        try:
            for source in sources:
                if self._stopped:
                    return
                if source is None:
                    self._fifo.put(_Pause())
                    continue
                reading = _Reading(source)
                self._feed(reading)
            self._fifo.put(None)
        except BaseException as error:  # noqa: BLE001 - of the machine: raised where it is iterated
            if reading is not None:  # and somebody may be waiting for its next block
                fault: Future[Part] = Future()
                fault.set_exception(error)
                reading.parts.put((fault, 0))
            self._fifo.put(error)

    def _feed(self, reading: _Reading[S]) -> None:
        source = reading.source
        try:
            if source.missing.any():
                reading.slide = source.open()
                reading.reader = TileReader(reading.slide, source.tree, source.missing)
        except SlideError as error:
            source.error = error
        except BaseException:
            reading.close()
            raise
        with self._lock:  # what is in the queue when all ends is closed; nothing may come after
            if self._stopped:
                reading.close()
                return
            self._fifo.put(reading)
        for block in reading.reader.blocks if reading.reader else ():
            size = reading.reader.nbytes(block) if reading.reader else 0
            if not self.budget.take(size):
                break
            reading.parts.put((self._pool.submit(self._read, reading, block), size))
        reading.parts.put(None)

    def _read(self, reading: _Reading[S], block: Block) -> Part:
        assert reading.reader is not None
        with self._gate:
            if self._stopped or reading.source.error:
                return Part([], None)
            started = perf_counter()
            try:
                return reading.reader.read(block)
            finally:
                spent = perf_counter() - started
                with self._lock:
                    reading.source.meter.reading += spent

    # -- the encoder's thread --

    def __iter__(self) -> Iterator[tuple[S, list[Tile] | None] | None]:
        """(source, tiles) in order, (source, None) after its last tile or when it has failed; None: no slide is there.

        A SlideError becomes the source's `error`; errors of the machine are raised.
        """
        starving = 0.0
        while True:
            started = perf_counter()
            try:
                reading = self._fifo.get(timeout=IDLE_S)
            except queue.Empty:
                starving += perf_counter() - started
                yield None
                continue
            starving += perf_counter() - started
            if reading is None:
                return
            if isinstance(reading, _Pause):
                if self._fifo.empty():
                    yield None
                continue
            if isinstance(reading, BaseException):
                raise reading
            reading.source.meter.starving += starving
            since, total, spent = self._trial
            self._trial, starving = (since + starving, total, spent), 0.0
            yield from self._tiles_of(reading)

    def _tiles_of(self, reading: _Reading[S]) -> Iterator[tuple[S, list[Tile] | None]]:
        self._current, source = reading, reading.source
        try:
            if reading.reader is not None:
                source.meter.needed += reading.reader.needed
                for tiles in reading.reader.joined(self._parts(reading)):
                    if tiles:
                        yield source, tiles
                    if source.error:
                        break
        except SlideError as error:
            source.error = error
        if reading.reader is not None:
            _refuse_changed(source)
        self._drain(reading)
        yield source, None

    def _parts(self, reading: _Reading[S]) -> Iterator[Part]:
        while (item := reading.next_part()) is not None:
            future, size = item
            started = perf_counter()
            try:
                part = future.result()
            finally:
                self.budget.give(size)
            waited = perf_counter() - started
            reading.source.meter.waiting += waited
            self._try_more(size, waited)
            yield part

    def _try_more(self, size: int, waited: float) -> None:
        """Another thread, if the encoder has to wait for those there are."""
        since, total, spent = self._trial
        total, spent, elapsed = total + size, spent + waited, perf_counter() - since
        if elapsed < TRIAL_S:
            self._trial = since, total, spent
            return
        if spent > WAITS * elapsed:
            self.readers.report(total, elapsed)
        self._trial = (perf_counter(), 0, 0.0)

    def _drain(self, reading: _Reading[S]) -> None:
        """What is left of a slide that was given up; then its file is closed."""
        while (item := reading.next_part()) is not None:
            future, size = item
            future.exception()
            self.budget.give(size)
        reading.close()


def _refuse_changed(source: Source) -> None:
    """What was read of a file that changed meanwhile is worth nothing, and neither is an error that came of it."""
    try:
        if not source.unchanged():
            reason = "the file changed while it was read; run again when it is whole"
            source.error = UnreadableSlide(source.slide, "encode", reason)
    except SlideError as error:  # it is gone
        source.error = error
