"""What three or more heads share: attention that scores tiles, that mixes them, and that looks only at neighbours.

Everything here works on one bag: (N, ·) tensors, no batch axis, no padding.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_BYTES = 16 << 20  # of keys and values that local attention gathers at a time: what a cache holds
DENSE_TILES = 512  # up to here masked attention over all tiles is the fastest
BLOCK = 128  # tiles, of FlexAttention


class Attention(nn.Module):
    """(N, dim) → (N, rows): raw scores of each tile, by a small network (Ilse et al., ICML 2018, eqs 8 and 9).

    plain: wᵀ tanh(V h); gated: wᵀ (tanh(V h) ⊙ σ(U h)). All have biases; dropout acts on both branches.
    Parameters: (1 + gated) (dim + 1) width + (width + 1) rows.
    """

    def __init__(self, dim: int, width: int, gated: bool = True, rows: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.V = nn.Linear(dim, width)
        self.U = nn.Linear(dim, width) if gated else None
        self.w = nn.Linear(width, rows)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        t = self.dropout(torch.tanh(self.V(h)))
        if self.U is not None:
            t = t * self.dropout(torch.sigmoid(self.U(h)))
        scores: Tensor = self.w(t)
        return scores


class NystromAttention(nn.Module):
    """(N, dim) → (N, dim): self-attention by way of at most `landmarks` means (Xiong et al., AAAI 2021).

    The landmarks are the means over groups of ⌈N / landmarks⌉ neighbours in the order of the tiles; the last group may
    be smaller, so nothing is padded and nothing depends on N mod landmarks. A depth-wise convolution over 33 tiles of
    the values is added. Time O(N · landmarks). The two softmaxes between tiles and landmarks are fused attention, which
    never holds them: memory O(N · dim). Parameters: 4 dim² + dim + 33 heads.
    """

    def __init__(
        self, dim: int, landmarks: int, heads: int = 8, iterations: int = 6, taps: int = 33, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if dim % heads or landmarks < 1:
            raise ValueError(f"{dim} features cannot be parted among {heads} heads, or no landmarks: {landmarks}")
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        self.convolution = nn.Conv1d(heads, heads, taps, padding=taps // 2, groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(x)
        few_q, few_k, inverse = self._landmarks(q, k)
        gathered = inverse @ fused(few_q, k, v)
        return self._out(fused(q, few_k, gathered) + self._neighbours(v))

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`'s first row (dim,), and how much it attends to each row of x (N,), the mean over the heads."""
        q, k, v = self._split(x)
        few_q, few_k, inverse = self._landmarks(q, k)
        left, right = (q[:, :1] @ few_k.mT).softmax(-1), (few_q @ k.mT).softmax(-1)
        row = left @ inverse @ right  # (H, 1, N)
        near = v[:, : self.convolution.kernel_size[0] // 2 + 1]
        return self._out(row @ v + self._neighbours(near)[:, :1])[0], row[:, 0].mean(0)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (H, N, d); the queries scaled."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return q * q.shape[-1] ** -0.5, k, v

    def _landmarks(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means of queries and of keys, each (H, m, d), and the inverse (H, m, m) of the attention between them."""
        few_q, few_k = group_means(q, self.landmarks), group_means(k, self.landmarks)
        return few_q, few_k, pseudo_inverse((few_q @ few_k.mT).softmax(-1), self.iterations)

    def _out(self, mixed: Tensor) -> Tensor:
        out: Tensor = self.out(mixed.transpose(0, 1).flatten(1))
        return out

    def _neighbours(self, v: Tensor) -> Tensor:
        """Each channel of a head with the head's one filter along the tiles."""
        return self.convolution(v.permute(2, 0, 1)).permute(1, 2, 0)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, n, d), (H, m, d), (H, m, d) → (H, n, d): softmax(q kᵀ) v; the queries are scaled already."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0]


def group_means(x: Tensor, most: int) -> Tensor:
    """(H, N, d) → (H, ⌈N / l⌉, d): means over groups of l = ⌈N / most⌉ neighbours, the last over what is left."""
    count = x.shape[1]
    size = -(-count // most)
    groups = -(-count // size)
    sums = F.pad(x, (0, 0, 0, groups * size - count)).unflatten(1, (groups, size)).sum(2)
    sizes = x.new_full((groups, 1), size)
    sizes[-1] = count - (groups - 1) * size
    return sums / sizes


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Moore-Penrose inverse of each (m, m) by iteration (Xiong et al.), from its own Aᵀ / (‖A‖₁ ‖A‖∞)."""
    scale = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
    z = a.mT / scale[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z


# -- positions on the grid --


def rope_2d(x: Tensor, grid: Tensor, base: float = 10_000.0) -> Tensor:
    """(H, N, d) turned by its place on the grid (N, 2): products of two turned vectors depend on differences only.

    The first half of the channels turns with the row, the second with the column; pair k of K = d/4 by
    position · base^(-k/K) (Su et al., arXiv:2104.09864, eq. 34, once for each axis). d is a multiple of 4.
    """
    if x.shape[-1] % 4:
        raise ValueError(f"a head of {x.shape[-1]} features has no two halves of pairs: use a multiple of 4")
    pairs = x.shape[-1] // 4
    place = (grid - grid.amin(0)).flip(-1).to(torch.float64)  # row, column; from 0, where angles are exact
    speed = base ** (-torch.arange(pairs, dtype=torch.float64, device=x.device) / pairs)
    angle = (place[:, :, None] * speed).flatten(1)  # (N, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def alibi_slopes(heads: int) -> Tensor:
    """(H,): 2^(-8h/H) for h = 1..H (Press et al., ICLR 2022)."""
    return 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, of whole positions (…, n, 2) and (…, m, 2) → (…, n, m), exact before the root."""
    return ((a[..., :, None, :] - b[..., None, :, :]) ** 2).sum(-1).to(torch.float32).sqrt()


# -- local attention --


def local_attention(q: Tensor, k: Tensor, v: Tensor, grid: Tensor, radius: float, backend: str = "auto") -> Tensor:
    """(H, N, d): attention of each tile to those within `radius` tiles of it on the grid (N, 2), itself included.

    The softmax runs over exactly the j with ‖grid_i - grid_j‖ ≤ radius, the same for all heads. backend: `dense` masks
    full attention, O(N²), the reference; `cells` sorts tiles into squares of ⌈radius⌉ and looks in 3 × 3 of them, O(N);
    `flex` is torch's FlexAttention with a mask of blocks, for GPUs (on a CPU torch has no gradient for it, and it is
    O(N²)); `auto` takes dense for few tiles and cells for many.
    """
    if radius < 0:
        raise ValueError(f"a radius of {radius} tiles reaches nothing, not even the tile itself")
    if backend == "auto":
        backend = "dense" if q.shape[1] <= DENSE_TILES else "cells"
    backends: dict[str, Callable[..., Tensor]] = {"dense": _dense, "cells": _in_cells, "flex": _flex}
    if backend not in backends:
        raise ValueError(f"no backend of local attention is called {backend!r} (known: auto, {', '.join(backends)})")
    return backends[backend](q, k, v, grid, radius)


def _within(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """(…, n, 2) and (…, m, 2) whole places → (…, n, m)."""
    x, y = (a[..., :, None, axis] - b[..., None, :, axis] for axis in (0, 1))
    return x * x + y * y <= math.floor(radius**2)


def _dense(q: Tensor, k: Tensor, v: Tensor, grid: Tensor, radius: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_within(grid, grid, radius))


Parts = list[tuple[Tensor, Tensor]]  # rows of tiles: those that look (m, P), those that they look among (m, K)


class Cells(NamedTuple):
    """Squares of the grid with a tile in them, the fewest neighbours first: rows of tiles, filled up with -1."""

    members: Tensor  # (M, P) the tiles in each
    near: Tensor  # (M, K) the tiles that one of them may reach, before those that are none
    counts: Tensor  # (M,) how many they are


def cells_of(place: Tensor, radius: float) -> Cells:
    """(N, 2) whole places from 0 → squares of ⌈radius⌉ tiles."""
    members, around = _squares(place, max(1, math.ceil(radius)))
    near = torch.where(around[:, :, None] >= 0, members[around], -1).flatten(1)  # (M, 9 P)
    inside = place[torch.where(members >= 0, members, members[:, :1])]
    gap = _gap(inside.amin(1)[:, None], inside.amax(1)[:, None], place[near])
    near = torch.where((gap**2).sum(-1) <= radius**2, near, -1)
    near = near.gather(1, (near < 0).to(torch.int8).argsort(dim=1, stable=True))
    counts = (near >= 0).sum(1)
    order = counts.argsort(stable=True)
    return Cells(members[order], near[order], counts[order])


def _squares(place: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """(M, P) tiles of each square, and (M, 9) the squares around it, both filled up with -1."""
    square, within = place // edge, place % edge
    width = int(square[:, 0].max()) + 3  # a free column on both sides, so that no neighbour wraps around
    key = (square[:, 1] + 1) * width + square[:, 0] + 1
    order = torch.argsort(key * edge * edge + within[:, 1] * edge + within[:, 0], stable=True)
    keys, sizes = torch.unique_consecutive(key[order], return_counts=True)
    cell = torch.arange(len(keys), device=place.device).repeat_interleave(sizes)
    at = torch.arange(len(order), device=place.device) - (sizes.cumsum(0) - sizes)[cell]
    members = order.new_full((len(keys), int(sizes.max())), -1).index_put((cell, at), order)
    step = torch.tensor([dy * width + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)], device=place.device)
    wanted = keys[:, None] + step
    found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return members, torch.where(keys[found] == wanted, found, -1)


def _gap(low: Tensor, high: Tensor, place: Tensor) -> Tensor:
    """From a box to places, along each axis; 0 inside."""
    return torch.maximum(low - place, place - high).clamp(min=0)


def _in_cells(q: Tensor, k: Tensor, v: Tensor, grid: Tensor, radius: float) -> Tensor:
    place = grid - grid.amin(0)
    cells = cells_of(place, radius)
    place = place.to(torch.int32 if radius < 1 << 14 else torch.int64)  # squares of near distances fit
    at_once = max(1, CHUNK_BYTES // (8 * q[:, 0].numel() * cells.near.shape[1]))
    parts = [
        (members, near[:, : int(counts[-1])])
        for members, near, counts in zip(*(part.split(at_once) for part in cells), strict=True)
    ]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (N, H, d)
    out: Tensor = _InParts.apply(q, k, v, place, parts, radius)
    return out.transpose(0, 1)


class _InParts(torch.autograd.Function):
    """Some squares at a time, few enough to stay in the cache. Backward they are done again, and their gradients added
    up in one place: kept by torch, each part would have gradients of the size of all tiles."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, place: Tensor, parts: Parts, radius: float) -> Tensor:
        ctx.save_for_backward(q, k, v, place)
        ctx.parts, ctx.radius = parts, radius
        out = torch.empty_like(q)
        for members, near in parts:
            mask = _looked_at(place, members, near, radius)
            mixed = _attend(_rows(q, members), _rows(k, near), _rows(v, near), mask)
            out.index_copy_(0, members[members >= 0], mixed[members >= 0])
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, place = ctx.saved_tensors
        slopes = [torch.zeros_like(x) for x in (q, k, v)]
        for members, near in ctx.parts:
            rows = (members, near, near)
            mask = _looked_at(place, members, near, ctx.radius)
            some = [_rows(x, which).requires_grad_() for x, which in zip((q, k, v), rows, strict=True)]
            with torch.enable_grad():
                mixed = _attend(some[0], some[1], some[2], mask)
            above = _rows(slope, members) * (members >= 0)[..., None, None]
            for total, which, own in zip(slopes, rows, torch.autograd.grad(mixed, some, above), strict=True):
                total.index_add_(0, which.clamp(min=0).flatten(), own.flatten(0, 1))  # 0 for what is not looked at
        return (*slopes, None, None, None)


def _looked_at(place: Tensor, members: Tensor, near: Tensor, radius: float) -> Tensor:
    """(m, P, K): who looks at whom. Rows that stand for no tile look anywhere, so that no row is empty."""
    return (_within(place[members], place[near], radius) & (near >= 0)[:, None]) | (members < 0)[:, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(m, P, H, d) queries, (m, K, H, d) keys and values → (m, P, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)
    return mixed


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows.clamp(min=0).flatten()).unflatten(0, rows.shape)


def _flex(q: Tensor, k: Tensor, v: Tensor, grid: Tensor, radius: float) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask

    order = torch.argsort(morton(grid), stable=True)
    place = (grid - grid.amin(0))[order]
    column, row = place.to(torch.float32).T.contiguous()
    reach = column.new_tensor(radius**2)  # a tensor, for torch's compiler takes no numbers here

    def near(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (column[i] - column[j]) ** 2 + (row[i] - row[j]) ** 2 <= reach

    # A mask made from `near` alone would ask all N² pairs (pytorch issue 134756); boxes around blocks say enough.
    touching = _boxes_touch(place, radius)
    counts = touching.sum(-1, dtype=torch.int32)
    blocks = touching.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        counts[None, None], blocks[None, None], BLOCK_SIZE=BLOCK, mask_mod=near, seq_lengths=(len(grid), len(grid))
    )
    mixed = _flex_attention(q.is_cuda)(q[None, :, order], k[None, :, order], v[None, :, order], block_mask=mask)[0]
    return torch.empty_like(mixed).index_copy(1, order, mixed)


@lru_cache(maxsize=2)
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    """Compiled on a GPU; uncompiled it is plain attention with a mask."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention  # type: ignore[return-value]


def _boxes_touch(place: Tensor, radius: float) -> Tensor:
    """(blocks, blocks): may a tile of the one be within `radius` of a tile of the other?"""
    blocks = -(-len(place) // BLOCK)
    last = place[-1:].expand(blocks * BLOCK - len(place), 2)
    boxes = torch.cat([place, last]).unflatten(0, (blocks, BLOCK))
    low, high = boxes.amin(1), boxes.amax(1)
    gap = torch.maximum(low[:, None] - high, low - high[:, None]).clamp(min=0)
    return (gap**2).sum(-1) <= radius**2


def morton(grid: Tensor) -> Tensor:
    """(N,) places along the Z curve: the bits of row and column in turn. For positions below 2³¹."""
    place = grid - grid.amin(0)
    code = torch.zeros_like(place[:, 0])
    for bit in range(31):
        code |= ((place[:, 0] >> bit) & 1) << (2 * bit) | ((place[:, 1] >> bit) & 1) << (2 * bit + 1)
    return code
