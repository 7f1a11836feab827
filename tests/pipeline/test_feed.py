"""Many slides, many threads, one order: what is read, what is told of failures; nothing hangs or stays open."""

import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from random import Random

import numpy as np
import pytest

from pipeline import feed as module
from pipeline import stream
from pipeline.doubling import Doubling
from pipeline.errors import CorruptTiles, RunStopped, SlideError, UnreadableSlide
from pipeline.feed import Budget, Feed, Gate
from pipeline.meter import Meter
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers.image import ArraySlide
from pipeline.stream import TileReader, stream_tiles
from pipeline.tissue import TissueMask

pytestmark = pytest.mark.timeout(60)

PX = 8
SIZE = (64, 48)  # of a slide: 4 × 3 blocks, each one node of 16 × 16 with four tiles of 8 × 8 below it
BLOCKS = 12
BLOCK_BYTES = 3 * 16**2 + 12 * 16**2


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    monkeypatch.setattr(stream, "GROUP_PX", 16)
    monkeypatch.setattr(module, "IDLE_S", 0.02)
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert threads() == []


def threads() -> list[str]:
    """Those of a feed that are alive; given a moment, for a thread ends after what it did has been seen."""
    for _ in range(100):
        alive = [t.name for t in threading.enumerate() if t.name.startswith(("reader", "feeder"))]
        if not alive:
            break
        time.sleep(0.01)
    return alive


class Watched(ArraySlide):
    """Calls `before_read` with the number of the read; notes whether it was closed, and whether that was too early."""

    def __init__(self, pixels: np.ndarray, before_read=lambda number: None) -> None:
        super().__init__(pixels)
        self.mpp, self.before_read = 0.5, before_read
        self.reads = self.now = self.most = self.closed = 0
        self.closed_while_read = False
        self._counting = threading.Lock()

    def read(self, x, y, level, width, height):
        with self._counting:
            self.reads, self.now = self.reads + 1, self.now + 1
            self.most = max(self.most, self.now)
            number = self.reads
        try:
            assert not self.closed
            self.before_read(number)
            self.cost.add(width * height, 0.25)
            return super().read(x, y, level, width, height)
        finally:
            with self._counting:
                self.now -= 1

    def close(self):
        self.closed += 1
        self.closed_while_read |= self.now > 0


def yes() -> bool:
    return True


@dataclass
class Source:
    """What Feed asks of a slide; `slides` are the files that were opened."""

    slide: str
    pixels: np.ndarray
    tree: QuadTree
    missing: np.ndarray
    before_read: object = lambda number: None
    unchanged: object = yes
    error: SlideError | None = None
    meter: Meter = field(default_factory=Meter)
    slides: list[Watched] = field(default_factory=list)

    def open(self) -> Watched:
        self.slides.append(Watched(self.pixels, self.before_read))
        return self.slides[-1]


def source(name: str, seed: int = 0, size: tuple[int, int] = SIZE, levels: int = 2, **options) -> Source:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    slide = Watched(pixels)
    mask = TissueMask(np.ones((1, 1), bool), (float(size[0]), float(size[1])), 0.5, "test")
    tree = build_quadtree(slide, mask, mpp=0.5, tile_px=PX, levels=levels, min_tissue=0)
    return Source(name, pixels, tree, np.ones(len(tree), bool), **options)


def several(count: int, **options) -> list[Source]:
    return [source(f"slide {seed}", seed, **options) for seed in range(count)]


def feed_of(sources, readers: int | None = 2, most_readers: int = 4, queue_bytes: int = 1 << 20) -> Feed:
    return Feed(sources, readers, most_readers, queue_bytes)


def flat(items) -> list[tuple[str, int, bytes | None]]:
    """(slide, row, pixels) of every tile in the order of arrival; (slide, -1, None) at the end of a slide."""
    found = []
    for item in items:
        if item is not None:
            one, tiles = item
            rows = [(-1, None)] if tiles is None else tiles
            found += [(one.slide, row, None if p is None else p.tobytes()) for row, p in rows]
    return found


def serial(sources: list[Source]) -> list[tuple[str, int, bytes | None]]:
    found = []
    for one in sources:
        tiles = stream_tiles(Watched(one.pixels), one.tree, one.missing) if one.missing.any() else ()
        found += [(one.slide, row, p.tobytes()) for row, p in tiles] + [(one.slide, -1, None)]
    return found


def run(sources: list[Source], **options) -> list[tuple[str, int, bytes | None]]:
    with feed_of(iter(sources), **options) as feed:
        found = flat(feed)
    assert feed.budget.used == 0
    assert_closed(sources)
    return found


def assert_closed(sources: list[Source]) -> None:
    for one in sources:
        for slide in one.slides:
            assert slide.closed == 1, f"{one.slide} was closed {slide.closed} times"
            assert not slide.closed_while_read


def ends(found) -> list[str]:
    return [name for name, row, _ in found if row == -1]


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_bytes", [1, 3 * BLOCK_BYTES, 1 << 20])
@pytest.mark.parametrize("readers", [1, 2, 7, None])
def test_tiles_come_in_order_whichever_thread_was_faster(readers, queue_bytes):
    random = Random(readers)
    lazy = partial(several, 4, before_read=lambda number: time.sleep(random.choice([0, 0, 0.002])))
    assert run(lazy(), readers=readers, queue_bytes=queue_bytes) == serial(several(4))


@pytest.mark.parametrize("queue_bytes", [1, 1 << 20])
@pytest.mark.parametrize("readers", [1, 3])
def test_nodes_larger_than_a_block_are_put_together(monkeypatch, readers, queue_bytes):
    monkeypatch.setattr(stream, "READ_PX", 16)
    sources = several(3, size=(100, 70), levels=4)
    reader = TileReader(Watched(sources[0].pixels), sources[0].tree)
    assert len(reader.blocks) > len(sources[0].tree.levels[0].grid), "otherwise nothing is put together"
    assert run(sources, readers=readers, queue_bytes=queue_bytes) == serial(several(3, size=(100, 70), levels=4))


def test_only_what_is_missing_is_read_and_a_slide_that_misses_nothing_is_not_opened():
    sources = several(4)
    sources[0].missing[:] = False
    sources[2].missing[:] = False
    sources[1].missing[5:] = False
    found = run(sources)
    assert found == serial(sources)
    assert ends(found) == [one.slide for one in sources]
    assert [len(one.slides) for one in sources] == [0, 1, 0, 1]
    assert sources[1].slides[0].reads < sources[3].slides[0].reads == BLOCKS


def test_no_slides_are_no_items():
    assert run([]) == []


def test_blocks_are_read_by_as_many_threads_as_told_and_no_more():
    for readers in (1, 3):
        sources = several(2, before_read=lambda number: time.sleep(0.003))
        run(sources, readers=readers)
        assert max(one.slides[0].most for one in sources) == readers


def test_the_next_slides_are_read_while_one_is_encoded():
    sources = several(3)
    with feed_of(iter(sources)) as feed:
        items = iter(feed)
        next(items)
        assert wait_until(lambda: [one.slides and one.slides[0].reads for one in sources] == [BLOCKS] * 3)
        flat(items)


def wait_until(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(condition())


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reading", "encoding"), [(0, 0.003), (0.003, 0), (0, 0)])
@pytest.mark.parametrize("blocks", [0, 1, 3, 7])
def test_no_more_bytes_are_in_flight_than_allowed(blocks, reading, encoding):
    """Counted here, from what was begun to be read and what was taken: none is told by the feed itself."""
    sources = several(2, before_read=lambda number: time.sleep(reading))
    ahead, taken = [], 0
    with feed_of(iter(sources), readers=3, queue_bytes=blocks * BLOCK_BYTES + 10) as feed:
        for item in feed:
            taken += item is not None and item[1] is not None
            time.sleep(encoding)
            ahead.append(sum(slide.reads for one in sources for slide in one.slides) - taken)
    assert taken == 2 * BLOCKS
    assert max(ahead) <= max(blocks, 1)
    assert feed.budget.peak <= max(blocks, 1) * BLOCK_BYTES
    if not reading and encoding:
        assert max(ahead) == max(blocks, 1), "and all that is allowed is used"


def test_a_block_larger_than_the_budget_is_let_through_alone():
    budget, entered = Budget(10), []

    def take(size: int) -> None:
        budget.take(size)
        entered.append(size)

    budget.take(4)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, 25)
        time.sleep(0.02)
        assert not entered, "it waits for what is there"
        budget.give(4)
        waiting.result(timeout=10)
        waiting = pool.submit(take, 1)
        time.sleep(0.02)
        assert entered == [25], "and nothing goes beside it"
        budget.give(25)
        waiting.result(timeout=10)
    assert (budget.used, budget.peak) == (1, 25)


def test_a_closed_budget_lets_nobody_wait():
    budget = Budget(1)
    assert budget.take(1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(budget.take, 1)
        budget.close()
        assert waiting.result(timeout=10) is False
    assert budget.take(1) is False


# --- waiting for a slide ---------------------------------------------------------------------------------------------


def test_while_no_slide_is_there_the_encoder_is_told():
    first, second = several(2)
    more, ticks = threading.Event(), 0

    def arriving():
        yield first
        more.wait(30)
        yield second

    found = []
    with feed_of(arriving()) as feed:
        for item in feed:
            if item is None:
                assert ends(found) == ["slide 0"], "not while tiles are being read"
                ticks += 1
                more.set()
            found += flat([item])
    assert ticks >= 1
    assert found == serial(several(2))
    assert second.meter.starving > 0
    assert first.meter.starving < second.meter.starving + 1


def test_whoever_gives_slides_may_say_that_there_is_none_for_now(monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 60)
    first, second = several(2)
    told = threading.Event()

    def arriving():
        yield None
        yield first
        yield None
        assert told.wait(30), "though nobody has been waiting for long"
        yield second

    found = []
    with feed_of(arriving()) as feed:
        for item in feed:
            if item is None and ends(found) == ["slide 0"]:
                told.set()
            found += flat([item])
    assert found == serial(several(2))


def test_where_slides_have_come_meanwhile_a_pause_is_none(monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 60)
    queued = threading.Event()

    def arriving():
        first, second = several(2)
        yield first
        yield None
        yield second
        queued.set()

    with feed_of(arriving()) as feed:
        assert queued.wait(30)
        assert None not in list(feed)


def test_a_slow_block_is_no_lack_of_slides():
    slow = source("slow", before_read=lambda number: time.sleep(0.1 * (number == 3)))
    with feed_of(iter([slow])) as feed:
        items = list(feed)
    assert None not in items[1:]
    assert slow.meter.waiting > 0.02


# --- slides that fail ------------------------------------------------------------------------------------------------


def refuse(number: int, at: int = 1) -> None:
    if number == at:
        raise UnreadableSlide("slide 1", "encode", "made up")


def failing(kind: str) -> list[Source]:
    """Three slides, of which the second fails."""
    sources = several(3)
    bad = sources[1]
    if kind == "open":
        bad.open = partial(refuse, 1)
    elif kind == "plan":
        bad.before_read = refuse
        bad.tree = "not a tree"  # stands for anything that TileReader may say of a slide
    elif kind == "read at once":
        bad.before_read = refuse
    elif kind == "read late":
        bad.before_read = partial(refuse, at=BLOCKS - 2)
    elif kind == "changed":
        bad.unchanged = lambda: False
    elif kind == "changed, with an error of its own":
        bad.unchanged = partial(refuse, 1)
    return sources


@pytest.mark.parametrize("queue_bytes", [1, 1 << 20])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize(
    "kind", ["open", "plan", "read at once", "read late", "changed", "changed, with an error of its own"]
)
def test_a_slide_that_fails_leaves_its_neighbours_alone(monkeypatch, kind, readers, queue_bytes):
    if kind == "plan":
        original = TileReader.__init__

        def plan(self, slide, tree, wanted):
            if tree == "not a tree":
                raise UnreadableSlide("slide 1", "encode", "made up")
            original(self, slide, tree, wanted)

        monkeypatch.setattr(TileReader, "__init__", plan)
    sources = failing(kind)
    found = run(sources, readers=readers, queue_bytes=queue_bytes)
    others = several(3)
    assert [f for f in found if f[0] != "slide 1"] == serial([others[0], others[2]])
    assert ends(found) == ["slide 0", "slide 1", "slide 2"], "it is told once that it has ended, and in its place"
    assert [type(one.error) for one in sources] == [type(None), UnreadableSlide, type(None)]
    whole = [f for f in serial([others[1]]) if f[1] >= 0]
    of_it = [f for f in found if f[0] == "slide 1" and f[1] >= 0]
    assert of_it == whole[: len(of_it)], "what came before the fault is as it always is"
    assert len(of_it) == (len(whole) if "changed" in kind else len(of_it))
    if kind in ("open", "plan", "read at once") and readers == 1:
        assert of_it == []


def test_a_file_that_changed_says_so():
    one = source("a", unchanged=lambda: False)
    run([one])
    assert one.error.stage == "encode"
    assert "changed while it was read; run again" in one.error.reason


def test_whether_it_changed_is_asked_after_the_last_read():
    one = source("a")
    asked = []
    one.unchanged = lambda: asked.append(one.slides[0].reads) or True
    run([one])
    assert asked == [BLOCKS]


def test_damaged_pixels_are_tiles_that_are_none():
    def damaged(number: int) -> None:
        if number == 1:  # the block; its quarters are read again
            raise CorruptTiles("slide 0", "encode", "made up")

    one, other = source("slide 0", before_read=damaged), source("slide 1", 1)
    found = run([one, other], readers=1)
    assert one.error is None
    lost = [row for name, row, pixels in found if name == "slide 0" and row >= 0 and pixels is None]
    assert len(lost) == 0
    assert [f for f in found if f[0] == "slide 1"] == serial([source("slide 1", 1)])


@pytest.mark.parametrize("after", [1, 5])
def test_of_a_slide_that_is_given_up_no_more_is_read(after):
    """As the encoder does where too many tiles are lost."""
    sources = several(3)
    sources[1].before_read = lambda number: time.sleep(0.005)
    found, count = [], 0
    with feed_of(iter(sources), readers=1, queue_bytes=3 * BLOCK_BYTES) as feed:
        for item in feed:
            found += flat([item])
            if item and item[0] is sources[1] and item[1]:
                count += 1
                if count == after:
                    sources[1].error = CorruptTiles("slide 1", "encode", "too many")
    assert count == after
    assert ends(found) == ["slide 0", "slide 1", "slide 2"]
    assert sources[1].slides[0].reads <= after + 4, "at most what was in flight"
    assert feed.budget.used == 0
    assert_closed(sources)


def test_a_large_node_of_a_failing_slide_does_not_stop_the_rest(monkeypatch):
    monkeypatch.setattr(stream, "READ_PX", 16)
    sources = several(3, size=(100, 70), levels=4)
    sources[1].before_read = partial(refuse, at=7)
    found = run(sources, readers=3)
    assert isinstance(sources[1].error, UnreadableSlide)
    others = several(3, size=(100, 70), levels=4)
    assert [f for f in found if f[0] != "slide 1"] == serial([others[0], others[2]])


# --- faults of the machine -------------------------------------------------------------------------------------------


def no_descriptors(*_: object) -> None:
    raise OSError(errno.EMFILE, "too many open files")


def faulty(kind: str, monkeypatch) -> tuple[list[Source], object]:
    """Five slides with a fault in the third, and the iterator over them."""
    sources = several(5, before_read=lambda number: time.sleep(0.001))
    bad, arriving = sources[2], iter(sources)
    if kind == "open":
        bad.open = no_descriptors
    elif kind == "first read":
        bad.before_read = no_descriptors
    elif kind == "last read":
        bad.before_read = lambda number: number == BLOCKS and no_descriptors()
    elif kind == "unchanged":
        bad.unchanged = no_descriptors
    elif kind == "the list of slides":

        def until_it_fails():
            yield from sources[:3]
            no_descriptors()

        arriving = until_it_fails()
    elif kind == "size of a block":
        counted = []

        def nbytes(self, block):
            counted.append(block)
            return no_descriptors() if len(counted) == 2 * BLOCKS + 5 else BLOCK_BYTES

        monkeypatch.setattr(TileReader, "nbytes", nbytes)
    elif kind == "a new thread":
        original = ThreadPoolExecutor.submit
        begun = []

        def submit(self, *arguments):
            begun.append(1)
            return no_descriptors() if len(begun) == 2 * BLOCKS + 5 else original(self, *arguments)

        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    elif kind == "the plan":
        original_plan = TileReader.__init__

        def plan(self, slide, tree, wanted):
            if tree is bad.tree:
                no_descriptors()
            original_plan(self, slide, tree, wanted)

        monkeypatch.setattr(TileReader, "__init__", plan)
    return sources, arriving


KINDS = [
    *("open", "the plan", "first read", "last read", "unchanged"),
    *("the list of slides", "size of a block", "a new thread"),
]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("queue_bytes", [1, 5 * BLOCK_BYTES, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_machine_is_raised_and_all_is_closed(monkeypatch, kind, queue_bytes, large):
    if large:
        monkeypatch.setattr(stream, "READ_PX", 8)  # so that nodes are put together from their quarters
    sources, arriving = faulty(kind, monkeypatch)
    with pytest.raises(OSError, match="too many open files"), feed_of(arriving, 3, 3, queue_bytes) as feed:
        flat(feed)
    assert threads() == []
    assert_closed(sources)
    assert any(one.slides for one in sources)


def test_an_error_of_whoever_encodes_goes_through_and_all_is_closed():
    sources = several(4, before_read=lambda number: time.sleep(0.002))

    def encode(item) -> None:
        if item and item[0] is sources[1]:
            raise RunStopped("mine")

    with pytest.raises(RunStopped, match="mine"), feed_of(iter(sources), 3, 3, 4 * BLOCK_BYTES) as feed:
        list(map(encode, feed))
    assert threads() == []
    assert_closed(sources)


def test_an_interrupt_while_waiting_for_a_block_closes_all():
    """Ctrl-C arrives in whatever the main thread waits for."""
    sources, go = several(2), threading.Event()
    sources[0].before_read = lambda number: go.wait(30)

    def interrupted(self, timeout=None):
        go.set()
        raise KeyboardInterrupt

    def use() -> None:
        with feed_of(iter(sources)) as feed, pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.Future, "result", interrupted)
            flat(feed)

    with pytest.raises(KeyboardInterrupt):
        use()
    assert threads() == []
    assert_closed(sources)


# --- an end that comes early -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_bytes", [1, 3 * BLOCK_BYTES, 1 << 20])
@pytest.mark.parametrize("after", [0, 1, 2, BLOCKS, BLOCKS + 1, BLOCKS + 2, 3 * BLOCKS])
def test_whoever_stops_early_leaves_nothing_open(after, queue_bytes):
    sources = several(4, before_read=lambda number: time.sleep(0.001))
    with feed_of(iter(sources), 3, 3, queue_bytes) as feed:
        for count, _ in enumerate(feed):
            if count == after:
                break
    assert threads() == []
    assert_closed(sources)


def test_a_feed_that_nobody_iterates_ends_too():
    sources = several(4)
    with feed_of(iter(sources), 2, 2, 1):
        pass
    assert threads() == []
    assert_closed(sources)


def test_the_end_does_not_wait_for_a_slide_that_does_not_come():
    first, late, more = source("a"), source("b"), threading.Event()

    def arriving():
        yield first
        more.wait(30)
        yield late

    started = time.monotonic()
    with feed_of(arriving()) as feed:
        next(iter(feed))
    assert time.monotonic() - started < 10
    assert_closed([first])
    more.set()
    assert threads() == []
    assert late.slides == [], "and when it comes after all it is not opened"


def test_a_slide_that_was_just_being_opened_is_closed():
    """However long that takes, and even if nobody waits for it any more."""
    slow, go, began = source("slow"), threading.Event(), threading.Event()
    original = slow.open

    def opening():
        began.set()
        go.wait(30)
        return original()

    slow.open = opening
    with feed_of(iter([slow])):
        assert began.wait(20)
    assert slow.slides == []
    go.set()
    assert threads() == []
    assert_closed([slow])
    assert slow.slides[0].reads == 0


def test_no_slide_is_closed_under_a_thread_that_reads_it():
    """A library that reads from a closed file takes the process down."""
    sources = several(3)
    inside, go = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        inside.set()
        go.wait(30)

    sources[1].before_read = slow
    sources[0].before_read = lambda number: time.sleep(0.001)

    def stop(_) -> None:
        assert inside.wait(20)
        threading.Timer(0.1, go.set).start()
        raise RunStopped("now")

    with pytest.raises(RunStopped, match="now"), feed_of(iter(sources), 3, 3) as feed:
        list(map(stop, feed))
    assert_closed(sources)
    assert sources[1].slides[0].reads > 0


# --- how many threads ------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "perf_counter", lambda: self.now)


@pytest.mark.parametrize(
    ("rate", "share", "readers"),
    [
        (lambda readers: readers, 0.5, 8),  # each thread brings its share
        (lambda readers: min(readers, 4), 0.5, 4),  # a disk, or cores, that four keep busy
        (lambda readers: 1, 0.5, 2),
        (lambda readers: readers, 0.09, 2),  # the encoder hardly waits: it is what bounds
        (lambda readers: readers, 0.11, 8),
    ],
)
def test_readers_are_added_while_it_helps_an_encoder_that_waits(monkeypatch, rate, share, readers):
    clock = Clock(monkeypatch)
    feed = feed_of(iter([]), None, 8)
    assert feed.readers.value == 2
    for _ in range(200):
        clock.now += 0.05
        feed._try_more(1000 * rate(feed.readers.value), 0.05 * share)
    assert feed.readers.value == readers
    feed._pool.shutdown()


def test_a_number_that_was_told_is_kept(monkeypatch):
    clock = Clock(monkeypatch)
    feed = feed_of(iter([]), 2, 8)
    for _ in range(100):
        clock.now += 0.05
        feed._try_more(1000 * feed.readers.value, 0.05)
    assert feed.readers.value == 2
    feed._pool.shutdown()


def test_many_small_slides_find_the_number_too(monkeypatch):
    """None of them takes as long as a trial does."""
    monkeypatch.setattr(module, "TRIAL_S", 0.05)
    sources = several(40, before_read=lambda number: time.sleep(0.002))
    with feed_of(iter(sources), None, 8) as feed:
        flat(feed)
    assert feed.readers.value > 2
    assert max(slide.most for one in sources for slide in one.slides) > 2


def test_waiting_for_slides_is_no_reason_for_more_readers(monkeypatch):
    monkeypatch.setattr(module, "TRIAL_S", 0.05)
    tried = []

    def rare():
        for one in several(8):
            time.sleep(0.06)
            yield one

    with feed_of(rare(), None, 8) as feed:
        monkeypatch.setattr(feed.readers, "report", lambda *told: tried.append(told))
        for _ in feed:
            time.sleep(0.002)
    assert len(tried) <= 1, "a trial may fall on a block that was waited for by chance"


def test_a_gate_lets_in_as_many_as_it_says():
    limit = Doubling(1, 4)
    gate, lock, now, most = Gate(limit), threading.Lock(), 0, []

    def enter() -> None:
        nonlocal now
        with gate:
            with lock:
                now += 1
                most.append(now)
            time.sleep(0.005)
            with lock:
                now -= 1

    with ThreadPoolExecutor(6) as pool:
        for value in (1, 2, 4, 1):
            limit.value = value
            most.clear()
            list(pool.map(lambda _: enter(), range(12)))
            assert max(most) == value


def test_a_gate_is_a_queue():
    """Whoever comes back at once would else always be first, and the block that is waited for the last."""
    gate, order = Gate(Doubling(1, 4)), []

    def waiting(name: str) -> None:
        with gate:
            order.append(name)

    with ThreadPoolExecutor(3) as pool:
        with gate:
            for name in "abc":
                pool.submit(waiting, name)
                time.sleep(0.03)
        with gate:
            order.append("again")
    assert order == ["a", "b", "c", "again"]


# --- meters ----------------------------------------------------------------------------------------------------------


def test_what_reading_cost_is_told_of_each_slide():
    sources = several(2, before_read=lambda number: time.sleep(0.002))
    run(sources, readers=2)
    for one in sources:
        meter = one.meter
        assert meter.decoded == BLOCKS * 16**2 == meter.needed
        assert meter.disk == BLOCKS * 0.25
        assert meter.reading >= BLOCKS * 0.002
        assert meter.waiting >= 0
        assert meter.tiles == 0, "that is the encoder's to say"


def test_nothing_is_needed_of_what_is_there_already():
    one = source("a")
    one.missing[5:] = False  # 5 coarse tiles
    run([one])
    assert 0 < one.meter.needed == one.meter.decoded == 5 * 16**2
