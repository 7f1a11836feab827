import numpy as np
import pytest
import torch

from heads import Bag, load_head
from heads.hatnet import HATNet, lay_out

DIM, SIDE = 5, 3


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(**options) -> HATNet:
    torch.manual_seed(0)
    return load_head("hatnet", DIM, 4, **({"side": SIDE, "width": 16, "heads": 2} | options)).eval()


def words(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All words of a region, some of them without tissue, and a bag without any."""
    random = torch.Generator().manual_seed(seed)
    there = torch.rand(SIDE**2, SIDE**2, generator=random) < 0.7
    there[4] = False
    return torch.randn(SIDE**2, SIDE**2, DIM, generator=random), there


def everywhere(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, there = words(seed)
    return x, torch.ones_like(there)


def square(side: int) -> np.ndarray:
    return np.stack([np.arange(side**2) % side, np.arange(side**2) // side], axis=1)


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("hatnet", dim=1280, classes=4)) == 2_374_373
    assert parameters(load_head("hatnet", dim=1024, classes=4)) == 2_308_837
    assert parameters(load_head("hatnet", dim=384, classes=4)) == 2_144_997


@pytest.mark.parametrize("separate_beta", [False, True])
def test_parameter_count_in_closed_form(separate_beta):
    d, n = 16, SIDE
    count = d * (DIM + 1) + 12 * d**2 + 13 * d + 16 * d**2 + 21 * d + 3 * (d**2 + 7 * d // 2) + n**4 + 4 * (d + 1)
    assert parameters(make(separate_beta=separate_beta)) == count + 2 * n**4 * separate_beta


def naive(head: HATNet, x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """One bag and one word at a time, from the equations."""
    psi = {"l2": lambda v: (v**2).sum().sqrt(), "l1": lambda v: v.abs().sum(), "mean": lambda v: v.sum()}
    measure, width, count = psi[head.options["psi"]], head.options["width"], SIDE**2

    def attend(layer, queries, context):
        (wq, wk, wv), (bq, bk, bv) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        outs = []
        for q in queries @ wq.T + bq:
            heads = []
            for part in torch.arange(width).chunk(head.options["heads"]):
                k, v = (context @ wk.T + bk)[:, part], (context @ wv.T + bv)[:, part]
                heads.append((k @ q[part] / len(part) ** 0.5).softmax(0) @ v)
            outs.append(layer.out_proj(torch.cat(heads)))
        return torch.stack(outs)

    def weighed(layer, rows, places):
        energy = torch.zeros(count)
        for row, place in zip(rows, places, strict=True):
            energy[place] = measure(row) / width
        chosen = (energy @ layer.beta)[places].softmax(0)
        return sum(c * row for c, row in zip(chosen, rows, strict=True))

    full = [i for i in range(count) if there[i].any()]
    projected = {i: head.projection(x[i][there[i]]) for i in full}
    if head.options["scope"] == "bag":
        mixed = {i: attend(head.word_attention, *2 * [head.word_norm(projected[i])]) for i in full}
    else:
        every = head.word_norm(torch.cat([projected[i] for i in full]))
        sizes = [len(projected[i]) for i in full]
        mixed = dict(zip(full, attend(head.word_attention, every, every).split(sizes), strict=True))
    context, before = [], []
    for i in full:
        places = there[i].nonzero().flatten().tolist()
        s = head.words(projected[i] + mixed[i])
        context.append(head.after_words(weighed(head.coefficients[0], s, places)))
        before.append(head.before_words(weighed(head.coefficients[-2 % len(head.coefficients)], projected[i], places)))
    b, normed = torch.stack(before), head.bag_norm(torch.stack(before))
    query = head.query_norm(b + attend(head.bag_attention, normed, normed))
    g = head.bags(b + attend(head.context_attention, query, head.context_norm(torch.stack(context))))
    return head.classifier(head.after_bags(weighed(head.coefficients[-1], g, full)))


@pytest.mark.parametrize("psi", ["l2", "l1", "mean"])
@pytest.mark.parametrize("scope", ["bag", "slide"])
@torch.no_grad()
def test_from_the_equations(psi, scope):
    head = make(psi=psi, scope=scope, separate_beta=psi == "l1")
    for region in (words(), everywhere()):
        torch.testing.assert_close(head.read(*region).logits, naive(head, *region), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_beta_every_word_and_bag_counts_the_same():
    head = make()
    head.coefficients[0].beta.zero_()
    x, there = everywhere()
    parts = head.read(x, there).parts
    torch.testing.assert_close(parts["word_weight"], torch.full((9, 9), 1 / 9))
    torch.testing.assert_close(parts["bag_weight"], torch.full((9,), 1 / 9))
    p = head.projection(x)
    torch.testing.assert_close(
        head.coefficients[-2 % len(head.coefficients)](p, there)[0], p.mean(1), rtol=1e-6, atol=1e-6
    )


@torch.no_grad()
def test_scope_says_whose_words_are_seen():
    x, there = words()
    other = x.clone()
    other[7] += 1

    def mixed(head: HATNet, given: torch.Tensor) -> torch.Tensor:
        return head._among_words(head.word_norm(head.projection(given)), there | ~there.any(1, keepdim=True))

    inside, among = make(scope="bag"), make(scope="slide")
    assert torch.equal(mixed(inside, x)[:7], mixed(inside, other)[:7])
    assert not torch.equal(mixed(inside, x)[7], mixed(inside, other)[7])
    assert not torch.allclose(mixed(among, x)[0][there[0]], mixed(among, other)[0][there[0]])


@torch.no_grad()
def test_the_place_of_a_word_counts_unless_beta_sees_none():
    head = make()
    x, there = everywhere()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(head.read(x, there).logits, head.read(x[:, order], there).logits, atol=1e-4)
    head.coefficients[0].beta.copy_(0.3 * torch.eye(9) + 0.2)
    torch.testing.assert_close(head.read(x, there).logits, head.read(x[:, order], there).logits)
    torch.testing.assert_close(head.read(x, there).logits, head.read(x[order], there).logits)


@pytest.mark.parametrize(("psi", "same"), [("l2", True), ("l1", True), ("mean", False)])
@torch.no_grad()
def test_the_sign_of_a_channel(psi, same):
    head, (z, there) = make(psi=psi), (torch.randn(9, 16), torch.ones(9, dtype=torch.bool))
    flipped = z * torch.where(torch.arange(16) == 3, -1.0, 1.0)
    assert torch.allclose(head.coefficients[0](z, there)[1], head.coefficients[0](flipped, there)[1]) == same


@torch.no_grad()
def test_words_without_tissue_change_nothing():
    head, (x, there) = make(), words()
    expected = head.read(x, there)
    for value in (1e6, torch.nan):
        found = head.read(x.masked_fill(~there[..., None], value), there)
        assert torch.equal(found.logits, expected.logits)
    for name in ("word_energy", "word_weight"):
        assert torch.equal(expected.parts[name].isnan(), ~there)
        assert torch.equal(expected.parts[f"bag{name[4:]}"].isnan(), ~there.any(1))
    torch.testing.assert_close(expected.parts["word_weight"].nansum(1), there.any(1).float())


def test_a_region_without_tissue_is_refused():
    with pytest.raises(ValueError, match="no word"):
        make().read(*(torch.zeros(9, 9, DIM), torch.zeros(9, 9, dtype=torch.bool)))


# -- tiles as words --


def test_numbered_tiles_are_read_row_by_row():
    n = SIDE**2
    numbers = torch.arange(float(n * n))[:, None]  # tile (row r, column c) is number 9 r + c
    read, there = lay_out(torch.from_numpy(square(n)), SIDE).words(numbers)
    assert there.all()
    bag, word = 5, 7  # second row of bags, third column; third row of words, second column
    assert read[bag, word, 0] == (3 + 2) * 9 + 6 + 1
    assert sorted(read.flatten().tolist()) == numbers.flatten().tolist()
    whole = read[..., 0].unflatten(0, (SIDE, SIDE)).unflatten(2, (SIDE, SIDE)).transpose(1, 2).reshape(n, n)
    assert torch.equal(whole.flatten(), numbers.flatten())


def test_a_word_is_the_mean_of_its_tiles():
    grid = torch.from_numpy(square(18)) + 5  # two by two tiles a word
    features = torch.randn(len(grid), DIM)
    read, _ = lay_out(grid, SIDE).words(features)
    first = [0, 1, 18, 19]
    torch.testing.assert_close(read[0, 0], features[first].mean(0))
    layout = lay_out(grid, SIDE)
    weight = torch.rand(81)
    energy, share = layout.tiles(torch.arange(81.0), weight)
    torch.testing.assert_close(share[first], weight[:1].expand(4) / 4)
    assert energy[first].tolist() == [0.0] * 4
    torch.testing.assert_close(share.sum(), weight.sum())


def test_few_tiles_fill_several_words():
    grid = torch.tensor([[0, 0], [2, 1]])  # a box of 3 × 2
    features = torch.tensor([[1.0], [2.0]])
    layout = lay_out(grid, SIDE)
    read, there = layout.words(features)
    assert there.sum() == 2 * 3 * 5  # three columns each, and five rows: both have a part of the fifth
    assert set(read[there].flatten().tolist()) == {1.0, 2.0}
    assert not there[2].any()
    assert not there[6].any()
    energy, share = layout.tiles(torch.full((81,), 3.0), torch.ones(81) / int(there.sum()))
    torch.testing.assert_close(energy, torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(share.sum(), torch.tensor(1.0))


@torch.no_grad()
def test_scores_of_tiles_are_those_of_their_words():
    head = make()
    random = np.random.default_rng(0)
    grid = square(9)[random.permutation(81)[:60]]
    grid = np.concatenate([grid, [[0, 0], [8, 8]]])[np.unique([*map(str, grid.tolist())], return_index=True)[1]]
    bag = Bag.flat(random.normal(size=(len(grid), DIM)), grid=grid)
    out = head(bag)
    layout = lay_out(bag.grid, SIDE)
    weight = out.parts["bag_weight"][:, None] * out.parts["word_weight"]
    torch.testing.assert_close(out.tiles[0].weight[layout.tile], weight.flatten()[layout.cell])
    torch.testing.assert_close(out.tiles[0].raw[layout.tile], out.parts["word_energy"].flatten()[layout.cell])
    torch.testing.assert_close(out.tiles[0].weight.sum(), torch.tensor(1.0))


@torch.no_grad()
def test_the_order_of_the_bag_and_the_place_of_the_box_do_not_count():
    head, random = make(), np.random.default_rng(0)
    features, grid, order = random.normal(size=(100, DIM)), square(10), random.permutation(100)
    expected = head(Bag.flat(features, grid=grid)).logits
    torch.testing.assert_close(head(Bag.flat(features[order], grid=grid[order])).logits, expected)
    assert torch.equal(head(Bag.flat(features, grid=grid + 17)).logits, expected)


@pytest.mark.parametrize("options", [{"scope": "word"}, {"psi": "l3"}, {"side": 0}, {"width": 18, "heads": 4}])
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match="must be"):
        make(**options)
