"""ResNet-50 cut after its third stage, then the global average: the 1,024 features of CLAM and its followers.

The fourth stage and the classifier (`layer4.`, `fc.`) are left out of the checkpoint; all other keys are strict.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from . import EncoderFacts, resnet50
from .network import NetworkEncoder
from .timm import timm_network

if TYPE_CHECKING:
    from torch import nn

FACTS: EncoderFacts = dataclasses.replace(
    resnet50.FACTS,
    name="resnet50_trunc",
    dim=1024,
    citation="Lu et al., Data-efficient and weakly supervised computational pathology, Nat Biomed Eng 2021 (CLAM)",
)


def cut_resnet50() -> nn.Module:
    from torch import nn

    network = timm_network("resnet50")
    network.layer4 = nn.Identity()
    return network


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> NetworkEncoder:
    return NetworkEncoder(FACTS, cut_resnet50, weights, drop=("layer4.", "fc."), fold=True)
