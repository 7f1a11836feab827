"""Tiles of many slides in random order: all of them, none twice, the pixels of the stream, whatever the threads do."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from extractors import load_encoder
from pipeline import BagStore, open_slide
from pipeline.config import make_config
from pipeline.demo import write_slide
from pipeline.errors import RunStopped, UsageError
from pipeline.output import write_json
from pipeline.pool import Pool, read_pool
from pipeline.stages import SlideFile, make_recipe, prepare
from pipeline.stream import stream_tiles

PX, NAMES = 64, ("a.tif", "b.tif", "c.tif")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides of noise on glass, and a store with their tiles on two levels."""
    root = tmp_path_factory.mktemp("pool")
    recipe = make_recipe(make_config(mpp=0.5, levels=2, tile_px=PX, encoder="lab_lbp"), load_encoder("lab_lbp"))
    (root / "slides").mkdir()
    for seed, name in enumerate(NAMES):
        random = np.random.default_rng(seed)
        pixels = random.integers(241, 246, (512, 640, 3), dtype=np.uint8)  # glass, but no two tiles alike
        pixels[64:448, 64 : 448 + 64 * seed] = random.integers(60, 200, (384, 384 + 64 * seed, 3), dtype=np.uint8)
        write_slide(root / "slides" / name, pixels, 0.5, downsamples=(4,), lossless=True)
        assert prepare(SlideFile(name, root / "slides" / name), recipe, root / "out").status == "ready"
    write_json(root / "out" / "run.json", {"root": str(root / "slides")})
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy whose slides may be damaged."""
    shutil.copytree(made, tmp_path / "copy")
    write_json(tmp_path / "copy/out/run.json", {"root": str(tmp_path / "copy/slides")})
    return tmp_path / "copy"


def pool_of(place: Path, level: float | None = None, **options: int) -> Pool:
    pool, _ = read_pool(place / "out", NAMES, level)
    return Pool(pool.parts, **options) if options else pool


def expected(place: Path, level: int = -1) -> set[bytes]:
    found = set()
    for name in NAMES:
        tree = BagStore(place / "out").group(name).tree()
        part = tree.levels[level]
        with open_slide(place / "slides" / name) as slide:
            found |= {t.pixels.tobytes() for t in stream_tiles(slide, tree) if part.start <= t.row < part.stop}
    return found


def drawn(pool: Pool, count: int, seed: int = 0, rank: int = 0, world: int = 1) -> list[bytes]:
    return [tile.tobytes() for tile in pool.draw(count, (seed,), rank, world)]


@pytest.mark.parametrize("mixed", [1, 3 * PX * PX * 5, 1 << 30])
def test_an_epoch_of_all_is_every_tile_once(made: Path, mixed: int) -> None:
    pool = pool_of(made, mixed_bytes=mixed)
    found = drawn(pool, len(pool))
    assert len(found) == len(pool) == len(set(found)) > 60
    assert set(found) == expected(made)
    assert pool.lost == {}


def test_a_coarse_level(made: Path) -> None:
    pool, mpp = read_pool(made / "out", NAMES, 1.0)
    assert mpp == 1.0
    got = np.stack([np.frombuffer(t, np.uint8) for t in sorted(drawn(pool, len(pool)))]).astype(int)
    want = np.stack([np.frombuffer(t, np.uint8) for t in expected(made, 0)]).astype(int)
    assert len(got) == len(want)
    nearest = np.abs(got[:, None] - want[None]).max(2).min(1)
    assert nearest.max() <= 1, "the means of the same pixels, rounded once more or less"


def test_the_seed_decides_which_and_in_what_order(made: Path) -> None:
    first = drawn(pool_of(made), 30)
    assert drawn(pool_of(made), 30) == first
    assert len(set(first)) == 30
    other = drawn(pool_of(made), 30, seed=1)
    assert set(other) != set(first)
    assert len(set(other) - set(first)) > 5


def test_slides_are_mixed_as_far_as_the_buffer_goes(made: Path) -> None:
    pool = pool_of(made)
    each = [{t.tobytes() for t, k in zip(*pool.sample(10_000, (0,)), strict=True) if k == i} for i in range(3)]
    order = [next(i for i, tiles in enumerate(each) if t in tiles) for t in drawn(pool, len(pool))]
    changes = int(np.count_nonzero(np.diff(order)))
    assert changes > len(order) / 3
    small = pool_of(made, mixed_bytes=1)
    assert [next(i for i, tiles in enumerate(each) if t in tiles) for t in drawn(small, len(small))] != order


def test_processes_share_an_epoch(made: Path) -> None:
    whole = set(drawn(pool_of(made), 60))
    shares = [drawn(pool_of(made), 60, rank=rank, world=3) for rank in range(3)]
    assert [len(share) for share in shares] == [20, 20, 20]
    assert set().union(*shares) == whole
    assert len(whole) == 60


def test_a_sample_has_tiles_of_every_slide(made: Path) -> None:
    tiles, parts = pool_of(made).sample(30, (0,))
    assert tiles.shape == (30, PX, PX, 3)
    assert np.bincount(parts).tolist() == [10, 10, 10]
    assert {t.tobytes() for t in tiles} <= expected(made)
    again, _ = pool_of(made).sample(30, (0,))
    assert np.array_equal(tiles, again)


def test_a_slide_that_breaks_leaves_its_place_to_others(place: Path) -> None:
    pool = pool_of(place)
    (place / "slides/b.tif").write_bytes(b"\0" * 1000)
    found = drawn(pool, len(pool))
    assert len(found) == len(pool)
    left = len(pool.parts[0]) + len(pool.parts[2])
    assert len(set(found)) == left
    assert max(found.count(tile) for tile in set(found)) == 2
    assert list(pool.lost) == ["b.tif"]
    assert "b.tif" in pool.lost["b.tif"]


def test_nothing_readable_stops(place: Path) -> None:
    pool = pool_of(place)
    for name in NAMES:
        (place / "slides" / name).write_bytes(b"\0" * 1000)
    with pytest.raises(RunStopped, match="not one tile could be read"):
        drawn(pool, 10)
    with pytest.raises(RunStopped, match="not one tile could be read"):
        pool.sample(10, (0,))


def test_what_cannot_be_a_pool(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--level 3: the tiles have 1, 0\.5 µm/px"):
        read_pool(place / "out", NAMES, 3.0)
    with pytest.raises(UsageError, match="no output folder"):
        read_pool(tmp_path, NAMES, None)
    with pytest.raises(UsageError, match="no slide with tiles"):
        read_pool(place / "out", [], None)
    (place / "slides/b.tif").unlink()
    with pytest.raises(UsageError, match=r"1 slides are not in .* b\.tif for one"):
        read_pool(place / "out", NAMES, None)
