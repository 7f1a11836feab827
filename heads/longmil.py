"""Local attention among neighbouring tiles, then global attention over fewer.

Li et al.: Rethinking Transformer for Long Contextual Histopathology Whole Slide Image Analysis, NeurIPS 2024 (arXiv
2410.14195).

    h = ReLU(P x)
    twice:  h ← h + Local(LN h), h ← h + MLP(LN h)     softmax over the tiles within R tiles (eqs 10, 11)
    2 × 2 tiles become one, the mean of those there are
    once:   h ← h + Global(LN h), h ← h + MLP(LN h)
    logits = W LN(mean h) + b

The number of pairs of the local layers grows with N, not N²; the global layer sees a quarter of the tokens. For slides
at 40× it can be linear attention, φ(q) (φ(k)ᵀ v) with φ = elu + 1 (Katharopoulos et al., ICML 2020).

What the paper leaves open and was chosen: mean pooling, an MLP in each block, 4 heads (the paper's text says 1:
preset="paper"), RoPE-2d in the global layer (or ALiBi-2d), nothing but the disk in the local ones. What differs from
the released code (its first version): local attention is local for every head; positions are whole tiles on the grid,
and the 2 × 2 squares are counted from the bag's first row and column, so a slide that is moved gives the same logits.

Parameters (width d): d (dim + 1) + (local + 1) (12 d² + 10 d) + 2 d + C (d + 1).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Block, FullAttention, Mix, full_rope, shares
from .bag import Bag, Prediction, TileScores
from .head import Head, Needs
from .layers import alibi_slopes, distances, local_attention

GLOBAL, POSITIONS = ("full", "linear"), ("rope", "alibi")
ALIBI_BYTES = 256 << 20  # of biases that are held at a time


class LongMIL(Head):
    """radius: of local attention, in tiles. global_layer: full or linear. positions: of the full one, rope or alibi."""

    needs = Needs(grid=True)
    presets: ClassVar = {"paper": {"heads": 1}}
    recipes: ClassVar = FullAttention.recipes

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        radius: float = 10.0,
        local: int = 2,
        width: int = 384,
        heads: int = 4,
        global_layer: str = "full",
        positions: str = "rope",
        base: float = 10_000.0,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            classes,
            radius=radius,
            local=local,
            width=width,
            heads=heads,
            global_layer=global_layer,
            positions=positions,
            base=base,
            dropout=dropout,
            backend=backend,
        )
        for name, value, known in (("global_layer", global_layer, GLOBAL), ("positions", positions, POSITIONS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        self.projection = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        self.local = nn.ModuleList(Block(width, heads, dropout) for _ in range(local))
        self.whole = Block(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        grid = bag.grid[bag.valid]
        squares, token = squares_of(grid)
        h = self.whole(pool(self.local_tokens(bag), token), self._global(squares))
        z = self.norm(h.mean(0))
        logits = self.classifier(z)
        each = shares(h, self.norm, self.classifier)  # (C, n)
        weight = each[logits.argmax()].softmax(0) / token.bincount()
        tiles = TileScores.place(bag.valid, each[logits.argmax()][token], weight[token], each[:, token])
        return Prediction(logits, z, (tiles,))

    def local_tokens(self, bag: Bag) -> Tensor:
        """(N, width): the valid tiles after the local layers."""
        grid, radius, backend = bag.grid[bag.valid], self.options["radius"], self.options["backend"]
        h = self.projection(bag.valid_features)
        for block in self.local:
            h = block(h, lambda q, k, v: local_attention(q, k, v, grid, radius, backend))
        return h

    def _global(self, grid: Tensor) -> Mix:
        if self.options["global_layer"] == "linear":
            return linear
        if self.options["positions"] == "alibi":
            return full_alibi(grid)
        return full_rope(grid, self.options["base"])


def pool(h: Tensor, token: Tensor) -> Tensor:
    """(N, d) → (n, d): the means over the tiles of each square, `token` (N,) as squares_of gives it."""
    sizes = token.bincount()
    return h.new_zeros(len(sizes), h.shape[1]).index_add(0, token, h) / sizes[:, None]


def squares_of(grid: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 2) places of the 2 × 2 squares with a tile, and (N,) the row of each tile's."""
    squares, token = torch.unique((grid - grid.amin(0)) // 2, dim=0, return_inverse=True)
    return squares, token


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with φ(q) · φ(k) in the place of exp(q · k), φ = elu + 1: O(N)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2)[..., None])


def full_alibi(grid: Tensor) -> Mix:
    """Attention of all to all, less slope · distance; a part of the queries at a time, for the biases are N²."""

    def part(q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
        slopes = alibi_slopes(len(q)).to(q)
        bias = -slopes[:, None, None] * distances(place, grid).to(q.dtype)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias[None])[0]

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = max(1, ALIBI_BYTES // (4 * len(q) * len(grid)))
        parts = zip(q.split(size, dim=1), grid.split(size), strict=True)
        # biases are made again in the backward step: to keep them all is what cannot be afforded
        return torch.cat([checkpoint(part, some, k, v, place, use_reentrant=False) for some, place in parts], dim=1)

    return mix


build = LongMIL
