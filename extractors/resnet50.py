"""ResNet-50 trained on ImageNet (torchvision, first version): what most older papers call "ResNet-50 features"."""

from __future__ import annotations

import os

from . import EncoderFacts
from .network import NetworkEncoder
from .timm import IMAGENET_MEAN, IMAGENET_STD, timm_encoder

FACTS = EncoderFacts(
    name="resnet50",
    dim=2048,
    tile_px=224,
    any_tile_px=True,  # convolutions and a global average
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    source="timm/resnet50.tv_in1k@78f3ecfdb38e06d9b8397f662e7ab8fee96026fa:model.safetensors",
    licence="BSD-3-Clause",
    citation="He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385",
)


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    return timm_encoder(FACTS, "resnet50", weights, drop=("fc.",), fold=True)
