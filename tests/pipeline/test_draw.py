"""Pictures: lines and colours stand where the tissue and the tiles are."""

import os

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.draw import CONTOUR, EDGE, LEVELS, MARGIN, heatmap, overlay, overview, save_png
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.tissue import TissueMask

# A slide of 1600 x 800 level-0 px, its thumbnail a tenth of that: a picture of 1600 x 800, one pixel each.
WIDTH, HEIGHT, STEP = 1600, 800, 10
WHITE = np.full((HEIGHT // STEP, WIDTH // STEP, 3), 255, np.uint8)


def mask(*boxes: tuple[int, int, int, int]) -> TissueMask:
    """Tissue in boxes x0, y0, x1, y1 of level-0 px."""
    image = np.zeros((HEIGHT // STEP, WIDTH // STEP), bool)
    for x0, y0, x1, y1 in boxes:
        image[y0 // STEP : y1 // STEP, x0 // STEP : x1 // STEP] = True
    return TissueMask(image, (STEP, STEP), 5.0, "test")


def no_tiles() -> QuadTree:
    grid = np.zeros((0, 2), np.int32)
    return QuadTree(grid, grid, np.zeros(0, np.float32), np.zeros(0, np.int32), ((0.5, 100.0, 0, 0),), 100)


def is_colour(picture: np.ndarray, colour) -> np.ndarray:
    return (picture == np.array(colour)).all(axis=2)


def body(picture: np.ndarray) -> np.ndarray:
    """Without the band of the caption."""
    return picture[MARGIN:]


def test_the_contour_runs_around_the_tissue_and_its_holes():
    tissue = mask((400, 200, 900, 600))
    tissue.image[35:45, 60:70] = False  # a hole: x 600..700, y 350..450
    picture = body(overview(WHITE, tissue, no_tiles(), ""))
    assert picture.shape == (HEIGHT, WIDTH, 3)
    green = is_colour(picture, CONTOUR)
    near = np.zeros((HEIGHT, WIDTH), bool)
    for x0, y0, x1, y1 in ((400, 200, 900, 600), (600, 350, 700, 450)):
        frame = np.zeros_like(near)
        frame[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] = True
        frame[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3] = False
        near |= frame
        assert green[(y0 + y1) // 2, x0 - 3 : x0 + 3].any()
        assert green[y1 - 3 : y1 + 3, (x0 + x1) // 2].any()
    assert not green[~near].any()
    assert (picture[~near] == 255).all()


def test_tiles_of_every_level_are_framed_in_their_colour():
    slide = open_slide(np.zeros((HEIGHT, WIDTH, 3), np.uint8), mpp=0.5)
    tissue = mask((400, 200, 600, 400))
    tree = build_quadtree(slide, tissue, mpp=0.5, tile_px=100, levels=2)
    assert [len(level.grid) for level in tree.levels] == [1, 4]
    picture = body(overview(WHITE, TissueMask(tissue.image & False, (STEP, STEP), 5.0, "test"), tree, ""))
    coarse, fine = (is_colour(picture, colour) for colour in LEVELS[:2])
    assert coarse[300, 400 - 1 : 403].any(), "the left edge of the root"
    assert coarse[200 - 1 : 203, 500].any()
    assert not coarse[:195].any()
    assert not coarse[:, 606:].any()
    assert not coarse[210:390, 410:590].any(), "a frame, not a surface"
    assert fine[250, 500], "the cross between the four leaves"
    assert fine[300, 450]
    assert not fine[310:390, 410:490].any()
    rest = np.ones((HEIGHT, WIDTH), bool)
    rest[195:406, 395:606] = False
    assert (picture[rest] == 255).all()


def test_frames_are_rectangles_drawn_one_by_one():
    """Positions between pixels, halves too, are rounded as Python rounds them."""
    slide = open_slide(np.zeros((HEIGHT, WIDTH, 3), np.uint8), mpp=0.5)
    tissue = TissueMask(np.ones((1, 1), bool), (WIDTH, HEIGHT), 5.0, "test")
    tree = build_quadtree(slide, tissue, mpp=0.5, tile_px=41, levels=3, origin=(-3.3, 0.5))
    nothing = TissueMask(np.zeros_like(WHITE[..., 0], bool), (STEP * 1.5, STEP), 5.0, "test")
    want = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for k, inset, thickness in ((2, 0, 1), (1, 1, 1), (0, 1, 2)):
        for x, y, w, h in tree.boxes(k) / (1.5, 1, 1.5, 1):
            corner = round(x) + inset, round(y) + inset
            cv2.rectangle(want, corner, (round(x + w) - inset, round(y + h) - inset), LEVELS[k], thickness)
    np.testing.assert_array_equal(body(overview(WHITE, nothing, tree, "")), want)


def test_the_slide_shows_through():
    rgb = np.zeros((80, 160, 3), np.uint8)
    rgb[:, :80], rgb[:, 80:] = (10, 200, 30), (200, 10, 90)
    picture = body(overview(rgb, mask(), no_tiles(), ""))
    assert is_colour(picture[:, :700], (10, 200, 30)).all()
    assert is_colour(picture[:, 900:], (200, 10, 90)).all()


@pytest.mark.parametrize("shape", [(80, 160), (160, 80), (3000, 4000), (1, 64)])
def test_the_longest_edge_is_fixed(shape):
    image = np.zeros(shape, bool)
    tissue = TissueMask(image, (1.0, 1.0), 8.0, "test")
    picture = body(overview(np.zeros((*shape, 3), np.uint8), tissue, no_tiles(), ""))
    assert max(picture.shape) == EDGE
    assert min(picture.shape[:2]) == max(1, round(min(shape) * EDGE / max(shape)))


def test_the_caption_stands_above_and_any_letter_goes():
    plain, said = (overview(WHITE, mask(), no_tiles(), text) for text in ("", "a — ü \U0001f9ec"))
    assert (plain[:MARGIN] == 255).all()
    assert (said[:MARGIN] < 128).any()
    np.testing.assert_array_equal(plain[MARGIN:], said[MARGIN:])


VIRIDIS = cv2.applyColorMap(np.arange(256, dtype=np.uint8).reshape(-1, 1), cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]


def test_tiles_are_coloured_by_the_rank_of_their_weight():
    boxes = np.array([[100 + 200 * i, 300, 100, 100] for i in range(6)], float)
    weight = np.array([0.001, 0.9, np.nan, 0.002, 0.05, 0.0015])
    ranks = [0, 4, None, 2, 3, 1]
    picture = body(heatmap(WHITE, mask(), boxes, weight, ""))
    for (x, y, w, h), rank in zip(boxes.astype(int), ranks, strict=True):
        middle = picture[y + h // 2, x + w // 2].astype(int)
        if rank is None:
            assert (middle == 255).all(), "never looked at: stays as it is"
        else:
            np.testing.assert_allclose(middle, 0.55 * VIRIDIS[int(rank / 4 * 255)] + 0.45 * 255, atol=1)
        assert (picture[y - 20 : y - 3, x : x + w] == 255).all()
        assert (picture[y : y + h, x + w + 3 : x + w + 20] == 255).all()


def test_one_tile_and_none_that_was_looked_at():
    box = np.array([[100.0, 100, 100, 100]])
    np.testing.assert_allclose(
        body(heatmap(WHITE, mask(), box, np.array([1.0]), ""))[150, 150], 0.55 * VIRIDIS[255] + 0.45 * 255, atol=1
    )
    assert (body(heatmap(WHITE, mask(), box, np.array([np.nan]), "")) == 255).all()


@pytest.mark.parametrize(("origin", "cell"), [((0.0, 0.0), 100.0), ((-130.0, 60.5), 200.0), ((333.25, -50.0), 37.5)])
def test_a_map_lies_over_the_slide_where_its_cells_are(origin, cell):
    """A picture of one pixel each level-0 px: each is asked in which cell its middle lies."""
    values = np.random.default_rng(0).uniform(2, 5, (5, 7))
    values[1, 2] = np.nan
    picture = body(overlay(WHITE, mask(), values, origin, cell, ""))
    colours = VIRIDIS[((np.nan_to_num(values) - np.nanmin(values)) / np.ptp(values[values > 0]) * 255).astype(int)]
    for y in range(3, HEIGHT, 17):
        for x in range(2, WIDTH, 13):
            column, row = int((x + 0.5 - origin[0]) // cell), int((y + 0.5 - origin[1]) // cell)
            seen = 0 <= row < 5 and 0 <= column < 7 and (row, column) != (1, 2)
            want = 0.55 * colours[row, column] + 0.45 * 255 if seen else (255, 255, 255)
            np.testing.assert_allclose(picture[y, x], want, atol=1)


def test_a_map_of_one_value_and_the_contour_of_the_tissue():
    picture = body(overlay(WHITE, mask((400, 200, 900, 600)), np.full((1, 1), 3.0), (0.0, 0.0), 50.0, ""))
    np.testing.assert_allclose(picture[10, 10], 0.55 * VIRIDIS[0] + 0.45 * 255, atol=1)
    assert is_colour(picture[198:203, 600:601], CONTOUR).any()


def test_pictures_do_not_change_what_they_are_given():
    rgb, tissue = WHITE.copy(), mask((400, 200, 900, 600))
    before = tissue.image.copy()
    overview(rgb, tissue, no_tiles(), "x")
    heatmap(rgb, tissue, np.array([[0.0, 0, 50, 50]]), np.ones(1), "x")
    np.testing.assert_array_equal(rgb, WHITE)
    np.testing.assert_array_equal(tissue.image, before)


@pytest.mark.parametrize("shape", [(20, 30), (1, 1), (1, 64), (64, 1), (1634, 1600)])
def test_png_round_trip_and_folders_are_made(tmp_path, shape):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    path = tmp_path / "deep/er/a.png"
    save_png(path, picture)
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], picture)
    with Image.open(path) as image:
        image.verify()  # the check sums too
    assert os.listdir(path.parent) == ["a.png"]


def test_png_is_written_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, WHITE)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.places.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_png(path, WHITE[:10])
    assert path.read_bytes() == before


@pytest.mark.parametrize("letter", ["x", "ü", "€", "\U0001d54f"])
def test_long_names(tmp_path, monkeypatch, letter):
    monkeypatch.setattr(os, "getpid", lambda: 4194304)
    name = letter * (236 // len(letter.encode())) + ".png"
    save_png(tmp_path / name, WHITE)
    assert os.listdir(tmp_path) == [name]
