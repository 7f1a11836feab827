"""What works here, in words that name the things a user can ask for."""

import re
import sys
import types

import numpy as np
import pytest
import torch

from extractors import Encoder, EncoderError, EncoderFacts, list_encoders
from pipeline.doctor import examine


class Mine(Encoder):
    def __init__(self, weights=None):
        super().__init__(EncoderFacts(name="mine", dim=5, tile_px=40, source="", licence="", citation=""), weights)

    def load(self, device="cpu"):
        if self.weights == "gone.pt":
            raise EncoderError("gone.pt: no such file")
        return self

    def _features(self, tiles):
        assert tiles.shape == (1, 40, 40, 3)
        assert np.ptp(tiles) > 100, "tissue, and not a flat grey"
        return torch.zeros(1, 5)


@pytest.fixture(autouse=True)
def _mine(monkeypatch):
    module = types.ModuleType("doctors_encoder")
    module.build = Mine
    monkeypatch.setitem(sys.modules, "doctors_encoder", module)


def test_everything_that_can_be_asked_for_is_listed():
    lines, code = examine()
    text = "\n".join(lines)
    assert code == 0
    for name in [*list_encoders(), "openslide", "tiffslide", "image", "zarr", "torch", "python"]:
        assert name in text
    uni = next(line for line in lines if line.split()[:1] == ["uni"])
    assert "1024" in uni
    assert "224" in uni
    assert "0.5" in uni
    assert "(gated)" in uni
    assert next(line for line in lines if line.split()[:1] == ["lab_lbp"]).split()[1:4] == ["222", "224", "any"]


@pytest.mark.parametrize(("token", "words"), [(None, "no HF_TOKEN"), ("secret-token", "a token is set")])
def test_the_token_is_told_but_never_shown(monkeypatch, token, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    text = "\n".join(examine()[0])
    assert words in text
    assert "secret-token" not in text


@pytest.mark.parametrize(("value", "words"), [("1", "offline"), ("", "asked when weights are needed")])
def test_offline_is_told(monkeypatch, value, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert words in "\n".join(examine()[0])


@pytest.mark.parametrize(
    ("name", "weights", "code", "words"),
    [
        ("doctors_encoder:build", None, 0, "works here on cpu in fp32, 5 features"),
        ("lab_lbp", None, 0, "works here on cpu in fp32, 222 features; no weights: made by hand"),
        ("doctors_encoder:build", "gone.pt", 1, "does not work here: gone.pt: no such file"),
        ("lab_lpb", None, 1, "Did you mean 'lab_lbp'"),
        ("lab_lbp", "w.pt", 1, "has no weights"),
    ],
)
def test_trying_an_encoder(name, weights, code, words):
    lines, found = examine(name, weights)
    assert found == code
    assert words in lines[-1]
    assert lines[-1].startswith(name)


def test_the_precision_is_told_with_its_cosine_to_fp32():
    lines, code = examine("timm/resnet18", "random")
    assert code == 0
    assert re.search(
        r"works here on \w+ in (fp32,|(bf16|fp16) \(cosine to fp32 at least (0\.99\d+|1\.0+)\))", lines[-1]
    )
