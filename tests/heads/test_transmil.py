import numpy as np
import pytest
import torch

from heads import Bag, load_head
from heads.layers import group_means, pseudo_inverse


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(**options):
    torch.manual_seed(0)
    return load_head("transmil", 7, 3, width=16, landmarks=8, heads=2, **options).eval()


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("transmil", dim=1024, classes=2)) == 2_672_146
    assert parameters(load_head("transmil", dim=2048, classes=7)) == 3_198_999


@pytest.mark.parametrize(("dim", "classes"), [(7, 3), (384, 2)])
def test_parameter_count_in_closed_form(dim, classes):
    e = 512
    mix = 2 * e + 4 * e**2 + e + 33 * 8
    expected = e * (dim + 1) + e + 2 * mix + 86 * e + 2 * e + classes * (e + 1)
    assert parameters(load_head("transmil", dim, classes)) == expected


@torch.no_grad()
def test_the_square_is_made_of_the_first_tiles():
    """10 tiles and the first 6 again are the 16 that stand in the square anyway: the same logits."""
    head, tiles = small(), np.random.default_rng(0).normal(size=(10, 7))
    torch.testing.assert_close(head(Bag.flat(tiles)).logits, head(Bag.flat(np.concatenate([tiles, tiles[:6]]))).logits)


@torch.no_grad()
def test_positions_are_the_order_of_the_bag():
    head, tiles = small(), np.random.default_rng(0).normal(size=(20, 7))
    assert not torch.allclose(head(Bag.flat(tiles)).logits, head(Bag.flat(tiles[::-1].copy())).logits, atol=1e-4)


@torch.no_grad()
def test_convolutions_see_the_square_row_by_row():
    """A step of one tile to the side is one row of h; a step down is one side of the square."""
    head = small()
    for convolution in head.around:
        convolution.weight.zero_()
        convolution.bias.zero_()
    head.around[2].weight[:, 0, 1, 2] = 1.0  # of the 3 × 3: what stands to the right
    h = torch.randn(9, 16)
    right = torch.stack([h[i + 1] if i % 3 < 2 else torch.zeros(16) for i in range(9)])
    torch.testing.assert_close(head._convolved(h, 3), h + right)


@torch.no_grad()
def test_scores_are_the_row_of_the_class_token():
    head, bag = small(), Bag.flat(np.random.default_rng(0).normal(size=(11, 7)))
    raw = head(bag).tiles[0].raw
    h = head.projection(bag.features)
    h = torch.cat([head.token, h, h[:5]])
    h = h + head.mix1(head.first(h))
    h = torch.cat([h[:1], head._convolved(h[1:], 4)])
    x = head.last(h)
    q, k, _ = head.mix2.qkv(x).unflatten(-1, (3, head.mix2.heads, -1)).permute(1, 2, 0, 3)
    q = q * q.shape[-1] ** -0.5
    few_q, few_k = group_means(q, head.mix2.landmarks), group_means(k, head.mix2.landmarks)
    middle = pseudo_inverse((few_q @ few_k.mT).softmax(-1), 6)
    whole = ((q @ few_k.mT).softmax(-1) @ middle @ (few_q @ k.mT).softmax(-1)).mean(0)[0, 1:]
    expected = whole[:11].clone()
    expected[:5] += whole[11:]
    torch.testing.assert_close(raw, expected)


@torch.no_grad()
def test_negative_scores_weigh_nothing():
    head = small()
    for seed in range(20):
        scores = head(Bag.flat(np.random.default_rng(seed).normal(scale=9, size=(30, 7)))).tiles[0]
        assert ((scores.weight > 0) == (scores.raw > 0)).all() or (scores.raw <= 0).all()
