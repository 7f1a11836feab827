"""Several heads as one: the mean of what they say, not of their logits."""

import pytest
import torch

from heads import Bag, load_head
from heads.average import Average, _votes
from heads.tasks import Classification, MultiLabel, Ordinal, Regression, Survival

DIM = 5


def made(outputs, seeds=(0, 1, 2), name="abmil"):
    heads = []
    for seed in seeds:
        torch.manual_seed(seed)
        heads.append(load_head(name, DIM, outputs).eval())
    return heads


@pytest.fixture
def bag():
    torch.manual_seed(9)
    return Bag.flat(torch.randn(11, DIM) * 3, valid=torch.arange(11) != 4)


@pytest.mark.parametrize(
    "tasks",
    [
        [Classification(3)] * 3,
        [MultiLabel(3)] * 3,
        [Ordinal(6)] * 3,
        [Regression(1.0, 2.0), Regression(5.0, 0.5), Regression(-3.0, 1.0)],
    ],
)
def test_it_says_the_mean(tasks, bag):
    heads = made(tasks[0].outputs)
    each = torch.stack([task.predict(head(bag).logits) for task, head in zip(tasks, heads, strict=True)])
    if isinstance(tasks[0], Ordinal):  # of grades before they are rounded
        each = torch.stack([head(bag).logits for head in heads])
        together = Average(heads, tasks).eval()(bag).logits
    else:
        together = tasks[0].predict(Average(heads, tasks).eval()(bag).logits)
    torch.testing.assert_close(together.flatten(), each.mean(0).flatten())


def test_attention_is_the_mean_weight_and_sums_to_one(bag):
    heads = made(2)
    scores = Average(heads, [Classification(2)] * 3).eval()(bag).tiles[0]
    each = torch.stack([head(bag).tiles[0].weight for head in heads])
    torch.testing.assert_close(scores.weight, each.mean(0), equal_nan=True)
    assert scores.weight.nansum().item() == pytest.approx(1)
    assert scores.weight.isnan().nonzero().flatten().tolist() == [4]


def test_a_tile_that_one_head_did_not_look_at_has_no_weight_for_it():
    from heads.average import _mean_scores
    from heads.bag import TileScores

    nan = torch.nan
    one = TileScores(torch.tensor([1.0, nan, nan]), torch.tensor([1.0, nan, nan]))
    two = TileScores(torch.tensor([3.0, 5.0, nan]), torch.tensor([0.5, 0.5, nan]))
    both = _mean_scores([one, two])
    torch.testing.assert_close(both.weight, torch.tensor([0.75, 0.25, nan]), equal_nan=True)
    torch.testing.assert_close(both.raw, torch.tensor([2.0, 5.0, nan]), equal_nan=True)


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="same features"):
        Average([*made(2, [0]), *made(3, [0])], [Classification(2), Classification(3)])
    with pytest.raises(ValueError, match="same features"):
        Average(made(1, [0, 1]), [Regression(), Ordinal(2)])
    with pytest.raises(ValueError, match="Survival cannot be averaged"):
        Average(made(4, [0, 1]), [Survival(4)] * 2)


def test_votes_count_heads_and_the_mean_decides_ties_only():
    """Probabilities of three heads, then of two."""
    three = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.0, 0.9, 0.1]])
    assert _votes(three).argmax() == 0  # the mean says 1
    torch.testing.assert_close(_votes(three), torch.tensor([2 / 3, 1 / 3, 0.0]), atol=2e-3, rtol=0)
    assert _votes(three[1:]).argmax() == 1
    torch.testing.assert_close(_votes(three).sum(), torch.tensor(1.0))


def test_heads_vote(bag):
    heads = made(3, range(5))
    said = [int(head(bag).logits.argmax()) for head in heads]
    out = Average(heads, [Classification(3)] * 5, vote=True).eval()(bag)
    expected = torch.bincount(torch.tensor(said), minlength=3) / 5
    torch.testing.assert_close(out.probabilities, expected, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="only classes are voted on, not Regression"):
        Average(made(1), [Regression()] * 3, vote=True)
