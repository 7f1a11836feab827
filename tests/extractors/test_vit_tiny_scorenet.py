"""The ViT-tiny as an encoder: ScoreNet's network under ScoreNet's keys, and never without weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from extractors import EncoderError, load_encoder
from extractors.vit_tiny import ViTTiny
from heads import load_head
from heads.scorenet import ViTTiny as Scorer


def made(seed: int) -> ViTTiny:
    torch.manual_seed(seed)
    return ViTTiny().eval()


def test_its_tokens_are_those_of_scorenets_own_network() -> None:
    mine, theirs = made(0), Scorer().eval()
    theirs.load_state_dict(mine.state_dict())
    images = torch.randn(2, 3, 128, 96)
    with torch.no_grad():
        assert torch.equal(mine.tokens(images), theirs(theirs.tokens(images)))
        assert mine.tokens(images).shape == (2, 48, 96)
    assert sum(p.numel() for p in mine.parameters()) == 673_248


def test_what_was_pretrained_goes_into_scorenet() -> None:
    head = load_head("scorenet", k=1).eval()
    for seed, part in enumerate((head.scorer, head.patches)):
        part.load_state_dict(made(seed).state_dict())
    places = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        mean = made(1)(head._normalised(places))
        assert torch.equal(head.encoder.class_tokens(mean[None], 1)[0][0], head.aggregate(places))


def test_an_embedding_is_the_mean_token_of_a_file(tmp_path: Path) -> None:
    save_file(made(3).state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder("vit_tiny_scorenet", tmp_path / "w.safetensors").load(precision="fp32")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.facts.mean, encoder.facts.std))
    with torch.no_grad():
        expected = made(3).tokens((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std).mean(1)
    torch.testing.assert_close(encoder.encode(tiles), expected, rtol=1e-4, atol=1e-5)


def test_without_weights_it_is_refused() -> None:
    encoder = load_encoder("vit_tiny_scorenet")
    for use in (encoder.load, lambda: encoder.weights_sha256):
        with pytest.raises(EncoderError, match=r"no weights to download.*slidestream pretrain.*--weights FILE"):
            use()
