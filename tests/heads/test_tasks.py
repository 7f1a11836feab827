import json
import math

import numpy as np
import pytest
import torch

from heads.tasks import KINDS, Classification, MultiLabel, Ordinal, Regression, Survival, describe, task_of


def test_classification_by_hand():
    logits = torch.tensor([0.0, math.log(3)])
    assert Classification(2).loss(logits, 1).item() == pytest.approx(math.log(4 / 3))
    assert Classification(2, (1.0, 5.0)).loss(logits, 1).item() == pytest.approx(5 * math.log(4 / 3))
    smooth = 0.95 * math.log(4 / 3) + 0.05 * math.log(4)
    assert Classification(2, smoothing=0.1).loss(logits, 1).item() == pytest.approx(smooth)
    assert Classification(2).predict(logits).tolist() == pytest.approx([0.25, 0.75])


def test_multi_label_by_hand():
    logits = torch.tensor([0.0, math.log(3)])
    assert MultiLabel(2).loss(logits, [1, 0]).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert MultiLabel(2, (3.0, 1.0)).loss(logits, [1, 0]).item() == pytest.approx((3 * math.log(2) + math.log(4)) / 2)
    assert MultiLabel(2).predict(logits).tolist() == pytest.approx([0.5, 0.75])


def test_ordinal_by_hand():
    task = Ordinal(4)
    assert task.loss(torch.tensor([1.5]), 3).item() == pytest.approx(2.25)
    assert [task.predict(torch.tensor([x])).item() for x in (-7.0, 0.4, 1.6, 99.0)] == [0, 0, 2, 3]


def test_regression_by_hand():
    task = Regression(centre=10, scale=2)
    assert task.loss(torch.tensor([1.0]), 14.0).item() == pytest.approx(1)
    assert task.predict(torch.tensor([1.0])).item() == 12


def test_survival_by_hand():
    """Hazards of one half: S = 1/2, 1/4, 1/8, 1/16."""
    logits = torch.zeros(4)
    task = Survival(4)
    assert task.loss(logits, (0, 1)).item() == pytest.approx(-math.log(1 / 2))
    assert task.loss(logits, (2, 1)).item() == pytest.approx(-math.log(1 / 4) - math.log(1 / 2))
    assert task.loss(logits, (2, 0)).item() == pytest.approx(-math.log(1 / 8))
    assert Survival(4, alpha=0.4).loss(logits, (2, 0)).item() == pytest.approx(-0.6 * math.log(1 / 8))
    assert task.predict(logits).item() == pytest.approx(-15 / 16)


def test_the_likelihood_sums_to_one():
    """Over all times of an event and the survival of all bins."""
    task, logits = Survival(5), torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = sum(math.exp(-task.loss(logits, (t, 1)).item()) for t in range(5))
    assert total + math.exp(-task.loss(logits, (4, 0)).item()) == pytest.approx(1)


def test_higher_hazards_are_a_higher_risk_and_no_logit_is_too_large():
    task = Survival(3)
    assert task.predict(torch.tensor([1.0, 0, 0])) > task.predict(torch.tensor([0.0, 0, 0]))
    for logits in (torch.full((3,), 200.0), torch.full((3,), -200.0)):
        assert task.loss(logits, (1, 1)).isfinite()
        assert task.loss(logits, (1, 0)).isfinite()


@pytest.mark.parametrize(
    ("task", "outputs"), [(Classification(3), 3), (MultiLabel(4), 4), (Ordinal(5), 1), (Survival(6), 6)]
)
def test_outputs(task, outputs):
    assert task.outputs == outputs


# --- tasks made of the training slides, and told to JSON -------------------------------------------------------------


def test_a_regression_is_centred_on_the_training_numbers():
    task = Regression.of([2.0, 4.0, 6.0])
    assert (task.centre, task.scale) == (4, pytest.approx(math.sqrt(8 / 3)))
    assert task.predict(torch.tensor([0.0])).item() == 4
    assert Regression.of([3.0, 3.0]).scale == 1, "no spread to divide by"


@pytest.mark.parametrize("seed", range(5))
def test_bins_of_time_hold_as_many_events_each(seed):
    random = np.random.default_rng(seed)
    times, seen = random.exponential(10, 80), random.random(80) < 0.5
    task = Survival.of(times, seen, 4)
    counts = np.bincount([task.bin(t) for t in times[seen]], minlength=task.bins)
    assert task.bins == task.outputs == 4
    assert np.ptp(counts) <= 1


@pytest.mark.parametrize(
    ("events", "bins"), [([5], 1), ([5, 5, 5, 5], 1), ([1, 1, 1, 9], 2), ([1, 1, 2, 2], 2), ([1, 2, 3], 3)]
)
def test_no_bin_of_time_is_empty_of_events(events, bins):
    task = Survival.of(np.array([*events, 100, 0.5]), np.array([1] * len(events) + [0, 0]))
    assert {task.bin(t) for t in events} == set(range(task.bins))
    assert task.bins == bins
    assert task.bin(0) == 0
    assert task.bin(1e9) == task.bins - 1


def test_without_an_event_there_are_no_bins():
    with pytest.raises(ValueError, match="no event was seen"):
        Survival.of(np.array([1.0, 2.0]), np.array([0, 0]))


@pytest.mark.parametrize(
    "task",
    [
        Classification(3, (1.0, 2.0, 0.5), 0.1),
        MultiLabel(2),
        Ordinal(5),
        Regression(3.5, 0.25),
        Survival(3, 0.2, (1.5, 8.0)),
    ],
)
def test_a_task_survives_json(task):
    description = json.loads(json.dumps(describe(task)))
    assert task_of(description) == task
    assert KINDS[description["kind"]] is type(task)
