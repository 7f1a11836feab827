"""Colour and texture by hand: L*a*b* histograms and local binary patterns. No weights, no download, no network.

The hand-made baseline of HATNet (Mehta et al., 2022, table II, R2 and R3), which names the two kinds of histogram and
no more; bins and rings are ours. 64 bins for each of L, a, b; then, on L, the 8 neighbours at 1, 2 and 4 px: each is
compared with the centre, and the pattern is named by how many are at least as bright (0–8) if these stand together on
the ring, else it is the tenth class (Ojala et al., 2002, "uniform", the same for all rotations by 45°).

Whole numbers only, up to the last division: the same features on any machine. scikit-image interpolates between
pixels and takes 4 ms for one ring; this takes 1.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from . import Encoder, EncoderError, EncoderFacts

if TYPE_CHECKING:
    from torch import Tensor

BINS = 64
RADII = (1, 2, 4)
RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # (y, x), once around
PATTERNS = 10

FACTS = EncoderFacts(
    name="lab_lbp",
    dim=3 * BINS + len(RADII) * PATTERNS,
    tile_px=224,
    any_tile_px=True,
    source="made by hand",
    licence="Apache-2.0",
    citation="Mehta et al., End-to-End Diagnosis of Breast Biopsy Images with Transformers, MedIA 2022 (the baseline)",
)


def _class_of(code: int) -> int:
    """0–8: that many neighbours in one run around the ring; 9: several runs."""
    bits = [code >> i & 1 for i in range(8)]
    changes = sum(bits[i] != bits[i - 1] for i in range(8))
    return sum(bits) if changes <= 2 else 9


CLASSES = np.array([_class_of(code) for code in range(256)], np.uint8)


def build(variant: str, weights: str | os.PathLike[str] | None = None) -> LabLbp:
    if weights is not None:
        raise EncoderError(f"lab_lbp is made by hand and has no weights; leave out {os.fspath(weights)!r}")
    return LabLbp(FACTS)


class LabLbp(Encoder):
    def _features(self, tiles: np.ndarray | Tensor) -> Tensor:
        import torch

        if min(tiles.shape[1:3]) <= 2 * max(RADII):
            raise ValueError(f"lab_lbp needs tiles of more than {2 * max(RADII)} px, not {tuple(tiles.shape[1:3])}")
        features = [describe(tile) for tile in np.asarray(tiles)]
        return torch.from_numpy(np.array(features, np.float32).reshape(-1, self.facts.dim))


def describe(tile: np.ndarray) -> np.ndarray:
    """uint8 RGB (H, W, 3) → (222,): six histograms, each of which sums to 1."""
    import cv2

    lab = cv2.cvtColor(np.ascontiguousarray(tile), cv2.COLOR_RGB2LAB)  # uint8: L · 2.55, a + 128, b + 128
    channels = [_histogram(lab[..., i] // (256 // BINS), BINS) for i in range(3)]
    light = np.ascontiguousarray(lab[..., 0])
    return np.concatenate(channels + [_histogram(CLASSES[_ring_codes(light, r)], PATTERNS) for r in RADII])


def _histogram(values: np.ndarray, bins: int) -> np.ndarray:
    return np.bincount(values.ravel(), minlength=bins) / max(values.size, 1)


def _ring_codes(light: np.ndarray, radius: int) -> np.ndarray:
    """One bit per neighbour; pixels without all their neighbours are left out."""
    height, width = (n - 2 * radius for n in light.shape)
    centre = light[radius : radius + height, radius : radius + width]
    codes = np.zeros(centre.shape, np.uint8)
    for bit, (dy, dx) in enumerate(RING):
        y, x = radius * (1 + dy), radius * (1 + dx)
        codes |= (light[y : y + height, x : x + width] >= centre).view(np.uint8) << np.uint8(bit)
    return codes
