"""The small ViT by which ScoreNet looks at places. Nobody publishes weights: pre-train it on your slides (dino.py)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import EncoderFacts
from .network import NetworkEncoder
from .timm import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch import nn

FACTS = EncoderFacts(
    name="vit_tiny_scorenet",
    dim=96,
    tile_px=128,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    source="nobody publishes them: `slidestream pretrain` makes them of your own slides",
    licence="the network's code is this project's, Apache-2.0; weights have the licence of their slides",
    citation="Stegmüller et al., ScoreNet: Learning Non-Uniform Attention and Augmentation for Transformer-Based "
    "Histopathological Image Classification, WACV 2023, arXiv:2202.07570",
)


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    return NetworkEncoder(FACTS, _network, weights)


def _network() -> nn.Module:
    from .vit_tiny import ViTTiny

    return ViTTiny()
