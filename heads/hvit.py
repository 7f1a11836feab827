"""Masked hierarchical ViT: a transformer over the tiles of each region that does not see background, one over regions.

Grisi et al.: Masked Attention as a Mechanism for Improving Interpretability of Vision Transformers, 2024 (arXiv
2404.18152), after HIPT: Chen et al., CVPR 2022. A region is side × side tiles of one level, counted on its grid.

    t = GELU(W x + b) + place;  [CLS, t] through 6 pre-norm blocks of width 192;  region = LN(CLS)
    h = ReLU(W region + b);  2 post-norm blocks without places;  gated attention pools;  logits = W ReLU(W z + b) + b

Keys of background, tiles whose share of tissue is at most `threshold`, get no weight in any head of any block. Their
own rows would be read by nobody, so they are left out, which is the same and faster; tiles that are not in the bag are
background, too. `masked=False` sees all tiles of a region, which then must all be there (`run --preset hvit` keeps the
background of a region). The weights are the same.

The table of places has `pos_grid` × `pos_grid` entries, enlarged bicubically where a region has more tiles; the paper's
has 7 × 7, for crops.

Parameters (D, C; w = 192, g = pos_grid): w (D + 1) + w + w (g² + 1) + 6 (12 w² + 13 w) + 2 w for regions, and w (w + 1)
+ 2 (6 w² + 10 w) + 2 w (w + 1) + w + 1 + w (w + 1) + C (w + 1) for the slide.
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bag import BadBag, Bag, Prediction, TileScores, spread
from .head import Head, Needs
from .layers import Attention
from .recipe import Recipe

WIDTH, DEPTH, HEADS = 192, 6, 6
SLIDE_HEADS, SLIDE_DEPTH = 3, 2
TOKENS = 1 << 16  # of regions that go through the transformer at a time


class Block(nn.Module):
    """(M, P, w), keys that are seen (M, P) → (M, P, w); or, of the last, the row of CLS and its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self._parts(x)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        return self._after(x, mixed)

    def first(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """CLS (M, w), and what it says of each key before the softmax (M, heads, P), -inf where nothing is seen."""
        q, k, v = self._parts(x)
        scores = (q[:, :, :1] @ k.mT)[:, :, 0] / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        mixed = scores.softmax(-1)[:, :, None] @ v
        return self._after(x[:, :1], mixed)[:, 0], scores

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _after(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        after: Tensor = x + self.mlp(self.norm2(x))
        return after


class RegionTransformer(nn.Module):
    """Regions of P tiles → vectors (M, w), and of the last block the scores of the tiles (M, heads, P)."""

    def __init__(self, dim: int, side: int, pos_grid: int, dropout: float) -> None:
        super().__init__()
        self.side = side
        self.projection = nn.Sequential(nn.Linear(dim, WIDTH), nn.GELU(), nn.Dropout(dropout))
        self.token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.places = nn.Parameter(torch.empty(1 + pos_grid**2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        for weight in (self.token, self.places):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tiles: Tensor, place: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """tiles (M, P, D), place (M, P) which of side² each is, row by row, seen (M, P) bool."""
        table = self.table()
        x = self.projection(tiles) + table[1:][place]
        first = (self.token + table[:1]).expand(len(x), 1, -1)
        x, seen = torch.cat([first, x], dim=1), F.pad(seen, (1, 0), value=True)
        *others, last = self.blocks
        for block in others:
            x = block(x, seen)
        vector, scores = last.first(x, seen)  # type: ignore[operator]
        return self.norm(vector), scores[..., 1:]

    def table(self) -> Tensor:
        """(1 + side², w): the place of CLS, then those of the tiles of a region."""
        grid = math.isqrt(len(self.places) - 1)
        if grid == self.side:
            return self.places
        square = self.places[1:].T.unflatten(1, (grid, grid))[None]
        larger = F.interpolate(square, size=(self.side, self.side), mode="bicubic", align_corners=False)
        return torch.cat([self.places[:1], larger[0].flatten(1).T])


class SlideTransformer(nn.Module):
    """(M, w) regions, in no order → logits (C,), the slide (w,), the regions' raw scores (M,)."""

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(dropout))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, SLIDE_HEADS, WIDTH, dropout, batch_first=True) for _ in range(SLIDE_DEPTH)
        )
        self.attention = Attention(WIDTH, WIDTH, dropout=dropout)
        self.out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(WIDTH, classes)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.projection(regions)[None]
        for block in self.blocks:
            h = block(h)
        raw = self.attention(h[0])[:, 0]
        z = self.out(raw.softmax(0) @ h[0])
        return self.classifier(z), z, raw


class HViT(Head):
    """side: tiles along a region. threshold: tissue up to which a tile is background. masked: is that hidden."""

    recipes: ClassVar = {
        "paper": Recipe(
            lr=2e-4, epochs=50, patience=50, schedule="step", step_epoch=20, step_factor=0.5, accumulation=32
        )
    }

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        side: int = 8,
        pos_grid: int | None = None,
        masked: bool = True,
        threshold: float = 0.0,
        dropout: float = 0.25,
    ) -> None:
        pos_grid = side if pos_grid is None else pos_grid
        super().__init__(
            dim, classes, side=side, pos_grid=pos_grid, masked=masked, threshold=threshold, dropout=dropout
        )
        if side < 1 or pos_grid < 1:
            raise ValueError(f"side and pos_grid must be at least 1, not {side} and {pos_grid}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a share of tissue in 0..1, not {threshold}")
        self.needs = Needs(grid=True, tissue=masked)
        self.regions = RegionTransformer(dim, side, pos_grid, 0.0)
        self.slide = SlideTransformer(classes, dropout)

    def forward(self, bag: Bag) -> Prediction:
        self.check(bag)
        seen = self.seen(bag)
        if not self.options["masked"]:
            self._require_whole(bag)
        regions, scores, (logits, z, raw) = self._look(bag, seen, bag.grid)
        weight = raw.softmax(0)
        each = share_of_regions(scores, regions)  # (heads, n)
        per_head = each * weight[regions.of]
        tiles = TileScores.place(seen, scores.mean(0), per_head.mean(0), per_head)
        parts = {"region_attention": each, "regions": regions.place}
        return Prediction(logits, z, (tiles,), (TileScores(raw, weight),), parts)

    @torch.no_grad()
    def attention(self, bag: Bag, shift: tuple[int, int] = (0, 0)) -> "RegionAttention":
        """Where it looks when regions begin `shift` (columns, rows) of tiles further right and down.

        Features are those of the bag; only who shares a region changes. Tiles that a region then lacks, beyond the
        slide or never stored, are background that is not seen, without a mask too: there, at the rim, a head that was
        trained on whole regions sees parts of some.
        """
        self.check(bag)
        seen = self.seen(bag)
        regions, scores, (_, _, raw) = self._look(bag, seen, bag.grid - torch.tensor(shift, device=bag.device))
        parts = share_of_regions(scores, regions), raw.softmax(0)[regions.of], regions.sizes[regions.of].float()
        return RegionAttention(*(spread(seen, part) for part in parts))

    def seen(self, bag: Bag) -> Tensor:
        """(N,) bool: the tiles whose features are read."""
        return bag.valid & (bag.tissue > self.options["threshold"]) if self.options["masked"] else bag.valid

    def _look(self, bag: Bag, seen: Tensor, grid: Tensor) -> tuple["Regions", Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The regions of the tiles that are seen, the scores in them (heads, n), and what the slide is."""
        rows = seen.nonzero()[:, 0]
        if not len(rows):
            raise BadBag(f"bag {bag.slide!r} has no tile with more than {self.options['threshold']:g} tissue")
        regions = regions_of(grid[rows], self.options["side"])
        vectors, scores = self._vectors(bag.features[rows], regions)
        return regions, scores, self.slide(vectors)

    def _require_whole(self, bag: Bag) -> None:
        whole = self.options["side"] ** 2
        found = torch.unique(bag.grid // self.options["side"], dim=0, return_counts=True)[1]
        if bool((found < whole).any()):
            raise BadBag(
                f"bag {bag.slide!r} has regions of {int(found.min())} tiles instead of {whole}: without a mask their "
                "background is read, too; run with --preset hvit, which keeps it, or leave masked=false out"
            )

    def _vectors(self, features: Tensor, regions: "Regions") -> tuple[Tensor, Tensor]:
        """(n, D) → (M, w) and (heads, n). Regions of about as many tiles go together, the fewest first."""
        order = regions.sizes.argsort(stable=True)
        vectors: list[Tensor] = []
        scores = features.new_zeros(HEADS, len(features))
        start = 0
        while start < len(order):
            # as many regions as TOKENS allow for the largest of them
            sizes = regions.sizes[order[start:]]
            fitting = sizes * torch.arange(1, len(sizes) + 1, device=sizes.device) <= TOKENS
            some = order[start : start + max(1, int(fitting.sum()))]
            rows = regions.rows[some, : int(regions.sizes[some].max())]
            seen, at = rows >= 0, rows.clamp(min=0)
            vector, score = self.regions(features[at], regions.within[at], seen)
            vectors.append(vector)
            scores = scores.index_put((torch.arange(HEADS)[:, None], at[seen][None]), score.transpose(0, 1)[:, seen])
            start += len(some)
        return torch.cat(vectors)[order.argsort()], scores


class RegionAttention(NamedTuple):
    """Of each of the N tiles of a bag, NaN where the head did not look."""

    tile: Tensor  # (heads, N) its share among the tiles of its region, CLS apart
    region: Tensor  # (N,) the share of its region in the slide
    size: Tensor  # (N,) tiles of its region that were looked at


class Regions(NamedTuple):
    """n tiles in M regions."""

    place: Tensor  # (M, 2) column, row among the regions, sorted row by row
    of: Tensor  # (n,) the region of each tile
    within: Tensor  # (n,) its place in it, row by row
    rows: Tensor  # (M, most) tiles of each region, filled up with -1
    sizes: Tensor  # (M,)


def regions_of(grid: Tensor, side: int) -> Regions:
    place, of, sizes = torch.unique((grid // side).flip(1), dim=0, return_inverse=True, return_counts=True)
    inside = grid % side
    order = of.argsort(stable=True)
    at = torch.arange(len(order), device=grid.device) - (sizes.cumsum(0) - sizes)[of[order]]
    rows = order.new_full((len(sizes), int(sizes.max())), -1).index_put((of[order], at), order)
    return Regions(place.flip(1), of, inside[:, 1] * side + inside[:, 0], rows, sizes)


def share_of_regions(scores: Tensor, regions: Regions) -> Tensor:
    """(heads, n) before the softmax → softmax over the tiles of each region, CLS apart."""
    table = scores[:, regions.rows.clamp(min=0)].masked_fill(regions.rows < 0, -torch.inf).softmax(-1)
    out = torch.zeros_like(scores)
    there = regions.rows >= 0
    return out.index_put((torch.arange(len(scores))[:, None], regions.rows[there][None]), table[:, there])


build = HViT
