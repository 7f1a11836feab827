import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads import Bag, UnknownOption, load_head
from heads.layers import alibi_slopes
from heads.longmil import LongMIL, full_alibi, linear, pool, squares_of


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def places(side: int = 15, share: float = 0.5, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    full = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    return random.permutation(full)[: round(share * len(full))]


def bag(grid: np.ndarray | None = None, seed: int = 0) -> Bag:
    grid = places() if grid is None else grid
    return Bag.flat(np.random.default_rng(seed).normal(size=(len(grid), 7)), grid=grid)


def small(**options) -> LongMIL:
    torch.manual_seed(0)
    return load_head("longmil", 7, 3, **{"width": 16, "heads": 2, "radius": 2.5} | options).eval()


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("longmil", dim=384, classes=3)) == 5_469_699
    assert parameters(load_head("longmil", dim=384, classes=3, preset="paper")) == 5_469_699
    assert parameters(load_head("longmil", dim=384, classes=3, global_layer="linear")) == 5_469_699


@pytest.mark.parametrize(("dim", "classes", "local", "d"), [(7, 3, 1, 16), (1536, 2, 3, 64)])
def test_parameter_count_in_closed_form(dim, classes, local, d):
    expected = d * (dim + 1) + (local + 1) * (12 * d**2 + 10 * d) + 2 * d + classes * (d + 1)
    assert parameters(load_head("longmil", dim, classes, local=local, width=d)) == expected


def test_the_paper_has_one_head():
    assert load_head("longmil", 7, 3, preset="paper").options["heads"] == 1
    assert load_head("longmil", 7, 3, preset="paper", heads=2).options["heads"] == 2
    with pytest.raises(UnknownOption, match=r"no preset 'print' \(known: paper\)"):
        load_head("longmil", 7, 3, preset="print")


def masked(head: LongMIL, tiles: Bag) -> torch.Tensor:
    """The whole model from the formulas, with a mask over all pairs, and squares gathered in a dictionary."""
    h, grid = F.relu(head.projection[0](tiles.features)), tiles.grid

    def attend(block, h, bias, turn=lambda x: x):
        q, k, v = block.qkv(block.norm1(h)).unflatten(-1, (3, block.heads, -1)).permute(1, 2, 0, 3)
        scores = turn(q) @ turn(k).mT / q.shape[-1] ** 0.5 + bias
        h = h + block.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        return h + block.mlp(block.norm2(h))

    far = ((grid[:, None] - grid) ** 2).sum(-1) > head.options["radius"] ** 2
    for block in head.local:
        h = attend(block, h, torch.zeros(far.shape).masked_fill(far, -torch.inf))
    squares: dict[tuple[int, int], list[int]] = {}
    for i, (x, y) in enumerate(((grid - grid.amin(0)) // 2).tolist()):
        squares.setdefault((x, y), []).append(i)
    h, grid = torch.stack([h[rows].mean(0) for rows in squares.values()]), torch.tensor(list(squares))
    if head.options["positions"] == "alibi":
        distance = ((grid[:, None] - grid).double() ** 2).sum(-1).sqrt().float()
        h = attend(head.whole, h, -alibi_slopes(head.whole.heads)[:, None, None] * distance)
    else:
        from heads.layers import rope_2d

        h = attend(head.whole, h, 0.0, lambda x: rope_2d(x, grid))
    return head.classifier(head.norm(h.mean(0)))


@pytest.mark.parametrize("backend", ["dense", "cells", "flex"])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_equals_a_naive_model(backend, positions):
    head = small(backend=backend, positions=positions)
    torch.testing.assert_close(head(bag()).logits, masked(head, bag()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"positions": "alibi"}, {"global_layer": "linear"}, {"backend": "cells"}])
@torch.no_grad()
def test_the_place_of_the_slide_and_the_order_of_its_tiles_do_not_matter(options):
    head, tiles = small(**options), bag()
    out = head(tiles)
    for move in ([1, 0], [-7, 12345]):
        torch.testing.assert_close(head(bag(places() + np.array(move))).logits, out.logits)
    order = np.random.default_rng(1).permutation(len(tiles))
    mixed = head(Bag.flat(tiles.features[order], grid=tiles.grid[order]))
    torch.testing.assert_close(mixed.logits, out.logits)
    torch.testing.assert_close(mixed.tiles[0].weight, out.tiles[0].weight[order])


@torch.no_grad()
def test_places_matter():
    head, tiles = small(), bag()
    elsewhere = Bag.flat(tiles.features, grid=tiles.grid[torch.randperm(len(tiles))])
    assert not torch.allclose(head(elsewhere).logits, head(tiles).logits, atol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "cells"])
@torch.no_grad()
def test_two_local_layers_see_twice_the_radius_and_no_farther(backend):
    head, grid = small(backend=backend), places(share=1.0)
    tiles = bag(grid)
    before = head.local_tokens(tiles)
    features = tiles.features.clone()
    features[0] += 5
    changed = (head.local_tokens(Bag.flat(features, grid=grid)) != before).any(1).numpy()
    distance = np.hypot(*(grid - grid[0]).T)
    assert not changed[distance > 5].any()
    assert changed[distance <= 2.5].all()
    assert changed[(distance > 2.5) & (distance <= 4)].any()


@torch.no_grad()
def test_a_full_grid_becomes_a_quarter():
    grid = torch.as_tensor(places(10, 1.0)) + 3
    squares, token = squares_of(grid)
    assert pool(torch.ones(100, 4), token).shape == (25, 4)
    assert (token.bincount() == 4).all()
    assert len(squares) == 25


def test_squares_with_holes_average_what_is_there():
    grid = torch.tensor([[4, 6], [5, 6], [4, 7], [9, 6], [6, 9]])
    squares, token = squares_of(grid)
    h = pool(torch.tensor([[1.0], [2.0], [6.0], [10.0], [20.0]]), token)
    assert h[token][:, 0].tolist() == [3, 3, 3, 10, 20]
    assert squares.tolist() == [[0, 0], [1, 1], [2, 0]]


@torch.no_grad()
def test_scores_of_the_tiles_of_a_square_are_those_of_the_square():
    head, tiles = small(), bag()
    scores = head(tiles).tiles[0]
    _, token = squares_of(tiles.grid)
    for square in range(int(token.max()) + 1):
        assert len(scores.raw[token == square].unique()) == len(scores.weight[token == square].unique()) == 1
    per_token = torch.stack([scores.per_class[:, token == s][:, 0] for s in range(int(token.max()) + 1)], dim=1)
    torch.testing.assert_close(per_token.mean(1) + head.classifier.bias, head(tiles).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_linear_attention_is_its_quadratic_form():
    q, k, v = torch.randn(3, 2, 13, 8, dtype=torch.float64)
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    torch.testing.assert_close(linear(q, k, v), scores / scores.sum(-1, keepdim=True) @ v)


def test_alibi_in_parts_is_alibi_gradients_too(monkeypatch):
    grid = torch.as_tensor(places())
    outs = []
    for size in (1 << 30, 4 * 2 * len(grid) * 5):  # all at a time; five queries at a time
        monkeypatch.setattr("heads.longmil.ALIBI_BYTES", size)
        q, k, v = (
            x.requires_grad_() for x in torch.randn(3, 2, len(grid), 8, generator=torch.Generator().manual_seed(0))
        )
        out = full_alibi(grid)(q, k, v)
        out.square().sum().backward()
        outs.append((out.detach(), q.grad, k.grad, v.grad))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only():
    head = small(dropout=0.5)
    assert torch.equal(head(bag()).logits, head(bag()).logits)
    torch.manual_seed(0)
    assert not torch.equal(head.train()(bag()).logits, head(bag()).logits)


@pytest.mark.parametrize("options", [{"global_layer": "mamba"}, {"positions": "sine"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="must be one of"):
        small(**options)
