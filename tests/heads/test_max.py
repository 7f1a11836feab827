import numpy as np
import pytest
import torch

from heads import Bag, load_head


def test_by_hand():
    head = load_head("max", dim=3, classes=2)
    with torch.no_grad():
        head.classifier.weight.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]]))
        head.classifier.bias.copy_(torch.tensor([0.5, 0.0]))
    # channel maxima 6 (third tile), 3 (first and third tie), -1 (second); 6 + 2·3 + 0.5 = 12.5 and -3 - 1 = -4
    out = head(Bag.flat(np.array([[0.0, 3.0, -2.0], [3.0, 0.0, -1.0], [6.0, 3.0, -3.0], [-9.0, -9.0, -9.0]])))
    assert out.embedding.tolist() == [6.0, 3.0, -1.0]
    assert out.logits.tolist() == [12.5, -4.0]
    assert out.tiles[0].raw.tolist() == [0.5, 1.0, 1.5, 0.0]
    np.testing.assert_allclose(out.tiles[0].weight, [1 / 6, 1 / 3, 1 / 2, 0.0], rtol=1e-6)


def test_a_tile_that_is_never_highest_changes_nothing():
    head, tiles = load_head("max", dim=5, classes=2), np.random.default_rng(0).normal(size=(7, 5))
    with_low = np.vstack([tiles, tiles.max(axis=0) - 1])
    assert torch.equal(head(Bag.flat(tiles)).logits, head(Bag.flat(with_low)).logits)
    assert head(Bag.flat(with_low)).tiles[0].weight[-1] == 0


@pytest.mark.parametrize(("dim", "classes", "count"), [(1024, 2, 2050), (7, 3, 24)])
def test_parameter_count(dim, classes, count):
    assert sum(p.numel() for p in load_head("max", dim, classes).parameters()) == count == (dim + 1) * classes
