"""Figures against annotations: planted masks, whose areas can be told by hand, and naive counting of pixels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.overlap import SHARES, Choice, Ground, disjoint, region_figures, tile_figures
from pipeline.tissue import TissueMask

WIDTH, HEIGHT, TILE = 1000, 600, 100


def ground(*boxes, size=(WIDTH, HEIGHT), cell=10) -> Ground:
    """Annotated are boxes x0, y0, x1, y1 in level-0 px."""
    shape = size[1] // cell, size[0] // cell
    image = np.zeros(shape, bool)
    for x0, y0, x1, y1 in boxes:
        image[y0 // cell : y1 // cell, x0 // cell : x1 // cell] = True
    return Ground(TissueMask(image, (size[0] / shape[1], size[1] / shape[0]), 0.5 * cell, "test"), size)


def grid(columns=10, rows=6, tile=TILE, origin=(0.0, 0.0)) -> np.ndarray:
    """Tiles row by row."""
    c, r = np.meshgrid(np.arange(columns), np.arange(rows))
    corner = np.stack([c.ravel(), r.ravel()], axis=1) * float(tile) + origin
    return np.concatenate([corner, np.full_like(corner, tile)], axis=1)


def scores(*first: int, count=60) -> np.ndarray:
    """The tiles of `first` are the best, in this order; then the rest, in theirs."""
    order = [*first, *(i for i in range(count) if i not in first)]
    out = np.empty(count)
    out[order] = np.linspace(1, 0, count)
    return out


def figures(truth, score, boxes=None, threshold=0.5, **more):
    boxes = grid() if boxes is None else boxes
    weight = score / np.nansum(score)
    return tile_figures(truth, boxes, weight, np.log(score + 1), threshold, **more)


# The first two columns of tiles of the upper three rows, 6 of 60 tiles: 60,000 px².
CORNER = (0, 0, 200, 300)
INSIDE = (0, 1, 10, 11, 20, 21)


# --- tiles -----------------------------------------------------------------------------------------------------------


def test_a_head_that_looks_where_it_is_annotated():
    found = figures(ground(CORNER), scores(*INSIDE))
    assert (found["tiles"], found["looked_at"], found["positive"]) == (60, 60, 6)
    assert found["auc_weight"] == found["auc_raw"] == 1.0
    assert found["dice_10"] == found["dice_inside_10"] == pytest.approx(1.0)
    # k tiles, 6 of which are annotated: 2 · 6 / (k + 6); and those inside alone are the same 6
    for k, chosen in ((20, 12), (30, 18), (40, 24), (50, 30), (60, 36)):
        assert found[f"dice_{k}"] == pytest.approx(12 / (chosen + 6))
        assert found[f"dice_inside_{k}"] == pytest.approx(1.0)
    assert found["annotated_share"] == pytest.approx(0.1)
    assert found["annotated_in_tiles"] == pytest.approx(1.0)
    assert found["dice_10"] == found[f"dice_{SHARES[0]}"]


def test_a_head_that_looks_elsewhere():
    score = scores(*[i for i in range(60) if i not in INSIDE])
    found = figures(ground(CORNER), score)
    assert found["auc_weight"] == found["auc_raw"] == 0.0
    assert [found[f"dice_{k}"] for k in SHARES] == [0.0] * 6
    assert [found[f"dice_inside_{k}"] for k in SHARES] == [0.0] * 6


def test_half_of_the_best_tiles_are_annotated():
    found = figures(ground(CORNER), scores(0, 1, 10, 59, 58, 57))
    # 3 of 6: 2 · 3 / (6 + 6); of the paper's only the 3 inside count: 2 · 3 / (3 + 6)
    assert found["dice_10"] == pytest.approx(0.5)
    assert found["dice_inside_10"] == pytest.approx(2 / 3)
    # 6 positive and 54 negative tiles; 11, 20 and 21 stand behind 59, 58, 57, and behind 2…9 (8), 2…9 and 12…19 (16)
    assert found["auc_weight"] == pytest.approx(1 - (3 * 3 + 8 + 16 + 16) / (6 * 54))


def test_a_shifted_mask_lowers_every_figure():
    right, wrong = (figures(ground(box), scores(*INSIDE)) for box in (CORNER, (100, 100, 300, 400)))
    # 2 of the 6 tiles are left
    assert wrong["dice_10"] == pytest.approx(2 * 2 / 12)
    for name in ("auc_weight", "auc_raw", *(f"{kind}_{k}" for kind in ("dice", "dice_inside") for k in SHARES[:3])):
        assert wrong[name] < right[name] - 0.05, name


def test_a_mask_between_tiles_counts_by_area():
    # 150 × 100 px: tile 0 is annotated by its right 40 %, tile 1 whole, tile 2 by its left 10 %
    truth = ground((60, 0, 210, 100))
    np.testing.assert_allclose(truth.share(grid())[:4], [0.4, 1.0, 0.1, 0.0], atol=1e-6)
    found = figures(truth, scores(0, 1, 2, 3, 4, 5))
    assert found["positive"] == 1
    assert found["dice_10"] == pytest.approx(2 * 15_000 / (60_000 + 15_000))
    assert found["dice_inside_10"] == pytest.approx(2 * 10_000 / (10_000 + 15_000))
    assert figures(truth, scores(0, 1, 2, 3, 4, 5), threshold=0.4)["positive"] == 2
    assert figures(truth, scores(0, 1, 2, 3, 4, 5), threshold=0.05)["positive"] == 3


def test_a_tile_over_the_edge_counts_by_what_is_on_the_slide():
    """A grid that begins 30 px outside: the first column shows 70 px, and is positive by what it shows."""
    boxes = grid(origin=(-30.0, 0.0))
    truth = ground((0, 0, 40, 600))
    np.testing.assert_allclose(truth.share(boxes)[[0, 10]], 4 / 7, atol=1e-6)
    found = figures(truth, scores(0, 10, 20, 30, 40, 50), boxes)
    assert found["positive"] == 6
    assert found["dice_10"] == pytest.approx(2 * 40 * 600 / (70 * 600 + 40 * 600))


def test_everything_is_annotated():
    found = figures(ground((0, 0, WIDTH, HEIGHT)), scores(*INSIDE), grid(origin=(-30.0, -50.0)))
    assert found["positive"] == 60
    assert math.isnan(found["auc_weight"])
    assert math.isnan(found["auc_raw"])
    # 6 tiles of the corner, of which the first column shows 70 px and the first row 50
    seen = (70 + 100) * (50 + 100 + 100)
    assert found["dice_10"] == found["dice_inside_10"] == pytest.approx(2 * seen / (seen + WIDTH * HEIGHT))
    assert found["annotated_share"] == pytest.approx(1.0)
    assert found["annotated_in_tiles"] == pytest.approx(970 * 550 / (WIDTH * HEIGHT))


def test_nothing_is_annotated():
    found = figures(ground(), scores(*INSIDE))
    assert found["positive"] == 0
    assert all(math.isnan(found[name]) for name in found if name.startswith(("auc", "dice", "annotated_in")))


def test_tiles_that_were_never_looked_at_are_counted_and_not_ranked():
    score = scores(*INSIDE)
    score[[0, 30, 31]] = np.nan
    found = figures(ground(CORNER), score)
    assert (found["tiles"], found["looked_at"], found["positive"]) == (60, 57, 6)
    assert found["auc_weight"] == 1.0
    # of 60 tiles 10 % are 6: the 5 that are left of those inside, and tile 2
    assert found["dice_10"] == pytest.approx(2 * 5 / 12)
    assert found["dice_inside_10"] == pytest.approx(2 * 5 / 11)
    few = np.full(60, np.nan)
    few[[0, 1]] = (0.7, 0.3)
    found = figures(ground(CORNER), few)  # fewer than any k: both are chosen, whatever k
    assert [found[f"dice_{k}"] for k in SHARES] == pytest.approx([2 * 2 / 8] * 6)
    assert math.isnan(found["auc_weight"])


def test_a_share_of_tiles_is_rounded_up():
    boxes = grid(7, 1)
    found = figures(ground((0, 0, 100, 100)), scores(0, count=7), boxes)
    # 10 % of 7 tiles is one, 20 % two
    assert [found[f"dice_{k}"] for k in SHARES[:3]] == pytest.approx([1.0, 2 / 3, 2 / 4])


def test_which_score_ranks():
    boxes, truth = grid(), ground(CORNER)
    weight, raw = np.full(60, 1 / 60), scores(*INSIDE)
    by_weight = tile_figures(truth, boxes, weight, raw, 0.5)
    assert by_weight["dice_10"] == pytest.approx(1.0), "equal weights are told apart by the raw score"
    assert (by_weight["auc_weight"], by_weight["auc_raw"]) == (0.5, 1.0)
    weight = scores(*range(54, 60))
    assert tile_figures(truth, boxes, weight, raw, 0.5)["dice_10"] == 0
    assert tile_figures(truth, boxes, weight, raw, 0.5, score="raw")["dice_10"] == pytest.approx(1.0)


def test_raw_scores_may_be_infinite():
    weight = scores(*INSIDE)
    raw = np.where(weight < 0.5, -np.inf, np.log(weight.clip(0.1)))
    assert tile_figures(ground(CORNER), grid(), weight, raw, 0.5)["auc_raw"] == 1.0


# --- areas -----------------------------------------------------------------------------------------------------------

BOX = st.tuples(*[st.integers(-20, 60)] * 2, *[st.integers(1, 40)] * 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(BOX, max_size=12), st.integers(0, 2**32 - 1))
def test_the_area_of_overlapping_boxes_is_that_of_the_pixels_they_cover(boxes, seed):
    size = (53, 47)
    image = np.random.default_rng(seed).random((size[1], size[0])) > 0.6
    truth = Ground(TissueMask(image, (1.0, 1.0), 0.5, "test"), size)
    covered = np.zeros_like(image)
    for x, y, w, h in boxes:
        covered[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = True
    table = np.array(boxes, float).reshape(-1, 4)
    assert truth.covered(table) == pytest.approx((covered.sum(), (covered & image).sum()), abs=1e-3)
    parts = disjoint(table)
    assert parts.shape == (len(parts), 4)
    assert len(boxes) or not len(parts)
    everywhere = np.zeros((120, 120), int)
    for x, y, w, h in parts.astype(int):
        everywhere[y + 20 : y + h + 20, x + 20 : x + w + 20] += 1
    assert everywhere.max(initial=0) <= 1


def test_overlapping_tiles_are_counted_once():
    boxes = np.array([[0, 0, 100, 100], [50, 0, 100, 100], [900, 500, 100, 100]], float)
    found = tile_figures(ground((0, 0, 150, 100)), boxes, np.array([0.5, 0.4, 0.1]), np.zeros(3), 0.5)
    assert found["dice_60"] == pytest.approx(1.0)  # two of three tiles: 150 × 100 px, not 200 × 100
    assert found["dice_10"] == pytest.approx(2 * 100 / 250)


# --- regions ---------------------------------------------------------------------------------------------------------


def test_how_many_of_the_chosen_regions_hit():
    boxes = grid()
    truth = ground((0, 0, 250, 100))  # tiles 0 and 1 whole, a half of tile 2
    found = region_figures(truth, Choice(boxes[[1, 2, 40, 41]], boxes), threshold=0.6)
    assert found == pytest.approx(
        {
            "regions": 60,
            "chosen": 4,
            "hit_rate": 2 / 4,
            "hit_rate_of_all": 3 / 60,
            "positive_rate": 1 / 4,
            "positive_rate_of_all": 2 / 60,
        }
    )
    assert region_figures(truth, Choice(boxes[[2]], boxes), threshold=0.5)["positive_rate"] == 1.0


@pytest.mark.parametrize("cell", [1, 10, 20])
def test_a_neighbour_of_what_is_annotated_is_no_hit(cell):
    """Its edge is that of the annotation, told in floats."""
    left = np.array([[500 - w, y, w, 50.1] for w in (0.1, 33.3, 99.7) for y in (310.7, 400.0, 555.5)])
    truth = ground((500, 300, 1000, 600), cell=cell)
    assert region_figures(truth, Choice(left, left), 0.5)["hit_rate"] == 0
    assert region_figures(truth, Choice(np.add(left, (0.1, 0, 0, 0)), left), 0.5)["hit_rate"] == 1.0


def test_where_nothing_is_annotated_nothing_can_be_hit():
    found = region_figures(ground(), Choice(grid()[:3], grid()), 0.5)
    assert (found["regions"], found["chosen"]) == (60, 3)
    assert math.isnan(found["hit_rate"])
    assert math.isnan(found["positive_rate_of_all"])


def test_a_head_that_chooses_nothing_has_no_rate():
    found = region_figures(ground(CORNER), None, 0.5)
    assert set(found) == set(region_figures(ground(CORNER), Choice(grid(), grid()), 0.5))
    assert (found["regions"], found["chosen"]) == (0, 0)
    assert math.isnan(found["hit_rate"])
