import dataclasses
import pickle

import numpy as np
import pytest
import torch

from heads import BadBag, Bag, BagLevel, Prediction, TileScores

N, D = 7, 5


def features(n: int = N, d: int = D) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, d))


def two_levels(**fine) -> Bag:
    coarse = BagLevel.of(features(3), grid=np.arange(6).reshape(3, 2), mpp=2.0, tile_px=224, span_px=887.1)
    columns = {"grid": np.arange(14).reshape(7, 2), "parent": np.array([0, 0, 0, 1, 1, 2, 2]), "mpp": 1.0, **fine}
    return Bag([coarse, BagLevel.of(features(7), **columns)], slide="a.svs")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_float_type_become_float32(dtype):
    values = features()
    given = torch.from_numpy(values).to(dtype) if isinstance(dtype, torch.dtype) else values.astype(dtype)
    bag = Bag.flat(given)
    assert bag.features.dtype == torch.float32
    assert torch.equal(bag.features, torch.as_tensor(given).float())


def test_one_level_is_not_copied():
    values = torch.from_numpy(features()).float()
    bag = Bag.flat(values)
    assert bag.features.data_ptr() == values.data_ptr() == bag.valid_features.data_ptr()


def test_a_flat_bag_has_defaults_for_what_is_always_there_and_names_what_is_missing():
    bag = Bag.flat(features())
    assert bag.valid.all()
    assert (bag.parent == -1).all()
    assert (len(bag), bag.dim) == (N, D)
    for column in ("grid", "tissue", "xy"):
        with pytest.raises(BadBag, match=column):
            getattr(bag, column)


def test_columns_are_joined_coarse_to_fine():
    bag = two_levels()
    assert len(bag) == 10
    assert torch.equal(bag.features, torch.cat([bag.levels[0].features, bag.levels[1].features]))
    assert bag.grid[:4].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert bag.parent.tolist() == [-1, -1, -1, 0, 0, 0, 1, 1, 2, 2]


def test_invalid_rows_are_zeroed_whatever_they_hold():
    values = features()
    values[2], values[5] = np.nan, np.inf
    valid = np.arange(N) % 3 != 2
    bag = Bag.flat(values, valid=valid)
    assert (bag.features[~bag.valid] == 0).all()
    assert torch.equal(bag.valid_features, torch.from_numpy(values[valid]).float())
    assert np.isnan(values[2]).all(), "the caller's array is his"


def test_a_level_that_was_not_encoded_keeps_its_rows_but_none_is_valid():
    coarse = BagLevel.of(grid=np.zeros((3, 2), int), mpp=2.0)
    bag = Bag([coarse, two_levels().levels[1]])
    assert bag.valid.tolist() == [False] * 3 + [True] * 7
    assert bag.features.shape == (10, D)
    assert (bag.features[:3] == 0).all()
    with pytest.raises(BadBag, match="not encoded"):
        bag.at(2.0)


def test_at_takes_the_level_within_one_percent_as_a_bag_of_its_own():
    bag = two_levels()
    fine = bag.at(1.009)
    assert len(fine.levels) == 1
    assert fine.slide == "a.svs"
    assert fine.features is bag.levels[1].features
    assert (fine.parent == -1).all()
    assert bag.at(2.0).levels[0].span_px == 887.1
    with pytest.raises(ValueError, match=r"no level of 1\.02.*there are: 2, 1"):
        bag.at(1.02)


def test_finest_is_the_finest_level_with_features():
    assert two_levels().finest.dim == D
    assert len(two_levels().finest) == 7
    unencoded = BagLevel.of(grid=np.zeros((2, 2), int), parent=np.array([0, 1]), mpp=0.5)
    assert len(Bag([*two_levels().levels, unencoded]).finest) == 7


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"features": np.ones(N)}, r"features must be \(N, D\)"),
        ({"grid": np.ones((N, 3), int)}, r"grid must be \(N, 2\), not \(7, 3\)"),
        ({"grid": np.ones((N - 1, 2), int)}, "grid has 6 rows"),
        ({"grid": np.ones((N, 2))}, "whole numbers"),
        ({"tissue": np.full(N, 1.1)}, "tissue must lie in 0..1"),
        ({"tissue": np.full(N, -0.1)}, "tissue must lie in 0..1"),
        ({"tissue": np.full(N, np.nan)}, "tissue must lie in 0..1"),
        ({"valid": np.zeros(N, bool)}, "none with features"),
        ({"valid": np.ones(N + 1, bool)}, "rows"),
        ({"features": np.ones((0, D))}, "no tile at all"),
        ({"features": np.where(np.arange(N)[:, None] == 3, np.nan, features())}, "1 of 7 tiles.*row 3"),
        ({"features": np.where(np.arange(N)[:, None] == 4, np.inf, features())}, "1 of 7 tiles.*row 4"),
    ],
)
def test_a_bag_that_contradicts_itself_is_refused_in_words(columns, message):
    with pytest.raises(BadBag, match=message):
        Bag.flat(**{"features": features(), **columns})


@pytest.mark.parametrize(
    ("fine", "message"),
    [
        ({"parent": np.array([0, 0, 0, 1, 1, 2, 3])}, r"0\.\.2"),
        ({"parent": np.array([0, 0, 0, 1, 1, 2, -1])}, r"0\.\.2"),
        ({"mpp": 4.0}, "coarse to fine"),
        ({"features": features(7, D + 1)}, "different lengths"),
    ],
)
def test_levels_that_do_not_fit_each_other_are_refused(fine, message):
    good = {"features": features(7), "parent": np.array([0, 0, 0, 1, 1, 2, 2]), "mpp": 1.0}
    coarse = two_levels().levels[0]
    assert Bag([coarse, BagLevel.of(**good)])
    with pytest.raises(BadBag, match=message):
        Bag([coarse, BagLevel.of(**{**good, **fine})])


def test_the_coarsest_level_has_only_roots():
    with pytest.raises(BadBag, match="all be -1"):
        Bag([two_levels().levels[1]])


def test_no_levels_is_no_tile():
    with pytest.raises(BadBag, match="no tile at all"):
        Bag([])


def test_bags_are_frozen_and_travel_between_processes():
    bag = two_levels()
    with pytest.raises(dataclasses.FrozenInstanceError):
        bag.slide = "b"
    there = pickle.loads(pickle.dumps(bag))
    assert torch.equal(there.features, bag.features)
    assert repr(there) == "Bag(slide='a.svs', tiles=[3, 7], dim=5)"


def test_to_the_same_device_is_the_same_bag():
    bag = two_levels()
    assert bag.to("cpu") is bag


def test_gradients_reach_the_features():
    values = torch.ones(N, D, dtype=torch.float64, requires_grad=True)
    Bag.flat(values, valid=np.arange(N) > 0).features.sum().backward()
    assert values.grad[:, 0].tolist() == [0.0] + [1.0] * (N - 1)


def test_scores_are_put_back_at_their_rows():
    valid = torch.tensor([True, False, True])
    scores = TileScores.place(valid, torch.tensor([3.0, 5.0]), torch.tensor([0.25, 0.75]), torch.ones(2, 2))
    np.testing.assert_array_equal(scores.raw, [3, np.nan, 5])
    np.testing.assert_array_equal(scores.weight, [0.25, np.nan, 0.75])
    np.testing.assert_array_equal(scores.per_class, [[1, np.nan, 1]] * 2)


def test_probabilities_are_the_softmax_of_the_logits():
    logits = torch.tensor([0.0, np.log(3.0)])
    np.testing.assert_allclose(Prediction(logits, logits, ()).probabilities, [0.25, 0.75], rtol=1e-6)
