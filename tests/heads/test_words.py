"""HATNet from pixels: which pixels a word has, and a gradient that is that of all words at once."""

import numpy as np
import pytest
import timm
import torch

from heads import Bag, load_head
from heads.hatnet import by_bag, by_row
from heads.picture import Picture
from heads.words import Words

CNN, SIDE = "test_efficientnet", 2  # the smallest of timm, with batch norms


def picture(height: int = 96, width: int = 128, seed: int = 0) -> Picture:
    random = np.random.default_rng(seed)
    return Picture.of(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make(**options):
    torch.manual_seed(0)
    options = {"side": SIDE, "width": 16, "heads": 2, "cnn": CNN, "cnn_weights": "random", "word_px": 32} | options
    return load_head("hatnet", classes=3, **options)


def gradients(head, some: Picture) -> dict[str, torch.Tensor]:
    head.zero_grad()
    head.loss(head(some), 1).backward()
    return {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}


def test_words_lie_row_by_row_in_bags_that_do():
    rows = torch.arange(16)
    assert by_bag(rows, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(by_row(by_bag(rows, 2), 2), rows)


def test_a_word_has_the_pixels_of_its_cell():
    """Cells of one colour each, of an image that is no multiple of anything."""
    colours = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = colours.repeat_interleave(25, 0).repeat_interleave(30, 1)
    parts = Picture.of(image).parts(torch.arange(16), 4, 8)
    assert parts.shape == (16, 3, 8, 8)
    expected = (colours.flatten(0, 1) / 255.0)[..., None, None].expand(-1, -1, 8, 8)
    torch.testing.assert_close(parts, expected, atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_all_words_at_once():
    head, some = make(dropout=0.0, coefficient_dropout=0.0, attention_dropout=0.0).train(), picture()
    head.cnn.at_a_time = SIDE**4
    naive = make(dropout=0.0, coefficient_dropout=0.0, attention_dropout=0.0).train()
    naive.cnn.forward = lambda one, across: naive.cnn.read(one, torch.arange(across**2), across, 32)
    whole = gradients(naive, some)
    assert any(name.startswith("cnn.") for name in whole)
    for at_a_time in (1, 3, SIDE**4):
        head.cnn.at_a_time = at_a_time
        found = gradients(head, some)
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_between_the_passes_only_the_places_of_words_are_kept():
    """Bytes of tensors that wait for the gradient: a number of 8 for each word."""

    def waiting(side: int, at_a_time: int) -> int:
        head, sizes = make(side=side, at_a_time=at_a_time).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            features = head.cnn(picture(), side**2)
        assert features.requires_grad
        return sum(sizes)

    assert (waiting(2, 4), waiting(3, 4)) == (8 * 2**4, 8 * 3**4)


def test_words_of_training_vary_in_size_and_those_of_use_do_not(monkeypatch):
    head, sizes = make(vary=0.25, word_px=256), set()
    monkeypatch.setattr(
        head.cnn, "read", lambda picture, cells, across, px: sizes.add(px) or torch.zeros(len(cells), 1)
    )
    for _ in range(40):
        head.train().cnn(picture(), 2)
    assert sizes == {192, 224, 256, 288, 320}
    sizes.clear()
    head.eval().cnn(picture(), 2)
    assert sizes == {256}


def test_every_weight_of_the_network_gets_a_gradient_and_batch_norms_keep_their_means():
    head = make().train()
    means = {name: x.clone() for name, x in head.cnn.named_buffers()}
    found = gradients(head, picture())
    assert {name for name, p in head.named_parameters() if name not in found} == set()
    assert all(torch.equal(x, means[name]) for name, x in head.cnn.named_buffers())


def test_a_frozen_network_gets_none():
    head = make(train_cnn=False).train()
    assert not any(name.startswith("cnn.") for name in gradients(head, picture()))


def test_scores_of_words_stand_where_the_words_are():
    """A picture of one colour but for one cell: the score that is another one is that cell's."""
    head = make(side=3).eval()
    colours = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, head.dim))
    head.cnn.network = colours  # an untrained network says the same of all
    plain = np.full((90, 90, 3), 200, np.uint8)
    other = plain.copy()
    other[40:50, 70:80] = (90, 0, 120)  # row 4, column 7 of 9 × 9
    with torch.no_grad():
        a, b = (head(Picture.of(image)).tiles[0] for image in (plain, other))
    assert a.weight.shape == (81,)
    torch.testing.assert_close(b.weight.sum(), torch.tensor(1.0))
    assert int((a.raw - b.raw).abs().argmax()) == 4 * 9 + 7


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(3)
    donor = timm.create_model(CNN)
    torch.save(donor.state_dict(), tmp_path / "cnn.pth")
    words = Words(CNN, str(tmp_path / "cnn.pth"), True, 32, 4)
    assert all(torch.equal(x, donor.state_dict()[name]) for name, x in words.network.state_dict().items())
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of test_efficientnet"):
        Words(CNN, str(tmp_path / "other.pth"), True, 32, 4)
    with pytest.raises(ValueError, match="is no file"):
        Words(CNN, str(tmp_path / "none.pth"), True, 32, 4)


def test_a_head_made_again_asks_for_no_weights():
    head = make()
    again = load_head("hatnet", head.dim, head.classes, **head.options)
    again.load_state_dict(head.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(picture()).logits, head.eval()(picture()).logits)


def test_what_it_was_not_made_for_is_refused():
    with pytest.raises(ValueError, match="timm has no network 'espnetv2'"):
        make(cnn="espnetv2")
    with pytest.raises(ValueError, match="makes 256 features of a word, not 7"):
        load_head("hatnet", 7, 3, cnn=CNN, cnn_weights="random")
    with pytest.raises(ValueError, match="dim must be given, or pixels"):
        load_head("hatnet", classes=3)
    with pytest.raises(ValueError, match="reads pixels, this is a bag of features"):
        make()(Bag.flat(torch.zeros(3, 256), grid=torch.zeros(3, 2, dtype=int)))
    with pytest.raises(ValueError, match="reads features of tiles, this is a picture"):
        load_head("hatnet", 7, 3)(picture())
