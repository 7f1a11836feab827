"""What holds for every head, also for those that are written later; an exception stands here, with its reason."""

import io
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from heads import Bag, BagLevel, Head, Prediction, list_heads, load_head
from heads.tasks import Classification

DIM, CLASSES = 11, 3
NEEDS = {name: load_head(name, 3, CLASSES).needs for name in list_heads()}
FLAT = [name for name, needs in NEEDS.items() if needs.levels == 1 and not needs.pixels]
VARIANTS = [
    *((name, {"masked": True} if name == "hipt" else {}) for name in FLAT),  # without a mask regions must be whole
    ("abmil", {"gated": False}),
    ("abmil", {"hidden": None}),
    ("abmil", {"dropout": 0.5}),
    ("clam_sb", {"size": "big", "instance_loss": "ce"}),
    ("clam_mb", {"subtyping": True}),
    ("dtfd", {"distill": "maxs"}),
    ("dtfd", {"distill": "maxmins", "joint": True}),
    ("longmil", {"global_layer": "linear", "radius": 2}),
    ("longmil", {"positions": "alibi", "backend": "cells", "dropout": 0.5}),
]
# the softmax does not see a constant added to all raw scores, so this bias has no gradient in any attention head
NO_GRADIENT = "w.bias"
ORDERED = {"iat", "transmil"}  # neighbours in the bag's order are what Nyström attention and convolutions see
DRAWN = {"dtfd"}  # parts the tiles at random
POOLED = {"longmil"}  # weighs squares of one to four tiles
POSITIONAL = {
    "hatnet",
    "hipt",
    "hvit",
}  # a weight is of the place, too; of a class token, tiles are not all that is seen

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")

torch.set_num_threads(1)


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join([variant[0], *map(str, variant[1])]))
def make(request) -> Callable[[], Head]:
    name, options = request.param

    def make_head() -> Head:  # name and options are for tests that hold for some
        with torch.random.fork_rng([]):
            torch.manual_seed(7)
            return load_head(name, DIM, CLASSES, **options).eval()

    make_head.head = name
    return make_head


def columns(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng([n, seed])
    side = int(np.ceil(np.sqrt(n)))
    return {
        "features": random.normal(size=(n, DIM)),
        "grid": np.stack([np.arange(n) % side, np.arange(n) // side], axis=1),
        "tissue": random.uniform(size=n),
        "valid": np.ones(n, bool),
    }


def rows(table: dict[str, np.ndarray], chosen: np.ndarray) -> Bag:
    return Bag.flat(**{name: values[chosen] for name, values in table.items()})


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@torch.no_grad()
def run(head: Head, bag: Bag) -> Prediction:
    return head(bag)


def test_shapes_and_finite_for_all_sizes(make):
    head = make()
    for n in (1, 2, 7, 8, 9, 49, 50, 513):
        out = run(head, Bag.flat(**columns(n)))
        assert out.logits.shape == (CLASSES,)
        assert out.embedding.ndim == 1
        assert [scores.raw.shape for scores in out.tiles] == [scores.weight.shape for scores in out.tiles] == [(n,)]
        for values in (out.logits, out.embedding, out.tiles[0].raw, out.tiles[0].weight, out.probabilities):
            assert values.isfinite().all(), n
        assert (out.tiles[0].weight >= 0).all()
        same(out.tiles[0].weight.sum(), torch.tensor(1.0))


def test_the_order_of_the_tiles_does_not_matter(make):
    if make.head in ORDERED:
        pytest.skip("its answer depends on the order by design")
    head, table, order = make(), columns(53), np.random.default_rng(1).permutation(53)
    a, b = run(head, Bag.flat(**table)), run(head, rows(table, order))
    same(a.logits, b.logits)
    same(a.embedding, b.embedding)
    same(a.tiles[0].raw[order], b.tiles[0].raw)
    same(a.tiles[0].weight[order], b.tiles[0].weight)


def test_every_tile_twice_changes_nothing_but_halves_the_weights(make):
    if make.head in ORDERED | DRAWN | POSITIONAL - {"hatnet"}:
        pytest.skip("twice as many tiles are parted in other places, or against one class token")
    head, table = make(), columns(17)
    a, b = run(head, Bag.flat(**table)), run(head, rows(table, np.tile(np.arange(17), 2)))
    same(a.logits, b.logits)
    same(a.tiles[0].weight / 2, b.tiles[0].weight[:17])
    same(b.tiles[0].weight[:17], b.tiles[0].weight[17:])


def test_the_head_sees_its_tiles(make):
    head, table = make(), columns(17)
    before, changes = run(head, Bag.flat(**table)).logits, []
    for row in range(17):  # some look at the best of them only
        other = table | {"features": table["features"] + 10.0 * (np.arange(17) == row)[:, None]}
        changes.append((run(head, Bag.flat(**other)).logits - before).abs().max())
    assert max(changes) > 1e-3


@pytest.mark.parametrize("junk", [0.0, 1e6, np.nan, np.inf])
def test_invalid_rows_contribute_nothing(make, junk):
    head, table = make(), columns(19)
    bad = np.array([0, 5, 6, 18])
    kept = np.setdiff1d(np.arange(19), bad)
    without = run(head, rows(table, kept))
    table["features"][bad], table["valid"][bad] = junk, False
    out = run(head, Bag.flat(**table))
    assert torch.equal(out.logits, without.logits)
    assert torch.equal(out.embedding, without.embedding)
    for scores, expected in [
        (out.tiles[0].raw, without.tiles[0].raw),
        (out.tiles[0].weight, without.tiles[0].weight),
    ]:
        assert scores[bad].isnan().all()
        assert torch.equal(scores[kept], expected)


def test_invalid_rows_get_no_gradient(make):
    features = torch.randn(13, DIM, generator=torch.Generator().manual_seed(3)).requires_grad_()
    valid = np.arange(13) != 4
    head = make()
    head.loss(head(Bag.flat(**columns(13) | {"features": features, "valid": valid})), 1).backward()
    assert (features.grad[4] == 0).all()
    assert (features.grad[valid] != 0).any()


def test_every_parameter_gets_a_gradient(make):
    head = make()
    for seed in range(5):
        head.loss(head(Bag.flat(**columns(290, seed))), seed % CLASSES).backward()  # more than one region of any head
    without = {name for name, p in head.named_parameters() if p.grad is None or not (p.grad.abs() > 1e-7).any()}
    assert {name for name in without if not name.endswith(NO_GRADIENT)} == set()


def test_constant_features(make):
    table = columns(29)
    table["features"][:] = 0.5
    out = run(make(), Bag.flat(**table))
    assert out.logits.isfinite().all()
    if make.head in ORDERED | DRAWN | POOLED | POSITIONAL:
        return  # convolutions see where the bag ends; groups of different sizes share alike
    same(out.tiles[0].weight, torch.full((29,), 1 / 29))


def test_saved_and_loaded_is_the_same_to_the_bit(make):
    head, bag, file = make(), Bag.flat(**columns(31)), io.BytesIO()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.01)
    file.write(save(head.state_dict()))  # which takes no two names of one tensor
    other = make()
    assert not torch.equal(run(other, bag).logits, run(head, bag).logits)
    other.load_state_dict(load(file.getvalue()))
    assert torch.equal(run(other, bag).logits, run(head, bag).logits)


def test_eval_is_deterministic_and_draws_no_random_numbers(make):
    head, bag = make(), Bag.flat(**columns(37))
    state = torch.get_rng_state()
    a, b = run(head, bag), run(head, bag)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.tiles[0].weight, b.tiles[0].weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore")  # dynamo's, of where it goes on in Python
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])])
def test_compiled_it_says_the_same(make, backend):
    """Two bags of different sizes, as the second is where a graph that was made for the first would be wrong."""
    head = make()
    torch._dynamo.reset()
    compiled = torch.compile(head, backend=backend)
    for n in (50, 7):
        bag = rows(columns(n), np.arange(n))
        torch.testing.assert_close(run(compiled, bag).logits, run(head, bag).logits, rtol=1e-4, atol=1e-5)


def test_a_bag_the_head_was_not_made_for_is_refused(make):
    head = make()
    places = {"grid": np.array([[0, 0], [0, 1], [1, 1]]), "tissue": np.ones(3)}
    coarse = BagLevel.of(np.ones((1, DIM)), mpp=2, grid=np.zeros((1, 2), int), tissue=np.ones(1))
    fine = BagLevel.of(np.ones((3, DIM)), parent=np.zeros(3, int), mpp=1, **places)
    with pytest.raises(ValueError, match=r"reads one level.*bag\.at\(mpp\)"):
        head(Bag([coarse, fine]))
    assert head(Bag([coarse, fine]).at(1)).logits.shape == (CLASSES,)
    with pytest.raises(ValueError, match="made for 11 features per tile, this bag has 12"):
        head(Bag.flat(np.ones((3, DIM + 1))))


def test_loss_is_weighted_cross_entropy(make):
    if make.head not in {"abmil", "attention", "longmil", "max", "maxscore", "mean", "transmil"}:
        pytest.skip("its loss has more parts")
    head, bag = make(), Bag.flat(**columns(7))
    out = run(head, bag)
    expected = -out.logits.double().log_softmax(0)[2].item()
    assert head.loss(out, 2).item() == pytest.approx(expected, rel=1e-5)
    assert head.loss(out, 2, Classification(CLASSES, (1.0, 1.0, 3.0))).item() == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize("name", list_heads())
def test_impossible_sizes_are_refused(name):
    for dim, classes in [(0, 2), (5, 0)]:
        with pytest.raises(ValueError, match="at least 1"):
            load_head(name, dim, classes)
