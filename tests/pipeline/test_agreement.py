"""How far 16 bits are from 32: a number that is right, and an encoder that is left as it was."""

import numpy as np
import pytest
import torch

from extractors import Encoder, EncoderFacts
from pipeline.agreement import cosine_to_fp32, tissue_tiles


class Turned(Encoder):
    """In bf16 its features are turned by an angle that is known."""

    def __init__(self, degrees: float) -> None:
        super().__init__(EncoderFacts(name="turned", dim=2, tile_px=8, source="", licence="", citation=""))
        self.precision, self.angle, self.loads = "bf16", np.deg2rad(degrees), []

    def load(self, device="cpu", precision="auto", compile=False):
        self.precision = precision
        self.loads.append((device, precision, compile))
        return self

    def _features(self, tiles):
        angle = self.angle if self.precision == "bf16" else 0.0
        return torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float32).repeat(len(tiles), 1) * 7


@pytest.mark.parametrize("degrees", [0.0, 1.0, 60.0])
def test_the_cosine(degrees):
    encoder = Turned(degrees)
    assert cosine_to_fp32(encoder, "cpu", 8, compile=True) == pytest.approx(np.cos(np.deg2rad(degrees)), abs=1e-6)
    assert encoder.loads == [("cpu", "fp32", False), ("cpu", "bf16", True)], "left as it was"


def test_fp32_is_not_compared_with_itself():
    encoder = Turned(30)
    encoder.precision = "fp32"
    assert cosine_to_fp32(encoder, "cpu", 8) == 1.0
    assert encoder.loads == []


@pytest.mark.parametrize("px", [8, 224, 900])
def test_tiles_of_tissue_of_any_size(px):
    tiles = tissue_tiles(3, px)
    assert (tiles.shape, tiles.dtype) == ((3, px, px, 3), np.uint8)
    assert not np.array_equal(tiles[0], tiles[1])
    assert np.array_equal(tiles, tissue_tiles(3, px))
