"""A plain transformer over all tiles, with their places on the grid: what LongMIL is compared with.

Li et al.: Rethinking Transformer for Long Contextual Histopathology Whole Slide Image Analysis, NeurIPS 2024 (arXiv
2410.14195), the row "full attention".

    h = ReLU(P x);  blocks times  h ← h + MHA(LN h), h ← h + MLP(LN h);  logits = W LN(mean h) + b

Queries and keys are turned by row and column (RoPE-2d), so only differences of places count. The classifier is linear
in the mean once its norm is known, so each tile's part in a logit is exact: that is its raw score (`shares`).

Parameters (width d): d (dim + 1) + blocks (12 d² + 10 d) + 2 d + C (d + 1).
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bag import Bag, Prediction, TileScores
from .head import Head, Needs
from .layers import rope_2d
from .recipe import Recipe

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values (H, N, d) → (H, N, d)
ROWS = 16_384  # tiles that a large bag's MLP sees at a time


class Block(nn.Module):
    """(N, width) → (N, width): h + Mix(LN h), then h + MLP(LN h) with GELU and four times the width.

    Who attends to whom is given with the call. Queries, keys and values have no biases.
    Parameters: 12 width² + 10 width.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} features cannot be parted among {heads} heads")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, h: Tensor, mix: Mix) -> Tensor:
        h = h + self.out(self._mixed(h, mix))
        return h + some_at_a_time(lambda part: self.mlp(self.norm2(part)), h)

    def _mixed(self, h: Tensor, mix: Mix) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return mix(q, k, v).transpose(0, 1).flatten(1)


def some_at_a_time(layer: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """A layer that sees each tile alone. Without gradients a part of a large bag at a time: the four-fold width of all
    tiles at once is what would fill the memory."""
    if torch.is_grad_enabled() or len(h) <= ROWS:
        return layer(h)
    return torch.cat([layer(part) for part in h.split(ROWS)])


def full_rope(grid: Tensor, base: float = 10_000.0) -> Mix:
    """Attention of all to all, turned by place."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rope_2d(q, grid, base), rope_2d(k, grid, base)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]

    return mix


def shares(h: Tensor, norm: nn.LayerNorm, classifier: nn.Linear) -> Tensor:
    """(n, d) tokens → (C, n): each one's part in the logits W LN(mean h) + b, whose mean over tokens they are, up to b.

    LN centres and divides by the spread of the mean; for that spread the logits are linear in the tokens.
    """
    mean = h.mean(0)
    spread = (mean.var(unbiased=False) + norm.eps).sqrt()
    centred = (h - h.mean(-1, keepdim=True)) / spread
    return classifier.weight @ (centred * norm.weight + norm.bias).T


class FullAttention(Head):
    needs = Needs(grid=True)
    recipes: ClassVar = {"paper": Recipe(optimizer="adamw", weight_decay=1e-2, class_weights=False)}  # epochs: ours

    def __init__(
        self, dim: int, classes: int, *, blocks: int = 2, width: int = 384, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__(dim, classes, blocks=blocks, width=width, heads=heads, dropout=dropout)
        self.projection = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        h = self.projection(bag.valid_features)
        mix = full_rope(bag.grid[bag.valid])
        for block in self.blocks:
            h = block(h, mix)
        z = self.norm(h.mean(0))
        logits = self.classifier(z)
        each = shares(h, self.norm, self.classifier)
        raw = each[logits.argmax()]
        return Prediction(logits, z, (TileScores.place(bag.valid, raw, raw.softmax(0), each),))


build = FullAttention
