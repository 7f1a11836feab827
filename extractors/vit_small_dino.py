"""ViT-S/16 trained on ImageNet without labels (DINO). Also the frame for a ViT-S of one's own: `weights="mine.pt"`."""

from __future__ import annotations

import os

from . import EncoderFacts
from .network import NetworkEncoder
from .timm import IMAGENET_MEAN, IMAGENET_STD, timm_encoder

FACTS = EncoderFacts(
    name="vit_small_dino",
    dim=384,
    tile_px=224,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    source="timm/vit_small_patch16_224.dino@733b42a211ebe03aa7327050699cfcee7cd96123:model.safetensors",
    licence="Apache-2.0",
    citation="Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, arXiv:2104.14294",
)


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    # dynamic_img_size changes nothing at 224 px; with --force-scale it lets other sizes through.
    return timm_encoder(FACTS, "vit_small_patch16_224", weights, drop=("head.",), dynamic_img_size=True)
