"""Boxes that are put where they were cut."""

import numpy as np
import pytest
import torch

from heads import load_head
from heads.mixing import MIXES, CutMix, SaliencyMix, saliency
from heads.picture import Picture
from heads.recipe import MIXES as RECIPES

EDGE = 16


def plain(value: int, rows: int = 6, columns: int = 8) -> Picture:
    return Picture(torch.full((3, rows * EDGE, columns * EDGE), value, dtype=torch.uint8))


def spotted(row: int, column: int) -> Picture:
    """A spot in one place of an even ground."""
    picture = plain(200)
    top, left = row * EDGE, column * EDGE
    picture.pixels[:, top + 4 : top + 12, left + 4 : left + 12] = torch.randint(
        0, 100, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return picture


@pytest.mark.parametrize("kind", [CutMix, SaliencyMix])
@pytest.mark.parametrize("other", [plain(9), plain(9, 4, 5)])
def test_a_box_of_the_other_is_put_where_it_was_cut(kind, other):
    mixing, corners = kind(edge=EDGE), set()
    for seed in range(40):
        torch.manual_seed(seed)
        mixed = mixing.mixed(None, plain(7), other)
        assert mixed.cut == mixed.put
        corners.add(mixed.put)
        (top, left), (height, width) = mixed.put, mixed.box
        assert (mixed.pixels[:, top * EDGE : (top + height) * EDGE, left * EDGE : (left + width) * EDGE] == 9).all()
        assert (mixed.pixels == 9).float().mean() == pytest.approx(1 - mixed.share)
        assert top + height <= min(6, other.size[0] // EDGE)
        assert left + width <= min(8, other.size[1] // EDGE)
    assert len(corners) > 5 or kind is SaliencyMix  # there is nothing salient


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2, 6), (5, 3)])
def test_what_is_salient_is_in_the_box(row, column):
    other = spotted(row, column)
    where = saliency(other)
    y, x = divmod(int(where.argmax()), where.shape[1])
    assert (y * 6 // where.shape[0], x * 8 // where.shape[1]) == (row, column)
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = SaliencyMix(edge=EDGE).mixed(None, plain(7), other)
        (top, left), (height, width) = mixed.put, mixed.box
        assert top <= row < top + height
        assert left <= column < left + width


def test_recipes_know_the_names():
    assert set(RECIPES) == {"none", *MIXES}
    assert MIXES["scoremix-one-minus-p"]().complement == "one-minus-p"


@pytest.mark.parametrize("name", MIXES)
def test_each_trains(name):
    from heads.train import fit

    random = np.random.default_rng(0)
    pictures = [Picture.of(random.integers(0, 255, (256, 256, 3), dtype=np.uint8)) for _ in range(4)]
    torch.manual_seed(0)
    head = load_head("scorenet", classes=2, k=2, draws=10)
    assert len(fit(head, pictures, [0, 1, 0, 1], epochs=1, mix=name).train_loss) == 1
