import math

import numpy as np
import pytest
import torch

from heads import Bag, load_head
from heads.dsmil import DSMIL
from heads.tasks import MultiLabel


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def naive(head: DSMIL, tiles: np.ndarray) -> np.ndarray:
    """The formulas a class and a tile at a time, in float64."""
    w = {name: values.double().numpy() for name, values in head.state_dict().items()}
    scores = np.array([w["scores.weight"] @ x + w["scores.bias"] for x in tiles])
    q = []
    for x in tiles:
        hidden = np.maximum(w["query.0.weight"] @ x + w["query.0.bias"], 0)
        q.append(np.tanh(w["query.2.weight"] @ hidden + w["query.2.bias"]))
    z = []
    for c in range(head.classes):
        critical = q[int(scores[:, c].argmax())]
        share = np.array([math.exp(critical @ other / math.sqrt(len(other))) for other in q])
        z.append(sum(s * x for s, x in zip(share / share.sum(), tiles, strict=True)))
    return np.array(
        [
            sum(w["classifier.weight"][c, d] @ z[d] for d in range(head.classes)) + w["classifier.bias"][c]
            for c in range(head.classes)
        ]
    )


@torch.no_grad()
def test_equals_a_naive_loop():
    torch.manual_seed(0)
    head, tiles = load_head("dsmil", 7, 3), np.random.default_rng(0).normal(size=(13, 7)).astype(np.float32)
    np.testing.assert_allclose(head(Bag.flat(tiles)).logits, naive(head, tiles), atol=1e-5)


def test_parameter_counts_of_the_literature():
    assert parameters(load_head("dsmil", dim=1024, classes=2)) == 153_860
    assert parameters(load_head("dsmil", dim=512, classes=2)) == 85_252


@pytest.mark.parametrize(("dim", "classes"), [(7, 3), (384, 2), (13, 1)])
def test_parameter_count_in_closed_form(dim, classes):
    expected = (dim + 1) * classes + 128 * (dim + 1) + 128 * 129 + classes**2 * dim + classes
    assert parameters(load_head("dsmil", dim, classes)) == expected


def test_the_loss_is_half_of_each_stream():
    torch.manual_seed(0)
    head = load_head("dsmil", 7, 3)
    out = head(Bag.flat(np.random.default_rng(0).normal(size=(13, 7))))
    target = torch.tensor([1.0, 0, 1])
    halves = [
        -(target * x.sigmoid().log() + (1 - target) * (1 - x.sigmoid()).log()).mean() / 2
        for x in (out.logits, out.parts["max"])
    ]
    torch.testing.assert_close(head.loss(out, target, MultiLabel(3)), sum(halves))
    halves = [-x.softmax(0)[2].log() / 2 for x in (out.logits, out.parts["max"])]
    torch.testing.assert_close(head.loss(out, 2), sum(halves))


def test_the_first_weights_are_orthogonal():
    head = load_head("dsmil", 16, 3)
    w = head.query[0].weight
    torch.testing.assert_close(w.T @ w, torch.eye(16), rtol=0, atol=1e-5)
    assert (head.query[0].bias == 0).all()
