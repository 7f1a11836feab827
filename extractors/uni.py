"""UNI: ViT-L/16, trained with DINOv2 on 100 million tiles of 100,000 slides. Gated."""

from __future__ import annotations

import os

from . import EncoderFacts
from .network import NetworkEncoder
from .timm import IMAGENET_MEAN, IMAGENET_STD, timm_encoder

FACTS = EncoderFacts(
    name="uni",
    dim=1024,
    tile_px=224,
    mpp=(0.5,),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    source="MahmoodLab/UNI@b55a5ec6cade1a39edfe6534189a9b8ca7a022f0:pytorch_model.bin",
    licence="CC-BY-NC-ND-4.0, academic research only",
    citation="Chen et al., Towards a general-purpose foundation model for computational pathology, Nat Med 2024",
    gated=True,
)


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    return timm_encoder(FACTS, "vit_large_patch16_224", weights, init_values=1e-5, dynamic_img_size=True)
