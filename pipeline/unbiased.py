"""ScoreNet's own pretext: a picture in two colourings. The student sees the places that it chose, the teacher all.

Stegmüller et al. (WACV 2023), "unbiased": no crops and no flips, so that what was cut out does not decide which
places matter. What is compared are the last two class tokens of the encoder over places. The scorer learns by the
gradient of its choice alone.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from extractors import EncoderFacts
from extractors.dino import Recipe
from heads.picture import Picture
from heads.scorenet import PLACE, WIDTH, ScoreNet

TOKENS = 2
PLACES = 20  # the student's choice
ARCH = "scorenet"
# A batch of 32 is our choice: a picture of 1,024 px is 64 tiles.
RECIPE = Recipe(wide_px=None, small_views=0, hidden=1024, bottleneck=128, prototypes=1024, batch_size=32)


def facts(tile_px: int) -> EncoderFacts:
    """Of ScoreNet as a network of pictures in 0..1, which it normalises itself."""
    return EncoderFacts(
        name=ARCH,
        dim=TOKENS * WIDTH,
        tile_px=tile_px,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source="",
        licence="",
        citation="arXiv:2202.07570",
    )


class Compared(ScoreNet):
    """ScoreNet without its classifier: pictures (B, 3, H, W) in 0..1 → (B, 192)."""

    def __init__(self, k: int) -> None:
        super().__init__(k=k, tokens=(4, TOKENS))
        self.classifier = nn.Sequential()

    def forward(self, pictures: Tensor) -> Tensor:  # type: ignore[override]
        pixels = (pictures * 255).round().to(torch.uint8)
        with torch.autocast(pictures.device.type, enabled=False):  # the choice is between small differences
            each = [ScoreNet.forward(self, cast(Any, Picture(picture))).embedding for picture in pixels]
        return torch.stack(each)[:, -TOKENS * WIDTH :]


def student() -> Compared:
    return Compared(PLACES)


def teacher(tile_px: int) -> Compared:
    """It looks at all places."""
    return Compared((tile_px // PLACE) ** 2)
