"""Lunit's ViT-S/16, trained with DINO on 33 million histology tiles at 20x and 40x."""

from __future__ import annotations

import os

from . import EncoderFacts
from .network import NetworkEncoder
from .timm import timm_encoder

FACTS = EncoderFacts(
    name="lunit_vits",
    dim=384,
    tile_px=224,
    mpp=(0.25, 0.5),
    # From the authors' release notes. The config.json of the hub copy says 0.5, left over from another model.
    mean=(0.70322989, 0.53606487, 0.66096631),
    std=(0.21716536, 0.26081574, 0.20723464),
    source="1aurent/vit_small_patch16_224.lunit_dino@9ed09909d93f9d39a092d8e49717ae48f9b44e6f:model.safetensors",
    licence="Lunit non-commercial: https://github.com/lunit-io/benchmark-ssl-pathology/blob/main/LICENSE",
    citation="Kang et al., Benchmarking Self-Supervised Learning on Diverse Pathology Datasets, CVPR 2023",
)


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    return timm_encoder(FACTS, "vit_small_patch16_224", weights, dynamic_img_size=True)
