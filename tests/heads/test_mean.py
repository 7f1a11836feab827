import numpy as np
import pytest
import torch

from heads import Bag, load_head


def test_by_hand():
    head = load_head("mean", dim=2, classes=2)
    with torch.no_grad():
        head.classifier.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        head.classifier.bias.copy_(torch.tensor([0.5, 0.0]))
    # tiles (0, 3), (3, 0), (6, 3): mean (3, 2); 1·3 + 2·2 + 0.5 = 7.5 and -2
    out = head(Bag.flat(np.array([[0.0, 3.0], [3.0, 0.0], [6.0, 3.0]])))
    assert out.embedding.tolist() == [3.0, 2.0]
    assert out.logits.tolist() == [7.5, -2.0]
    assert out.tiles[0].raw.tolist() == [0.0] * 3
    np.testing.assert_allclose(out.tiles[0].weight, [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize(("dim", "classes", "count"), [(1024, 2, 2050), (7, 3, 24)])
def test_parameter_count(dim, classes, count):
    assert sum(p.numel() for p in load_head("mean", dim, classes).parameters()) == count == (dim + 1) * classes
