"""Every tile holds the pixels that it claims: the colour of a pixel is its address, and the reference is naive."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from pipeline.demo import write_slide
from pipeline.errors import CorruptTiles
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.slide import Slide, source_level
from pipeline.stream import stream_tiles
from pipeline.tissue import TissueMask

TOLERANCE = 0.51  # rounding to uint8, and a hundredth for float32
PRIME, WHOLE = (1013, 787), (1024, 768)  # the second: every level a whole fraction, so that OpenSlide is exact


@pytest.fixture(scope="module")
def files(tmp_path_factory, address) -> dict[tuple[int, int], Path]:
    folder = tmp_path_factory.mktemp("slides")
    paths = {size: folder / f"{size[0]}.svs" for size in (PRIME, WHOLE)}
    for size, path in paths.items():
        write_slide(path, address(*size), 0.25, downsamples=(2, 4), tile_px=112, lossless=True)
    return paths


def all_tissue(slide: Slide) -> TissueMask:
    return TissueMask(np.ones((1, 1), bool), (float(slide.size[0]), float(slide.size[1])), slide.mpp, "test")


def whole_tree(slide: Slide, mpp: float, tile_px: int = 37, levels: int = 3, **options) -> QuadTree:
    return build_quadtree(slide, all_tissue(slide), mpp=mpp, tile_px=tile_px, levels=levels, min_tissue=0, **options)


def tiles_of(slide: Slide, tree: QuadTree, wanted: np.ndarray | None = None) -> dict[int, np.ndarray | None]:
    found = {}
    for row, pixels in stream_tiles(slide, tree, wanted):
        assert row not in found, "a tile came twice"
        found[row] = pixels
        if pixels is not None:
            assert pixels.shape == (tree.tile_px, tree.tile_px, 3)
            assert pixels.dtype == np.uint8
    return found


@pytest.mark.parametrize(("mpp", "tile_px"), [(0.25, 37), (0.5, 37), (0.5, 64), (0.75, 37), (0.34, 37)])
def test_pixels_do_not_depend_on_which_levels_are_encoded(files, mpp, tile_px):
    """One level is averaged in whole grey levels, several in 1/256 of one: the finest tiles are the same."""
    with open_slide(files[PRIME]) as slide:
        deep, flat = whole_tree(slide, mpp, tile_px), whole_tree(slide, mpp, tile_px, encode_levels="finest")
        first = deep.levels[-1].start
        want, got = tiles_of(slide, deep), tiles_of(slide, flat)
    assert len(got) == len(deep) - first
    for row, pixels in got.items():
        np.testing.assert_array_equal(pixels, want[first + row])


def level_pixels(slide: Slide) -> list[np.ndarray]:
    """What is stored, by tifffile alone."""
    with tifffile.TiffFile(slide.path) as file:
        pages = sorted((p for p in file.pages if p.is_tiled), key=lambda p: -p.imagewidth)
        return [page.asarray() for page in pages]


def expected(tree: QuadTree, level: int, source: np.ndarray, factor: float, area_mean) -> dict[int, np.ndarray]:
    """The tiles of a level that stands on a grid, cut from one area mean over all of it."""
    grid, part, px = tree.levels[level].grid.astype(int), tree.levels[level], tree.tile_px
    low, high = grid.min(axis=0), grid.max(axis=0) + 1
    box = [*(tree.origin + low * part.span_px), *((high - low) * part.span_px)]
    wide, tall = (high - low) * px
    image = area_mean(source, tuple(edge / factor for edge in box), (int(wide), int(tall)))
    at = (grid - low) * px
    return {part.start + row: image[y : y + px, x : x + px] for row, (x, y) in enumerate(at)}


def assert_true(
    slide: Slide, tree: QuadTree, stored: list[np.ndarray], area_mean, tolerance: float = TOLERANCE
) -> None:
    source = source_level(slide, tree.levels[-1].mpp)
    got = tiles_of(slide, tree)
    assert sorted(got) == list(range(len(tree)))
    for level in range(len(tree.levels)):
        factor = slide.levels[source].downsample[0]
        for row, want in expected(tree, level, stored[source], factor, area_mean).items():
            assert abs(got[row] - want).max() <= tolerance, (level, row)


@pytest.mark.parametrize("origin", [(0.0, 0.0), (-57.3, 23.9), (11.0, -200.0)])
@pytest.mark.parametrize("ratio", [1, 1.37, 2, 4])
@pytest.mark.parametrize(("size", "reader"), [(PRIME, "auto"), (PRIME, "tiffslide"), (WHOLE, "openslide")])
def test_every_tile_of_a_file_at_every_level(files, area_mean, size, reader, ratio, origin):
    with open_slide(files[size], reader=reader) as slide:
        tree = whole_tree(slide, 0.25 * ratio, origin=origin)
        assert source_level(slide, 0.25 * ratio) == {1: 0, 1.37: 0, 2: 1, 4: 2}[ratio]
        assert_true(slide, tree, level_pixels(slide), area_mean)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("origin", [(16.0, 48.0), (-16.0, 5.0), (100.0, 100.0)])
def test_a_sparse_tree_of_a_moved_grid(address, area_mean, origin, levels):
    """Its first node stands at any column, so squares of its Morton order are no squares of many blocks."""
    pixels = address(640, 640)
    slide = open_slide(pixels, mpp=0.5)
    for seed in range(20):
        image = np.random.default_rng(seed).random((20, 20)) < 0.7
        mask = TissueMask(image, (32.0, 32.0), 16.0, "test")
        tree = build_quadtree(
            slide, mask, mpp=0.5, tile_px=32, levels=levels, min_tissue=0.3, origin=origin, encode_levels="finest"
        )
        part, got = tree.levels[-1], tiles_of(slide, tree)
        want = expected(tree, len(tree.levels) - 1, pixels, 1.0, area_mean)
        assert sorted(got) == list(range(part.stop - part.start))
        for row, tile in got.items():
            assert abs(tile - want[part.start + row]).max() <= TOLERANCE


@pytest.mark.parametrize("ratio", [1, 1.37, 2, 4])
def test_openslide_at_level_0_of_any_size(files, area_mean, ratio):
    """Its positions are whole there; at other levels of prime size it interpolates, which is why auto avoids it."""
    with open_slide(files[PRIME], reader="openslide") as slide:
        if ratio <= 1.37:
            assert_true(slide, whole_tree(slide, 0.25 * ratio), level_pixels(slide), area_mean)
        else:
            with open_slide(files[PRIME]) as automatic:
                assert automatic.reader == "tiffslide"
                assert any("interpolates" in text or "deflate" in text for text in automatic.refusals)


@pytest.mark.parametrize(("mpp", "asked"), [(0.2525, 0.5), (0.2525, 0.2525), (0.5, 0.499), (0.2271, 1.0), (0.26, 0.25)])
def test_odd_resolutions(address, area_mean, mpp, asked):
    pixels = address(1511, 1201)
    slide = open_slide(pixels, mpp=mpp)
    assert_true(slide, whole_tree(slide, asked, 61, 4), [pixels], area_mean)


def test_what_lies_outside_is_white_and_counts_by_its_area(address, area_mean):
    pixels = np.zeros((101, 127, 3), np.uint8)
    slide = open_slide(pixels, mpp=0.5)
    tree = whole_tree(slide, 2.0, 5, 2, origin=(-50.5, -50.5))
    got = tiles_of(slide, tree)
    corner = next(row for row, xy in enumerate(tree.xy[tree.levels[1].start :]) if tuple(xy) == (-11, -11))
    want = np.full((5, 5), 0.0)
    want[2, :], want[:, 2] = 255 * 2.5 / 4, 255 * 2.5 / 4  # the border is 10.5 px in: 2.5 of 4 px of the third cell
    want[2, 2] = 255 * (1 - 1.5**2 / 16)
    want[:2, :], want[:, :2] = 255, 255
    assert abs(got[tree.levels[1].start + corner][..., 0] - want).max() <= TOLERANCE
    assert_true(slide, tree, [pixels], area_mean)


def test_a_slide_smaller_than_a_tile(address, area_mean):
    pixels = address(23, 17)
    slide = open_slide(pixels, mpp=0.5)
    assert_true(slide, whole_tree(slide, 0.5, 64, 3), [pixels], area_mean)


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.37])
def test_tiles_that_overlap(address, area_mean, overlap):
    pixels = address(613, 401)
    slide = open_slide(pixels, mpp=0.2525)
    tree = whole_tree(slide, 0.5, 40, 1, overlap=overlap)
    got = tiles_of(slide, tree)
    span, pitch = 40 * 0.5 / 0.2525, 40 * 0.5 / 0.2525 * (1 - overlap)
    for row, (column, line) in enumerate(tree.grid.tolist()):
        want = area_mean(pixels, (column * pitch, line * pitch, span, span), (40, 40))
        assert abs(got[row] - want).max() <= TOLERANCE
    assert len(got) == len(tree) > 50


def test_tiles_on_points(files, area_mean):
    points = [(500.2, 300.7), (3.0, 2.0), (1010.9, 780.1), (500.2, 300.7), (64.5, 700.0), (-20.0, -20.0)]
    with open_slide(files[PRIME]) as slide:
        tree = QuadTree.from_points(slide, points, 0.4, 33)
        got = tiles_of(slide, tree)
        assert sorted(got) == list(range(6))
        stored, span = level_pixels(slide)[0], 33 * 0.4 / 0.25
        for row, (x, y) in enumerate(points):
            box = (np.floor(x - span / 2), np.floor(y - span / 2), span, span)
            assert abs(got[row] - area_mean(stored, box, (33, 33))).max() <= TOLERANCE
        np.testing.assert_array_equal(got[0], got[3])


@pytest.mark.parametrize("wish", ["all", "finest", (2.0, 0.5)])
def test_only_encoded_levels_come_and_in_table_order(files, wish):
    with open_slide(files[PRIME]) as slide:
        every = tiles_of(slide, whole_tree(slide, 0.5))
        tree = whole_tree(slide, 0.5, encode_levels=wish)
        got = tiles_of(slide, tree)
        assert sorted(got) == list(range(len(tree.encoded_rows)))
        for row, at in enumerate(tree.encoded_rows):
            # A level that is read alone may be read in other parts: rounding of float32 sums.
            assert abs(got[row].astype(int) - every[int(at)]).max() <= 1


def test_the_source_serves_the_finest_level_that_is_asked_for(files, area_mean):
    """1.0 µm/px alone has the same pixels as beside 0.5: of the file's level for 0.5, not of its own for 1.0."""
    with open_slide(files[PRIME]) as slide:
        tree = whole_tree(slide, 0.5, encode_levels=(1.0,))
        got = tiles_of(slide, tree)
        want = expected(tree, 1, level_pixels(slide)[1], 2, area_mean)
        assert sorted(got) == [row - tree.levels[1].start for row in want]
        for row, pixels in want.items():
            assert abs(got[row - tree.levels[1].start] - pixels).max() <= TOLERANCE


def sparse_mask(slide: Slide, seed: int) -> TissueMask:
    image = np.random.default_rng(seed).random((13, 17)) < 0.25
    return TissueMask(image, (slide.size[0] / 17, slide.size[1] / 13), slide.mpp * 60, "test")


@pytest.mark.parametrize("ratio", [1.37, 2])
def test_background_children_show_in_the_tile_above(address, area_mean, ratio):
    pixels = address(*PRIME)
    slide = open_slide(pixels, mpp=0.25)
    tree = build_quadtree(slide, sparse_mask(slide, 1), mpp=0.25 * ratio, tile_px=19, levels=4, min_tissue=0.5)
    assert 0 < len(tree.levels[3].grid) < len(whole_tree(slide, 0.25 * ratio, 19, 4).levels[3].grid) / 2
    assert_true(slide, tree, [pixels], area_mean)


@pytest.mark.parametrize("read_px", [4096, 100])
@pytest.mark.parametrize("wish", ["all", "finest", (2.0, 0.5)])
def test_a_wanted_part_has_the_same_bits(monkeypatch, files, wish, read_px):
    monkeypatch.setattr("pipeline.stream.READ_PX", read_px)
    random = np.random.default_rng(7)
    with open_slide(files[PRIME]) as slide:
        tree = build_quadtree(slide, sparse_mask(slide, 2), mpp=0.5, tile_px=19, levels=4, encode_levels=wish)
        every = tiles_of(slide, tree)
        for share in (0.0, 0.02, 0.3, 1.0):
            wanted = random.random(len(tree.encoded_rows)) < share
            got = tiles_of(slide, tree, wanted)
            assert sorted(got) == np.nonzero(wanted)[0].tolist()
            for row, pixels in got.items():
                np.testing.assert_array_equal(pixels, every[row])


@pytest.mark.parametrize("ratio", [1, 1.37, 2])
@pytest.mark.parametrize("read_px", [37, 64, 300, 700])
def test_reading_in_quarters_gives_the_same_pixels(monkeypatch, address, area_mean, ratio, read_px):
    """±1: the means of means are float32 sums in another order, so that a rounding may fall to the other side."""
    pixels = address(*PRIME)
    slide = open_slide(pixels, mpp=0.25)
    tree = whole_tree(slide, 0.25 * ratio, 16, 6, origin=(-3.3, -7.9))
    monkeypatch.setattr("pipeline.stream.READ_PX", 1 << 15)
    direct = tiles_of(slide, tree)
    monkeypatch.setattr("pipeline.stream.READ_PX", read_px)
    quarters = tiles_of(slide, tree)
    assert sorted(direct) == sorted(quarters) == list(range(len(tree)))
    for row, want in direct.items():
        assert abs(quarters[row].astype(int) - want).max() <= 1
    assert_true(slide, tree, [pixels], area_mean)


def test_a_root_of_8192_pixels_is_read_in_bounded_parts(monkeypatch, address, area_mean):
    pixels = address(8209, 521)
    slide = open_slide(pixels, mpp=0.25)
    largest, read = [0], slide.read

    def noted(x, y, level, width, height):
        largest[0] = max(largest[0], width, height)
        return read(x, y, level, width, height)

    monkeypatch.setattr(slide, "read", noted)
    tree = build_quadtree(slide, all_tissue(slide), mpp=0.25, tile_px=256, levels=6, min_tissue=0.5)
    assert tree.levels[0].span_px == 8192
    assert tree.levels[0].grid.tolist() == [[0, 0]]
    got = tiles_of(slide, tree)
    assert largest[0] == 4096
    for level in (0, 2, 5):
        for row, want in expected(tree, level, pixels, 1, area_mean).items():
            assert abs(got[row] - want).max() <= TOLERANCE, (level, row)


def damaged_copy(source: Path, target: Path, numbers: list[int]) -> list[tuple[int, int]]:
    """Zero the streams of these tiles of level 0; their (column, row)."""
    data = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as file:
        page = file.pages[0]
        across = -(-page.imagewidth // page.tilewidth)
        for number in numbers:
            at, count = page.dataoffsets[number], page.databytecounts[number]
            data[at : at + count] = bytes(count)
    target.write_bytes(data)
    return [(n % across, n // across) for n in numbers]


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
@pytest.mark.parametrize(("ratio", "off"), [(1, 0), (2, 0), (1.37, 1)])
def test_a_damaged_tile_costs_exactly_the_tiles_that_touch_it(tmp_path, address, reader, ratio, off):
    write_slide(tmp_path / "whole.svs", address(*WHOLE), 0.25, downsamples=(4,), tile_px=128)
    hurt = damaged_copy(tmp_path / "whole.svs", tmp_path / "hurt.svs", [19, 37])
    with open_slide(tmp_path / "whole.svs", reader=reader) as slide:
        tree = whole_tree(slide, 0.25 * ratio, 24, 5)
        want = tiles_of(slide, tree)
    with open_slide(tmp_path / "hurt.svs", reader=reader) as slide:
        got = tiles_of(slide, tree)
        with pytest.raises(CorruptTiles):
            slide.read(hurt[0][0] * 128 + 5, hurt[0][1] * 128 + 5, 0, 3, 3)
    assert sorted(got) == sorted(want)
    lost = set()
    for k, level in enumerate(tree.levels):
        for row, (x, y, width, height) in enumerate(tree.boxes(k), start=level.start):
            for column, line in hurt:
                if (
                    x < column * 128 + 128
                    and x + width > column * 128
                    and y < line * 128 + 128
                    and y + height > line * 128
                ):
                    lost.add(row)
    assert {row for row, pixels in got.items() if pixels is None} == lost
    assert 0 < len(lost) < len(tree) / 2
    for row, pixels in got.items():
        if pixels is not None:
            # Read alone instead of with its neighbours: the same sums where the grid is whole, else one rounding.
            assert abs(pixels.astype(int) - want[row]).max() <= off


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_tree_wholly_on_damage(tmp_path, address, level):
    write_slide(tmp_path / "a.svs", address(256, 256), 0.25, downsamples=(), tile_px=128)
    damaged_copy(tmp_path / "a.svs", tmp_path / "b.svs", [0, 1, 2, 3])
    with open_slide(tmp_path / "b.svs") as slide:
        got = tiles_of(slide, whole_tree(slide, 0.25, 16, level + 1))
    assert got
    assert all(pixels is None for pixels in got.values())


def test_stopping_early_leaves_no_trace(files):
    with open_slide(files[PRIME]) as slide:
        tree = whole_tree(slide, 0.5)
        stream = stream_tiles(slide, tree)
        first = next(stream)
        stream.close()
        np.testing.assert_array_equal(tiles_of(slide, tree)[first.row], first.pixels)


def test_an_empty_tree_has_no_tiles():
    slide = open_slide(np.zeros((50, 50, 3), np.uint8), mpp=0.5)
    nothing = TissueMask(np.zeros((5, 5), bool), (10.0, 10.0), 5.0, "test")
    tree = build_quadtree(slide, nothing, mpp=0.5, tile_px=16, levels=2)
    assert list(stream_tiles(slide, tree)) == []
