"""Native tiles of TIFF files: each decoded once, by any number of threads, to the pixels that tifffile finds."""

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from pipeline.demo import write_slide
from pipeline.errors import CorruptTiles
from pipeline.places import read_at
from pipeline.quadtree import build_quadtree
from pipeline.readers import open_slide, tifftiles
from pipeline.readers.tifftiles import TileCache, TilePage, _unaligned
from pipeline.slide import ReadCost, Window
from pipeline.stream import TileReader
from pipeline.tissue import TissueMask

pytestmark = pytest.mark.timeout(60)

W, H, TILE = 300, 211, 64  # 5 × 4 tiles, the last of each row and column cut


@contextmanager
def page_of(path: Path, number: int = 0) -> Iterator[tuple[TilePage, TileCache, ReadCost]]:
    cache, cost = TileCache(), ReadCost()
    with open(path, "rb") as file, tifffile.TiffFile(file) as tif:
        yield TilePage(path, read_at(file), tif.pages[number], number, "level 0", cache, cost), cache, cost


def pasted(page: TilePage, window: Window) -> np.ndarray:
    out = np.full((window.height, window.width, 3), 255, np.uint8)
    page.paste(out, window.x, window.y)
    return out


def on_white(pixels: np.ndarray, at: Window) -> np.ndarray:
    out = np.full((at.height, at.width, 3), 255, np.uint8)
    rows, columns = np.arange(at.y, at.y + at.height), np.arange(at.x, at.x + at.width)
    inside = np.ix_((rows >= 0) & (rows < pixels.shape[0]), (columns >= 0) & (columns < pixels.shape[1]))
    out[inside] = pixels[np.ix_(rows[(rows >= 0) & (rows < pixels.shape[0])], columns[(columns >= 0) & (columns < W)])]
    return out


@pytest.fixture(scope="module")
def pixels(address) -> np.ndarray:
    return address(W, H)


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    """What JPEG keeps to a few grey values, in large streams: noise of a few grey values too."""
    y, x = np.mgrid[:H, :W]
    noise = np.random.default_rng(0).integers(-9, 10, (H, W, 3))
    return np.clip(np.stack([x * 0.8, y, (x + y) / 2], axis=2) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pixels) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "a.tif"
    tifffile.imwrite(path, pixels, tile=(TILE, TILE), compression="deflate", photometric="rgb")
    return path


class Watch:
    """Counts what is decoded, and which of it is still kept by anybody."""

    def __init__(self, monkeypatch, slow: float = 0) -> None:
        self.decoded: Counter[tuple[int, int]] = Counter()
        self._tiles: list[tuple[weakref.ref, int]] = []
        self._lock, original = threading.Lock(), TilePage._read

        def read(page, index):
            time.sleep(slow)
            tile = original(page, index)
            with self._lock:
                self.decoded[page.number, index] += 1
                self._tiles.append((weakref.ref(tile), tile.nbytes))
            return tile

        monkeypatch.setattr(TilePage, "_read", read)

    @property
    def kept(self) -> int:
        """Bytes."""
        with self._lock:
            return sum(size for tile, size in self._tiles if tile() is not None)


def windows_that_overlap() -> list[Window]:
    """Of 80 × 80 pixels every 56, also over the edges; no border is one of a tile."""
    return [Window(x, y, 80, 80) for y in range(-19, H, 56) for x in range(-13, W, 56)]


# --- each once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 8])
def test_what_was_announced_is_decoded_once_and_then_let_go(monkeypatch, plain, pixels, threads):
    watch, windows = Watch(monkeypatch, slow=0.001 * (threads > 1)), windows_that_overlap()
    with page_of(plain) as (page, _, cost):
        page.expect(windows)
        with ThreadPoolExecutor(threads) as pool:
            for window, got in zip(windows, pool.map(lambda window: pasted(page, window), windows), strict=True):
                np.testing.assert_array_equal(got, on_white(pixels, window))
        assert watch.decoded == {(0, index): 1 for index in range(20)}
        assert watch.kept == 0
        assert cost.pixels == 20 * TILE**2
        assert cost.disk > 0


def test_a_tile_is_kept_from_its_first_use_to_its_last(monkeypatch, plain):
    watch = Watch(monkeypatch)
    with page_of(plain) as (page, _, _):
        page.expect([Window(0, 0, 64, 64), Window(60, 0, 10, 10), Window(30, 30, 5, 5)])
        pasted(page, Window(0, 0, 64, 64))
        assert watch.kept == 3 * TILE**2, "tile 0 will be asked for again"
        pasted(page, Window(60, 0, 10, 10))
        assert watch.kept == 3 * TILE**2, "tile 1 will not"
        pasted(page, Window(30, 30, 5, 5))
        assert watch.kept == 0
        assert watch.decoded == {(0, 0): 1, (0, 1): 1}


def test_what_was_not_announced_can_be_read_all_the_same(monkeypatch, plain, pixels):
    """A damaged block is read again in parts, and more often than was said."""
    watch, window = Watch(monkeypatch), Window(10, 10, 100, 100)
    with page_of(plain) as (page, _, _):
        page.expect([window])
        for _ in range(3):
            np.testing.assert_array_equal(pasted(page, window), on_white(pixels, window))
        assert watch.kept == 0


def test_pages_do_not_mix(monkeypatch, tmp_path, address):
    watch = Watch(monkeypatch)
    write_slide(tmp_path / "a.svs", address(512, 384), 0.5, downsamples=(2,), tile_px=64, lossless=True)
    with open_slide(tmp_path / "a.svs", reader="tiffslide") as slide:
        first, second = slide.read(0, 0, 0, 64, 64), slide.read(0, 0, 1, 64, 64)
        np.testing.assert_array_equal(first, address(512, 384)[:64, :64])
        assert not np.array_equal(first, second)
    assert watch.decoded == {(0, 0): 1, (1, 0): 1}


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("ratio", [1, 1.37, 2])
def test_a_tree_of_tiles_is_read_with_each_native_tile_decoded_once(monkeypatch, tmp_path, address, threads, ratio):
    """The blocks of a tree announce themselves."""
    monkeypatch.setattr("pipeline.stream.GROUP_PX", 128)
    write_slide(tmp_path / "a.svs", address(700, 500), 0.25, downsamples=(), tile_px=64, lossless=True)
    watch = Watch(monkeypatch)
    with open_slide(tmp_path / "a.svs", reader="tiffslide") as slide:
        mask = TissueMask(np.ones((1, 1), bool), (700.0, 500.0), 0.25, "test")
        tree = build_quadtree(
            slide, mask, mpp=0.25 * ratio, tile_px=19, levels=3, min_tissue=0, origin=(-7.3, 3.9), min_region_tissue=0
        )
        reader = TileReader(slide, tree)
        assert len(reader.blocks) > 20
        with ThreadPoolExecutor(threads) as pool:
            tiles = [tile for part in pool.map(reader.read, reader.blocks) for tile in part.tiles]
        assert sorted(tile.row for tile in tiles) == list(range(len(tree)))
        assert set(watch.decoded.values()) == {1}
        assert watch.kept == 0
        assert slide.cost.pixels == len(watch.decoded) * 64**2


# --- within bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [0, 1, 3, 7])
@pytest.mark.parametrize("announced", [False, True])
def test_no_more_is_kept_than_fits(monkeypatch, plain, pixels, tiles, announced):
    monkeypatch.setattr(tifftiles, "CACHE_BYTES", tiles * 3 * TILE**2 + 1)
    watch, random = Watch(monkeypatch), np.random.default_rng(0)
    windows = [Window(*random.integers(0, 200, 2).tolist(), 70, 70) for _ in range(60)]
    with page_of(plain) as (page, cache, _):
        if announced:
            page.expect(windows)
        for window in windows:
            np.testing.assert_array_equal(pasted(page, window), on_white(pixels, window))
            assert watch.kept <= max(tiles, 1) * 3 * TILE**2
        if tiles == 7 and not announced:
            assert watch.kept == 7 * 3 * TILE**2, "what fits is kept"
        cache.clear()
        assert watch.kept == 0


@pytest.mark.parametrize("announced", [False, True])
def test_threads_do_not_wear_the_bound_away(monkeypatch, plain, pixels, announced):
    monkeypatch.setattr(tifftiles, "CACHE_BYTES", 3 * 3 * TILE**2)
    watch, random = Watch(monkeypatch, slow=0.0005), np.random.default_rng(1)
    windows = [Window(*random.integers(-20, 250, 2).tolist(), 70, 70) for _ in range(150)]
    with page_of(plain) as (page, _, _):
        if announced:
            page.expect(windows)
        with ThreadPoolExecutor(8) as pool:
            for window, got in zip(windows, pool.map(lambda window: pasted(page, window), windows), strict=True):
                np.testing.assert_array_equal(got, on_white(pixels, window))
        assert watch.kept <= (0 if announced else 3 * 3 * TILE**2)


def test_a_tile_that_is_dropped_at_the_moment_it_arrives_is_not_counted_twice(monkeypatch):
    """The last use of a tile, between its being there and its being counted: its bytes would be taken off for ever."""
    monkeypatch.setattr(tifftiles, "CACHE_BYTES", 250)
    cache, pool, last_uses = TileCache(), ThreadPoolExecutor(1), []

    class Meddled(Future):
        def set_result(self, result):
            super().set_result(result)
            last_uses.append(pool.submit(cache.get, (0, len(last_uses)), lambda: np.zeros(100, np.uint8)))
            time.sleep(0.02)

    monkeypatch.setattr(tifftiles, "Future", Meddled)
    cache.expect(0, np.full(20, 2))
    for number in range(20):
        cache.get((0, number), lambda: np.zeros(100, np.uint8))
        last_uses[-1].result(timeout=10)
    monkeypatch.setattr(tifftiles, "Future", Future)
    kept = []
    for number in range(20):
        tile = cache.get((1, number), lambda: np.zeros(100, np.uint8))
        kept.append(weakref.ref(tile))
        del tile
    assert sum(tile() is not None for tile in kept) == 2
    pool.shutdown()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CorruptTiles("a", "encode", "made up"), OSError(5, "made up"), KeyboardInterrupt()])
def test_an_error_reaches_every_thread_that_waits(error):
    cache, go, decoded = TileCache(), threading.Event(), []

    def decode():
        decoded.append(1)
        go.wait(30)
        raise error

    cache.expect(0, np.array([9]))
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(cache.get, (0, 0), decode) for _ in range(8)]
        time.sleep(0.05)
        go.set()
        assert [future.exception(timeout=10) for future in waiting] == [error] * 8
    assert len(decoded) == 1


def test_a_failed_tile_costs_no_bytes_and_no_place(monkeypatch):
    monkeypatch.setattr(tifftiles, "CACHE_BYTES", 250)
    cache, decoded = TileCache(), []

    def fail():
        raise CorruptTiles("a", "encode", "made up")

    def good(number: int) -> np.ndarray:
        return cache.get((1, number), lambda: decoded.append(number) or np.zeros(100, np.uint8))

    for number in range(9):
        with pytest.raises(CorruptTiles):
            cache.get((0, number), fail)
    good(0), good(1), good(0), good(1)
    assert decoded == [0, 1]


def damaged(path: Path, target: Path, number: int, data: bytes, at: float) -> None:
    """A copy with `data` in the stream of one tile, beginning at a share of its length."""
    whole = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        offset, count = tif.pages[0].dataoffsets[number], tif.pages[0].databytecounts[number]
    start = offset + int(at * count)
    assert start + len(data) < offset + count
    whole[start : start + len(data)] = data
    target.write_bytes(whole)


def write_jpeg(path: Path, image: np.ndarray, photometric: str = "rgb", in_rgb: bool = False, **options) -> Path:
    """As YCbCr in a JFIF stream, which the tags say too; or as RGB, which is neither."""
    args = {"level": 95} | ({"outcolorspace": "rgb"} if in_rgb else {})
    options = {"tile": (TILE, TILE), "compression": "jpeg", "metadata": None, "compressionargs": args} | options
    tifffile.imwrite(path, image, photometric=photometric, **options)
    return path


@pytest.mark.parametrize("in_rgb", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_noise_in_the_middle_of_a_jpeg_stream_is_an_error(tmp_path, smooth, seed, in_rgb):
    """Its head and its end are whole, and libjpeg only warns: it hands out noise."""
    write_jpeg(tmp_path / "a.tif", smooth, in_rgb=in_rgb)
    noise = np.random.default_rng(seed).integers(0, 256, 900, np.uint8).tobytes()
    damaged(tmp_path / "a.tif", tmp_path / "b.tif", 6, noise, 0.4)
    with page_of(tmp_path / "b.tif") as (page, _, _):
        for _ in range(2):
            with pytest.raises(CorruptTiles, match=r"tile 6 of level 0 (does not decode|is damaged)") as caught:
                pasted(page, Window(64, 64, 64, 64))
            assert (caught.value.path, caught.value.stage) == (str(tmp_path / "b.tif"), "encode")
    with page_of(tmp_path / "a.tif") as (whole, _, _), page_of(tmp_path / "b.tif") as (page, _, _):
        for window in (Window(0, 0, W, 64), Window(128, 0, 172, H), Window(0, 128, W, 83)):
            np.testing.assert_array_equal(pasted(page, window), pasted(whole, window))


def test_a_file_that_was_cut_while_open_is_an_error(tmp_path, smooth):
    path = write_jpeg(tmp_path / "a.tif", smooth)
    with page_of(path) as (page, _, _):
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CorruptTiles, match=r"it is cut|is damaged"):
            pasted(page, Window(0, 0, W, H))


def test_a_strip_that_holds_less_than_it_should_is_an_error(tmp_path, smooth):
    """A whole stream, but of fewer rows: what it lacks is no background, and surely not what was in memory before."""
    parts = [smooth[y : y + height] for y, height in ((0, 64), (64, 16), (128, 64), (192, H - 192))]
    streams = (imagecodecs.jpeg_encode(np.ascontiguousarray(part), level=95) for part in parts)
    options = {"shape": (H, W, 3), "dtype": np.uint8, "rowsperstrip": 64, "compression": "jpeg", "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", streams, metadata=None, **options)
    with open_slide(tmp_path / "a.tif", mpp=0.5, reader="tiffslide") as slide:
        with pytest.raises(CorruptTiles, match="tile 1 of level 0 is damaged: it holds 300 x 16 pixels"):
            slide.read(0, 0, 0, W, H)
        assert abs(slide.read(0, 192, 0, W, H - 192).astype(int) - smooth[192:]).mean() < 6, "the last one may be short"


# --- pixels ----------------------------------------------------------------------------------------------------------


def set_photometric(path: Path, value: int) -> None:
    with tifffile.TiffFile(path) as tif:
        at = tif.pages[0].tags[262].valueoffset
    data = bytearray(path.read_bytes())
    data[at : at + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)


def jpeg_stream(path: Path) -> bytes:
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        return path.read_bytes()[page.dataoffsets[0] :][: page.databytecounts[0]]


def rgb_without_jfif(path, image):
    write_jpeg(path, image, in_rgb=True)
    assert b"JFIF" not in jpeg_stream(path)[:20]


def rgb_without_any_marker(path, image):
    """As Aperio writes it: nothing in the stream says what its colours are."""
    rgb_without_jfif(path, image)
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        whole = path.read_bytes()
        streams = [whole[o : o + c] for o, c in zip(page.dataoffsets, page.databytecounts, strict=True)]
    bare = []
    for stream in streams:
        at = stream.find(b"\xff\xee")
        cut = 0 if at < 0 else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        stream = stream[: max(at, 0)] + stream[max(at, 0) + cut :]
        frame = stream.index(b"\xff\xc0")
        names = [frame + 10 + 3 * k for k in range(3)]
        scan = stream.index(b"\xff\xda") + 5
        stream = bytearray(stream)
        for k in range(3):  # the components' names would say it too, were they R, G and B
            stream[names[k]] = stream[scan + 2 * k] = k + 1
        bare.append(bytes(stream))
    options = {"photometric": "rgb", "compression": "jpeg", "tile": (TILE, TILE), "metadata": None}
    tifffile.imwrite(path, iter(bare), shape=(H, W, 3), dtype=np.uint8, **options)
    set_photometric(path, 2)  # the writer takes it for YCbCr
    assert b"Adobe" not in jpeg_stream(path)


def rgb_with_jfif(path, image):
    """The tag says RGB, the stream says JFIF, which is YCbCr: the stream is right."""
    write_jpeg(path, image)
    set_photometric(path, 2)
    assert b"JFIF" in jpeg_stream(path)[:20]


def ycbcr(*subsampling):
    return lambda path, image: write_jpeg(path, image, subsampling=subsampling)


def strips(path, image):
    tifffile.imwrite(path, image, rowsperstrip=32, photometric="rgb", compression="deflate")


def written(**options):
    return lambda path, image: tifffile.imwrite(path, image, **({"tile": (TILE, TILE), "photometric": "rgb"} | options))


FORMATS = {
    "jpeg, ycbcr, jfif": ycbcr(1, 1),
    "jpeg, ycbcr, jfif, halved in x": ycbcr(2, 1),
    "jpeg, ycbcr, jfif, halved": ycbcr(2, 2),
    "jpeg, rgb, no jfif": rgb_without_jfif,
    "jpeg, rgb, no marker": rgb_without_any_marker,
    "jpeg, rgb, but jfif": rgb_with_jfif,
    "jpeg, grey": lambda path, image: write_jpeg(path, image[..., 0], "minisblack"),
    "deflate": written(compression="deflate"),
    "deflate, predictor": written(compression="deflate", predictor=True),
    "lzw": written(compression="lzw"),
    "zstd": written(compression="zstd"),
    "raw": written(),
    "big endian": written(byteorder=">"),
    "strips": strips,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_pixels_that_tifffile_finds(tmp_path, smooth, name):
    FORMATS[name](tmp_path / "a.tif", smooth)
    want = tifffile.imread(tmp_path / "a.tif")
    want = np.repeat(want[..., None], 3, axis=2) if want.ndim == 2 else want
    assert abs(want.astype(int) - (smooth[..., :1] if "grey" in name else smooth)).mean() < 6, "or both are wrong"
    with page_of(tmp_path / "a.tif") as (page, _, _):
        for window in (Window(0, 0, W, H), Window(-5, 60, 90, 70), Window(250, 190, 80, 50), Window(63, 63, 2, 2)):
            np.testing.assert_array_equal(pasted(page, window), on_white(want, window))


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_tiles_that_the_file_leaves_out_are_white(tmp_path, smooth, compression):
    grid = [(y, x) for y in range(0, 192, 64) for x in range(0, 256, 64)]
    tiles = (None if (x // 64 + y // 64) % 2 else smooth[y : y + 64, x : x + 64] for y, x in grid)
    path = tmp_path / "a.tif"
    options = {"photometric": "rgb", "compression": compression, "tile": (64, 64), "metadata": None}
    tifffile.imwrite(path, tiles, shape=(192, 256, 3), dtype=np.uint8, **options)
    with page_of(path) as (page, _, cost):
        got = pasted(page, Window(0, 0, 256, 192))
    for y, x in grid:
        tile = got[y : y + 64, x : x + 64]
        if (x // 64 + y // 64) % 2:
            assert (tile == 255).all()
        else:
            assert abs(tile.astype(int) - smooth[y : y + 64, x : x + 64]).mean() < 9
    assert cost.pixels == 6 * 64**2


@pytest.mark.parametrize("count", [1, 31, 3 * 64 * 64, 3 * 256 * 256])
def test_what_a_tile_is_decoded_into_begins_at_no_multiple_of_32(count):
    kept = [_unaligned(count) for _ in range(50)]
    assert all(out.shape == (count,) and out.ctypes.data % 32 for out in kept)


@pytest.mark.parametrize("sparse", [False, True])
def test_it_is_known_where_a_page_has_every_pixel(tmp_path, smooth, sparse):
    """Elsewhere there has to be white before it is pasted."""
    tiles = (None if sparse and x == 64 else smooth[:64, x : x + 64] for x in (0, 64, 128))
    options = {"shape": (64, 160, 3), "dtype": np.uint8, "tile": (64, 64), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", tiles, **options)
    with page_of(tmp_path / "a.tif") as (page, _, _):
        for inside in ((0, 0, 160, 64), (5, 5, 1, 1), (159, 63, 1, 1)):
            assert page.covers(*inside) is not sparse
        for across in ((-1, 0, 9, 9), (0, -1, 9, 9), (152, 0, 9, 9), (0, 56, 9, 9), (-1, -1, 200, 200), (200, 0, 1, 1)):
            assert page.covers(*across) is False


@pytest.mark.parametrize(
    "window", [(-7, 3, 20, 20), (290, 200, 30, 30), (500, 0, 8, 8), (0, 0, W, H), (60, 60, 80, 80)]
)
def test_what_was_in_memory_before_never_shows(plain, pixels, window):
    at = Window(*window)
    with open_slide(plain, mpp=0.5, reader="tiffslide") as slide:
        for junk in (77, 78):
            before = np.full((at.height, at.width, 3), junk, np.uint8)
            del before
            np.testing.assert_array_equal(slide.read(at.x, at.y, 0, at.width, at.height), on_white(pixels, at))


def test_a_window_beside_the_image_reads_nothing(monkeypatch, plain):
    watch = Watch(monkeypatch)
    with page_of(plain) as (page, _, _):
        windows = [Window(W, 0, 5, 5), Window(-5, 0, 5, 5), Window(0, H, 5, 5), Window(0, -5, 5, 5), Window(3, 3, 0, 5)]
        page.expect(windows)
        assert all((pasted(page, window) == 255).all() for window in windows)
    assert not watch.decoded
