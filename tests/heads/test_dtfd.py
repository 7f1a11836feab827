import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads import Bag, load_head
from heads.dtfd import DTFD, draws


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def bag(n: int = 23, dim: int = 7, seed: int = 0) -> Bag:
    return Bag.flat(np.random.default_rng(seed).normal(size=(n, dim)))


def naive(head: DTFD, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pseudo-bag after pseudo-bag: logits, those of tier 1, and weights of the tiles."""
    groups = draws(x).argsort(stable=True).tensor_split(min(head.options["groups"], len(x)))
    first, vectors, owners = [], [], []
    for rows in groups:
        h = F.relu(head.projection[0](x[rows]))
        alpha = head.attention(h)[:, 0].softmax(0)
        z = (alpha[:, None] * h).sum(0)
        first.append(head.classifier(z))
        likely = torch.stack([head.classifier(a * tile) for a, tile in zip(alpha, h, strict=True)]).softmax(1)[:, -1]
        found = {"afs": [z], "maxs": [h[likely.argmax()]], "maxmins": [h[likely.argmax()], h[likely.argmin()]]}
        vectors += found[head.options["distill"]]
        owners.append((rows, alpha, len(found[head.options["distill"]])))
    d = torch.stack(vectors)
    beta = head.attention2(d)[:, 0].softmax(0)
    weights, at = torch.zeros(len(x)), 0
    for rows, alpha, count in owners:
        weights[rows] = alpha * beta[at : at + count].sum()
        at += count
    return head.classifier2((beta[:, None] * d).sum(0)), torch.stack(first), weights


@pytest.mark.parametrize("distill", ["afs", "maxs", "maxmins"])
@pytest.mark.parametrize("n", [1, 3, 4, 23])
@torch.no_grad()
def test_equals_a_naive_loop(distill, n):
    torch.manual_seed(0)
    head = load_head("dtfd", 7, 2, distill=distill).eval()
    out, (logits, first, weights) = head(bag(n)), naive(head, bag(n).features)
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.parts["tier 1"], first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.tiles[0].weight, weights, rtol=1e-5, atol=1e-6)


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("dtfd", dim=1024, classes=2)) == 789_254


@pytest.mark.parametrize(("dim", "classes"), [(7, 3), (384, 2)])
def test_parameter_count_in_closed_form(dim, classes):
    expected = 512 * dim + 2 * (2 * 128 * 513 + 129 + 513 * classes)
    assert parameters(load_head("dtfd", dim, classes)) == expected


@pytest.mark.parametrize("distill", ["afs", "maxs", "maxmins"])
def test_tier_2_trains_tier_1_only_where_it_is_asked_to(distill):
    for joint in (False, True):
        torch.manual_seed(0)
        head = load_head("dtfd", 7, 2, distill=distill, joint=joint)
        head.eval()(bag()).logits[0].backward()
        assert (head.projection[0].weight.grad is not None) == joint
        assert head.attention2.V.weight.grad is not None


def test_the_parting_is_random_in_training_and_fixed_in_evaluation():
    torch.manual_seed(0)
    head = load_head("dtfd", 7, 2)
    training = [head.train()(bag()).logits for _ in range(3)]
    assert not torch.equal(training[0], training[1])
    assert torch.equal(head.eval()(bag()).logits, head(bag()).logits)


def test_the_parting_is_even_and_looks_random():
    """Neighbours in the bag are in one pseudo-bag as often as strangers are: a quarter of the time."""
    x = torch.randn(4000, 7, generator=torch.Generator().manual_seed(0))
    groups = draws(x).argsort(stable=True).tensor_split(4)
    assert [len(rows) for rows in groups] == [1000] * 4
    owner = torch.empty(4000, dtype=torch.int64)
    for g, rows in enumerate(groups):
        owner[rows] = g
    assert (owner[1:] == owner[:-1]).float().mean().item() == pytest.approx(0.25, abs=0.03)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draws(x[order]), draws(x)[order])
    assert len(draws(x).unique()) == 4000


def test_the_loss_is_both_tiers():
    torch.manual_seed(0)
    head = load_head("dtfd", 7, 2).eval()
    out = head(bag())
    first = F.cross_entropy(out.parts["tier 1"], torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(head.loss(out, 1), first + F.cross_entropy(out.logits, torch.tensor(1)))


@pytest.mark.parametrize("options", [{"distill": "mean"}, {"groups": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="one of afs, maxs, maxmins, groups at least 1"):
        load_head("dtfd", 7, 2, **options)
