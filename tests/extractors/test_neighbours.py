"""Weighted nearest neighbours against loops, and what may not vote."""

import math

import pytest
import torch

from extractors.neighbours import NEIGHBOURS, TEMPERATURE, accuracy, votes


def naive(queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    found = torch.zeros(len(queries), classes)
    for i, query in enumerate(queries):
        near = sorted(((float(torch.cosine_similarity(query, b, dim=0)), j) for j, b in enumerate(bank)), reverse=True)
        for cosine, j in near[:NEIGHBOURS]:
            found[i, labels[j]] += math.exp(cosine / TEMPERATURE)
    return found / found.sum(1, keepdim=True)


def test_votes_are_those_of_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    queries, bank = (torch.randn(n, 5, generator=random) for n in (4, 50))
    labels = torch.randint(3, (50,), generator=random)
    torch.testing.assert_close(votes(queries, bank, labels, 3), naive(queries, bank, labels, 3))
    few = votes(queries, bank[:7], labels[:7], 3)
    torch.testing.assert_close(few, naive(queries, bank[:7], labels[:7], 3))


def test_who_is_barred_has_no_vote() -> None:
    bank = torch.eye(3)
    labels = torch.tensor([0, 1, 1])
    barred = torch.tensor([[True, False, False], [True, True, True]])
    found = votes(bank[[0, 0]], bank, labels, 2, barred)
    assert found[0].tolist() == [0.0, 1.0]
    assert found[1].tolist() == [0.5, 0.5], "nobody is left: both classes alike"


def test_slides_do_not_help_themselves() -> None:
    """Vectors tell the slide and nothing of the class: within slides all is right, across them nothing is."""
    owners = torch.arange(6).repeat_interleave(5)
    labels = owners % 2
    features = torch.eye(6)[owners] + 0.5 * torch.eye(2)[1 - labels].repeat(1, 3)
    assert accuracy(features, labels, torch.arange(30)) == 1.0
    assert accuracy(features, labels, owners) == 0.0


def test_accuracy_is_the_mean_over_classes() -> None:
    labels = torch.tensor([0] * 40 + [1] * 2)
    features = torch.ones(42, 2)  # equal: the many outvote the few
    assert accuracy(features, labels, torch.arange(42)) == pytest.approx(0.5)
