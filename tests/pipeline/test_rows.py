"""Rows of one slide into whole chunks, by a thread that writes: bounded, in order, and no error is lost."""

import errno
import threading
import time

import numpy as np
import pytest

from pipeline import rows as module
from pipeline.errors import CorruptTiles, RunStopped, UnreadableSlide
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.rows import SlideRows, Work, Writer
from pipeline.tissue import TissueMask

pytestmark = pytest.mark.timeout(60)

DIM, CHUNK = 3, 10


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", CHUNK)


# --- the writer ------------------------------------------------------------------------------------------------------


def test_writes_are_done_one_by_one_and_in_their_order():
    done, names = [], set()

    def task(number: int) -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.002 * (number % 3 == 0))
        done.append(number)

    with Writer(1000) as writer:
        for number in range(12):
            writer.write(lambda number=number: task(number), 10)
    assert done == list(range(12)), "all of them, before the writer is left"
    assert len(names) == 1
    assert threading.current_thread().name not in names


@pytest.mark.parametrize("most", [1, 10, 35, 1000])
def test_no_more_bytes_wait_than_allowed(most):
    lock, waiting, peaks = threading.Lock(), 0, []

    def task() -> None:
        nonlocal waiting
        time.sleep(0.001)
        with lock:
            waiting -= 10

    with Writer(most) as writer:
        for _ in range(20):
            writer.write(task, 10)
            with lock:
                waiting += 10
                peaks.append(waiting)
    assert max(peaks) <= max(most, 10)  # a task counts itself as done just before the writer does
    if most == 1000:
        assert max(peaks) > 35, "and all that is allowed is used"


def test_who_waits_for_room_is_told_how_long():
    with Writer(10) as writer:
        _, waited = writer.write(lambda: time.sleep(0.05), 10)
        assert waited < 0.04
        _, waited = writer.write(lambda: None, 10)
        assert waited > 0.03


def test_a_write_that_fails_gives_its_room_back():
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writer(10) as writer:
        futures = [writer.write(fail, 10)[0] for _ in range(5)]
        assert [future.exception(timeout=10).errno for future in futures] == [errno.ENOSPC] * 5


def test_left_with_an_error_it_ends_what_is_begun_and_drops_the_rest():
    begun, go, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go.wait(20)
        done.append(0)

    def use() -> None:
        with Writer(1000) as writer:
            writer.write(first, 10)
            futures.extend(writer.write(lambda k=k: done.append(k), 10)[0] for k in (1, 2, 3))
            assert begun.wait(20)
            threading.Timer(0.05, go.set).start()
            raise RunStopped("elsewhere")

    futures: list = []
    with pytest.raises(RunStopped, match="elsewhere"):
        use()
    assert done == [0]
    assert all(future.cancelled() for future in futures)


# --- the rows --------------------------------------------------------------------------------------------------------


class Kept:
    """Features that are kept in memory, as far as rows ask for them."""

    key = "mean"

    def __init__(self, count: int, dtype=np.float16) -> None:
        self.dtype = np.dtype(dtype)
        self.x, self.valid = np.full((count, DIM), -1, dtype), np.zeros(count, bool)
        self.there = np.zeros(count, bool)
        self.writes: list[int] = []
        self.hold, self.fault = threading.Event(), None
        self.hold.set()

    def missing_rows(self) -> np.ndarray:
        return ~self.there

    def stored_valid(self) -> np.ndarray:
        return self.valid & self.there

    def write_chunk(self, chunk: int, x: np.ndarray, valid: np.ndarray) -> None:
        self.hold.wait(20)
        if self.fault is not None:
            raise self.fault
        at = slice(chunk * CHUNK, chunk * CHUNK + len(x))
        assert x.dtype == self.dtype
        self.x[at], self.valid[at], self.there[at] = x, valid, True
        self.writes.append(chunk)


def tree_of(side: int = 160) -> QuadTree:
    """A table of 25 coarse nodes and 100 finest ones."""
    slide = open_slide(np.zeros((side, side, 3), np.uint8), mpp=0.5)
    mask = TissueMask(np.ones((1, 1), bool), (float(side), float(side)), 0.5, "test")
    tree = build_quadtree(slide, mask, mpp=0.5, tile_px=16, levels=2, min_tissue=0)
    assert [level.stop - level.start for level in tree.levels] == [25, 100]
    return tree


COARSE, ALL = 25, 125


@pytest.fixture
def writer():
    with Writer(1 << 20) as writer:
        yield writer


def rows_of(features: Kept, writer: Writer) -> SlideRows:
    return SlideRows(Work("a.svs", open, lambda: True, tree_of(), features), DIM, writer)


def value(row: int) -> np.ndarray:
    return np.array([row, 2 * row, 3 * row], np.float32)


def test_each_chunk_is_written_once_when_its_last_row_is_in(writer):
    features = Kept(ALL)
    rows, order = rows_of(features, writer), np.random.default_rng(0).permutation(ALL).tolist()
    for row in order:
        rows.put(row, value(row))
    rows.read_all = True
    assert rows.settle() == 0
    ends = [max(order.index(row) for row in range(c * CHUNK, min(c * CHUNK + CHUNK, ALL))) for c in range(13)]
    assert features.writes == np.argsort(ends).tolist()
    assert features.valid.all()
    np.testing.assert_array_equal(features.x, np.stack([value(row) for row in range(ALL)]))
    assert rows.finished
    assert rows.meter.tiles == ALL
    assert rows.meter.writing > 0


def test_chunks_that_are_there_are_not_written_again(writer):
    features = Kept(ALL)
    features.there[20:100] = features.valid[20:100] = True
    rows = rows_of(features, writer)
    for row in np.flatnonzero(rows.missing):
        rows.put(int(row), value(row))
    rows.settle()
    assert features.writes == [0, 1, 10, 11, 12]
    assert (features.x[20:100] == -1).all()


def test_a_slide_that_misses_nothing_is_finished_as_soon_as_it_was_gone_through(writer):
    features = Kept(ALL)
    features.there[:] = True
    features.valid[5:] = True
    rows = rows_of(features, writer)
    assert not rows.finished
    rows.read_all = True
    assert rows.finished
    assert rows.settle() == 5, "what an earlier run could not read counts too"


def test_it_is_not_finished_before_the_disk_has_it(writer):
    features = Kept(ALL)
    features.hold.clear()
    rows = rows_of(features, writer)
    for row in range(ALL):
        rows.put(row, value(row))
        assert not rows.finished
    rows.read_all = True
    assert not rows.finished
    features.hold.set()
    rows.settle()
    assert rows.finished


def test_a_slide_that_has_failed_is_finished_once_nothing_more_comes_of_it(writer):
    """Else it would be told twice: when it fails, and when the last of its blocks has been let go."""
    rows = rows_of(Kept(ALL), writer)
    rows.error = UnreadableSlide("a.svs", "encode", "made up")
    assert not rows.finished
    rows.read_all = True
    assert rows.finished
    assert rows.settle() == 0


def test_rows_that_cannot_be_read_are_zero_and_invalid(writer):
    features = Kept(ALL)
    rows = rows_of(features, writer)
    for row in range(ALL):
        rows.put(row, None if row in (3, 60) else value(row + 1))
    assert rows.settle() == 2
    assert np.flatnonzero(~features.valid).tolist() == [3, 60]
    assert not features.x[[3, 60]].any()
    assert features.x[4].any()
    assert rows.meter.tiles == ALL - 2


@pytest.mark.parametrize(
    ("lost", "fails"),
    [([COARSE], False), ([COARSE, COARSE + 1], True), ([*range(COARSE)], False), ([*range(COARSE), 124], False)],
)
def test_one_in_a_hundred_of_the_finest_may_be_lost(writer, lost, fails):
    rows = rows_of(Kept(ALL), writer)
    for row in lost:
        assert rows.error is None
        rows.put(row, None)
    assert isinstance(rows.error, CorruptTiles) == fails
    if fails:
        assert "at least 2 of 100 tiles cannot be decoded, more than 1%" in rows.error.reason


def test_what_earlier_runs_lost_counts_when_all_is_written(writer):
    features = Kept(ALL)
    features.there[: ALL - 5] = features.valid[: ALL - 5] = True
    features.valid[COARSE] = False
    rows = rows_of(features, writer)
    for row in range(ALL - 5, ALL):
        rows.put(row, None if row == 122 else value(row))
    assert rows.error is None, "one now"
    rows.settle()
    assert isinstance(rows.error, CorruptTiles), "and one before"


def test_of_a_slide_that_has_failed_nothing_more_is_written(writer):
    features = Kept(ALL)
    rows = rows_of(features, writer)
    for row in range(CHUNK):
        rows.put(row, value(row))
    for row in range(COARSE, COARSE + CHUNK):
        rows.put(row, None)
    for row in range(CHUNK, 2 * CHUNK):
        rows.put(row, value(row))
    rows.settle()
    assert features.writes == [0]


FAULTS = [OSError(errno.ENOSPC, "No space left on device"), RunStopped("stop"), KeyboardInterrupt()]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("failed", [False, True])
def test_what_the_writer_met_is_raised_in_the_end(writer, fault, failed):
    """Also of a slide that has failed: the next one would meet it too."""
    features = Kept(ALL)
    features.fault = fault
    rows = rows_of(features, writer)
    for row in range(CHUNK):
        rows.put(row, value(row))
    if failed:
        rows.error = UnreadableSlide("a.svs", "encode", "made up")
    with pytest.raises(type(fault)) as caught:
        rows.settle()
    assert caught.value is fault


def test_and_with_the_next_chunk(writer):
    """A slide of a million tiles does not go on for hours."""
    features = Kept(ALL)
    features.fault = FAULTS[0]
    rows = rows_of(features, writer)
    for row in range(CHUNK):
        rows.put(row, value(row))
    writer.write(lambda: None, 1)[0].result(timeout=10)  # after the first write
    for row in range(CHUNK, 2 * CHUNK - 1):
        rows.put(row, value(row))
    with pytest.raises(OSError, match="No space left"):
        rows.put(2 * CHUNK - 1, value(1))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_no_number_is_never_written(writer, number, dtype):
    features = Kept(ALL, dtype)
    rows = rows_of(features, writer)
    for row in range(CHUNK):
        rows.put(row, value(row) if row != 4 else np.array([0, number, 0], np.float32))
    with pytest.raises(RunStopped, match=r"a\.svs: encode: the encoder mean gave inf or NaN"):
        rows.settle()
    assert features.writes == []


@pytest.mark.parametrize(("number", "fits"), [(65504, True), (65519, False), (-70000, False)])
def test_what_the_type_cannot_hold_is_never_written(writer, number, fits):
    features = Kept(ALL)
    rows = rows_of(features, writer)
    for row in range(CHUNK):
        rows.put(row, np.full(DIM, number, np.float32))
    if fits:
        rows.settle()
        assert (features.x[:CHUNK] == number).all()
    else:
        with pytest.raises(RunStopped, match=f"gave {abs(number):g}, which does not fit float16; pass --dtype float32"):
            rows.settle()
        assert features.writes == []
