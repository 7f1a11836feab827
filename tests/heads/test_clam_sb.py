import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads import Bag, load_head
from heads.clam_sb import CLAM, Instances, top1_svm
from heads.tasks import Classification, MultiLabel

SIZES = {"small": 256, "big": 384}


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def bag(n: int = 23, dim: int = 7, seed: int = 0) -> Bag:
    return Bag.flat(np.random.default_rng(seed).normal(size=(n, dim)))


def naive(head: CLAM, tiles: np.ndarray) -> np.ndarray:
    """The formulas a tile and a class at a time, in float64."""
    weights = {name: values.double().numpy() for name, values in head.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    hidden = [np.maximum(linear("projection.0", x), 0) for x in tiles]
    scores = np.array(
        [
            linear("attention.w", np.tanh(linear("attention.V", h)) / (1 + np.exp(-linear("attention.U", h))))
            for h in hidden
        ]
    )
    logits = []
    for c in range(head.classes):
        a = scores[:, c if scores.shape[1] > 1 else 0]
        share = np.exp(a) / np.exp(a).sum()
        z = sum(s * h for s, h in zip(share, hidden, strict=True))
        logits.append(weights["classifier.weight"][c] @ z + weights["classifier.bias"][c])
    return np.array(logits)


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
@pytest.mark.parametrize("size", ["small", "big"])
@torch.no_grad()
def test_equals_a_naive_loop(name, size):
    torch.manual_seed(0)
    head, tiles = load_head(name, 7, 3, size=size).eval(), np.random.default_rng(0).normal(size=(13, 7))
    np.testing.assert_allclose(head(Bag.flat(tiles)).logits, naive(head, tiles.astype(np.float32)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "dim", "classes", "count"),
    [
        ("clam_sb", "small", 1024, 2, 790_791),
        ("clam_sb", "big", 1024, 2, 922_247),
        ("clam_mb", "small", 1024, 2, 791_048),
        ("clam_mb", "big", 1024, 2, 922_632),
        ("clam_sb", "small", 2048, 7, 1_322_774),
        ("clam_mb", "big", 2048, 7, 1_456_540),
    ],
)
def test_parameter_counts_of_the_literature(name, size, dim, classes, count):
    assert parameters(load_head(name, dim=dim, classes=classes, size=size)) == count


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
@pytest.mark.parametrize("size", ["small", "big"])
@pytest.mark.parametrize(("dim", "classes"), [(7, 3), (384, 2)])
def test_parameter_count_in_closed_form(name, size, dim, classes):
    e, a, rows = 512, SIZES[size], classes if name == "clam_mb" else 1
    expected = e * (dim + 1) + 2 * a * (e + 1) + rows * (a + 1) + classes * (e + 1) + 2 * classes * (e + 1)
    assert parameters(load_head(name, dim, classes, size=size)) == expected


def test_the_branches_look_at_tiles_of_their_own():
    torch.manual_seed(0)
    out = load_head("clam_mb", 7, 3).eval()(bag())
    scores = out.tiles[0]
    assert scores.per_class.shape == (3, 23)
    assert torch.equal(scores.raw, scores.per_class[out.logits.argmax()])
    assert not torch.allclose(scores.per_class[0], scores.per_class[1], atol=1e-3)
    assert load_head("clam_sb", 7, 3).eval()(bag()).tiles[0].per_class is None


def test_svm_by_hand():
    """Equal scores: log(1 + e). A clear lead of the right one: 0. A clear lead of the wrong one: the margin itself."""
    labels = torch.tensor([1])
    assert top1_svm(torch.tensor([[0.3, 0.3]]), labels).item() == pytest.approx(math.log(1 + math.e))
    assert top1_svm(torch.tensor([[-20.0, 20.0]]), labels).item() == 0
    assert top1_svm(torch.tensor([[20.0, -20.0]]), labels).item() == pytest.approx(41)
    assert top1_svm(torch.tensor([[0.3, 0.3], [-20.0, 20.0]]), torch.tensor([1, 1])).item() == pytest.approx(
        math.log(1 + math.e) / 2
    )
    five = torch.zeros(1, 5)
    assert top1_svm(five, torch.tensor([3])).item() == pytest.approx(math.log(1 + 4 * math.e))


@pytest.mark.parametrize(("n", "taken"), [(1, 0), (2, 1), (3, 1), (15, 7), (16, 8), (100, 8)])
def test_few_tiles_are_never_labelled_both_ways(n, taken):
    """Which tiles were labelled how is read off from gradients: each is pushed for one label only."""
    torch.manual_seed(0)
    loss = Instances(1, 1, 8, "ce", subtyping=False)
    loss.classifiers[0].weight.data = torch.tensor([[0.0], [1.0]])
    tiles = torch.zeros(n, 1, requires_grad=True)
    value = loss(tiles, torch.arange(n).float()[None], 0)
    if taken == 0:
        assert value.item() == 0
        return
    value.backward()
    slope = tiles.grad[:, 0]
    assert (slope < 0).nonzero()[:, 0].tolist() == list(range(n - taken, n))  # highest attention: to be more positive
    assert (slope > 0).nonzero()[:, 0].tolist() == list(range(taken))


def test_subtyping_says_that_tiles_of_one_class_are_not_of_another():
    torch.manual_seed(0)
    tiles, raw = torch.randn(20, 5), torch.randn(3, 20)
    plain, subtyping = (Instances(5, 3, 2, "ce", flag) for flag in (False, True))
    subtyping.load_state_dict(plain.state_dict())
    order = raw.argsort(dim=1)
    zero, both = torch.zeros(2, dtype=torch.int64), torch.tensor([1, 1, 0, 0])
    own = F.cross_entropy(plain.classifiers[1](tiles[torch.cat([order[1, -2:], order[1, :2]])]), both)
    others = [F.cross_entropy(plain.classifiers[c](tiles[order[c, -2:]]), zero) for c in (0, 2)]
    torch.testing.assert_close(plain(tiles, raw, 1), own)
    torch.testing.assert_close(subtyping(tiles, raw, 1), (own + sum(others)) / 3)


def test_the_loss_has_both_parts():
    torch.manual_seed(0)
    head = load_head("clam_sb", 7, 3, instance_weight=0.25).eval()
    out = head(bag())
    instances = head.instances(out.parts["tiles"], out.parts["raw"], 2)
    expected = 0.75 * F.cross_entropy(out.logits, torch.tensor(2)) + 0.25 * instances
    torch.testing.assert_close(head.loss(out, 2), expected)
    weighted = Classification(3, (1.0, 1.0, 5.0))
    expected = 0.75 * 5 * F.cross_entropy(out.logits, torch.tensor(2)) + 0.25 * instances
    torch.testing.assert_close(head.loss(out, 2, weighted), expected)


def test_other_tasks_need_the_loss_on_tiles_to_be_off():
    out = (head := load_head("clam_sb", 7, 3))(bag())
    with pytest.raises(ValueError, match="needs one class a slide; for other tasks set instance_weight=0"):
        head.loss(out, [0, 1, 1], MultiLabel(3))
    head = load_head("clam_sb", 7, 3, instance_weight=0.0)
    assert head.loss(head(bag()), [0, 1, 1], MultiLabel(3)).isfinite()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "huge"}, "one of small, big"),
        ({"instance_loss": "hinge"}, "one of svm, ce"),
        ({"instances": 0}, "at 1 or more"),
        ({"instance_weight": 1.5}, "in 0..1"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        load_head("clam_sb", 7, 2, **options)
