import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from heads import BadBag, Bag, BagLevel, load_head
from heads.hagmil import HAGMIL, WIDTHS, admin
from heads.tasks import Classification, Regression

DIM = 7


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tree(roots: int = 5, levels: int = 3, seed: int = 0) -> Bag:
    """One to four children under each tile, as a quadtree keeps them."""
    random = np.random.default_rng(seed)
    parts, parent = [], np.full(roots, -1)
    for i in range(levels):
        parts.append(BagLevel.of(random.normal(size=(len(parent), DIM)), parent=parent, mpp=2.0 / 2**i))
        parent = np.repeat(np.arange(len(parent)), random.integers(1, 5, len(parent)))
    return Bag(parts, "a.svs")


def make(**options) -> HAGMIL:
    torch.manual_seed(0)
    return load_head("hagmil", DIM, 3, **options).eval()


def count(dim: int, classes: int, widths=WIDTHS) -> int:
    last = widths[-1]
    total = len(widths) + 1 + 1026 * classes + (last + 1) * classes
    for before, d in zip((dim, *widths), widths, strict=False):
        total += before * d + 4 * d**2 + 8 * d + 33 * 8 + 512 * (d + 1) + 512 * 513 + 257
        total += last * (d + 1) + 2 * last
    return total


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("iat", dim=1024, classes=2)) == 30_201_903
    assert parameters(load_head("iat", dim=1536, classes=2)) == 30_726_191
    assert parameters(load_head("hagmil", dim=1024, classes=2, levels=3)) == 90_605_709


@pytest.mark.parametrize(("dim", "classes"), [(7, 3), (384, 2)])
def test_parameter_count_in_closed_form(dim, classes):
    assert parameters(load_head("iat", dim, classes)) == count(dim, classes)
    for widths in ((64, 96, 32, 64), (16, 40)):
        assert parameters(load_head("iat", dim, classes, widths=widths)) == count(dim, classes, widths)


def test_widths_of_every_level():
    head = make(widths=(16, 24), levels=2)
    assert parameters(head) == 2 * count(DIM, 3, (16, 24))
    assert head.levels[0].blocks[0].omega == torch.tensor(admin(4))
    again = load_head("hagmil", head.dim, head.classes, **head.options)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.eval()(tree()).logits, head(tree()).logits)


@pytest.mark.parametrize("widths", [(), (12,), (0, 16)])
def test_widths_that_heads_cannot_part_are_refused(widths):
    with pytest.raises(ValueError, match="multiples of 8"):
        load_head("iat", DIM, 2, widths=widths)


def test_blocks_computed_once_more_give_the_same_gradients(monkeypatch):
    """Dropout draws the same numbers the second time."""

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        head = load_head("iat", DIM, 3, widths=(16, 24)).train()
        head.loss(head(Bag.flat(torch.randn(40, DIM, generator=torch.Generator().manual_seed(1)))), 1).backward()
        return [p.grad for p in head.parameters() if p.grad is not None]

    kept = gradients()
    monkeypatch.setattr("heads.hagmil.RECOMPUTED_TILES", 39)
    calls: list[object] = []
    monkeypatch.setattr("heads.hagmil.checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(), strict=True))
    assert len(calls) == 2


def test_omega():
    assert pytest.approx(1.75957, abs=5e-6) == admin(8)


@torch.no_grad()
def test_omega_weighs_the_residual():
    torch.manual_seed(0)
    block = load_head("iat", DIM, 2).eval().blocks[0]
    x = torch.randn(9, DIM)
    wide = block.widen(x)
    torch.testing.assert_close(block(x)[0], admin(8) * wide + block.mix(block.norm(wide)))
    block.omega.fill_(1.0)
    torch.testing.assert_close(block(x)[0], wide + block.mix(block.norm(wide)))


@torch.no_grad()
def test_one_level_from_the_formulas():
    torch.manual_seed(0)
    head = load_head("iat", DIM, 3).eval()
    x = torch.randn(13, DIM)
    h, z = x, torch.zeros(1024)
    for t, block in enumerate(head.blocks):
        h = F.gelu(block.widen[1](block.widen[0](h)))
        h = admin(8) * h + block.mix(block.norm(h))
        u = F.gelu(block.seen[0](block.norm_t(h)))
        a = block.attention.w(torch.tanh(block.attention.V(u)) * torch.sigmoid(block.attention.U(u)))[:, 0]
        mean = sum(share * tile for share, tile in zip(a.softmax(0), h, strict=True))
        z = z + head.fuse.weight[0, t] * F.gelu(block.out[1](block.out[0](block.norm_t(mean))))
    out = head(Bag.flat(x))
    torch.testing.assert_close(out.logits, head.classifier(z + head.fuse.bias), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.tiles[0].raw, a, rtol=1e-4, atol=1e-4)
    assert out.parts["blocks"].shape == (4, 13)


@torch.no_grad()
def test_all_tiles_chosen_is_one_transformer_a_level():
    bag = tree()
    for k in (1.0, 10_000):
        head = make(k=k)
        out = head(bag)
        for i, (level, iat) in enumerate(zip(bag.levels, head.levels, strict=True)):
            alone = iat(Bag.flat(level.features))
            assert torch.equal(out.parts[f"logits {i}"], alone.logits)
            assert torch.equal(out.tiles[i].raw, alone.tiles[0].raw)
        assert torch.equal(out.logits, out.parts["logits 2"])


@pytest.mark.parametrize("k", [0.5, 2])
@torch.no_grad()
def test_only_children_of_chosen_tiles_are_looked_at(k):
    bag, head = tree(9), make(k=k)
    out = head(bag)
    shown = torch.ones(9, dtype=torch.bool)
    for level, scores, finer in zip(bag.levels, out.tiles, [*bag.levels[1:], None], strict=True):
        assert torch.equal(~scores.raw.isnan(), shown)
        assert torch.equal(~scores.weight.isnan(), shown)
        torch.testing.assert_close(scores.weight.nansum(), torch.tensor(1.0))
        if finer is None:
            break
        wanted = k if isinstance(k, int) else int(np.ceil(k * int(shown.sum())))
        best = scores.raw.nan_to_num(-torch.inf).argsort(descending=True)[:wanted].tolist()
        shown = torch.tensor([int(p) in best for p in finer.parent])
        assert len(level) >= wanted


@torch.no_grad()
def test_tiles_that_were_not_chosen_change_nothing():
    bag, head = tree(9), make(k=2)
    out = head(bag)
    finest = bag.levels[-1]
    junk = torch.where(out.tiles[-1].raw.isnan()[:, None], 1e6, finest.features)
    changed = Bag([*bag.levels[:-1], BagLevel.of(junk, parent=finest.parent, mpp=finest.mpp)])
    assert torch.equal(head(changed).logits, out.logits)


def test_no_gradient_crosses_levels():
    head, bag = make(), tree()
    out = head(bag)
    out.logits.sum().backward()
    for i, iat in enumerate(head.levels):
        grads = [p.grad is not None for p in iat.parameters()]
        assert any(grads) == (i == 2)
    for i, iat in enumerate(head.levels):
        head.zero_grad()
        head(bag).parts[f"logits {i}"].square().sum().backward()
        for block in iat.blocks:
            assert float(block.mix.qkv.weight.grad.abs().sum()) > 0
            assert float(block.attention.V.weight.grad.abs().sum()) > 0


def test_every_parameter_gets_a_gradient():
    head = make()
    for seed in range(3):
        head.loss(head(tree(seed=seed)), seed).backward()
    without = [n for n, p in head.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert [name for name in without if not name.endswith("attention.w.bias")] == []


def test_the_loss_is_the_sum_over_levels_smoothed_above_the_finest():
    head = make(instance_weight=0.5, smoothing=0.2)
    out = head(tree())
    total = torch.zeros(())
    for i, iat in enumerate(head.levels):
        smoothing = 0.0 if i == 2 else 0.2
        total = total + F.cross_entropy(out.parts[f"logits {i}"], torch.tensor(1), label_smoothing=smoothing)
        total = total + 0.5 * iat.instances(out.parts[f"tiles {i}"], out.parts[f"raw {i}"], 1)
    torch.testing.assert_close(head.loss(out, 1), total)
    own = head.loss(out, 1, Classification(3, smoothing=0.3)) - total
    logits = [out.parts[f"logits {i}"] for i in range(3)]
    more = [F.cross_entropy(one, torch.tensor(1), label_smoothing=0.3) for one in logits]
    less = [F.cross_entropy(one, torch.tensor(1), label_smoothing=0.2 * (i < 2)) for i, one in enumerate(logits)]
    torch.testing.assert_close(own, sum(more) - sum(less))
    weighted = head.loss(out, 1, Classification(3, (1.0, 2.0, 1.0)))
    assert weighted > total
    plain = load_head("hagmil", DIM, 1, instance_weight=0.0).eval()
    assert plain.loss(plain(tree()), 0.3, Regression()).isfinite()
    with pytest.raises(ValueError, match="needs one class a slide"):
        head.loss(out, 0.3, Regression())


@pytest.mark.parametrize("roots", [1, 2])
@torch.no_grad()
def test_few_tiles(roots):
    out = make()(tree(roots))
    assert out.logits.isfinite().all()
    assert make().loss(out, 0).isfinite()


def test_training_may_look_at_another_number():
    head = make(k=1, k_train=3)
    raw = torch.arange(8.0)
    assert head.chosen(raw).tolist() == [False] * 7 + [True]
    assert head.train().chosen(raw).sum() == 3
    assert load_head("hagmil", DIM, 2, preset="paper").options["k"] == 10_000
    assert load_head("hagmil", DIM, 2, preset="paper").options["k_train"] == 7_000


def test_bags_that_do_not_fit_are_refused_in_words():
    with pytest.raises(ValueError, match="needs 3 levels or more, this bag has 1"):
        make()(Bag.flat(np.ones((3, DIM))))
    bag = tree()
    bare = BagLevel.of(grid=np.zeros((len(bag.levels[0]), 2), int), mpp=2.0)
    with pytest.raises(BadBag, match=r"no features at 2 µm/px.*run again"):
        make()(Bag([bare, *bag.levels[1:]]))
    deep = tree(levels=4)
    out = make()(deep)
    assert out.tiles[0].raw.isnan().all()
    assert [len(scores.raw) for scores in out.tiles] == [len(level) for level in deep.levels]


@torch.no_grad()
def test_invalid_tiles_are_not_looked_at():
    bag = tree()
    level = bag.levels[1]
    valid = np.arange(len(level)) != 2
    holes = Bag([bag.levels[0], BagLevel.of(level.features, parent=level.parent, valid=valid, mpp=1.0), bag.levels[2]])
    out = make(k=1.0)(holes)
    assert out.tiles[1].raw[2].isnan()
    assert out.tiles[2].raw[bag.levels[2].parent == 2].isnan().all()


@pytest.mark.parametrize("options", [{"levels": 1}, {"k": 0}, {"k": 1.5}, {"k_train": -1}, {"instances": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        make(**options)


# --- step by step ----------------------------------------------------------------------------------------------------


def bare(bag: Bag) -> list[BagLevel]:
    """The tree of a bag, without features."""
    return [
        BagLevel.of(grid=np.zeros((len(level), 2), int), parent=level.parent, mpp=level.mpp) for level in bag.levels
    ]


@pytest.mark.parametrize("k", [0.3, 2, 10_000])
@pytest.mark.parametrize("levels", [3, 4])
@torch.no_grad()
def test_a_descent_asks_for_the_tiles_that_forward_looks_at_and_no_other(k, levels):
    bag, head = tree(9, levels), make(k=k)
    out, descent, asked = head(bag), head.descend(bare(bag)), 0
    while not descent.done:
        level = bag.levels[descent.level]
        assert torch.equal(descent.wanted, ~out.tiles[descent.level].raw.isnan())
        asked += int(descent.wanted.sum())
        descent.look(level.features[descent.wanted], level.valid[descent.wanted])
    found = descent.prediction
    assert torch.equal(found.logits, out.logits)
    assert torch.equal(found.embedding, out.embedding)
    for one, other in zip(found.tiles, out.tiles, strict=True):
        torch.testing.assert_close(one.raw, other.raw, equal_nan=True, rtol=0, atol=0)
    assert found.parts.keys() == out.parts.keys()
    assert (asked < len(bag)) == (k != 10_000 or levels == 4)


@torch.no_grad()
def test_a_descent_is_told_which_tiles_are_not_valid():
    bag = tree()
    level = bag.levels[1]
    valid = torch.arange(len(level)) != 2
    junk = torch.where(valid[:, None], level.features, 1e9)
    holes = Bag([bag.levels[0], BagLevel.of(junk, parent=level.parent, valid=valid, mpp=1.0), bag.levels[2]])
    head = make(k=1.0)
    descent = head.descend(bare(bag))
    for one, mask, x in zip(bag.levels, (None, valid, None), (None, junk, None), strict=True):
        features, mask = one.features if x is None else x, one.valid if mask is None else mask
        descent.look(features[descent.wanted], mask[descent.wanted])
    assert torch.equal(descent.prediction.logits, head(holes).logits)


def test_a_descent_without_a_valid_tile_is_refused():
    head, bag = make(), tree()
    descent = head.descend(bare(bag))
    with pytest.raises(BadBag, match="none of the 5 tiles to be looked at on level 0 is valid"):
        descent.look(torch.ones(5, DIM), torch.zeros(5, dtype=torch.bool))
    with pytest.raises(BadBag, match="looks at 3 levels, this tree has 2"):
        head.descend(bare(bag)[:2])
    level = bag.levels[2]
    none = Bag([*bag.levels[:2], BagLevel.of(level.features, parent=level.parent, valid=level.valid & False, mpp=0.5)])
    with pytest.raises(BadBag, match="on level 2 is valid"):
        head(none)
