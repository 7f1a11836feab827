"""Tiles of many slides through one encoder: every row comes home, and a killed run ends with the same bytes."""

import errno
import threading
import time
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from extractors import Encoder, EncoderFacts, Pending, load_encoder
from extractors.network import NetworkEncoder
from pipeline import arrays, rows, stream
from pipeline import encode as module
from pipeline import store as store_module
from pipeline.encode import Encoded, Settings, encode_slides
from pipeline.errors import CorruptTiles, RunStopped, UnreadableSlide
from pipeline.meter import Meter
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.readers.image import ArraySlide
from pipeline.rows import Work
from pipeline.store import BagStore
from pipeline.tissue import TissueMask

pytestmark = pytest.mark.timeout(120)

PX, ROWS = 8, 7
BATCH = module.ON_CPU
FACTS = EncoderFacts(name="mean", dim=4, tile_px=PX, any_tile_px=True, source="", licence="", citation="")
SMALL = Settings(batch_size=BATCH)


class MeanColour(Encoder):
    """The mean of each channel, and a constant that a blank row does not have; remembers what it was given.

    `seconds`: how long a batch of so many tiles is said to take; None: what it does take.
    """

    def __init__(self, change=lambda x: x, seconds=None) -> None:
        super().__init__(FACTS)
        self.change, self.seconds, self.batches, self.spent = change, seconds, [], 0.0

    def _features(self, tiles):
        self.batches.append(len(tiles))
        mean = torch.from_numpy(np.asarray(tiles, np.float64).mean(axis=(1, 2)) / 16)
        return self.change(torch.cat([mean, torch.ones(len(tiles), 1)], dim=1).float())

    def start(self, tiles):
        pending = super().start(tiles)
        if self.seconds is not None:
            pending.seconds = self.seconds(len(tiles))
        self.spent += pending.seconds
        return pending


def same(_: int) -> float:
    """A batch takes as long whatever its size: larger ones are faster."""
    return 1.0


class Damaged(ArraySlide):
    """Cannot decode what overlaps one of these boxes (x0, y0, x1, y1)."""

    def __init__(self, pixels, boxes=(), closed=None) -> None:
        super().__init__(pixels)
        self.mpp, self.boxes, self.closed = 0.5, boxes, [] if closed is None else closed

    def read(self, x, y, level, width, height):
        for x0, y0, x1, y1 in self.boxes:
            if x < x1 and x + width > x0 and y < y1 and y + height > y0:
                raise CorruptTiles("array", "encode", "made up")
        return super().read(x, y, level, width, height)

    def close(self):
        self.closed.append(True)


def picture(seed: int, side: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side[1], side[0], 3), np.uint8)


def tree_of(pixels: np.ndarray, encode_levels="all", levels=2, px=PX) -> QuadTree:
    slide = open_slide(pixels, mpp=0.5)
    rng = np.random.default_rng(0)
    mask = TissueMask(rng.random((slide.size[1] // px, slide.size[0] // px)) > 0.3, (px, px), 4.0, "test")
    return build_quadtree(slide, mask, mpp=0.5, tile_px=px, levels=levels, encode_levels=encode_levels)


def expected(pixels: np.ndarray, tree: QuadTree, scale=16) -> np.ndarray:
    """Naive: cut each tile out, average it down, average it up."""
    found, px = [], tree.tile_px
    for k in tree.encoded_levels:
        for x, y in tree.levels[k].xy:
            side = round(tree.levels[k].span_px)
            box = np.full((side, side, 3), 255.0)
            part = pixels[y : y + side, x : x + side]
            box[: part.shape[0], : part.shape[1]] = part
            tile = np.floor(box.reshape(px, side // px, px, side // px, 3).mean(axis=(1, 3)) + 0.5)
            found.append([*(tile.mean(axis=(0, 1)) / scale), 1])
    return np.array(found)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture
def impatient(monkeypatch, _small):
    """What has gathered is encoded soon where no slide comes."""
    monkeypatch.setattr("pipeline.feed.IDLE_S", 0.05)


@pytest.fixture
def fewer_chunks(monkeypatch, _small):
    """Where chunks are not what is looked at: writing them takes longer than all else."""
    make_small(monkeypatch, 99)


def make_small(patch, chunk_rows: int = ROWS) -> None:
    """Chunks of a few rows, and blocks of a few tiles."""
    for where in (rows, store_module):
        patch.setattr(where, "CHUNK_ROWS", chunk_rows)
    patch.setattr(stream, "GROUP_PX", 32)
    patch.setattr("pipeline.feed.IDLE_S", 60)  # else a busy machine cuts batches short


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    for _ in range(100):
        alive = [t.name for t in threading.enumerate() if t.name.startswith(("reader", "feeder", "writer", "encoder"))]
        if not alive:
            return
        time.sleep(0.01)
    raise AssertionError(f"still alive: {alive}")


def work(
    root, name, pixels, tree=None, boxes=(), unchanged=lambda: True, dtype="float16", facts=FACTS, closed=None
) -> Work:
    tree = tree_of(pixels) if tree is None else tree
    group = BagStore(root).group(name)
    if group.status == "missing":
        group.begin(slide={"path": name})
        group.write_tissue(TissueMask(np.ones((2, 2), bool), (8, 8), 4.0, "test"), np.zeros((2, 2, 3), np.uint8), "h")
        group.write_tiles(tree)
    features = group.features("mean")
    features.begin(len(tree.encoded_rows), facts.dim, dtype, tiles=tree.hash)
    return Work(name, lambda: Damaged(pixels, boxes, closed), unchanged, tree, features)


def stored(one: Work) -> tuple[np.ndarray, np.ndarray]:
    one.features.finish()
    return one.features.read()


def assert_right(works: list[Work], pictures: list[np.ndarray]) -> None:
    for one, pixels in zip(works, pictures, strict=True):
        x, valid = stored(one)
        assert valid.all()
        np.testing.assert_allclose(x, expected(pixels, one.tree), rtol=1e-3)


def disk(root) -> dict[str, bytes]:
    """The bytes of all chunks of features."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("c/*")) + sorted(root.rglob("c/*/0"))
        if p.is_file() and "features" in p.parts
    }


SIDES = [(80, 64), (48, 32), (16, 16), (100, 52)]


def several(root, **options) -> tuple[list[Work], list[np.ndarray]]:
    pictures = [picture(k, side) for k, side in enumerate(SIDES)]
    return [work(root, f"{k}.svs", p, **options) for k, p in enumerate(pictures)], pictures


def by_name(results) -> dict[str, Encoded]:
    """Each slide comes once."""
    results = list(results)
    found = {result.slide: result for result in results}
    assert len(found) == len(results), f"a slide came twice: {[result.slide for result in results]}"
    return found


def told() -> tuple[list[int], object]:
    """How many tiles each batch is said to have had, and who is told."""
    counts: list[int] = []
    return counts, lambda count, so_far: counts.append(count)


# --- rows come home --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode_levels", ["all", "finest", (1.0,)])
def test_every_row_comes_home(tmp_path, encode_levels):
    pictures = [picture(k, side) for k, side in enumerate(SIDES)]
    works = [work(tmp_path, f"{k}.svs", p, tree_of(p, encode_levels)) for k, p in enumerate(pictures)]
    results = list(encode_slides(works, MeanColour()))
    assert [r.slide for r in results] == ["0.svs", "1.svs", "2.svs", "3.svs"]
    assert_right(works, pictures)
    for one, result in zip(works, results, strict=True):
        assert (result.error, result.invalid, result.meter.tiles) == (None, 0, len(one.tree.encoded_rows))


def test_tiles_of_three_levels_and_over_the_edge(tmp_path):
    pixels = picture(9, (75, 61))
    one = work(tmp_path, "a", pixels, tree_of(pixels, levels=3))
    list(encode_slides([one], MeanColour()))
    assert_right([one], [pixels])


def test_slides_of_other_tile_sizes_in_one_run(tmp_path):
    pictures = [picture(k, (96, 80)) for k in range(4)]
    works = [work(tmp_path, f"{k}", p, tree_of(p, px=(8, 16, 16, 8)[k])) for k, p in enumerate(pictures)]
    assert all(len(one.tree) % BATCH for one in works)
    results = by_name(encode_slides(works, MeanColour(), settings=SMALL))
    assert [r.error for r in results.values()] == [None] * 4
    assert_right(works, pictures)


def test_batches_are_full_across_slides(tmp_path):
    works, pictures = several(tmp_path)
    encoder, (counts, on_tiles) = MeanColour(), told()
    list(encode_slides(works, encoder, "cpu", on_tiles, SMALL))
    total = sum(len(w.tree) for w in works)
    assert any(len(w.tree) % BATCH for w in works[:-1]), "otherwise no batch crosses from one slide to the next"
    assert counts == [BATCH] * (total // BATCH) + [total % BATCH] * (total % BATCH > 0)
    assert encoder.batches == [BATCH] * len(counts), "the last one is filled up"
    assert_right(works, pictures)


def test_slides_are_taken_as_they_come_and_given_back_early(tmp_path, impatient):
    works, _ = several(tmp_path)
    taken, go = [], threading.Event()

    def arriving():
        for one in works:
            if len(taken) == 2:
                go.wait(60)
            taken.append(one.slide)
            yield one

    results = encode_slides(arriving(), MeanColour())
    assert taken == []
    first = next(results)
    assert first.slide == "0.svs"
    assert next(results).slide == "1.svs", "though its last tiles wait for a batch that no other slide fills"
    assert len(taken) == 2, "a finished slide does not wait for the next one"
    go.set()
    assert [r.slide for r in results] == ["2.svs", "3.svs"]


def test_while_there_is_none_what_has_gathered_is_encoded_at_once_and_given_back(tmp_path):
    works, pictures = several(tmp_path)
    back = threading.Event()

    def arriving():
        yield works[0]
        yield None
        assert back.wait(30), "the first slide comes home, though no other fills its last batch"
        yield from works[1:]

    results = encode_slides(arriving(), MeanColour(), settings=SMALL)
    assert next(results).slide == "0.svs"
    back.set()
    assert [r.slide for r in results] == ["1.svs", "2.svs", "3.svs"]
    assert_right(works, pictures)


def test_the_fastest_batch_says_what_a_tile_takes(tmp_path):
    works, _ = several(tmp_path)
    took = iter([0.5, 0.25] + [1.0] * 99)
    results = list(encode_slides(works, MeanColour(seconds=lambda _: next(took)), settings=SMALL))
    assert results[-1].tile_seconds == 0.25 / BATCH


def test_every_tile_is_told_after_it_was_encoded(tmp_path):
    works, _ = several(tmp_path)
    seen, encoder = [], MeanColour()
    list(encode_slides(works, encoder, "cpu", lambda n, so_far: seen.append((n, len(encoder.batches), so_far)), SMALL))
    assert [n for n, _, _ in seen] == [BATCH] * (len(seen) - 1) + [sum(len(w.tree) for w in works) % BATCH]
    assert all(batches >= number for number, (_, batches, _) in enumerate(seen, 1))
    assert [so_far.tiles for _, _, so_far in seen] == np.cumsum([n for n, _, _ in seen]).tolist()


def test_nothing_to_do(tmp_path):
    encoder = MeanColour()
    assert list(encode_slides([], encoder)) == []
    assert encoder.batches == []


# --- batches ---------------------------------------------------------------------------------------------------------


def large(root, count: int = 3) -> tuple[list[Work], list[np.ndarray]]:
    pictures = [picture(20 + k, (160, 128)) for k in range(count)]
    works = [work(root, f"{k}.svs", p, dtype="float32") for k, p in enumerate(pictures)]
    assert sum(len(w.tree) for w in works) > 8 * 64
    return works, pictures


def test_batches_come_in_one_shape(tmp_path, fewer_chunks):
    works, pictures = large(tmp_path)
    encoder, (counts, on_tiles) = MeanColour(), told()
    results = list(encode_slides(works, encoder, "cpu", on_tiles))
    assert set(encoder.batches) == {BATCH}
    assert len(encoder.batches) == -(-sum(len(w.tree) for w in works) // BATCH), "and none is encoded twice"
    assert sum(counts) == sum(len(w.tree) for w in works)
    assert {r.batch_size for r in results} == {BATCH}
    assert_right(works, pictures)


class Together(MeanColour):
    """May be called by several threads; a batch waits until so many are on the way at the same time."""

    parallel = True

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted, self.inside, self.most = wanted, 0, 0
        self._changed = threading.Condition()

    def _features(self, tiles):
        with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= self.wanted, 20)
        features = super()._features(tiles)
        with self._changed:
            self.inside -= 1
        return features


def test_on_a_cpu_each_core_has_a_batch_of_its_own(tmp_path, fewer_chunks):
    works, pictures = large(tmp_path)
    encoder = Together(3)
    results = list(encode_slides(works, encoder, settings=Settings(threads=3)))
    assert encoder.most == 3
    assert sum(r.meter.encoding for r in results) <= sum(r.meter.seconds for r in results) + 1e-3, "of the whole device"
    assert_right(works, pictures)


def test_an_encoder_that_knows_no_threads_is_called_by_one(tmp_path, fewer_chunks):
    works, pictures = large(tmp_path)
    encoder = Together(1)
    encoder.parallel = False
    list(encode_slides(works, encoder, settings=Settings(threads=3)))
    assert encoder.most == 1
    assert_right(works, pictures)


def allocator(tiles: int) -> RuntimeError:
    return RuntimeError(f"[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: {tiles}")


class Cramped(MeanColour):
    """Has memory for so many tiles at once; `after` so many batches."""

    def __init__(self, most: int, error=torch.OutOfMemoryError, after: int = 0, **options) -> None:
        super().__init__(**options)
        self.most, self.error, self.after, self.refused = most, error, after, []

    def start(self, tiles):
        if len(tiles) > self.most and len(self.batches) >= self.after:
            self.refused.append(len(tiles))
            raise self.error(len(tiles))
        return super().start(tiles)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, allocator, MemoryError])
def test_a_lack_of_memory_is_known_by_each_of_its_names(tmp_path, error):
    works, pictures = several(tmp_path)
    encoder = Cramped(9, error)
    list(encode_slides(works, encoder))
    assert set(encoder.refused) == {BATCH}
    assert_right(works, pictures)


@pytest.mark.parametrize(
    ("batch_size", "most"),
    [*product([None, 16], [1, 2, 15]), (5, 4), (5, 2), (24, 1), (100, 9), (1024, 99)],
)
def test_what_does_not_fit_into_memory_is_encoded_in_smaller_batches(tmp_path, batch_size, most, fewer_chunks):
    works, pictures = several(tmp_path)
    encoder, (counts, on_tiles) = Cramped(most, seconds=same), told()
    results = by_name(encode_slides(works, encoder, "cpu", on_tiles, Settings(batch_size=batch_size)))
    assert {r.error for r in results.values()} == {None}
    assert sum(counts) == sum(len(w.tree) for w in works)
    assert_right(works, pictures)
    assert encoder.refused == sorted(encoder.refused, reverse=True)
    assert max(map(encoder.refused.count, encoder.refused)) <= 2, (
        "what was refused is not asked for again: one more was on the way"
    )
    assert results["2.svs"].batch_size == encoder.batches[-1] <= most


def test_memory_may_be_taken_away_in_the_middle(tmp_path):
    works, pictures = several(tmp_path)
    encoder = Cramped(3, after=4, seconds=same)
    list(encode_slides(works, encoder))
    assert encoder.refused
    assert set(encoder.batches[-5:]) <= {2}
    assert_right(works, pictures)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_no_memory_for_a_single_tile_stops_the_run(tmp_path, batch_size):
    works, _ = several(tmp_path)
    with pytest.raises(RunStopped, match="does not suffice for one tile"):
        list(encode_slides(works, Cramped(0), settings=Settings(batch_size=batch_size)))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("facts")])
def test_other_errors_of_the_encoder_go_through(tmp_path, error):
    closed = []
    works, _ = several(tmp_path, closed=closed)

    def fail(x):
        raise error

    with pytest.raises(type(error)) as caught:
        list(encode_slides(works, MeanColour(fail)))
    assert caught.value is error
    assert len(closed) >= 1


class Later(Pending):
    """Looks at its tiles only when the result is asked for: who fills the buffer again before gets other numbers."""

    def __init__(self, encoder, tiles) -> None:
        super().__init__(torch.empty(0), 0.0)
        self.encoder, self.tiles = encoder, tiles
        encoder.flying += 1
        encoder.most_flying = max(encoder.most_flying, encoder.flying)

    def result(self):
        if not len(self._features):
            self._features = self.encoder.encode(self.tiles)
            self.seconds, self.encoder.flying = self.encoder.seconds(len(self.tiles)), self.encoder.flying - 1
        return self._features


class FakeGpu(Cramped):
    """Works on its own time. `fastest`: batches beyond it are no faster."""

    def __init__(self, fastest: int = 64, most: int = 1 << 20, **options) -> None:
        super().__init__(most, seconds=lambda tiles: max(1, tiles / fastest), **options)
        self.flying = self.most_flying = 0
        self.first_tiles: list[int] = []  # of each batch: whether it was of real tiles

    def start(self, tiles):
        if len(tiles) > self.most and len(self.first_tiles) >= self.after:
            self.refused.append(len(tiles))
            raise self.error(len(tiles))
        self.first_tiles.append(int(tiles.any()))
        return Later(self, tiles)


@pytest.fixture
def pinned(monkeypatch) -> list[tuple[int, ...]]:
    """Memory that is pinned for a GPU, which need not be there; the shapes that were asked for."""
    asked, original = [], torch.zeros

    def zeros(*arguments, pin_memory=False, **options):
        if pin_memory:
            asked.append(tuple(arguments[0]))
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    return asked


@pytest.mark.parametrize(("fastest", "most", "size"), [(64, 1 << 20, 64), (1 << 20, 1 << 20, 1024), (1 << 20, 50, 32)])
def test_a_gpu_sees_one_shape_which_is_found_before_the_first_tile(tmp_path, pinned, fastest, most, size, fewer_chunks):
    works, pictures = large(tmp_path)
    encoder = FakeGpu(fastest, most)
    results = list(encode_slides(works, encoder, device="cuda"))
    trials = encoder.first_tiles.index(1)
    shapes = encoder.batches[trials:]
    assert set(shapes) == {size}
    assert len(shapes) == -(-sum(len(w.tree) for w in works) // size)
    assert set(encoder.first_tiles[:trials]) == {0}, "found on nothing"
    assert {r.batch_size for r in results} == {size}
    assert_right(works, pictures)
    assert {shape[1:] for shape in pinned} == {(PX, PX, 3)}


def test_a_batch_size_that_was_told_is_not_looked_for(tmp_path, pinned, fewer_chunks):
    works, pictures = large(tmp_path)
    encoder = FakeGpu()
    (*_, last) = encode_slides(works, encoder, device="cuda", settings=Settings(batch_size=48))
    assert set(encoder.batches) == {48} == {last.batch_size}
    assert 0 not in encoder.first_tiles
    assert_right(works, pictures)


def test_a_gpu_works_while_the_next_batch_is_filled_and_memory_stays_flat(tmp_path, pinned, fewer_chunks):
    works, pictures = large(tmp_path)
    encoder = FakeGpu()
    list(encode_slides(works, encoder, device="cuda", settings=Settings(batch_size=16)))
    assert encoder.most_flying == 2
    assert len(pinned) <= 3, "one is filled while two are on the device; then they come round again"
    assert_right(works, pictures)


@pytest.mark.parametrize("most", [1, 5, 40])
def test_a_gpu_that_runs_out_of_memory_later_goes_on_with_less(tmp_path, pinned, most, fewer_chunks):
    works, pictures = large(tmp_path)
    encoder = FakeGpu(most=most, after=5)
    by_name(encode_slides(works, encoder, device="cuda", settings=Settings(batch_size=56)))
    assert encoder.refused[0] == 56
    assert encoder.batches[-1] <= most
    assert_right(works, pictures)


def test_where_nothing_is_missing_a_gpu_is_left_alone(tmp_path, pinned):
    list(encode_slides(several(tmp_path)[0], MeanColour()))
    encoder = FakeGpu()
    results = by_name(encode_slides(several(tmp_path)[0], encoder, device="cuda"))
    assert len(results) == 4
    assert encoder.batches == []


# --- the same bits, however it is done -------------------------------------------------------------------------------

NETWORK_PX = 32


def network(name: str, precision: str) -> Encoder:
    """Small, and with random weights, which are the same each time."""
    if name == "vit":
        import timm

        def make():
            return timm.create_model("vit_tiny_patch16_224", img_size=NETWORK_PX, num_classes=0)

        known = {"name": "vit", "dim": 192, "tile_px": NETWORK_PX, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        facts = EncoderFacts(**known, source="", licence="", citation="")
        return NetworkEncoder(facts, make, "random").load(precision=precision)
    return load_encoder(name, "random").load(precision=precision)


def has_bf16() -> bool:
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


BF16 = pytest.mark.skipif(not has_bf16(), reason="this CPU does not multiply in bf16")
WAYS = {
    "7 readers and one block at a time": Settings(readers=7, queue_bytes=1),
    "2 readers, and slides from the last to the first": Settings(readers=2),
    "batches of 32": Settings(batch_size=32),
    "3 batches at a time": Settings(threads=3),
}


@pytest.fixture
def one_thread():
    """Threads of two processes on few cores wait for each other; tests have neighbours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("timm/resnet18", "fp32"),
        pytest.param("timm/resnet18", "bf16", marks=[BF16, pytest.mark.slow]),
        pytest.param("vit", "fp32", marks=pytest.mark.slow),
        pytest.param("vit", "bf16", marks=BF16),
    ],
)
def test_features_do_not_depend_on_how_the_work_is_done(tmp_path, one_thread, name, precision):
    encoder = network(name, precision)
    pictures = [picture(40 + k, side) for k, side in enumerate([(320, 192), (64, 64), (200, 290)])]

    def made(way: str, settings: Settings) -> dict[str, bytes]:
        root, step = tmp_path / way, -1 if "last to the first" in way else 1
        works = [work(root, f"{k}", p, tree_of(p, px=NETWORK_PX), facts=encoder.facts) for k, p in enumerate(pictures)]
        tiles = sum(len(w.tree) for w in works)
        assert tiles > 16 + 32 + 64
        assert tiles % BATCH
        assert [r.error for r in encode_slides(works[::step], encoder, settings=settings)] == [None] * 3
        return disk(root)

    want = made("want", Settings(batch_size=BATCH, readers=1))
    assert len(want) >= 30
    for way, settings in WAYS.items():
        assert made(way, settings) == want, way
    if (name, precision) != ("vit", "bf16"):  # with AMX it was seen to get other bits in batches of 64
        assert made("batches of 64", Settings(batch_size=64)) == want


@pytest.mark.slow
@BF16
def test_features_of_a_whole_transformer_do_not_depend_on_how_the_work_is_done(tmp_path, fewer_chunks):
    encoder, found = network("timm/vit_tiny_patch16_224", "bf16"), []
    pixels = picture(50, (900, 900))
    for way, settings in (("a", SMALL), ("b", Settings(batch_size=32, readers=7)), ("c", Settings(queue_bytes=1))):
        one = work(tmp_path / way, "a", pixels, tree_of(pixels, px=224), facts=encoder.facts)
        list(encode_slides([one], encoder, settings=settings))
        found.append(disk(tmp_path / way))
    assert found[0] == found[1] == found[2]


# --- unreadable tiles ------------------------------------------------------------------------------------------------

BIG = (320, 320)  # 1600 leaves at most: some 1100 with tissue, of which 1 % may be lost


def test_unreadable_tiles_are_marked_and_counted(tmp_path, fewer_chunks):
    pixels, boxes = picture(5, BIG), [(41, 43, 42, 44), (200, 8, 202, 9)]
    tree = tree_of(pixels)
    one, other = work(tmp_path, "a", pixels, tree, boxes), work(tmp_path, "b", picture(6, (48, 32)))
    a, b = encode_slides([one, other], MeanColour())
    x, valid = stored(one)
    hit = np.zeros(len(tree), bool)
    for k, level in enumerate(tree.levels):
        for i, (left, top, width, height) in enumerate(tree.boxes(k)):
            hit[level.start + i] = any(
                left < x1 and left + width > x0 and top < y1 and top + height > y0 for x0, y0, x1, y1 in boxes
            )
    assert hit.any()
    assert hit[: tree.levels[0].stop].any(), "and a coarse one above"
    np.testing.assert_array_equal(valid, ~hit)
    assert not x[hit].any()
    np.testing.assert_allclose(x[~hit], expected(pixels, tree)[~hit], rtol=1e-3)
    assert (a.error, a.invalid, a.meter.tiles) == (None, hit.sum(), (~hit).sum())
    assert (b.error, b.invalid) == (None, 0)


def test_a_slide_that_loses_too_much_fails_alone(tmp_path, fewer_chunks):
    pixels = picture(5, BIG)
    works = [
        work(tmp_path, "a", picture(0, (80, 64))),
        work(tmp_path, "b", pixels, boxes=[(0, 0, 160, 20)]),
        work(tmp_path, "c", picture(1, (48, 32))),
    ]
    results = by_name(encode_slides(works, MeanColour()))
    error = results["b"].error
    assert isinstance(error, CorruptTiles)
    assert (error.path, error.stage) == ("b", "encode")
    assert results["a"].error is results["c"].error is None
    assert_right([works[0], works[2]], [picture(0, (80, 64)), picture(1, (48, 32))])


def spoil(tree: QuadTree, count: int) -> list[tuple[int, int, int, int]]:
    """One pixel in each of `count` of the finest tiles."""
    return [(int(x) + 3, int(y) + 3, int(x) + 4, int(y) + 4) for x, y in tree.levels[-1].xy[::37][:count]]


@pytest.mark.parametrize("over", [0, 1])
def test_the_limit_is_one_percent_of_the_finest_tiles(tmp_path, over, fewer_chunks):
    pixels = picture(5, BIG)
    tree = tree_of(pixels)
    finest = tree.levels[-1].stop - tree.levels[-1].start
    boxes = spoil(tree, finest // 100 + over)
    assert len(boxes) == finest // 100 + over > 5
    (result,) = encode_slides([work(tmp_path, "a", pixels, tree, boxes)], MeanColour())
    assert isinstance(result.error, CorruptTiles) == bool(over)


def test_the_limit_counts_what_earlier_runs_lost(tmp_path, fewer_chunks):
    pixels = picture(5, BIG)
    tree = tree_of(pixels)
    boxes = spoil(tree, (tree.levels[-1].stop - tree.levels[-1].start) // 100 + 1)
    with pytest.raises(Killed):
        run_killed([work(tmp_path, "a", pixels, tree, boxes)], after=3)
    again = work(tmp_path, "a", pixels, tree, boxes)
    assert not again.features.missing_rows().all()
    (result,) = encode_slides([again], MeanColour())
    assert isinstance(result.error, CorruptTiles)
    (result,) = encode_slides([work(tmp_path, "a", pixels, tree, boxes)], MeanColour())
    assert isinstance(result.error, CorruptTiles), "and once more: nothing was made whole by trying"


# --- resume ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def run_killed(works, after: int, halfway=False, error=Killed, settings=Settings(readers=2)) -> None:
    """Stop at the write of chunk number `after`; `halfway`: when its `valid` is written and its `x` is not."""
    left, original = [after], arrays.StoredArray.write_chunk

    def dying(self, chunk, values):
        first = self.path.name == "valid"
        if left[0] == 0 and (not halfway or not first):
            raise error
        if not first:
            left[0] -= 1
        original(self, chunk, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays.StoredArray, "write_chunk", dying)
        list(encode_slides(works, MeanColour(), settings=settings))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        works, _ = several(root)
        assert all(r.error is None for r in encode_slides(works, MeanColour()))
    return disk(root)


def test_chunks_of_an_uninterrupted_run(uninterrupted):
    assert sum("/x/" in name for name in uninterrupted) > 12


@pytest.mark.parametrize(("after", "halfway"), list(product([0, 1, 2, 5, 9, 12], [False, True])))
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, uninterrupted, after, halfway):
    with pytest.raises(Killed):
        run_killed(several(tmp_path)[0], after, halfway)
    works, _ = several(tmp_path)
    missing = sum(int(w.features.missing_rows().sum()) for w in works)
    total = sum(len(w.tree) for w in works)
    assert total - missing >= after, "chunks that were written stay"
    counts, on_tiles = told()
    results = list(encode_slides(works, MeanColour(), "cpu", on_tiles))
    assert sum(counts) == missing == sum(r.meter.tiles for r in results)
    assert disk(tmp_path) == uninterrupted


@pytest.mark.parametrize("seed", range(3))
def test_any_set_of_lost_chunks_is_made_again_and_no_other(tmp_path, uninterrupted, seed):
    works, _ = several(tmp_path)
    list(encode_slides(works, MeanColour()))
    rng, lost, kept = np.random.default_rng(seed), 0, {}
    for one in works:
        n = len(one.tree)
        for chunk in range(-(-n // ROWS)):
            path = one.features.path / f"x/c/{chunk}/0"
            if rng.random() < 0.4:
                path.unlink()
                lost += min(ROWS, n - chunk * ROWS)
            else:
                kept[path] = path.stat().st_mtime_ns
    counts, on_tiles = told()
    list(encode_slides(several(tmp_path)[0], MeanColour(), "cpu", on_tiles))
    assert sum(counts) == lost > 0
    assert disk(tmp_path) == uninterrupted
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def no(*_: object):
    raise AssertionError("opened")


def test_a_finished_slide_is_not_opened(tmp_path):
    pixels = picture(0, (80, 64))
    list(encode_slides([work(tmp_path, "a", pixels)], MeanColour()))
    again, encoder = work(tmp_path, "a", pixels, unchanged=no), MeanColour()
    again.open = no
    (result,) = encode_slides([again], encoder)
    assert (result.meter.tiles, result.invalid, result.error, encoder.batches) == (0, 0, None, [])


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_is_given_up_keeps_what_it_wrote_and_closes_all(tmp_path, uninterrupted, after):
    closed = []
    works, _ = several(tmp_path, closed=closed)
    results = encode_slides(works, MeanColour(), settings=Settings(readers=2))
    for _ in range(after):
        next(results)
    results.close()
    assert len(closed) >= after
    assert disk(tmp_path).items() <= uninterrupted.items(), "no chunk is half of one"
    list(encode_slides(several(tmp_path)[0], MeanColour()))
    assert disk(tmp_path) == uninterrupted


# --- what the encoder or the file does wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stops_the_run(tmp_path, value):
    def poison(x):
        x[-1, 0] = value
        return x

    pixels = picture(0, (80, 64))
    with pytest.raises(RunStopped, match="inf or NaN") as error:
        list(encode_slides([work(tmp_path, "a", pixels)], MeanColour(poison)))
    assert "encoder mean" in str(error.value)
    again = work(tmp_path, "a", pixels)
    assert again.features.missing_rows().any()
    list(encode_slides([again], MeanColour()))
    assert_right([again], [pixels])


@pytest.mark.parametrize(("factor", "stops"), [(65504.0, False), (65520.0, True), (-65520.0, True), (1e30, True)])
def test_what_float16_cannot_hold_stops_the_run(tmp_path, factor, stops):
    one = work(tmp_path, "a", picture(0, (80, 64)))
    encoder = MeanColour(lambda x: x * 0 + factor)
    if stops:
        with pytest.raises(RunStopped, match="--dtype float32"):
            list(encode_slides([one], encoder))
        assert one.features.missing_rows().all()
    else:
        list(encode_slides([one], encoder))
        assert (stored(one)[0] == factor).all()


def test_float32_holds_it(tmp_path):
    one = work(tmp_path, "a", picture(0, (80, 64)), dtype="float32")
    list(encode_slides([one], MeanColour(lambda x: x * 0 + 1e30)))
    x, _ = stored(one)
    assert x.dtype == np.float32
    assert (x == np.float32(1e30)).all()


def test_a_file_that_changed_while_it_was_read_fails(tmp_path):
    works = [
        work(tmp_path, "a", picture(0, (80, 64)), unchanged=lambda: False),
        work(tmp_path, "b", picture(1, (48, 32))),
    ]
    results = by_name(encode_slides(works, MeanColour()))
    assert isinstance(results["a"].error, UnreadableSlide)
    assert "changed while it was read" in results["a"].error.reason
    assert results["b"].error is None
    assert_right(works[1:], [picture(1, (48, 32))])


def test_tiles_of_a_slide_that_has_failed_are_not_encoded_any_more(tmp_path):
    few = work(tmp_path, "a", picture(2, (32, 16)), unchanged=lambda: False)
    other, (counts, on_tiles) = work(tmp_path, "b", picture(1, (80, 64))), told()
    assert 0 < len(few.tree) < BATCH, "all of them still wait for a batch when the slide fails"
    list(encode_slides([few, other], MeanColour(), "cpu", on_tiles, SMALL))
    assert sum(counts) == len(other.tree)
    assert few.features.missing_rows().all()
    assert_right([other], [picture(1, (80, 64))])


def test_a_slide_that_does_not_open_again_fails_alone(tmp_path):
    works, _ = several(tmp_path)

    def gone():
        raise UnreadableSlide("/x/1.svs", "open", "there is no such file")

    works[1].open = gone
    errors = {name: result.error for name, result in by_name(encode_slides(works, MeanColour())).items()}
    assert isinstance(errors.pop("1.svs"), UnreadableSlide)
    assert set(errors.values()) == {None}


def test_faults_of_the_machine_go_through_and_the_slide_is_closed(tmp_path):
    closed = []

    class Lost(Damaged):
        def read(self, *_):
            raise OSError(errno.ESTALE, "Stale file handle")

    one = work(tmp_path, "a", picture(0, (80, 64)))
    one.open = lambda: Lost(picture(0, (80, 64)), closed=closed)
    with pytest.raises(OSError, match="Stale"):
        list(encode_slides([one], MeanColour()))
    assert closed == [True]


@pytest.mark.parametrize("room", [1, 1 << 20])
@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize("after", [0, 3, 14])
def test_a_full_disk_is_raised_and_nothing_hangs(tmp_path, monkeypatch, uninterrupted, after, halfway, room):
    monkeypatch.setattr(module, "WRITER_BYTES", room)
    closed = []
    works, _ = several(tmp_path, closed=closed)
    full = partial(OSError, errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught:
        run_killed(works, after, halfway, error=full())
    assert caught.value.errno == errno.ENOSPC
    assert closed
    list(encode_slides(several(tmp_path)[0], MeanColour()))
    assert disk(tmp_path) == uninterrupted, "once there is room again"


def test_a_slow_disk_is_waited_for(tmp_path, monkeypatch):
    """No more chunks wait in memory than the writer may hold; and the time is told."""
    monkeypatch.setattr(module, "WRITER_BYTES", 1)
    original = arrays.StoredArray.write_chunk

    def slow(self, chunk, values):
        time.sleep(0.004)
        original(self, chunk, values)

    monkeypatch.setattr(arrays.StoredArray, "write_chunk", slow)
    works, pictures = several(tmp_path)
    results = list(encode_slides(works, MeanColour(), settings=SMALL))
    total = sum((r.meter for r in results), Meter())
    assert total.writing >= 2 * 0.004 * sum(-(-len(w.tree) // ROWS) for w in works)
    assert 0.01 < total.stalled <= total.seconds
    assert total.bound_by == "writing"
    assert_right(works, pictures)


# --- time ------------------------------------------------------------------------------------------------------------


def test_time_is_shared_out_and_adds_up(tmp_path):
    def slowly(x):
        time.sleep(0.02)
        return x

    works, _ = several(tmp_path)
    encoder, seen, started = MeanColour(slowly), [], time.perf_counter()
    results = list(encode_slides(works, encoder, "cpu", lambda count, so_far: seen.append(so_far), SMALL))
    wall = time.perf_counter() - started
    total = sum((r.meter for r in results), Meter())
    assert total.encoding == pytest.approx(encoder.spent)
    assert total.tiles == sum(len(w.tree) for w in works)
    assert total.encoding <= total.seconds + 1e-3
    assert total.seconds <= wall
    assert total.bound_by == "encoding"
    for so_far in seen:
        assert 0 < so_far.encoding <= so_far.seconds <= wall, "from the first batch on"
    assert all(a.seconds <= b.seconds for a, b in pairwise(seen))
    assert seen[-1].tiles == total.tiles


def test_what_is_told_so_far_counts_slides_that_are_finished(tmp_path, impatient):
    works, _ = several(tmp_path)
    go, seen = threading.Event(), []

    def arriving():
        yield works[0]
        go.wait(60)
        yield from works[1:]

    results = encode_slides(arriving(), MeanColour(), "cpu", lambda count, so_far: seen.append(so_far))
    first = next(results)
    assert seen[-1].tiles == first.meter.tiles == len(works[0].tree)
    go.set()
    list(results)
    assert seen[-1].tiles == sum(len(w.tree) for w in works)


def test_the_only_batch_of_a_small_run_takes_time_too(tmp_path):
    one = work(tmp_path, "a", picture(2, (16, 16)))
    encoder = MeanColour(lambda x: time.sleep(0.02) or x)
    (result,) = encode_slides([one], encoder)
    assert 0.02 <= result.meter.encoding <= result.meter.seconds
