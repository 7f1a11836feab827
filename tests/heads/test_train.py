import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from heads import Bag, load_head
from heads.train import check_labels, fit, inverse_frequency, predict, split

torch.set_num_threads(1)


def make_head(name="abmil", dim=5, classes=2, seed=0, **options):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return load_head(name, dim, classes, **({"hidden": 17, "attention": 13} if name == "abmil" else {}), **options)


def planted(count: int, seed: int, tiles: int = 100, dim: int = 16) -> tuple[list[Bag], np.ndarray]:
    """Bags of noise; in every second bag one tile of `tiles` is shifted along one direction."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    direction = np.ones(dim) / np.sqrt(dim)
    bags = []
    for label in labels:
        features = random.normal(size=(tiles, dim))
        features[random.integers(tiles)] += label * 8 * direction
        bags.append(Bag.flat(features))
    return bags, labels


def few(n: int = 12, seed: int = 0) -> tuple[list[Bag], np.ndarray]:
    random, labels = np.random.default_rng(seed), np.arange(n) % 2
    return [Bag.flat(random.normal(size=(3, 5)) + label) for label in labels], labels


class Recorded:
    """A sequence of bags that writes down which were read."""

    def __init__(self, bags):
        self.bags, self.read = bags, []

    def __len__(self):
        return len(self.bags)

    def __getitem__(self, i):
        self.read.append(i)
        return self.bags[i]


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_abmil_finds_one_tile_in_a_hundred():
    bags, labels = planted(120, seed=0)
    others, expected = planted(100, seed=1)
    head = make_head(dim=16)
    untrained = roc_auc_score(expected, predict(head, others)[:, 1])
    fit(head, bags, labels, epochs=30, lr=2e-3)
    trained = roc_auc_score(expected, predict(head, others)[:, 1])
    assert trained > 0.95 > untrained

    positive = [i for i in range(100) if expected[i]]
    shifted = [others[i].features.sum(dim=1).argmax() for i in positive]
    found = [head(others[i]).tiles[0].raw.argmax() == tile for i, tile in zip(positive, shifted, strict=True)]
    assert np.mean(found) > 0.9


def test_labels_without_a_signal_are_not_learned():
    bags, labels = planted(60, seed=0, tiles=11)
    others, expected = planted(60, seed=1, tiles=11)
    head = make_head(dim=16)
    fit(head, bags, np.random.default_rng(3).permutation(labels), epochs=5, lr=2e-3)
    assert 0.2 < roc_auc_score(expected, predict(head, others)[:, 1]) < 0.8


def test_the_loss_falls_and_all_epochs_are_run_without_validation():
    head = make_head()
    bags, labels = few()
    history = fit(head, bags, labels, epochs=13, lr=1e-2)
    assert len(history.train_loss) == 13
    assert history.validation_loss == ()
    assert history.best_epoch == 12
    assert history.train_loss[-1] < history.train_loss[0] / 2
    assert not head.training


def validate_against_the_opposite(patience: int, epochs: int = 30):
    """Validation labels are the wrong way round: what is learned makes validation worse from the first epoch on."""
    bags, labels = few()
    head, weights = make_head(), {}

    def keep(epoch, train_loss, validation_loss):
        weights[epoch] = {k: v.clone() for k, v in head.state_dict().items()}

    history = fit(
        head, bags, labels, validation=(bags, 1 - labels), epochs=epochs, lr=1e-2, patience=patience, on_epoch=keep
    )
    return head, history, weights


def test_the_best_epoch_is_kept():
    head, history, weights = validate_against_the_opposite(patience=5)
    assert history.best_epoch == int(np.argmin(history.validation_loss)) == 0
    assert all(torch.equal(head.state_dict()[k], v) for k, v in weights[0].items())
    assert not all(torch.equal(head.state_dict()[k], v) for k, v in weights[1].items())


@pytest.mark.parametrize("name", ["clam_sb", "dsmil", "dtfd"])
def test_the_epoch_is_chosen_by_the_loss_of_the_bags_logits(name):
    """Not by what a head adds to it while it trains."""
    bags, labels = few()
    head = make_head(name)
    history = fit(head, bags, labels, validation=(bags, labels), epochs=1, class_weights=False)
    probabilities = predict(head, bags)[np.arange(len(bags)), labels]
    assert history.validation_loss[0] == pytest.approx(-np.log(probabilities).mean(), rel=1e-5)


def test_training_stops_after_patience_epochs_without_a_better_one():
    _, history, _ = validate_against_the_opposite(patience=5)
    assert len(history.validation_loss) == len(history.train_loss) == 6
    _, history, _ = validate_against_the_opposite(patience=50, epochs=7)
    assert len(history.validation_loss) == 7


def test_validation_does_not_change_training():
    bags, labels = few()
    a, b = make_head(dropout=0.5), make_head(dropout=0.5)
    with_validation = fit(a, bags, labels, validation=(bags, labels), epochs=5)
    assert with_validation.train_loss == fit(b, bags, labels, epochs=5).train_loss


def test_dropout_acts_in_every_epoch_of_training():
    bags, labels = few()
    # so small a step that the loss of an epoch moves by the dropout alone
    settings = {"validation": (bags, labels), "epochs": 3, "lr": 1e-9}
    without = fit(make_head(), bags, labels, **settings)
    dropped = fit(make_head(dropout=0.5), bags, labels, **settings)
    assert np.ptp(without.train_loss) < 1e-5
    assert min(abs(np.diff(dropped.train_loss))) > 1e-3
    assert dropped.validation_loss == pytest.approx(without.validation_loss, abs=1e-5)


@pytest.mark.parametrize("accumulation", [1, 5])
def test_same_seed_same_bytes(accumulation):
    bags, labels = few()
    heads = [make_head(dropout=0.5) for _ in range(3)]
    settings = {"epochs": 3, "lr": 1e-2, "accumulation": accumulation}
    first = fit(heads[0], bags, labels, seed=1, **settings)
    torch.rand(5)  # where the global generator stands must not matter
    assert fit(heads[1], bags, labels, seed=1, **settings) == first
    assert same_weights(heads[0], heads[1])
    assert fit(heads[2], bags, labels, seed=2, **settings) != first
    assert not same_weights(heads[0], heads[2])


def test_the_global_generators_are_left_as_they_were():
    bags, labels = few()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    fit(make_head(dropout=0.5), bags, labels, epochs=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_step_takes_the_mean_of_its_bags():
    bags, labels = few(6)
    once, twice = make_head("mean"), make_head("mean")
    # Adam alone would not see a sum from a mean; against a strong weight decay it does
    settings = {"epochs": 20, "lr": 1e-2, "weight_decay": 0.5}
    fit(once, bags, labels, accumulation=6, seed=1, **settings)
    fit(twice, bags * 2, np.tile(labels, 2), accumulation=100, seed=2, **settings)
    for x, y in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_bags_may_be_read_when_they_are_needed():
    bags, labels = few(7)
    lazy = Recorded(bags)
    fit(make_head(), lazy, labels, epochs=3)
    epochs = np.array(lazy.read).reshape(3, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert not (epochs[0] == epochs[1]).all()


def test_class_weights_have_mean_one_and_make_rare_classes_count():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 2)
    torch.testing.assert_close(inverse_frequency(labels, 3), torch.tensor([0.5, 1.0, 1.5]))
    torch.testing.assert_close(inverse_frequency(labels, 4)[3], torch.tensor(1.0))

    bags = [Bag.flat(np.ones((1, 5)))] * 10  # nothing to see: the head can only learn how frequent a class is
    targets = [0] * 9 + [1]
    heads = [make_head("mean"), make_head("mean")]
    for head, weighted in zip(heads, (True, False), strict=True):
        fit(head, bags, targets, epochs=300, lr=1e-2, class_weights=weighted, accumulation=10)
    assert predict(heads[0], bags)[0, 1] == pytest.approx(0.5, abs=0.02)
    assert predict(heads[1], bags)[0, 1] == pytest.approx(0.1, abs=0.02)


def test_one_class_alone_is_refused():
    bags, labels = few()
    with pytest.raises(ValueError, match="all 12 training labels are 1"):
        fit(make_head(), bags, labels * 0 + 1)


def test_a_loss_that_is_not_finite_names_the_bag():
    bags, labels = few()
    bags[5] = Bag.flat(np.full((3, 5), 1e38), slide="huge.svs")
    head = make_head("mean")
    head.classifier.weight.data.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"bag 5 \('huge.svs'\)"):
        fit(head, bags, labels, epochs=1, accumulation=12)
    assert all(p.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 1], "3 bags"),
        ([0, 1, 2], r"0\.\.1"),
        ([0, 1, -1], r"0\.\.1"),
        ([0.0, 1.0, 0.5], "whole"),
        ([[0], [1], [1]], "3 bags"),
    ],
)
def test_labels_that_do_not_fit_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        check_labels(targets, 3, classes=2)


@pytest.mark.parametrize("wrong", ["epochs", "patience", "accumulation"])
def test_impossible_settings_are_refused(wrong):
    bags, labels = few()
    with pytest.raises(ValueError, match="at least 1"):
        fit(make_head(), bags, labels, **{wrong: 0})


def test_an_empty_validation_set_is_refused():
    bags, labels = few()
    with pytest.raises(ValueError, match="at least one bag"):
        fit(make_head(), bags, labels, validation=([], []))


def test_predict_gives_float64_probabilities_in_order():
    bags, _ = few(7)
    head = make_head(classes=3, dropout=0.9).train()
    probabilities = predict(head, bags)
    assert probabilities.dtype == np.float64
    assert probabilities.shape == (7, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-15)
    np.testing.assert_allclose(probabilities[4], head(bags[4]).probabilities.detach(), rtol=1e-5)
    assert predict(head, []).shape == (0, 3)


# --- split


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=9), min_size=2, max_size=4),
    fraction=st.sampled_from([0.1, 0.2, 0.25, 0.33, 0.5]),
    seed=st.integers(0, 5),
)
def test_split_of_patients_with_one_class_each(sizes, fraction, seed):
    patients = [(label, size) for label, groups in enumerate(sizes) for size in groups]
    targets = np.concatenate([[label] * size for label, size in patients])
    groups = np.concatenate([[f"p{i}"] * size for i, (_, size) in enumerate(patients)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, held_out = split(targets, groups, fraction, seed)
    assert sorted([*train, *held_out]) == list(range(len(targets)))
    assert not set(groups[train]) & set(groups[held_out])
    assert set(targets[train]) == set(targets[held_out]) == set(targets)
    again = split(targets, groups, fraction, seed)
    assert np.array_equal(train, again[0])
    assert np.array_equal(held_out, again[1])


@settings(max_examples=60, deadline=None)
@given(
    slides=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), min_size=2, max_size=40), seed=st.integers(0, 3)
)
def test_split_of_any_patients_keeps_its_word_or_says_why_not(slides, seed):
    targets, groups = np.array(slides).T
    try:
        train, held_out = split(targets, groups, seed=seed)
    except ValueError as error:
        assert "in one group only" in str(error) or "no split" in str(error)  # noqa: PT017
        return
    assert sorted([*train, *held_out]) == list(range(len(targets)))
    assert not set(groups[train]) & set(groups[held_out])
    assert set(targets[train]) == set(targets[held_out]) == set(targets)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_split_is_stratified_and_of_the_asked_size(fraction):
    targets = np.array([0] * 100 + [1] * 40)
    for groups in (None, np.arange(140) // 2):
        train, held_out = split(targets, groups, fraction)
        assert len(held_out) == pytest.approx(140 * fraction, abs=2)
        assert targets[held_out].mean() == pytest.approx(40 / 140, abs=0.05)
        assert len(train) + len(held_out) == 140


def test_other_seeds_give_other_splits():
    targets = np.arange(60) % 2
    assert not np.array_equal(split(targets, seed=0)[1], split(targets, seed=1)[1])


@pytest.mark.parametrize(
    ("targets", "groups", "message"),
    [
        ([0, 0, 0, 1], None, "class 1 is in one bag only"),
        ([0, 0, 0, 1, 1], ["a", "b", "c", "d", "d"], "class 1 is in one group only"),
        # three patients, each with two of three classes: one side always lacks a class
        ([0, 1, 1, 2, 0, 2], ["a", "a", "b", "b", "c", "c"], "no split"),
        ([0, 1, 0, 1], ["a", "b"], "4 targets, but 2 groups"),
    ],
)
def test_impossible_splits_are_refused_in_words(targets, groups, message):
    with pytest.raises(ValueError, match=message):
        split(targets, groups)


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, 1.0])
def test_impossible_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        split([0, 1, 0, 1], fraction=fraction)
