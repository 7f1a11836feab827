"""Stitched maps against what is known of them: constants, ramps, single tiles, and the plain head."""

import numpy as np
import pytest
import torch

from heads import Bag, load_head
from heads.hvit import RegionAttention, regions_of
from pipeline.errors import UsageError
from pipeline.stitching import Look, Shifts, half, look, stitch_looks, stretched

SIDE, DIM = 4, 3


class Told:
    """A head whose attention is told: `of(columns, rows, regions)` of the tiles where the bag has them."""

    def __init__(self, of):
        self.of = of

    def attention(self, bag, shift=(0, 0)):
        regions = regions_of(bag.grid - torch.tensor(shift), SIDE)
        tile = self.of(*bag.grid.T.double(), regions)
        return RegionAttention(tile.expand(2, -1).float(), tile.float(), regions.sizes[regions.of].float())


def bag(side=12, first=(0, 0), tissue=None) -> Bag:
    grid = np.array([(first[0] + c, first[1] + r) for r in range(side) for c in range(side)])
    features = np.random.default_rng(0).normal(size=(len(grid), DIM))
    return Bag.flat(features, grid=grid, tissue=np.ones(len(grid)) if tissue is None else tissue)


def maps(head, given, stride, **options):
    """Every grid has the bag's tiles, as a slide that looks the same wherever its grid begins."""
    shifts = Shifts(SIDE, stride)
    return stitch_looks([look(head, given, shifts, moved, **options) for moved in shifts.grids], shifts)


@pytest.fixture
def hvit():
    torch.manual_seed(0)
    head = load_head("hvit", DIM, 2, side=SIDE).eval()
    for weight in (head.regions.places, head.regions.token):
        weight.data.normal_()
    return head


@pytest.mark.parametrize("stride", [4, 2, 1, 0.5, 1 / 3])
def test_constant_attention_gives_a_constant_map(stride):
    found = maps(Told(lambda x, y, regions: x * 0 + 0.3), bag(), stride, by_foreground=False)
    for values in (found.slide, *found.region):
        seen = values[np.isfinite(values)]
        assert len(seen) >= 12 * 12
        np.testing.assert_allclose(seen, 0.3, rtol=1e-6)
    product = found.stitched(0.5)
    assert set(product[np.isfinite(product)]) == {1.0}


@pytest.mark.parametrize("stride", [4, 2, 1, 0.5, 1 / 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_ramp_stays_a_ramp(stride, axis):
    """Attention that grows with the column (row) grows in the map, whatever tiles and grids overlap."""
    found = maps(Told(lambda *at: at[axis]), bag(first=(-3, 5)), stride, by_foreground=False)
    values = found.region[0] if axis == 0 else found.region[0].T
    lines = values[found.per_tile : -2 * found.per_tile]  # of all, those that every grid covers
    assert np.isfinite(lines).any()
    for line in lines:
        steps = np.diff(line[np.isfinite(line)])
        assert (steps > -1e-5).all()
        assert steps.sum() == pytest.approx(11, abs=1)


@torch.no_grad()
def test_without_overlap_the_map_is_what_the_head_says(hvit):
    """A stride of a whole region is the plain head: tile (row r, column c) stands at [r, c], which is place 4 r + c."""
    given = bag()
    found, out = maps(hvit, given, SIDE, by_foreground=False), hvit(given)
    assert (found.low, found.per_tile) == ((0, 0), 1)
    columns, rows = given.grid.T.numpy()
    each = out.parts["region_attention"].numpy()
    np.testing.assert_array_equal(found.region[:, rows, columns], each)
    regions = regions_of(given.grid, SIDE)
    np.testing.assert_array_equal(found.slide[rows, columns], out.regions[0].weight[regions.of].numpy())
    places = maps(Told(lambda x, y, regions: regions.within.double()), given, SIDE).region[0]
    np.testing.assert_array_equal(places[4:8, 8:12], np.arange(16).reshape(4, 4))


def test_eight_tiles_a_side_are_counted_row_by_row():
    class Eight(Told):
        def attention(self, bag, shift=(0, 0)):
            within = regions_of(bag.grid - torch.tensor(shift), 8).within.float()
            return RegionAttention(within.expand(1, -1), within, torch.full_like(within, 64))

    shifts = Shifts(8, 8)
    order = np.random.default_rng(1).permutation(64)  # in whatever order the bag has them
    given = bag(8, first=(8, 16))
    mixed = Bag.flat(given.features[order], grid=given.grid[order])
    found = stitch_looks([look(Eight(None), mixed, shifts)], shifts).region[0]
    for r in range(8):
        for c in range(8):
            assert found[r, c] == 8 * r + c


def test_overlap_is_the_mean_of_all_shifts(hvit):
    """Tile by tile, slowly."""
    given = bag(first=(3, -2), tissue=np.random.default_rng(1).uniform(size=144).round())
    found, said = maps(hvit, given, 2), [hvit.attention(given, (x, y)) for x in (0, 2) for y in (0, 2)]
    for i, (column, row) in enumerate(given.grid.tolist()):
        expected = torch.stack([one.tile[:, i] * one.size[i] / SIDE**2 for one in said]).mean(0)
        at = (row - found.low[1], column - found.low[0])
        if not 0 <= at[0] < found.slide.shape[0]:
            assert given.tissue[i] == 0
            continue
        np.testing.assert_allclose(found.region[(slice(None), *at)], expected, rtol=1e-5)
        np.testing.assert_allclose(found.slide[at], torch.stack([one.region[i] for one in said]).mean(), rtol=1e-5)
        assert np.isnan(found.slide[at]) == (given.tissue[i] == 0)


def test_a_tile_alone_in_its_region_does_not_outshine_the_others(hvit):
    """It has all of the attention of its region."""
    tissue = np.zeros(144)
    tissue[[0, 100]] = 1
    tissue[[r * 12 + c for r in range(4, 8) for c in range(4, 8)]] = 1
    given = bag(tissue=tissue)
    plain, weighed = (maps(hvit, given, SIDE, by_foreground=wanted).region.mean(0) for wanted in (False, True))
    assert plain[0, 0] == pytest.approx(1)
    assert weighed[0, 0] == pytest.approx(1 / 16)
    np.testing.assert_allclose(weighed[4:8, 4:8], plain[4:8, 4:8])


def test_moved_grids_stand_where_they_were_moved_to():
    """One tile that shines, on a grid moved by 1/2 tile to the right, and by nothing down."""
    shifts = Shifts(SIDE, 0.5)
    given = Bag.flat(np.zeros((1, DIM)), grid=np.array([(5, 7)]))
    head = Told(lambda x, y, regions: x * 0 + 1)
    found = stitch_looks([look(head, given, shifts, (1, 0))], shifts)
    assert (found.low, found.per_tile) == ((5, 7), 2)
    assert np.argwhere(np.isfinite(found.slide)).tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


def test_attention_within_tiles_has_cells_of_its_own():
    shifts = Shifts(SIDE, 0.5)
    given, head = bag(4), Told(lambda x, y, regions: x)
    tile = np.arange(16 * 9, dtype=np.float32).reshape(16, 3, 3)
    found = stitch_looks([look(head, given, shifts, (0, 0), tile, by_foreground=False)], shifts)
    assert found.per_tile == 6  # of halves and thirds
    assert found.tile.shape == found.slide.shape
    for row in range(4):
        for column in range(4):
            part = found.tile[6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
            np.testing.assert_array_equal(part[::2, ::2], tile[4 * row + column])
    assert found.region[0, 0, :24:6].tolist() == [0, 1, 2, 3]


def test_the_product_of_the_scales():
    look_ = Look(
        (0, 0),
        np.array([(0, 0), (1, 0), (2, 0)]),
        np.array([[1.0, 2.0, 5.0], [4.0, 4.0, 4.0]]),
        np.array([10.0, 30.0, 20.0]),
        np.array([3.0, 4.0, 7.0])[:, None, None],
    )
    found = stitch_looks([look_], Shifts(1, 1))
    assert found.tile is None, "attention of one token a tile says nothing within it"
    np.testing.assert_allclose(found.stitched(0.5)[0, 0, :3], [0, (0.25 * 1) ** 0.5, (1 * 0.5) ** 0.5])
    np.testing.assert_allclose(found.stitched(1.0)[1, 0, :3], [0, 1, 0.5])
    tokens = np.stack([[[3.0, 4.0], [7.0, 7.0]]] * 3)
    found = stitch_looks([look_._replace(tile=tokens)], Shifts(1, 1))
    expected = (1 * 0.5) ** 0.25 * (np.array([[0, 0.25], [1, 1]])) ** 0.75
    np.testing.assert_allclose(found.stitched(0.25)[0, :2, 4:6], expected, rtol=1e-6)
    assert np.isnan(found.stitched(0.25)[0, 2:]).all()


def test_each_channel_is_stretched_by_itself():
    values = np.array([[[1.0, 3.0, np.nan]], [[5.0, 5.0, np.nan]]])
    np.testing.assert_array_equal(stretched(values), [[[0, 1, np.nan]], [[1, 1, np.nan]]])
    rounding = np.array([[[0.3, np.nextafter(np.float32(0.3), 1)]]], np.float32)
    np.testing.assert_array_equal(stretched(rounding), 1)


def test_strides():
    assert (Shifts(8, 4).parts, Shifts(8, 4).whole) == (1, [(0, 0), (4, 0), (0, 4), (4, 4)])
    assert len(Shifts(8, 1).whole) == 64
    assert Shifts(8, 2).steps == [0, 2, 4, 6]
    fine = Shifts(2, 0.5)
    assert (fine.parts, fine.steps) == (2, [0, 0.5, 1, 1.5])
    assert fine.grids == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert fine.whole == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert Shifts(8, 0.333).parts == 3
    assert [half(side) for side in (1, 2, 5, 8, 16)] == [1, 1, 1, 4, 8]


@pytest.mark.parametrize("stride", [3, 16, 0, -1, 1.5, 0.4, np.inf, np.nan])
def test_strides_that_do_not_fit(stride):
    with pytest.raises(UsageError, match=r"take 1, 2, 4, 8, or 1/2"):
        Shifts(8, stride)
