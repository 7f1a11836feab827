"""HIPT (Chen et al., CVPR 2022): the hierarchical ViT without a mask, on regions of 16 × 16 tiles. See hvit.py."""

from typing import Any

from .hvit import HViT


class HIPT(HViT):
    def __init__(self, dim: int, classes: int, *, side: int = 16, masked: bool = False, **options: Any) -> None:
        super().__init__(dim, classes, side=side, masked=masked, **options)


build = HIPT
