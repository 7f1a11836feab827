"""Tiles of many slides through one encoder: every row comes home, and a killed run ends with the same bytes."""

from itertools import product

import numpy as np
import pytest
import torch

from extractors import Encoder, EncoderFacts
from pipeline import encode as module
from pipeline import store as store_module
from pipeline.encode import Encoded, Work, encode_slides
from pipeline.errors import CorruptTiles, RunStopped, UnreadableSlide
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.readers.image import ArraySlide
from pipeline.store import BagStore
from pipeline.tissue import TissueMask

PX, BATCH, ROWS = 8, 16, 7
FACTS = EncoderFacts(name="mean", dim=4, tile_px=PX, source="", licence="", citation="")


class MeanColour(Encoder):
    """The mean of each channel, and a constant that a blank row does not have; remembers what it was given."""

    def __init__(self, change=lambda x: x) -> None:
        super().__init__(FACTS)
        self.change, self.batches = change, []

    def _features(self, tiles):
        self.batches.append(len(tiles))
        mean = torch.from_numpy(np.asarray(tiles, np.float64).mean(axis=(1, 2)) / 16)
        return self.change(torch.cat([mean, torch.ones(len(tiles), 1)], dim=1).float())

    @property
    def tiles(self) -> int:
        return sum(self.batches)


class Damaged(ArraySlide):
    """Cannot decode what overlaps one of these boxes (x0, y0, x1, y1)."""

    def __init__(self, pixels, boxes=()) -> None:
        super().__init__(pixels)
        self.mpp, self.boxes = 0.5, boxes

    def read(self, x, y, level, width, height):
        for x0, y0, x1, y1 in self.boxes:
            if x < x1 and x + width > x0 and y < y1 and y + height > y0:
                raise CorruptTiles("array", "encode", "made up")
        return super().read(x, y, level, width, height)


def picture(seed: int, side: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side[1], side[0], 3), np.uint8)


def tree_of(pixels: np.ndarray, encode_levels="all", levels=2) -> QuadTree:
    slide = open_slide(pixels, mpp=0.5)
    rng = np.random.default_rng(0)
    mask = TissueMask(rng.random((slide.size[1] // PX, slide.size[0] // PX)) > 0.3, (PX, PX), 4.0, "test")
    return build_quadtree(slide, mask, mpp=0.5, tile_px=PX, levels=levels, encode_levels=encode_levels)


def expected(pixels: np.ndarray, tree: QuadTree, scale=16) -> np.ndarray:
    """Naive: cut each tile out, average it down, average it up."""
    rows = []
    for k in tree.encoded_levels:
        for x, y in tree.levels[k].xy:
            side = round(tree.levels[k].span_px)
            box = np.full((side, side, 3), 255.0)
            part = pixels[y : y + side, x : x + side]
            box[: part.shape[0], : part.shape[1]] = part
            tile = np.rint(box.reshape(PX, side // PX, PX, side // PX, 3).mean(axis=(1, 3)))
            rows.append([*(tile.mean(axis=(0, 1)) / scale), 1])
    return np.array(rows)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", ROWS)
    monkeypatch.setattr(store_module, "CHUNK_ROWS", ROWS)
    monkeypatch.setattr(module, "BATCH", BATCH)


def work(root, name, pixels, tree=None, boxes=(), unchanged=lambda: True, dtype="float16") -> Work:
    tree = tree_of(pixels) if tree is None else tree
    group = BagStore(root).group(name)
    if group.status == "missing":
        group.begin(slide={"path": name})
        group.write_tissue(TissueMask(np.ones((2, 2), bool), (8, 8), 4.0, "test"), np.zeros((2, 2, 3), np.uint8), "h")
        group.write_tiles(tree)
    features = group.features("mean")
    features.begin(len(tree.encoded_rows), FACTS.dim, dtype, tiles=tree.hash)
    return Work(name, lambda: Damaged(pixels, boxes), unchanged, tree, features)


def stored(one: Work) -> tuple[np.ndarray, np.ndarray]:
    one.features.finish()
    return one.features.read()


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


@pytest.mark.parametrize("encode_levels", ["all", "finest", (1.0,)])
def test_every_row_comes_home(tmp_path, encode_levels):
    pictures = [picture(k, side) for k, side in enumerate(SIDES)]
    works = [work(tmp_path, f"{k}.svs", p, tree_of(p, encode_levels)) for k, p in enumerate(pictures)]
    results = list(encode_slides(works, MeanColour()))
    assert [r.slide for r in results] == ["0.svs", "1.svs", "2.svs", "3.svs"]
    for one, pixels, result in zip(works, pictures, results, strict=True):
        x, valid = stored(one)
        assert valid.all()
        np.testing.assert_allclose(x, expected(pixels, one.tree), rtol=1e-3)
        assert (result.error, result.invalid, result.rows) == (None, 0, len(x))


def test_tiles_of_three_levels_and_over_the_edge(tmp_path):
    pixels = picture(9, (75, 61))
    tree = tree_of(pixels, levels=3)
    one = work(tmp_path, "a", pixels, tree)
    list(encode_slides([one], MeanColour()))
    np.testing.assert_allclose(stored(one)[0], expected(pixels, tree), rtol=1e-3)


def test_batches_are_full_across_slides(tmp_path):
    works, _ = several(tmp_path)
    encoder = MeanColour()
    list(encode_slides(works, encoder))
    total = sum(len(w.tree) for w in works)
    assert encoder.batches == [BATCH] * (total // BATCH) + [total % BATCH] * (total % BATCH > 0)
    assert any(len(w.tree) % BATCH for w in works[:-1]), "otherwise no batch crosses from one slide to the next"


def test_one_batch_shape_on_a_gpu(tmp_path):
    works, pictures = several(tmp_path)
    encoder = MeanColour()
    list(encode_slides(works, encoder, device="cuda"))  # only the name: the encoder is ours
    assert set(encoder.batches) == {BATCH}
    for one, pixels in zip(works, pictures, strict=True):
        np.testing.assert_allclose(stored(one)[0], expected(pixels, one.tree), rtol=1e-3)


def test_slides_are_taken_as_they_come_and_given_back_early(tmp_path):
    works, _ = several(tmp_path)
    taken = []

    def arriving():
        for one in works:
            taken.append(one.slide)
            yield one

    results = encode_slides(arriving(), MeanColour())
    assert taken == []
    first = next(results)
    assert first.slide == "0.svs"
    assert len(taken) < len(works), "a finished slide does not wait for the last one"


def test_every_tile_is_told_after_it_was_encoded(tmp_path):
    works, _ = several(tmp_path)
    told, encoder = [], MeanColour()
    list(encode_slides(works, encoder, on_tiles=lambda n: told.append((n, encoder.tiles))))
    assert [n for n, _ in told] == encoder.batches, "the last, partial one too"
    assert [total for _, total in told] == np.cumsum(encoder.batches).tolist()


# --- unreadable tiles ------------------------------------------------------------------------------------------------

BIG = (320, 320)  # 1600 leaves at most: some 1100 with tissue, of which 1 % may be lost


def test_unreadable_tiles_are_marked_and_counted(tmp_path):
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
    assert (a.error, a.invalid, a.rows) == (None, hit.sum(), (~hit).sum())
    assert (b.error, b.invalid) == (None, 0)


def test_a_slide_that_loses_too_much_fails_alone(tmp_path):
    pixels = picture(5, BIG)
    works = [
        work(tmp_path, "a", picture(0, (80, 64))),
        work(tmp_path, "b", pixels, boxes=[(0, 0, 160, 20)]),
        work(tmp_path, "c", picture(1, (48, 32))),
    ]
    a, b, c = sorted(encode_slides(works, MeanColour()), key=lambda r: r.slide)
    assert isinstance(b.error, CorruptTiles)
    assert b.error.path == "b"
    assert b.error.stage == "encode"
    assert a.error is c.error is None
    for one, seed, side in ((works[0], 0, (80, 64)), (works[2], 1, (48, 32))):
        np.testing.assert_allclose(stored(one)[0], expected(picture(seed, side), one.tree), rtol=1e-3)


def spoil(tree: QuadTree, count: int) -> list[tuple[int, int, int, int]]:
    """One pixel in each of `count` of the finest tiles."""
    return [(int(x) + 3, int(y) + 3, int(x) + 4, int(y) + 4) for x, y in tree.levels[-1].xy[::37][:count]]


@pytest.mark.parametrize("over", [0, 1])
def test_the_limit_is_one_percent_of_the_finest_tiles(tmp_path, over):
    pixels = picture(5, BIG)
    tree = tree_of(pixels)
    finest = tree.levels[-1].stop - tree.levels[-1].start
    boxes = spoil(tree, finest // 100 + over)
    assert len(boxes) == finest // 100 + over > 5
    (result,) = encode_slides([work(tmp_path, "a", pixels, tree, boxes)], MeanColour())
    assert isinstance(result.error, CorruptTiles) == bool(over)


def test_the_limit_counts_what_earlier_runs_lost(tmp_path):
    pixels = picture(5, BIG)
    tree = tree_of(pixels)
    boxes = spoil(tree, (tree.levels[-1].stop - tree.levels[-1].start) // 100 + 1)
    with pytest.raises(Killed):
        run_killed(tmp_path, [work(tmp_path, "a", pixels, tree, boxes)], after=40)
    again = work(tmp_path, "a", pixels, tree, boxes)
    assert not again.features.missing_rows().all()
    (result,) = encode_slides([again], MeanColour())
    assert isinstance(result.error, CorruptTiles)
    (result,) = encode_slides([work(tmp_path, "a", pixels, tree, boxes)], MeanColour())
    assert isinstance(result.error, CorruptTiles), "and once more: nothing was made whole by trying"


# --- resume ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def run_killed(root, works, after: int, halfway=False) -> None:
    """Stop at the write of chunk number `after`; `halfway`: when its `valid` is written and its `x` is not."""
    left = [after]

    def dying(self, chunk, x, valid):
        if left[0] == 0:
            if halfway:
                self._valid[chunk * ROWS : chunk * ROWS + len(x)] = valid
            raise Killed
        left[0] -= 1
        return original(self, chunk, x, valid)

    original = store_module.Features.write_chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module.Features, "write_chunk", dying)
        list(encode_slides(works, MeanColour()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for where in (module, store_module):
            patch.setattr(where, "CHUNK_ROWS", ROWS)
        patch.setattr(module, "BATCH", BATCH)
        works, _ = several(root, boxes=[])
        assert all(r.error is None for r in encode_slides(works, MeanColour()))
    return disk(root)


def test_chunks_of_an_uninterrupted_run(uninterrupted):
    assert sum("/x/" in name for name in uninterrupted) > 12


@pytest.mark.parametrize(("after", "halfway"), list(product([0, 1, 2, 5, 9, 12], [False, True])))
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, uninterrupted, after, halfway):
    with pytest.raises(Killed):
        run_killed(tmp_path, several(tmp_path)[0], after, halfway)
    works, _ = several(tmp_path)
    missing = sum(int(w.features.missing_rows().sum()) for w in works)
    total = sum(len(w.tree) for w in works)
    assert total - missing >= after, "chunks that were written stay"
    encoder = MeanColour()
    results = list(encode_slides(works, encoder))
    assert encoder.tiles == missing == sum(r.rows for r in results)
    assert disk(tmp_path) == uninterrupted


@pytest.mark.parametrize("seed", range(3))
def test_any_set_of_lost_chunks_is_made_again_and_no_other(tmp_path, uninterrupted, seed):
    works, _ = several(tmp_path)
    list(encode_slides(works, MeanColour()))
    rng, lost = np.random.default_rng(seed), 0
    for one in works:
        n = len(one.tree)
        for chunk in range(-(-n // ROWS)):
            if rng.random() < 0.4:
                (one.features.path / f"x/c/{chunk}/0").unlink()
                lost += min(ROWS, n - chunk * ROWS)
    encoder = MeanColour()
    list(encode_slides(several(tmp_path)[0], encoder))
    assert encoder.tiles == lost > 0
    assert disk(tmp_path) == uninterrupted


def test_a_finished_slide_is_not_opened(tmp_path):
    pixels = picture(0, (80, 64))
    list(encode_slides([work(tmp_path, "a", pixels)], MeanColour()))

    def no():
        raise AssertionError("opened")

    again = work(tmp_path, "a", pixels, unchanged=no)
    again.open, encoder = no, MeanColour()
    (result,) = encode_slides([again], encoder)
    assert (result.rows, result.invalid, result.error, encoder.batches) == (0, 0, None, [])


# --- what the encoder or the file does wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stops_the_run(tmp_path, value):
    def poison(x):
        x[-1, 0] = value
        return x

    one = work(tmp_path, "a", picture(0, (80, 64)))
    with pytest.raises(RunStopped, match="inf or NaN") as error:
        list(encode_slides([one], MeanColour(poison)))
    assert "encoder mean" in str(error.value)
    assert all(np.isfinite(one.features._x[...]).ravel())


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
    a, b = sorted(encode_slides(works, MeanColour()), key=lambda r: r.slide)
    assert isinstance(a.error, UnreadableSlide)
    assert "changed while it was read" in a.error.reason
    assert b.error is None
    np.testing.assert_allclose(stored(works[1])[0], expected(picture(1, (48, 32)), works[1].tree), rtol=1e-3)


def test_tiles_of_a_slide_that_has_failed_are_not_encoded_any_more(tmp_path):
    few = work(tmp_path, "a", picture(2, (32, 16)), unchanged=lambda: False)
    other, encoder = work(tmp_path, "b", picture(1, (48, 32))), MeanColour()
    assert 0 < len(few.tree) < BATCH, "all of them still wait for a batch when the slide fails"
    list(encode_slides([few, other], encoder))
    assert encoder.tiles == len(other.tree)
    assert few.features.missing_rows().all()


def test_a_slide_that_does_not_open_again_fails_alone(tmp_path):
    works, _ = several(tmp_path)

    def gone():
        raise UnreadableSlide("/x/1.svs", "open", "there is no such file")

    works[1].open = gone
    results = {r.slide: r.error for r in encode_slides(works, MeanColour())}
    assert isinstance(results.pop("1.svs"), UnreadableSlide)
    assert set(results.values()) == {None}


def test_faults_of_the_machine_go_through_and_the_slide_is_closed(tmp_path):
    closed = []

    class Lost(Damaged):
        def read(self, *_):
            raise OSError(116, "Stale file handle")

        def close(self):
            closed.append(True)

    one = work(tmp_path, "a", picture(0, (80, 64)))
    one.open = lambda: Lost(picture(0, (80, 64)))
    with pytest.raises(OSError, match="Stale"):
        list(encode_slides([one], MeanColour()))
    assert closed == [True]


def test_what_bounds_a_slide():
    assert Encoded("a", reading=2, encoding=1).bound_by == "reading"
    assert Encoded("a", reading=1, encoding=2).bound_by == "encoding"


def test_time_is_shared_out_and_adds_up(tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))  # every look at the clock takes a second
    works, _ = several(tmp_path)
    encoder = MeanColour()
    results = list(encode_slides(works, encoder))
    assert sum(r.encoding for r in results) == pytest.approx(len(encoder.batches))
    assert sum(r.reading for r in results) >= sum(len(w.tree) for w in works)
