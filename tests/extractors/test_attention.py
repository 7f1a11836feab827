"""The class token's attention within a tile, against timm's own unfused attention."""

import numpy as np
import pytest
import timm
import torch

from extractors import EncoderError, load_encoder
from extractors.attention import attending

PX = 224


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of our own: a ViT as it was drawn, its places and its CLS strong enough to be seen."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    for parameter in (network.pos_embed, network.cls_token, network.blocks[-1].attn.qkv.weight):
        parameter.data.normal_(std=0.3)
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tiles():
    return np.random.default_rng(0).integers(0, 256, (3, PX, PX, 3), dtype=np.uint8)


def encoder(weights):
    return load_encoder("timm/vit_tiny_patch16_224", weights)


def test_features_are_the_same_and_attention_is_timms(weights, tiles):
    plain, looking = encoder(weights).load(precision="fp32"), attending(encoder(weights), PX).load(precision="fp32")
    expected, rows = plain.encode(tiles), []
    found = looking.encode(tiles)
    assert found.shape == (3, looking.facts.dim) == (3, plain.facts.dim + 14 * 14)
    assert torch.equal(found[:, :-196], expected)
    attention = plain._network.blocks[-1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: rows.append(output[:, :, 0]))
    plain.encode(tiles)
    torch.testing.assert_close(found[:, -196:], rows[0][..., 1:].mean(1))
    assert found[:, -196:].max() > 2 / 197, "it must differ from even attention to mean anything"


def test_half_precision_changes_little(weights, tiles):
    one, other = (attending(encoder(weights), PX).load(precision=kind).encode(tiles) for kind in ("fp32", "bf16"))
    assert np.corrcoef(one[:, -196:].flatten(), other[:, -196:].flatten())[0, 1] > 0.99


def test_a_bright_patch_moves_with_its_token(weights):
    """Tokens go row by row: with places switched off, what one patch does to the map moves where the patch moves."""
    looking = attending(encoder(weights), PX).load(precision="fp32")
    looking._network.network.pos_embed.data.zero_()
    maps = []
    for row, column in ((2, 11), (9, 4)):
        tile = np.full((1, PX, PX, 3), 60, np.uint8)
        tile[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 255
        maps.append(looking.encode(tile)[0, -196:].reshape(14, 14))
        assert len(maps[-1].round(decimals=6).unique()) == 2
        odd = (maps[-1] - maps[-1].median()).abs().argmax()
        assert divmod(int(odd), 14) == (row, column)


def test_crops_leave_a_margin_of_whole_tokens():
    whole = attending(load_encoder("vit_small_dino", "random"), 256)
    cropped = attending(load_encoder("gigapath", "random"), 256)
    assert (whole.side, whole.margin) == (16, 0)
    assert (cropped.side, cropped.margin) == (14, 1)
    with pytest.raises(EncoderError, match="tokens of 16 px do not fit"):
        attending(load_encoder("vit_small_dino", "random"), 250)


@pytest.mark.parametrize("name", ["resnet50", "lab_lbp", "timm/vit_base_patch16_siglip_224"])
def test_encoders_without_a_class_token_are_refused(name):
    with pytest.raises(EncoderError, match="no ViT of timm with a class token"):
        attending(load_encoder(name, None if name == "lab_lbp" else "random"), PX)
