"""Prov-GigaPath's tile encoder: ViT-g/16, trained with DINOv2 on 1.3 billion tiles of 256 px. Gated."""

from __future__ import annotations

import os

from . import EncoderFacts
from .network import NetworkEncoder
from .timm import IMAGENET_MEAN, IMAGENET_STD, timm_encoder

FACTS = EncoderFacts(
    name="gigapath",
    dim=1536,
    tile_px=256,
    crop_px=224,  # the authors' transform: 256-px tile, centre crop
    mpp=(0.5,),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    source="prov-gigapath/prov-gigapath@eba85dd46097c3eedfcc2a3a9a930baecb6bcc19:pytorch_model.bin",
    licence="Apache-2.0, research only",
    citation="Xu et al., A whole-slide foundation model for digital pathology from real-world data, Nature 2024",
    gated=True,
)


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    return timm_encoder(
        FACTS,
        "vit_giant_patch14_dinov2",  # in timm a patch-14 model for 518 px; the rest is the authors' config.json
        weights,
        img_size=224,
        patch_size=16,
        embed_dim=1536,
        depth=40,
        num_heads=24,
        mlp_ratio=5.33334,
        init_values=1e-5,
        dynamic_img_size=True,
    )
