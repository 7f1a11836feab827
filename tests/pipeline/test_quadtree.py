"""Which tiles are taken, and where they lie: against loops over single tiles, and exact fractions."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import TooCoarse, UsageError
from pipeline.quadtree import QuadTree, build_quadtree, halve, morton
from pipeline.scale import ScaleTags
from pipeline.slide import Level, Slide
from pipeline.tissue import TissueMask


class Blank(Slide):
    """A slide of any size that is never read."""

    def __init__(self, width: int, height: int, mpp: float) -> None:
        super().__init__(Path("blank"), [Level(width, height, (1.0, 1.0))], ScaleTags(), "test")
        self.mpp, self.mpp_source = mpp, "test"

    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        raise AssertionError("a tree is built from the mask alone")

    def close(self) -> None:
        pass


def mask_of(image: np.ndarray, slide: Slide) -> TissueMask:
    scale = (slide.size[0] / image.shape[1], slide.size[1] / image.shape[0])
    return TissueMask(image, scale, slide.mpp * math.sqrt(scale[0] * scale[1]), "test")


def full(slide: Slide) -> TissueMask:
    return mask_of(np.ones((1, 1), bool), slide)


def share(mask: TissueMask, x: float, y: float, width: float, height: float) -> float:
    """The tissue in a box by the overlap of every mask pixel with it."""
    (h, w), (fx, fy) = mask.image.shape, mask.downsample
    across = [max(0.0, min(x + width, (i + 1) * fx) - max(x, i * fx)) for i in range(w)]
    down = [max(0.0, min(y + height, (i + 1) * fy) - max(y, i * fy)) for i in range(h)]
    return float(np.array(down) @ mask.image @ np.array(across)) / (width * height)


@st.composite
def cases(draw):
    width, height = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    slide_mpp = draw(st.sampled_from([0.25, 0.2525, 0.2501, 0.499, 0.5, 0.2271]))
    mpp = slide_mpp * draw(st.sampled_from([0.92, 1.0, 1.37, 2.0, 3.999]))
    levels = draw(st.integers(1, 5))
    # at most some 40 leaves a side, or the loops below take their time
    tile_px = max(draw(st.sampled_from([16, 31, 224, 256, 257])), math.ceil(max(width, height) / 40 * slide_mpp / mpp))
    cells = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    seed, share_of_tissue = draw(st.integers(0, 999)), draw(st.sampled_from([0.02, 0.3, 0.9, 1.0]))
    image = np.random.default_rng(seed).random(cells) < share_of_tissue
    origin = draw(st.sampled_from([(0.0, 0.0), (-13.7, 101.3), (5.5, -700.25), (-5000.0, 6000.0)]))
    slide = Blank(width, height, slide_mpp)
    options = {
        "mpp": mpp,
        "tile_px": tile_px,
        "levels": levels,
        "min_tissue": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "min_region_tissue": draw(st.sampled_from([0.0, 0.1, 0.6])),
        "keep_background": draw(st.booleans()),
        "origin": origin,
    }
    return slide, mask_of(image, slide), options


def leaves(slide, mask, options):
    """{(column, row): share} of every leaf of every root that touches the slide, one by one."""
    span, root = options["tile_px"] * options["mpp"] / slide.mpp, 2 ** (options["levels"] - 1)
    (ox, oy), (w, h) = options["origin"], slide.size
    columns = range(math.floor(-ox / span / root) * root, math.ceil((w - ox) / span / root) * root)
    rows = range(math.floor(-oy / span / root) * root, math.ceil((h - oy) / span / root) * root)
    return {(c, r): share(mask, ox + c * span, oy + r * span, span, span) for c in columns for r in rows}


def wanted_leaves(slide, shares, options):
    """The rule of the design, in words of one leaf; None where a share is too near a limit to say."""
    span, root = options["tile_px"] * options["mpp"] / slide.mpp, 2 ** (options["levels"] - 1)
    (ox, oy), (w, h) = options["origin"], slide.size
    regions: dict[tuple[int, int], list[float]] = {}
    for (c, r), value in shares.items():
        regions.setdefault((c // root, r // root), []).append(value)
    limits = [*shares.values()], [sum(v) / len(v) for v in regions.values()]
    for values, limit in zip(limits, (options["min_tissue"], options["min_region_tissue"]), strict=True):
        if limit > 0 and any(abs(value - limit) < 1e-6 for value in values):
            return None
    taken = set()
    for (c, r), value in shares.items():
        x, y = ox + c * span, oy + r * span
        on_slide = x < w - 1e-6 and y < h - 1e-6 and x + span > 1e-6 and y + span > 1e-6
        region = regions[c // root, r // root]
        if on_slide and value >= options["min_tissue"] and sum(region) / len(region) >= options["min_region_tissue"]:
            taken.add((c, r))
    if options["keep_background"]:
        roots = {(c // root, r // root) for c, r in taken}
        taken = {(c, r) for c, r in shares if (c // root, r // root) in roots}
    return taken


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_every_property_of_a_tree(case):
    slide, mask, options = case
    tree = build_quadtree(slide, mask, **options)
    shares = leaves(slide, mask, options)
    want = wanted_leaves(slide, shares, options)
    finest, levels = tree.levels[-1], options["levels"]
    if want is not None:
        assert {tuple(g) for g in finest.grid.tolist()} == want
    assert len(tree.levels) == levels
    assert [level.tile_px for level in tree.levels] == [options["tile_px"]] * levels
    assert len(tree) == sum(len(level.grid) for level in tree.levels)
    means = {0: shares}
    for depth in range(1, levels):
        below = means[depth - 1]
        roots = {(c // 2, r // 2) for c, r in below}
        means[depth] = {(c, r): sum(below[2 * c + i, 2 * r + j] for i in (0, 1) for j in (0, 1)) / 4 for c, r in roots}
    low = [min(g[axis] for g in shares) for axis in (0, 1)]
    for k, level in enumerate(tree.levels):
        depth = levels - 1 - k
        assert level.mpp == pytest.approx(options["mpp"] * 2**depth, rel=1e-12)
        assert level.span_px == pytest.approx(options["tile_px"] * level.mpp / slide.mpp, rel=1e-12)
        grid = [tuple(g) for g in level.grid.tolist()]
        assert len(set(grid)) == len(grid)
        assert level.tissue == pytest.approx([means[depth][g] for g in grid], abs=2e-6)
        assert grid == sorted(grid, key=lambda g: quadrants(g[0] - (low[0] >> depth), g[1] - (low[1] >> depth)))
        if k == 0:
            assert (level.parent == -1).all()
            continue
        above = tree.levels[k - 1]
        assert [tuple(above.grid[p]) for p in level.parent] == [(c // 2, r // 2) for c, r in grid]
        assert set(level.parent.tolist()) == set(range(len(above.grid)))  # no inner node without a child
        boxes, parents = tree.boxes(k), tree.boxes(k - 1)
        for row in range(len(above.grid)):
            children = tree.children(k - 1, row)
            assert (level.parent[children] == row).all()
            assert 1 <= len(children) <= 4
            x, y, width, height = parents[row]
            corners = {(x, y), (x + width / 2, y), (x, y + height / 2), (x + width / 2, y + height / 2)}
            for child in children:
                got = boxes[child]
                assert got[2] == width / 2
                assert min(abs(got[0] - cx) + abs(got[1] - cy) for cx, cy in corners) < 1e-8
            if options["keep_background"]:
                assert len(children) == 4
    for k, level in enumerate(tree.levels):
        np.testing.assert_array_equal(level.xy, np.floor(tree.boxes(k)[:, :2]))


def quadrants(column: int, row: int) -> list[tuple[int, int]]:
    """Which quarter (lower, right), from the largest square down."""
    return [(row >> bit & 1, column >> bit & 1) for bit in range(20, -1, -1)]


@given(st.lists(st.tuples(st.integers(0, 2**20 - 1), st.integers(0, 2**20 - 1)), min_size=1, max_size=30))
def test_morton_interleaves_bits(places):
    columns, rows = np.array(places).T
    want = [int("".join(f"{r >> b & 1}{c >> b & 1}" for b in range(20, -1, -1)), 2) for c, r in places]
    assert morton(columns, rows).tolist() == want


def test_halve_is_the_mean_of_each_four():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert halve(values).tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]


@pytest.mark.parametrize("ratio", ["0.2525", "0.2501", "0.499", "0.2271"])
@pytest.mark.parametrize("origin", [(0.0, 0.0), (-0.3, 77.7)])
def test_nothing_drifts_over_a_hundred_thousand_pixels(ratio, origin):
    slide = Blank(100_003, 400, float(ratio))
    tree = build_quadtree(slide, full(slide), mpp=0.5, tile_px=224, levels=3, min_tissue=0, origin=origin)
    for k, level in enumerate(tree.levels):
        span = 224 * Fraction("0.5") * 2 ** (2 - k) / Fraction(ratio)
        boxes = tree.boxes(k)
        assert boxes[:, 0].max() > 98_000
        for (x, y, width, _), (column, row), xy in zip(boxes, level.grid.tolist(), level.xy.tolist(), strict=True):
            ideal = [Fraction(o) + n * span for o, n in zip(origin, (column, row), strict=True)]
            assert abs(Fraction(float(x)) - ideal[0]) < Fraction(1, 10**9)
            assert abs(Fraction(float(y)) - ideal[1]) < Fraction(1, 10**9)
            assert abs(Fraction(float(width)) - span) < Fraction(1, 10**11)
            assert all(
                abs(Fraction(v) - math.floor(i)) <= (abs(i - round(i)) < 1e-9) for v, i in zip(xy, ideal, strict=True)
            )


def test_outside_the_slide_counts_as_no_tissue():
    slide = Blank(150, 100, 0.5)
    tree = build_quadtree(slide, full(slide), mpp=0.5, tile_px=100, levels=2, min_tissue=0.1)
    assert tree.levels[1].grid.tolist() == [[0, 0], [1, 0]]
    assert tree.levels[1].tissue.tolist() == [1.0, 0.5]
    assert tree.levels[0].tissue.tolist() == [0.375]  # four children, two of them outside


def test_the_rules_of_keeping():
    slide = Blank(800, 400, 0.5)
    image = np.zeros((4, 8), bool)
    image[0, 0] = True  # the left root has one leaf of tissue in sixteen, the right one a quarter
    image[:2, 4:6] = True
    mask = mask_of(image, slide)

    def kept(**options):
        tree = build_quadtree(slide, mask, mpp=0.5, tile_px=100, levels=3, **options)
        return len(tree.levels[0].grid), {tuple(g) for g in tree.levels[2].grid.tolist()}

    block = {(4, 0), (5, 0), (4, 1), (5, 1)}
    assert kept() == (2, {(0, 0)} | block)
    assert kept(min_region_tissue=0.1) == (1, block)
    assert kept(min_region_tissue=0.26) == (0, set())
    assert kept(keep_background=True) == (2, {(c, r) for c in range(8) for r in range(4)})
    assert kept(min_region_tissue=0.1, keep_background=True) == (1, {(c, r) for c in range(4, 8) for r in range(4)})
    assert kept(min_tissue=0) == (2, {(c, r) for c in range(8) for r in range(4)})
    assert kept(min_tissue=0, min_region_tissue=0.1) == (1, {(c, r) for c in range(4, 8) for r in range(4)})


def test_a_slide_without_tissue_has_an_empty_tree():
    slide = Blank(1000, 700, 0.5)
    for levels in (1, 4):
        tree = build_quadtree(slide, mask_of(np.zeros((7, 10), bool), slide), levels=levels)
        assert len(tree) == 0
        assert [len(level.grid) for level in tree.levels] == [0] * levels
        assert tree.encoded_rows.tolist() == []
        assert tree.boxes(0).shape == (0, 4)


def test_too_coarse_a_slide_has_no_tree():
    slide = Blank(1000, 1000, 0.56)
    with pytest.raises(TooCoarse):
        build_quadtree(slide, full(slide), mpp=0.5)
    assert len(build_quadtree(slide, full(slide), mpp=0.5, allow_upsampling=True)) > 0


def test_tiles_that_overlap():
    slide = Blank(1000, 500, 0.5)
    tree = build_quadtree(slide, full(slide), mpp=0.5, tile_px=100, levels=1, overlap=0.25, min_tissue=0.01)
    boxes = tree.boxes(0)
    assert sorted(set(boxes[:, 0])) == [75.0 * n for n in range(14)]
    assert set(boxes[:, 2]) == {100.0}
    shares = [share(full(slide), *box) for box in boxes]
    assert tree.levels[0].tissue == pytest.approx(shares, abs=1e-6)
    with pytest.raises(UsageError, match="overlap"):
        build_quadtree(slide, full(slide), levels=2, overlap=0.25)


def test_encoded_levels_by_name_and_by_resolution():
    slide = Blank(900, 700, 0.25)

    def encoded(wish):
        tree = build_quadtree(slide, full(slide), mpp=0.5, tile_px=64, levels=3, encode_levels=wish)
        rows = [np.arange(tree.levels[k].start, tree.levels[k].stop) for k in tree.encoded_levels]
        assert tree.encoded_rows.tolist() == np.concatenate(rows).tolist()
        return tree.encoded_levels

    assert encoded("all") == (0, 1, 2)
    assert encoded("finest") == (2,)
    assert encoded((2.0,)) == (0,)
    assert encoded((0.5, 2.0)) == (0, 2)
    assert encoded((0.5, 0.5, 1.004)) == (1, 2)
    with pytest.raises(UsageError, match=r"no level of 4.0 µm/px; there are 2, 1, 0.5"):
        encoded((4.0,))


def small_tree(**options):
    slide = Blank(1003, 701, options.pop("slide_mpp", 0.25))
    image = np.random.default_rng(options.pop("seed", 1)).random((7, 10)) < 0.5
    return build_quadtree(slide, mask_of(image, slide), **{"mpp": 0.5, "tile_px": 64, "levels": 3} | options)


def test_the_hash_changes_with_everything_that_changes_a_tile():
    changes = [
        {}, {"seed": 2}, {"mpp": 0.51}, {"tile_px": 65}, {"levels": 2}, {"min_tissue": 0.9}, {"origin": (1.0, 0.0)},
        {"origin": (0.0, 1e-9)}, {"slide_mpp": 0.2501}, {"encode_levels": "finest"}, {"levels": 1},
        {"levels": 1, "overlap": 0.5}, {"keep_background": True}, {"min_region_tissue": 0.55},
    ]  # fmt: skip
    hashes = [small_tree(**change).hash for change in changes]
    assert len(set(hashes)) == len(changes)
    tree = small_tree()
    assert small_tree().hash == tree.hash == hashes[0]
    for name in ("grid", "xy", "tissue", "parent"):
        column = getattr(tree, name).copy()
        column[-1] += 1
        assert replace(tree, **{name: column}).hash != tree.hash, name
    for name, value in {"regular": False, "tile_px": 63, "overlap": 0.1, "encoded": (0,), "origin": (0.5, 0.0)}.items():
        assert replace(tree, **{name: value}).hash != tree.hash, name
    order = np.arange(len(tree))[::-1]
    assert replace(tree, grid=tree.grid[order]).hash != tree.hash


def test_the_hash_is_of_values_and_not_of_their_types():
    tree = small_tree(mpp=1, origin=(0.0, 3.0))
    assert small_tree(mpp=1.0, origin=(0, 3)).hash == tree.hash
    assert small_tree(mpp=np.float64(1), origin=np.array([0.0, 3.0]), tile_px=np.int64(64)).hash == tree.hash
    assert replace(tree, grid=tree.grid.astype(np.int64), tissue=tree.tissue.astype(np.float64)).hash == tree.hash
    assert replace(tree, grid=np.asfortranarray(tree.grid)).hash == tree.hash
    assert replace(tree, encoded=(0, 1, 2)).hash == replace(tree, encoded=()).hash == tree.hash
    assert json.loads(json.dumps(tree.facts())) == tree.facts()


def test_the_hash_is_the_same_in_another_process():
    code = """
import numpy as np
from pipeline.quadtree import QuadTree
grid = np.array([[0, 0], [1, 1], [-3, 2]], np.int32)
print(QuadTree(grid, grid * 7, np.array([1, .5, .25], np.float32), np.array([-1, 0, 0], np.int32),
               ((1.0, 512.0, 0, 1), (0.5, 256.0, 1, 3)), 256, origin=(-1.5, 0.0)).hash)
"""
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("0", "1")]
    run = [
        subprocess.run([sys.executable, "-c", code], env=e, capture_output=True, text=True, check=True)
        for e in environments
    ]
    names: dict[str, object] = {}
    exec(code.replace("print(", "tree = (").replace(".hash)", ")"), names)
    assert {r.stdout.strip() for r in run} == {names["tree"].hash}  # type: ignore[attr-defined]


def test_columns_of_different_length_are_no_tree():
    tree = small_tree()
    for name in ("grid", "xy", "tissue", "parent"):
        with pytest.raises(ValueError, match="of one length"):
            replace(tree, **{name: getattr(tree, name)[:-1]})


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-500, 5000), st.floats(-500, 5000)), max_size=20), st.sampled_from([0.25, 0.2525, 0.5])
)
def test_tiles_on_points_keep_the_order_of_the_points(points, slide_mpp):
    slide = Blank(4001, 3989, slide_mpp)
    tree = QuadTree.from_points(slide, points, 0.5, 64)
    boxes, span = tree.boxes(0), 64 * 0.5 / slide_mpp
    assert len(tree) == len(points)
    assert not tree.regular
    assert (tree.parent == -1).all()
    for (px, py), (x, y, width, height) in zip(points, boxes, strict=True):
        assert width == height == span
        assert -1 < x + span / 2 - px <= 1e-9
        assert -1 < y + span / 2 - py <= 1e-9
    np.testing.assert_array_equal(tree.xy, boxes[:, :2])
    mask = mask_of(np.random.default_rng(0).random((9, 11)) < 0.5, slide)
    with_mask = QuadTree.from_points(slide, points, 0.5, 64, mask)
    assert with_mask.tissue == pytest.approx([share(mask, *box) for box in boxes], abs=1e-5)


@pytest.mark.parametrize("point", [(float("nan"), 1), (1, float("inf"))])
def test_points_must_be_somewhere(point):
    with pytest.raises(UsageError, match="finite"):
        QuadTree.from_points(Blank(100, 100, 0.5), [(1, 1), point], 0.5, 64)


def test_points_may_come_as_an_array_or_a_generator():
    slide = Blank(100, 100, 0.5)
    points = [(10.0, 20.0), (30.5, 40.0)]
    want = QuadTree.from_points(slide, points, 0.5, 8).hash
    assert QuadTree.from_points(slide, np.array(points), 0.5, 8).hash == want
    assert QuadTree.from_points(slide, (p for p in points), 0.5, 8).hash == want


@pytest.mark.parametrize("leaves", [1, 70, 1 << 20])
def test_how_many_leaves_are_counted_at_once_does_not_show(monkeypatch, leaves):
    slide = Blank(5003, 2999, 0.2525)
    mask = mask_of(np.random.default_rng(1).random((37, 61)) < 0.3, slide)
    want = build_quadtree(slide, mask, tile_px=64, origin=(-77.7, 13.1))
    monkeypatch.setattr("pipeline.quadtree.LEAVES_AT_ONCE", leaves)
    assert build_quadtree(slide, mask, tile_px=64, origin=(-77.7, 13.1)).hash == want.hash


@pytest.mark.slow
def test_a_slide_of_a_hundred_thousand_pixels_a_side():
    slide = Blank(100_003, 99_991, 0.2525)
    image = np.random.default_rng(0).random((500, 500)) < 0.2
    tree = build_quadtree(slide, mask_of(image, slide), mpp=0.5, tile_px=224, levels=4)
    assert len(tree.levels[-1].grid) > 10_000
    for k in range(1, 4):
        level, above = tree.levels[k], tree.levels[k - 1]
        np.testing.assert_array_equal(above.grid[level.parent], level.grid // 2)
        assert (np.diff(level.parent) >= 0).all()
