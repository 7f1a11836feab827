import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads import BadBag, Bag, load_head
from heads.hvit import HEADS, WIDTH, HViT, regions_of

DIM = 5


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(name: str = "hvit", **options) -> HViT:
    torch.manual_seed(0)
    head = load_head(name, DIM, 3, **({"side": 4} | options))
    for place in (head.regions.places, head.regions.token):
        place.data.normal_()  # at the 0.02 they begin with, a place moves nothing that a test could see
    return head.eval()


def bag(side: int = 12, tissue: float = 0.4, seed: int = 0, background: float | None = None) -> Bag:
    """side × side tiles of which some have tissue; `background`: added to the features of the others."""
    random = np.random.default_rng(seed)
    grid = np.stack([np.arange(side**2) % side, np.arange(side**2) // side], axis=1)
    features = random.normal(size=(side**2, DIM))
    share = np.where(random.uniform(size=side**2) < tissue, random.uniform(0.1, 1, side**2), 0.0)
    if background is not None:
        features[share == 0] += background
    return Bag.flat(features, grid=grid, tissue=share)


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("hvit", dim=384, classes=1, pos_grid=7)) == 3_348_098
    assert parameters(load_head("hvit", dim=384, classes=1, pos_grid=7).regions) == 2_753_280
    assert parameters(load_head("hvit", dim=384, classes=1)) == 3_350_978
    assert parameters(load_head("hipt", dim=384, classes=2, pos_grid=14)) == 3_376_515


def test_parameter_count_in_closed_form():
    w, g, classes = WIDTH, 4, 3
    regions = w * (DIM + 1) + w + w * (g**2 + 1) + 6 * (12 * w**2 + 13 * w) + 2 * w
    slide = w * (w + 1) + 2 * (6 * w**2 + 10 * w) + 2 * w * (w + 1) + w + 1 + w * (w + 1) + classes * (w + 1)
    assert parameters(make()) == regions + slide


def naive_region(head: HViT, tiles: torch.Tensor, place: torch.Tensor, seen: torch.Tensor):
    """All tiles of one region, background too, which as a key gets -inf."""
    r = head.regions
    table = r.table()
    x = torch.cat([r.token[0] + table[:1], F.gelu(r.projection[0](tiles)) + table[1:][place]])
    mask = torch.cat([torch.tensor([True]), seen])
    for block in r.blocks:
        q, k, v = block.qkv(block.norm1(x)).split(WIDTH, dim=1)
        outs = []
        for one in torch.arange(WIDTH).chunk(HEADS):
            scores = (q[:, one] @ k[:, one].T) / len(one) ** 0.5
            outs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, one])
        x = x + block.out(torch.cat(outs, dim=1))
        x = x + block.mlp(block.norm2(x))
    return r.norm(x[0])


@torch.no_grad()
def test_a_region_from_the_equations():
    """Background computed and hidden (here) is background left out (the head)."""
    head, given = make(), bag()
    seen = given.tissue > 0
    regions = regions_of(given.grid[seen], 4)
    vectors, _ = head._vectors(given.features[seen], regions)
    assert regions.place.tolist() == [[c, r] for r in range(3) for c in range(3)]
    for vector, (column, row) in zip(vectors, regions.place.tolist(), strict=True):
        inside = (given.grid // 4 == torch.tensor([column, row])).all(1)
        column_row = given.grid[inside] % 4
        place = column_row[:, 1] * 4 + column_row[:, 0]
        expected = naive_region(head, given.features[inside], place, seen[inside])
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_background_changes_no_bit():
    head = make()
    expected = head(bag())
    for value in (1.0, 1e6):
        other = head(bag(background=value))
        assert torch.equal(other.logits, expected.logits)
        assert torch.equal(other.regions[0].raw, expected.regions[0].raw)
    unmasked = make(masked=False)
    assert not torch.allclose(unmasked(bag(background=1.0)).logits, unmasked(bag()).logits, atol=1e-3)


@torch.no_grad()
def test_background_that_is_not_in_the_bag_is_background():
    head, given = make(), bag()
    seen = given.tissue > 0
    only = Bag.flat(given.features[seen], grid=given.grid[seen], tissue=given.tissue[seen])
    assert torch.equal(head(only).logits, head(given).logits)


@torch.no_grad()
def test_with_tissue_everywhere_the_mask_does_nothing():
    masked, plain = make(), make(masked=False)
    plain.load_state_dict(masked.state_dict())
    given = bag(tissue=1.0)
    assert torch.equal(masked(given).logits, plain(given).logits)


@torch.no_grad()
def test_attention_is_of_tissue_only():
    head, given = make(), bag()
    out, seen = head(given), given.tissue > 0
    assert torch.equal(~out.tiles[0].weight.isnan(), seen)
    each = out.parts["region_attention"]
    regions = regions_of(given.grid[seen], 4)
    for i in range(len(regions.place)):
        torch.testing.assert_close(each[:, regions.of == i].sum(1), torch.ones(HEADS))
    torch.testing.assert_close(out.tiles[0].weight.nansum(), torch.tensor(1.0))
    torch.testing.assert_close(out.tiles[0].per_class[:, seen].sum(1), torch.ones(HEADS))
    by_region = torch.stack([out.tiles[0].weight[seen][regions.of == i].sum() for i in range(9)])
    torch.testing.assert_close(by_region, out.regions[0].weight)


def test_attention_of_regions_that_begin_where_they_were():
    head, given = make(), bag()
    out, found, seen = head(given), head.attention(given), given.tissue > 0
    assert torch.equal(found.tile[:, seen], out.parts["region_attention"])
    assert torch.equal(~found.region.isnan(), seen)
    assert not found.tile.requires_grad
    regions = regions_of(given.grid[seen], 4)
    assert torch.equal(found.region[seen], out.regions[0].weight[regions.of])
    assert torch.equal(found.size[seen].long(), regions.sizes[regions.of])
    torch.testing.assert_close(found.tile.mean(0)[seen] * found.region[seen], out.tiles[0].weight[seen])


@pytest.mark.parametrize("shift", [(1, 0), (0, 3), (2, 1), (-1, 5)])
def test_attention_of_moved_regions_is_that_of_a_moved_bag(shift):
    """A region that begins 2 tiles further right cuts tiles as one does whose tiles were moved 2 to the left."""
    head, given = make(), bag()
    moved = Bag.flat(given.features, grid=given.grid - torch.tensor(shift), tissue=given.tissue)
    for found, expected in zip(head.attention(given, shift), head.attention(moved), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)
    if shift == (2, 1):
        assert not torch.allclose(head.attention(given, shift).tile, head.attention(given).tile, equal_nan=True)


def test_background_gets_no_attention_wherever_regions_begin():
    head = make()
    for found, expected in zip(head.attention(bag(background=1e6), (1, 2)), head.attention(bag(), (1, 2)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_without_a_mask_moved_regions_may_lack_tiles():
    given, head = bag(side=8), make(masked=False)
    found = head.attention(given, (2, 0))
    regions = regions_of(given.grid - torch.tensor([2, 0]), 4)
    assert sorted(regions.sizes.tolist()) == [8, 8, 8, 8, 16, 16]
    for i in range(6):
        torch.testing.assert_close(found.tile[:, regions.of == i].sum(1), torch.ones(HEADS))
    assert torch.equal(found.size.long(), regions.sizes[regions.of])


def test_same_attention_with_and_without_mask_where_all_is_tissue():
    masked, plain, given = make(), make(masked=False), bag(tissue=1.0)
    plain.load_state_dict(masked.state_dict())
    for found, expected in zip(plain.attention(given, (1, 1)), masked.attention(given, (1, 1)), strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_threshold_of_tissue():
    given = bag()
    out = make(threshold=0.5)(given)
    assert torch.equal(~out.tiles[0].weight.isnan(), given.tissue > 0.5)
    with pytest.raises(BadBag, match=r"no tile with more than 0\.9 tissue"):
        make(threshold=0.9)(Bag.flat(np.ones((3, DIM)), grid=np.eye(3, 2, dtype=int), tissue=np.full(3, 0.5)))


@torch.no_grad()
def test_the_order_of_tiles_and_of_regions_does_not_count():
    head, given = make(), bag()
    order = torch.from_numpy(np.random.default_rng(1).permutation(144))
    mixed = Bag.flat(given.features[order], grid=given.grid[order], tissue=given.tissue[order])
    torch.testing.assert_close(head(mixed).logits, head(given).logits)
    moved = Bag.flat(given.features, grid=given.grid + 4 * torch.tensor([5, 2]), tissue=given.tissue)
    assert torch.equal(head(moved).logits, head(given).logits)
    other = Bag.flat(given.features, grid=given.grid + 1, tissue=given.tissue)
    assert not torch.allclose(head(other).logits, head(given).logits, atol=1e-4)
    vectors = torch.randn(9, WIDTH)
    torch.testing.assert_close(head.slide(vectors)[0], head.slide(vectors.flip(0))[0])


@torch.no_grad()
def test_places_are_counted_row_by_row():
    grid = torch.tensor([[4 + c, 8 + r] for r in range(4) for c in range(4)])
    regions = regions_of(grid, 4)
    assert regions.place.tolist() == [[1, 2]]
    assert regions.within.tolist() == list(range(16))
    assert regions.rows.tolist() == [list(range(16))]


@torch.no_grad()
def test_many_regions_go_through_some_at_a_time(monkeypatch):
    head, given = make(), bag(side=24)
    expected = head(given)
    monkeypatch.setattr("heads.hvit.TOKENS", 20)
    found = head(given)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.tiles[0].weight, expected.tiles[0].weight, equal_nan=True)


@torch.no_grad()
def test_a_smaller_table_of_places_is_enlarged():
    head = make(side=8, pos_grid=7)
    table = head.regions.table()
    assert table.shape == (65, WIDTH)
    assert torch.equal(table[0], head.regions.places[0])
    corners = [head.regions.places[1 + i] for i in (0, 6, 42, 48)]
    near = [(table[1 + i] - corner).norm() for i, corner in zip((0, 7, 56, 63), corners, strict=True)]
    far = [(table[1 + 28] - corner).norm() for corner in corners]
    assert max(near) < min(far)


def test_without_a_mask_a_region_must_be_whole():
    given = bag(tissue=1.0)
    part = Bag.flat(given.features[1:], grid=given.grid[1:])
    with pytest.raises(BadBag, match=r"regions of 15 tiles instead of 16.*--preset hvit"):
        make(masked=False)(part)
    assert make("hipt")(Bag.flat(given.features, grid=given.grid)).logits.isfinite().all()


def test_tissue_is_asked_for_only_where_it_masks():
    with pytest.raises(BadBag, match="has no tissue"):
        make()(Bag.flat(np.ones((4, DIM)), grid=np.eye(4, 2, dtype=int)))


@pytest.mark.parametrize("options", [{"side": 0}, {"pos_grid": 0}, {"threshold": 1.0}, {"threshold": -0.1}])
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match=r"must be at least 1|is a share"):
        make(**options)
