"""Correlated MIL by a transformer: Nyström attention over all tiles and a class token, with a convolution between.

Shao et al.: TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide Image Classification,
NeurIPS 2021 (arXiv 2106.00908).

    h = ReLU(P x); the first tiles are repeated until their number is a square; a class token goes before them
    h ← h + Nys(LN h)
    h ← h + depth-wise 7 × 7, 5 × 5 and 3 × 3 convolutions of the tiles as a square
    h ← h + Nys(LN h)
    logits = W LN(h_class) + b

The square is made of the tiles in the order of the bag: positions on the slide are not used, and another order is
another answer. What differs from the released code: nothing is padded in Nyström attention, so N mod landmarks changes
nothing.

A tile's raw score is its part in the row of the class token in the last attention, the mean over the heads; the Nyström
product can be slightly negative, which counts as nothing in its weight.

Parameters (E = 512): E (dim + 1) + E + 2 (2 E + 4 E² + E + 33 · 8) + 86 E + 2 E + C (E + 1).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head
from .layers import NystromAttention
from .recipe import Recipe


class TransMIL(Head):
    recipes: ClassVar = {
        "paper": Recipe(
            optimizer="radam", lookahead=5, lr=2e-4, epochs=200, patience=10, accumulation=2, class_weights=False
        )
    }

    def __init__(
        self, dim: int, classes: int, *, width: int = 512, landmarks: int = 256, heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__(dim, classes, width=width, landmarks=landmarks, heads=heads, dropout=dropout)
        self.projection = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, width))
        self.first, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix1, self.mix2 = (NystromAttention(width, landmarks, heads, dropout=dropout) for _ in range(2))
        self.around = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (7, 5, 3))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        h = self.projection(bag.valid_features)  # (N, E)
        side = math.isqrt(len(h) - 1) + 1
        h = torch.cat([self.token, h, h[: side**2 - len(h)]])
        h = h + self.mix1(self.first(h))
        h = torch.cat([h[:1], self._convolved(h[1:], side)])
        mixed, row = self.mix2.first(self.last(h))
        z = self.norm(h[0] + mixed)
        raw = with_copies(row[1:], int(bag.valid.sum()))
        shown = raw.clamp(min=0)
        weight = shown / shown.sum() if bool((shown > 0).any()) else torch.full_like(raw, 1 / len(raw))
        return Prediction(self.classifier(z), z, (TileScores.place(bag.valid, raw, weight),))

    def _convolved(self, h: Tensor, side: int) -> Tensor:
        square = h.T.unflatten(1, (side, side))[None]
        mixed = square + sum(convolution(square) for convolution in self.around)
        return mixed[0].flatten(1).T


def with_copies(row: Tensor, count: int) -> Tensor:
    """(count,): the score of each tile, with that of its copy where the square was filled with one."""
    raw, copies = row[:count], row[count:]
    return raw + torch.cat([copies, copies.new_zeros(count - len(copies))])


build = TransMIL
