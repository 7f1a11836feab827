import numpy as np
import pytest
import torch

from heads import BadBag, UnknownOption, load_head
from heads.picture import Picture
from heads.scorenet import PerturbedTopK, ScoreNet


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(**options) -> ScoreNet:
    torch.manual_seed(0)
    head = load_head("scorenet", classes=3, **({"k": 3} | options))
    head.mixture.data.normal_()
    return head.eval()


def picture(rows: int = 3, columns: int = 4, seed: int = 0) -> Picture:
    """Noise with a coarse grain, so that thumbnails of places differ."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (rows * 16, columns * 16, 3), dtype=np.uint8)
    return Picture.of(coarse.repeat(8, axis=0).repeat(8, axis=1))


def choose(scores: torch.Tensor, draws: int, k: int, sigma: float, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(draws, len(scores), dtype=scores.dtype, generator=torch.Generator().manual_seed(seed))
    return PerturbedTopK.apply(scores, noise, k, sigma)


# -- counts --


def test_parameter_counts_of_the_literature():
    head = load_head("scorenet", classes=7)
    assert parameters(head.scorer) == parameters(head.patches) == 673_248
    assert parameters(head.encoder) == 446_400
    assert parameters(head) - parameters(head.classifier) == 1_792_900
    assert parameters(head.classifier) == 62_471
    assert parameters(load_head("scorenet", classes=7, tokens=(4, 3)).classifier) == 87_047


def test_the_printed_ratio_of_the_encoder_gives_another_total():
    """Half of the inner width: 1,644,676, which is not the paper's 1.79 million."""
    inner = sum(parameters(block.mlp) for block in make().encoder.blocks)
    half = 4 * (2 * 96 * 192 + 192 + 96)
    assert 1_792_900 - inner + half == 1_644_676


# -- the choice of places --

SCORES = torch.tensor([0.9, 0.7, 0.65, 0.3, 0.1], dtype=torch.float64)


def test_without_noise_the_choice_is_the_highest_in_the_order_of_places():
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8])
    assert torch.equal(choose(scores, 5, 2, 1e-9), torch.eye(4)[[1, 3]])
    assert torch.equal(choose(scores, 5, 4, 0.5), torch.eye(4))


def test_gradient_of_the_choice_against_differences():
    """The same draws on both sides. Finite differences of so few draws are coarse: a wide step and a loose bound."""
    slope = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scores = SCORES.clone().requires_grad_()
    (choose(scores, 1_000_000, 2, 0.2) * slope).sum().backward()
    differences = []
    for one in torch.eye(5, dtype=torch.float64):
        up, down = (choose(SCORES + sign * 0.02 * one, 1_000_000, 2, 0.2) for sign in (1, -1))
        differences.append(float(((up - down) * slope).sum()) / 0.04)
    torch.testing.assert_close(scores.grad, torch.tensor(differences, dtype=torch.float64), rtol=0, atol=0.05)
    assert scores.grad.abs().max() > 0.3


def test_rows_of_the_choice_are_shares():
    rows = choose(SCORES, 1000, 3, 0.2)
    torch.testing.assert_close(rows.sum(1), torch.ones(3, dtype=torch.float64))
    assert (rows.sum(0) <= 1 + 1e-9).all()
    for i in range(5):
        raised = choose(SCORES + 0.1 * torch.eye(5, dtype=torch.float64)[i], 1000, 3, 0.2)
        assert raised[:, i].sum() >= rows[:, i].sum()


# -- the scorer --


@torch.no_grad()
def test_the_map_is_the_attention_row_without_the_class_token():
    head, thumbnail = make(), picture().thumbnail(8)
    share, _, across = head.score(thumbnail)
    assert (len(share), across) == (12, 4)
    torch.testing.assert_close(share.sum(), torch.tensor(1.0))
    scorer, x = head.scorer, head.scorer.tokens((thumbnail - head.mean)[None] / head.sd)
    for i, block in enumerate(scorer.blocks):
        if i == 4:
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        before, x = x, block(x)
    q, k, _ = block.qkv(block.norm1(before))[0].unflatten(1, (3, 4, 24)).unbind(1)
    rows = torch.stack([(k[:, h] @ q[0, h] / 24**0.5).softmax(0)[1:] for h in range(4)])
    expected = head.mixture.softmax(0) @ (rows / rows.sum(1, keepdim=True))
    torch.testing.assert_close(share, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_class_tokens_are_those_of_the_last_blocks():
    head, x = make(), torch.randn(1, 9, 96)
    tokens, _ = head.encoder.class_tokens(x, 1)
    for block in head.encoder.blocks[:3]:
        x = block(x)
    x = head.encoder.blocks[3](torch.cat([x.mean(1, keepdim=True), x], dim=1))
    torch.testing.assert_close(tokens[0], head.encoder.norm(x[0, 0]))


@torch.no_grad()
def test_the_places_looked_at_are_a_set_and_the_thumbnail_is_not():
    head = make()
    places = torch.rand(5, 3, 128, 128)
    torch.testing.assert_close(head.aggregate(places), head.aggregate(places.flip(0)), rtol=1e-4, atol=1e-5)
    tokens = torch.randn(1, 12, 96)
    grid = tokens.mT.unflatten(2, (3, 4))
    placed = grid + head.scorer.place(grid)
    other = grid.flip(2)
    assert not torch.allclose(placed.flip(2), other + head.scorer.place(other), atol=1e-3)


@torch.no_grad()
def test_the_map_moves_with_what_is_shown():
    """Something on a plain ground, away from the borders, a place further."""
    plain = torch.full((3, 7 * 16, 7 * 16), 0.8)
    shown = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    head, maps = make(), []
    for at in (32, 48):
        thumbnail = plain.clone()
        thumbnail[:, 32:64, at : at + 32] = shown
        maps.append(head.score(thumbnail)[0].unflatten(0, (7, 7)))
    torch.testing.assert_close(maps[0][:, 1:5], maps[1][:, 2:6], rtol=1e-4, atol=1e-6)
    assert maps[0].std() > 1e-5


@torch.no_grad()
def test_what_is_looked_at_are_the_highest_places_in_full():
    head, given = make(), picture()
    out = head(given)
    best = out.tiles[0].weight.topk(3).indices.sort().values
    assert torch.equal(out.parts["chosen"], best)
    row, column = int(best[0]) // 4, int(best[0]) % 4
    inside = given.pixels[:, row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] / 255
    torch.testing.assert_close(given.crops(best[:1], 128)[0], inside)
    unseen = given.pixels.clone()
    unseen[:, 5, 5] += 1  # too little for the thumbnail to choose other places
    if 0 not in best:
        torch.testing.assert_close(head(Picture(unseen)).logits, out.logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("selection", ["soft", "straight_through"])
def test_every_parameter_gets_a_gradient(selection):
    head, given = make(selection=selection, sigma=0.05).train(), picture()
    for label in range(3):
        head.loss(head(given), label).backward()
    # a constant that is added to all keys does not move a softmax
    without = [n for n, p in head.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert without == []


def test_straight_through_looks_at_places_and_soft_at_mixtures():
    given = picture()
    every = given.crops(torch.arange(12), 128)

    def looked(selection: str) -> torch.Tensor:
        head = make(selection=selection, sigma=0.05).train()
        share, _, _ = head.score(given.thumbnail(8))
        torch.manual_seed(1)
        return head._looked_at(given, share, share.topk(3).indices.sort().values).detach()

    hard, soft = looked("straight_through"), looked("soft")
    assert all(min(float((place - one).abs().max()) for one in every) < 1e-5 for place in hard)
    assert not all(min(float((place - one).abs().max()) for one in every) < 1e-2 for place in soft)


def test_an_image_that_is_no_multiple_is_cut_and_one_with_few_places_is_whole():
    assert Picture.of(np.zeros((300, 257, 3), np.uint8)).trimmed(128).size == (256, 256)
    assert make(k=20)(picture(1, 2)).parts["chosen"].tolist() == [0, 1]
    with pytest.raises(BadBag, match="holds no place of 128 px"):
        make()(Picture.of(np.zeros((300, 100, 3), np.uint8), "a.png"))
    with pytest.raises(BadBag, match="must be"):
        Picture.of(np.zeros((300, 300, 4), np.uint8))


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"draws": 0}, {"sigma": 0.0}, {"selection": "hard"}, {"tokens": (9, 1)}, {"tokens": (4, 0)}]
)
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match=r"must be|are 1 to 8"):
        make(**options)


def test_a_head_of_features_needs_their_number():
    with pytest.raises(UnknownOption, match="say how many a tile has"):
        load_head("abmil", classes=2)
