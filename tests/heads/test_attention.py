import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads import BadBag, Bag, load_head
from heads.attention import Block, FullAttention, shares
from heads.layers import rope_2d


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def bag(n: int = 23, seed: int = 0, move: tuple[int, int] = (0, 0)) -> Bag:
    random = np.random.default_rng(seed)
    grid = random.permutation(np.stack(np.meshgrid(np.arange(9), np.arange(9)), -1).reshape(-1, 2))[:n]
    return Bag.flat(random.normal(size=(n, 7)), grid=grid + np.array(move))


def small(**options) -> FullAttention:
    torch.manual_seed(0)
    return load_head("attention", 7, 3, width=16, heads=2, **options).eval()


def naive_block(block: Block, h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """A tile and a head at a time."""
    dim, n = h.shape[1] // block.heads, len(h)
    q, k, v = block.qkv(block.norm1(h)).split(h.shape[1], dim=1)
    q, k = (
        torch.cat([rope_2d(x[None, :, i : i + dim], grid)[0] for i in range(0, h.shape[1], dim)], 1) for x in (q, k)
    )
    mixed = torch.empty_like(h)
    for i in range(n):
        for s in range(0, h.shape[1], dim):
            part = slice(s, s + dim)
            weight = torch.stack([q[i, part] @ k[j, part] / math.sqrt(dim) for j in range(n)]).softmax(0)
            mixed[i, part] = sum(weight[j] * v[j, part] for j in range(n))
    h = h + block.out(mixed)
    return h + block.mlp[2](F.gelu(block.mlp[0](block.norm2(h))))


@torch.no_grad()
def test_equals_a_naive_loop():
    head, tiles = small(), bag()
    h = F.relu(head.projection[0](tiles.features))
    for block in head.blocks:
        h = naive_block(block, h, tiles.grid)
    expected = head.classifier(F.layer_norm(h.mean(0), (16,), head.norm.weight, head.norm.bias))
    torch.testing.assert_close(head(tiles).logits, expected, rtol=1e-5, atol=1e-5)


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("attention", dim=384, classes=3, blocks=2)) == 3_696_387


@pytest.mark.parametrize(("dim", "classes", "blocks", "d"), [(7, 3, 1, 16), (384, 2, 3, 64)])
def test_parameter_count_in_closed_form(dim, classes, blocks, d):
    expected = d * (dim + 1) + blocks * (12 * d**2 + 10 * d) + 2 * d + classes * (d + 1)
    assert parameters(load_head("attention", dim, classes, blocks=blocks, width=d)) == expected


@torch.no_grad()
def test_only_differences_of_places_count():
    head = small()
    torch.testing.assert_close(head(bag(move=(-500, 70_000))).logits, head(bag()).logits)
    turned = Bag.flat(bag().features, grid=bag().grid.flip(1))
    assert not torch.allclose(head(turned).logits, head(bag()).logits, atol=1e-5)


@torch.no_grad()
def test_scores_are_the_tiles_parts_in_the_logits():
    head = small()
    head.norm.weight.uniform_(0.5, 2)
    head.norm.bias.uniform_(-1, 1)
    out = head(bag())
    torch.testing.assert_close(out.tiles[0].per_class.mean(1) + head.classifier.bias, out.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.tiles[0].raw, out.tiles[0].per_class[out.logits.argmax()])


def test_shares_are_gradients_where_the_spread_is_known():
    """∂logit/∂h_j · h_j, with the norm's spread held still, is a tile's share up to what the bias of the norm adds."""
    torch.manual_seed(0)
    h, norm, classifier = torch.randn(5, 8, requires_grad=True), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1)
    mean = h.mean(0)
    spread = (mean.var(unbiased=False) + norm.eps).sqrt().detach()
    logit = classifier((mean - mean.mean()) / spread)
    (slope,) = torch.autograd.grad(logit, h)
    torch.testing.assert_close((slope * h).sum(1) * len(h), shares(h, norm, classifier)[0])


def test_a_bag_without_a_grid_is_refused():
    with pytest.raises(BadBag, match="no grid"):
        small()(Bag.flat(np.ones((3, 7))))


def test_heads_must_part_the_features():
    with pytest.raises(ValueError, match="cannot be parted among 5 heads"):
        load_head("attention", 7, 3, heads=5)
