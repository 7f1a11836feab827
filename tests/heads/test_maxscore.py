import numpy as np
import pytest
import torch

from heads import Bag, load_head


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts():
    assert parameters(load_head("maxscore", dim=1024, classes=2)) == 525_826
    assert parameters(load_head("maxscore", 7, 3)) == 512 * 8 + 513 * 3


@pytest.mark.parametrize("classes", [1, 2, 3])
@torch.no_grad()
def test_the_logits_are_those_of_one_tile(classes):
    torch.manual_seed(0)
    head, tiles = load_head("maxscore", 7, classes).eval(), torch.randn(13, 7)
    each = torch.stack([head(Bag.flat(tile[None])).logits for tile in tiles])
    probability = each.softmax(1)
    sure = each[:, 0] if classes == 1 else probability[:, 1] if classes == 2 else probability.amax(1)
    out = head(Bag.flat(tiles))
    torch.testing.assert_close(out.logits, each[sure.argmax()])
    torch.testing.assert_close(out.tiles[0].raw, sure.sigmoid() if classes == 1 else sure)
    torch.testing.assert_close(out.tiles[0].per_class, each.T)
    assert out.tiles[0].weight.argmax() == sure.argmax()
    assert out.tiles[0].weight.sum() == 1


def test_tiles_that_tie_share():
    head = load_head("maxscore", 3, 2).eval()
    out = head(Bag.flat(np.array([[1, 2, 3], [0, 0, 0], [1, 2, 3]])))
    assert sorted(out.tiles[0].weight.tolist()) in ([0, 0, 1], [0, 0.5, 0.5])
