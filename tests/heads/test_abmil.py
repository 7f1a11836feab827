import math

import numpy as np
import pytest
import torch

from heads import Bag, load_head
from heads.abmil import ABMIL
from heads.layers import Attention


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def naive(head: ABMIL, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formula of the paper, a tile at a time, in float64: logits and raw scores."""
    weights = {name: values.double().numpy() for name, values in head.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    hidden, raw = [], []
    for x in tiles:
        h = np.maximum(linear("projection.0", x), 0) if head.options["hidden"] else x
        t = np.tanh(linear("attention.V", h))
        if head.options["gated"]:
            t = t / (1 + np.exp(-linear("attention.U", h)))
        hidden.append(h)
        raw.append(linear("attention.w", t).item())
    share = [math.exp(a) for a in raw]
    z = sum(s / sum(share) * h for s, h in zip(share, hidden, strict=True))
    return linear("classifier", z), np.array(raw)


def test_by_hand():
    head = load_head("abmil", dim=1, classes=1, gated=True, hidden=None, attention=1)
    for name, value in {
        "V.weight": 1.0,
        "V.bias": 0.0,
        "U.weight": 0.0,
        "U.bias": 0.0,
        "w.weight": 2.0,
        "w.bias": 0.0,
    }.items():
        head.attention.get_parameter(name).data.fill_(value)
    head.classifier.weight.data.fill_(3.0)
    head.classifier.bias.data.fill_(1.0)
    # the gate is σ(0) = 1/2, so a = 2 · tanh(x) / 2 = tanh(x): 0 for the tile 0, 3/5 for the tile ln 2
    out = head(Bag.flat(np.array([[0.0], [math.log(2)]])))
    share = math.exp(0.6) / (1 + math.exp(0.6))  # 0.645656
    np.testing.assert_allclose(out.tiles[0].raw.detach(), [0.0, 0.6], atol=1e-6)
    np.testing.assert_allclose(out.tiles[0].weight.detach(), [0.354344, 0.645656], atol=1e-6)
    assert out.embedding.item() == pytest.approx(share * math.log(2), rel=1e-6)
    assert out.logits.item() == pytest.approx(3 * share * math.log(2) + 1, rel=1e-6)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hidden", [5, None])
def test_equals_a_naive_loop(gated, hidden):
    torch.manual_seed(0)
    head = load_head("abmil", dim=7, classes=3, gated=gated, hidden=hidden, attention=11)
    tiles = np.random.default_rng(0).normal(size=(13, 7)).astype(np.float32)
    out = head(Bag.flat(tiles))
    logits, raw = naive(head, tiles)
    np.testing.assert_allclose(out.logits.detach(), logits, atol=1e-6)
    np.testing.assert_allclose(out.tiles[0].raw.detach(), raw, atol=1e-6)


def test_gated_is_plain_when_the_gate_is_open():
    torch.manual_seed(0)
    gated, plain = load_head("abmil", 7, 3, gated=True), load_head("abmil", 7, 3, gated=False)
    shut_out = plain.load_state_dict(gated.state_dict(), strict=False)
    assert set(shut_out.unexpected_keys) == {"attention.U.weight", "attention.U.bias"}
    bag = Bag.flat(np.random.default_rng(0).normal(size=(13, 7)))
    assert not torch.allclose(gated(bag).tiles[0].raw, plain(bag).tiles[0].raw, atol=1e-3)
    gated.attention.U.weight.data.zero_()
    gated.attention.U.bias.data.fill_(100.0)  # σ(100) is 1 in float32
    assert torch.equal(gated(bag).logits, plain(bag).logits)


def test_parameter_counts_of_the_literature():
    assert parameters(Attention(500, 128, gated=False)) == 64_257
    assert parameters(Attention(500, 128, gated=True)) == 128_385
    assert parameters(load_head("abmil", 1024, 2, gated=False)) == 591_619
    assert parameters(load_head("abmil", 1024, 2)) == 657_283


@pytest.mark.parametrize(
    ("dim", "classes", "hidden", "attention"), [(7, 3, 5, 11), (384, 2, 512, 128), (13, 1, None, 17)]
)
@pytest.mark.parametrize("gated", [True, False])
def test_parameter_count_in_closed_form(dim, classes, hidden, attention, gated):
    width = hidden or dim
    projection = (dim + 1) * hidden if hidden else 0
    expected = projection + (1 + gated) * (width + 1) * attention + attention + 1 + (width + 1) * classes
    assert parameters(load_head("abmil", dim, classes, gated=gated, hidden=hidden, attention=attention)) == expected


def test_dropout_acts_in_training_only():
    head, bag = load_head("abmil", 7, 2, dropout=0.5), Bag.flat(np.ones((3, 7)))
    torch.manual_seed(0)
    assert not torch.equal(head.train()(bag).logits, head(bag).logits)
    assert torch.equal(head.eval()(bag).logits, head(bag).logits)


@pytest.mark.parametrize("options", [{"hidden": 0}, {"attention": 0}, {"dropout": 1.5}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError):
        load_head("abmil", 7, 2, **options)
