import math

import numpy as np
import pytest
import torch

from heads import Bag, load_head
from heads.picture import Picture
from heads.scoremix import Mixed, ScoreMix, box_sums, chances, draw_box, mix
from heads.train import fit

EDGE = 4


def image(rows: int, columns: int, value: int) -> torch.Tensor:
    return torch.full((3, rows * EDGE, columns * EDGE), value, dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sizes", [((6, 9), (6, 9)), ((6, 9), (4, 12)), ((1, 1), (5, 5))])
def test_pixels_are_the_targets_outside_the_box_and_the_sources_inside(sizes):
    (rows, columns), other = sizes
    source = torch.randint(100, 200, (3, other[0] * EDGE, other[1] * EDGE), dtype=torch.uint8)
    for seed in range(50):
        given = generator(seed)
        maps = torch.rand(rows, columns, generator=given), torch.rand(other, generator=given)
        mixed = mix(image(rows, columns, 7), source, *maps, edge=EDGE, generator=given)
        (top, left), (y, x), (height, width) = mixed.put, mixed.cut, mixed.box
        assert 0 <= top <= rows - height
        assert 0 <= left <= columns - width
        assert 0 <= y <= other[0] - height
        assert 0 <= x <= other[1] - width
        inside = torch.zeros(rows * EDGE, columns * EDGE, dtype=torch.bool)
        inside[top * EDGE : (top + height) * EDGE, left * EDGE : (left + width) * EDGE] = True
        assert (mixed.pixels[:, ~inside] == 7).all()
        box = source[:, y * EDGE : (y + height) * EDGE, x * EDGE : (x + width) * EDGE]
        assert torch.equal(mixed.pixels[:, inside], box.flatten(1))
        assert mixed.share + height * width / (rows * columns) == pytest.approx(1)


def test_a_box_with_everything_in_it_is_always_cut():
    """Wherever the box is as small as the place that has all of the map."""
    where = torch.zeros(6, 6)
    where[4, 1] = 1.0
    sums = box_sums(where, (1, 1))
    assert chances(sums)[4, 1] == 1.0
    assert chances(sums, "range-shift")[4, 1] == 0.0
    for seed in range(30):
        mixed = mix(image(6, 6, 0), image(6, 6, 1), where, where, edge=EDGE, generator=generator(seed))
        if mixed.box != (6, 6):
            assert mixed.cut[0] <= 4 < mixed.cut[0] + mixed.box[0]
            assert mixed.cut[1] <= 1 < mixed.cut[1] + mixed.box[1]


def test_sums_are_those_of_the_box():
    where = torch.arange(12.0).unflatten(0, (3, 4))
    torch.testing.assert_close(box_sums(where, (2, 3)), torch.tensor([[18.0, 24.0], [42.0, 48.0]]))


def entropy(p: torch.Tensor) -> float:
    return float(-(p * p.clamp(min=1e-30).log()).sum()) / math.log(p.numel())


def test_the_papers_complement_hardly_chooses():
    """Of 180 positions it has 99.9999 % of the entropy of chance, the range-shift 96 % (specification, 3.3)."""
    share = torch.randn(12 * 15, generator=generator()).softmax(0)
    assert entropy(chances(share.unflatten(0, (12, 15)), "one-minus-p")) > 0.99999
    shifted = [
        entropy(chances(torch.randn(180, generator=generator(seed)).softmax(0)[None], "range-shift"))
        for seed in range(9)
    ]
    assert max(shifted) < 0.9999


def test_equal_maps_choose_by_chance():
    for complement in (None, "range-shift", "one-minus-p"):
        torch.testing.assert_close(chances(torch.full((2, 5), 0.3), complement), torch.full((2, 5), 0.1))


def test_boxes_of_all_sizes_lie_and_stand():
    boxes = [draw_box(12, 16, generator(seed)) for seed in range(400)]
    assert all(1 <= h <= 12 and 1 <= w <= 16 for h, w in boxes)
    standing = sum(h > w for h, w in boxes)
    assert 80 < standing < 250
    shares = sorted(h * w / 192 for h, w in boxes)
    assert shares[40] < 0.2
    assert shares[-40] > 0.6


def test_the_loss_is_of_both_labels():
    torch.manual_seed(0)
    head = load_head("scorenet", classes=3, k=2).eval()
    pictures = [torch.randint(0, 255, (3, 256, 384), dtype=torch.uint8) for _ in range(2)]
    maps = [head.score(Picture(p).thumbnail(8))[0].unflatten(0, (2, 3)) for p in pictures]
    mixed = mix(*pictures, *maps, generator=generator())
    out = head(Picture(mixed.pixels))
    expected = mixed.share * head.loss(out, 0) + (1 - mixed.share) * head.loss(out, 2)
    torch.testing.assert_close(mixed.loss(head, out, 0, 2), expected)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="is not that of"):
        mix(image(3, 3, 0), image(3, 3, 0), torch.ones(3, 4), torch.ones(3, 3), edge=EDGE)
    with pytest.raises(ValueError, match="complement must be one of"):
        mix(image(3, 3, 0), image(3, 3, 0), torch.ones(3, 3), torch.ones(3, 3), edge=EDGE, complement="none")


def labelled(count: int = 8) -> tuple[list[Picture], np.ndarray]:
    """Of class 1 are those with a dark place."""
    random, pictures, labels = np.random.default_rng(0), [], np.arange(count) % 2
    for label in labels:
        pixels = random.integers(150, 255, (256, 256, 3), dtype=np.uint8)
        if label:
            y, x = 128 * random.integers(2, size=2)
            pixels[y : y + 128, x : x + 128] //= 4
        pictures.append(Picture.of(pixels))
    return pictures, labels


@pytest.mark.parametrize("name", ["scorenet", "hatnet"])
def test_any_head_of_pixels_trains_on_mixed_pictures(name):
    options = {"scorenet": {"k": 2, "draws": 10}, "hatnet": {"side": 2, "cnn": "test_efficientnet", "word_px": 32}}[
        name
    ]
    if name == "hatnet":
        options |= {"cnn_weights": "random", "width": 16, "heads": 2}
    runs = []
    for mix_ in ("scoremix", "scoremix", "none"):
        torch.manual_seed(0)
        head = load_head(name, classes=2, **options)
        history = fit(head, *labelled(), epochs=2, mix=mix_, augment=True, validation=labelled(), seed=3)
        runs.append(history.train_loss)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_half_of_the_steps_are_on_mixed_pictures_and_their_loss_is_of_both_labels(monkeypatch):
    pictures, labels = labelled()
    torch.manual_seed(0)
    head = load_head("scorenet", classes=2, k=2, draws=10).train()
    shares = []
    inner = Mixed.loss
    monkeypatch.setattr(Mixed, "loss", lambda self, *rest: shares.append(self.share) or inner(self, *rest))
    for i in range(100):
        ScoreMix().loss(head, pictures, torch.from_numpy(labels), i % 8, head.task)
    assert 30 < len(shares) < 70
    assert all(0 <= share <= 0.75 for share in shares)
    assert head.training


def test_heads_of_features_are_not_mixed():
    head = load_head("mean", 3, 2)
    bags = [Bag.flat(np.zeros((2, 3)))] * 2
    for changes in ({"mix": "scoremix"}, {"augment": True}):
        with pytest.raises(ValueError, match="reads features: augment and mix are for heads of pixels"):
            fit(head, bags, [0, 1], epochs=1, **changes)
