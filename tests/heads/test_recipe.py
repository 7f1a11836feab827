"""How a head is trained: each setting does what it says."""

import numpy as np
import pytest
import torch

from heads import Bag, list_heads, load_head
from heads.recipe import Lookahead, Recipe, mean_of
from heads.tasks import MultiLabel, Ordinal, Regression, Survival
from heads.train import fit


def bags(count: int = 12) -> tuple[list[Bag], np.ndarray]:
    random, labels = np.random.default_rng(0), np.arange(count) % 2
    places = {"grid": np.arange(10).reshape(5, 2), "tissue": np.ones(5)}
    return [Bag.flat(random.normal(size=(5, 3)) + label, **places) for label in labels], labels


def make(classes: int = 2):
    torch.manual_seed(0)
    return load_head("mean", 3, classes)


def state(head) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in head.parameters()])


@pytest.mark.parametrize("name", list_heads())
def test_recipes_of_papers_can_be_used(name):
    recipes = load_head(name, 3, 2).recipes
    assert all(isinstance(recipe, Recipe) for recipe in recipes.values())
    assert ("paper" in recipes) == (name not in {"mean", "max"})


@pytest.mark.parametrize("name", ["abmil", "clam_sb", "dsmil", "dtfd", "transmil", "hatnet", "hvit"])
def test_a_paper_trains(name):
    head, (some, labels) = load_head(name, 3, 2), bags()
    history = fit(
        head,
        some,
        labels,
        recipe=head.recipes["paper"],
        epochs=2,
        keep_from=0,
        warmup_epochs=0,
        validation=(some, labels),
    )
    assert len(history.train_loss) == 2


def test_sgd_has_a_momentum():
    got = Recipe(optimizer="sgd", lr=0.3, momentum=0.9).make_optimizer(make().parameters())
    assert type(got) is torch.optim.SGD
    assert (got.param_groups[0]["lr"], got.param_groups[0]["momentum"]) == (0.3, 0.9)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "radam"])
def test_the_optimiser_is_the_one_that_was_asked_for(optimizer):
    got = Recipe(optimizer=optimizer, lr=0.3, weight_decay=0.2, betas=(0.5, 0.6)).make_optimizer(make().parameters())
    assert type(got).__name__.lower() == optimizer
    assert {k: got.param_groups[0][k] for k in ("lr", "weight_decay", "betas")} == {
        "lr": 0.3,
        "weight_decay": 0.2,
        "betas": (0.5, 0.6),
    }


def rates(recipe: Recipe) -> list[float]:
    optimizer = recipe.make_optimizer(make().parameters())
    schedule, seen = recipe.make_schedule(optimizer), []
    for _ in range(recipe.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_schedules_by_hand():
    assert rates(Recipe(lr=1.0, epochs=3)) == [1, 1, 1]
    assert rates(Recipe(lr=1.0, epochs=4, schedule="step", step_epoch=2, step_factor=0.2)) == [1, 1, 0.2, 0.2]
    cosine = rates(Recipe(lr=1.0, epochs=4, schedule="cosine", final_lr=0.2))
    np.testing.assert_allclose(cosine, [0.2 + 0.4 * (1 + np.cos(np.pi * t / 4)) for t in range(4)])


def test_lookahead_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    slow = Lookahead(layer, every=2)
    seen = []
    for _ in range(4):
        layer.weight.data.add_(1.0)
        slow.step()
        seen.append(layer.weight.item())
    assert seen == [1, 1, 2, 2]  # 2 is pulled back to 1, 3 to 2
    plain = torch.nn.Linear(1, 1)
    before = plain.weight.item()
    Lookahead(plain, every=0).step()
    assert plain.weight.item() == before


def test_the_gradient_is_clipped():
    some, labels = bags()
    heads = [make(), make()]
    for head, clip in zip(heads, (None, 1e-9), strict=True):
        fit(head, some, labels, epochs=1, lr=1e-3, clip=clip, weight_decay=0.0)
    moved = [(state(head) - state(make())).abs().max().item() for head in heads]
    assert moved[0] > 1e-3
    assert moved[1] < 0.9 * moved[0]  # Adam divides by the size of gradients, but not by less than its epsilon


def trail(**changes):
    """A training, and the weights after each of its epochs."""
    some, labels = bags()
    head, seen = make(), []
    history = fit(
        head, some, labels, lr=0.05, validation=(some, labels), on_epoch=lambda *_: seen.append(state(head)), **changes
    )
    return state(head), seen, history


def test_which_weights_are_kept():
    best, seen, history = trail(epochs=8)
    assert torch.equal(best, seen[history.best_epoch])
    assert history.best_epoch == int(np.argmin(history.validation_loss))
    last, seen, history = trail(epochs=8, keep="last")
    assert torch.equal(last, seen[-1])
    assert history.best_epoch == 7
    mean, seen, history = trail(epochs=8, keep="average5")
    order = np.argsort(history.validation_loss)[:5]
    torch.testing.assert_close(mean, torch.stack([seen[i] for i in order]).mean(0))
    late, seen, history = trail(epochs=8, keep_from=6)
    assert history.best_epoch in (6, 7)
    assert torch.equal(late, seen[history.best_epoch])


def test_training_ends_no_sooner_than_it_may():
    def epochs(**changes) -> int:
        some, labels = bags()
        wrong = 1 - labels  # the better it learns, the worse it gets
        history = fit(make(), some, labels, lr=0.05, epochs=30, patience=2, validation=(some, wrong), **changes)
        return len(history.train_loss)

    assert epochs() == 3
    assert epochs(min_epochs=9) == 9
    assert epochs(keep_from=11) == 12


def test_the_mean_of_states():
    states = [{"a": torch.tensor([float(i)]), "n": torch.tensor(i)} for i in (1, 2, 6)]
    assert mean_of(states)["a"].item() == 3
    assert mean_of(states)["n"].item() == 6


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (MultiLabel(2), [[i % 2, 1 - i % 2] for i in range(12)]),
        (Ordinal(2), [i % 2 for i in range(12)]),
        (Regression(), [float(i % 2) for i in range(12)]),
        (Survival(2), [(i % 2, 1) for i in range(12)]),
    ],
)
def test_every_task_is_learned(task, targets):
    some, _ = bags()
    head = make(task.outputs)
    history = fit(head, some, targets, task=task, epochs=60, lr=0.03)
    assert history.train_loss[-1] < 0.3 * history.train_loss[0] or history.train_loss[-1] < 0.1


def test_a_head_with_another_number_of_outputs_is_refused():
    some, labels = bags()
    with pytest.raises(ValueError, match="the head has 2 outputs, Survival needs 4"):
        fit(make(), some, labels, task=Survival(4))
    with pytest.raises(ValueError, match="12 bags, but 3 targets"):
        fit(make(1), some, [1.0, 2.0, 3.0], task=Regression())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "lamb"}, "one of adam, adamw, radam, sgd, not 'lamb'"),
        ({"schedule": "linear"}, "one of constant, cosine, step"),
        ({"keep": "worst"}, "one of best, last, average5"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"keep_from": 50}, "one of the 50 epochs"),
    ],
)
def test_impossible_recipes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**changes)


def test_the_rate_rises_before_the_schedule_begins():
    recipe = Recipe(lr=1.0, warmup_epochs=2, schedule="step", step_epoch=2, step_factor=0.5, epochs=6)
    optimizer = recipe.make_optimizer(make().parameters())
    schedule, rates = recipe.make_schedule(optimizer), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.001, 0.5005, 1.0, 1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="fewer than the 6 epochs"):
        Recipe(epochs=6, warmup_epochs=6)
