import dataclasses
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from heads import BadBag, Bag, BagLevel, Prediction, TileScores, load_head
from heads.longmil import squares_of

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


# --- several slides as one bag ---------------------------------------------------------------------------------------


def tree_bag(seed: int, origin=(0, 0), slide: str = "", mpp: float = 0.5, valid=None) -> Bag:
    """Two levels of a quadtree: 4 roots in a square that begins at `origin`, 1 to 4 children each."""
    random = np.random.default_rng(seed)
    roots = np.add(origin, [[0, 0], [1, 0], [0, 1], [1, 1]])
    parent = np.repeat(np.arange(4), random.integers(1, 5, 4))
    corner = np.concatenate([np.arange((parent == root).sum()) for root in range(4)])
    children = roots[parent] * 2 + np.stack([corner % 2, corner // 2], axis=1)
    levels = [
        BagLevel.of(random.normal(size=(len(grid), D)), grid=grid, parent=up, mpp=at, tile_px=8, span_px=9.5,
                    tissue=random.random(len(grid)), xy=grid * 8)
        for grid, up, at in ((roots, None, mpp * 2), (children, parent, mpp))
    ]  # fmt: skip
    return Bag(levels, slide)


def test_one_slide_alone_is_itself():
    bag = tree_bag(0, slide="a.svs")
    assert Bag.joined([bag]) is bag


def test_joined_rows_stand_in_the_order_of_the_slides():
    bags = [tree_bag(seed, slide=f"{seed}.svs") for seed in range(3)]
    whole = Bag.joined(bags)
    assert whole.slide == "0.svs"
    assert Bag.joined(bags, "patient 7").slide == "patient 7"
    for k, level in enumerate(whole.levels):
        for name in ("features", "tissue", "valid", "xy"):
            assert torch.equal(getattr(level, name), torch.cat([getattr(bag.levels[k], name) for bag in bags]))
        assert (level.mpp, level.tile_px, level.span_px) == ((1.0, 0.5)[k], 8, None)


def test_joined_parents_are_those_of_each_slide():
    bags = [tree_bag(seed, origin=(3 * seed, 5 - seed)) for seed in range(3)]
    roots, children = Bag.joined(bags).levels
    assert (roots.parent == -1).all()
    assert torch.equal(children.grid // 2, roots.grid[children.parent]), "the tree is one on the grid too"
    start = 0
    for i, bag in enumerate(bags):
        end = start + len(bag.levels[1])
        assert torch.equal(children.parent[start:end], bag.levels[1].parent + 4 * i)
        start = end


def test_slides_stand_out_of_each_others_sight():
    bags = [tree_bag(seed, origin=(7 * seed + 1, 0)).finest for seed in range(3)]
    grid = Bag.joined(bags).grid
    parts = grid.split([len(bag) for bag in bags])
    for left, right in pairwise(parts):
        assert right[:, 0].min() - left[:, 0].max() > 256
    for part, bag in zip(parts, bags, strict=True):
        assert torch.equal(part - part.amin(0), bag.grid - bag.grid.amin(0)), "moved, not bent"


@pytest.mark.parametrize("origins", [[(0, 0), (1, 3)], [(5, 2), (2, 5), (3, 4)], [(-3, -1), (0, 0)]])
def test_what_a_slide_pools_alone_it_pools_in_a_joined_bag(origins):
    odd = Bag.flat(features(3), grid=np.array([[4, 1], [5, 1], [6, 2]]), mpp=0.5)  # 3 columns wide
    bags = [odd, *(tree_bag(seed, origin=origin).finest for seed, origin in enumerate(origins))]
    alone = [squares_of(bag.grid)[1] for bag in bags]
    together = squares_of(Bag.joined(bags).grid)[1]
    start = 0
    for one in alone:
        part = together[start : start + len(one)]
        assert torch.equal(one[:, None] == one, part[:, None] == part)
        start += len(one)
    assert len(together.unique()) == sum(len(one.unique()) for one in alone)


def test_invalid_tiles_of_a_joined_slide_stay_so():
    flat = [Bag.flat(features(4), valid=[True, False, True, True]), Bag.flat(features(3))]
    whole = Bag.joined(flat)
    assert whole.valid.tolist() == [True, False, *[True] * 5]
    assert torch.equal(whole.valid_features, torch.cat([bag.valid_features for bag in flat]))


def test_what_only_some_slides_have_the_joined_bag_has_not():
    whole = Bag.joined([Bag.flat(features(3), grid=np.arange(6).reshape(3, 2)), Bag.flat(features(2))])
    assert len(whole) == 5
    with pytest.raises(BadBag, match="no grid"):
        _ = whole.grid


@pytest.mark.parametrize(
    ("bags", "words"),
    [
        ([tree_bag(0), tree_bag(1).finest], "1 and 2 levels"),
        ([tree_bag(0), tree_bag(1, mpp=0.25)], "different resolutions.*1, 0.5 µm"),
        ([tree_bag(0).finest, Bag.flat(features(3))], "different resolutions.*0.5, unknown"),
        ([Bag.flat(features(3)), Bag.flat(features(3, D + 1))], "5 and 6 features a tile"),
    ],
)
def test_slides_that_cannot_be_one_bag(bags, words):
    with pytest.raises(BadBag, match=words):
        Bag.joined(bags)


def test_a_level_that_only_some_slides_have_encoded_is_refused():
    bare = tree_bag(1)
    bare = Bag([dataclasses.replace(bare.levels[0], features=None), bare.levels[1]])
    with pytest.raises(BadBag, match="only some have features"):
        Bag.joined([tree_bag(0), bare])
    assert Bag.joined([bare, bare]).levels[0].features is None


@pytest.mark.parametrize(
    ("head", "options"), [("mean", {}), ("longmil", {"width": 16, "heads": 2, "radius": 3}), ("hagmil", {"levels": 2})]
)
def test_heads_read_joined_bags(head, options):
    made = load_head(head, D, 2, **options).eval()
    bags = [tree_bag(0), tree_bag(1, origin=(4, 1))]
    if made.needs.levels == 1:
        bags = [bag.finest for bag in bags]
    found = made(Bag.joined(bags))
    assert found.logits.isfinite().all()
    assert len(found.tiles[-1].weight) == sum(len(bag.levels[-1]) for bag in bags)
    if head == "mean":
        mean = torch.cat([bag.features for bag in bags]).mean(0, keepdim=True)
        torch.testing.assert_close(found.logits, made(Bag.flat(mean)).logits)
