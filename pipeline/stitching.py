"""The attention of a hierarchical ViT over a whole slide, at three scales, from regions that are moved and overlap.

A map that is cut at the borders of regions depends on where they happen to begin. So the grid of regions is moved by
every multiple of a stride, and a place has the mean of all that was said of it. Shifts by whole tiles use the features
that are there; finer ones need the tiles of a moved grid (regrid.py).

Scales (Grisi et al., 2024, after HIPT): slide, the share of a region in the slide; region, the share of a tile among
those of its region, per head; tile, of the tile encoder's class token. Each is stretched to 0..1 over the slide (by its
least and largest value, per head) and multiplied: tile^(1 - gamma) · region^gamma · slide^gamma.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from heads import Bag
from heads.hvit import HViT

from .canvas import Canvas
from .errors import UsageError

ROUNDING = 1e-5  # of means in 32 bits, relative


@dataclass(frozen=True)
class Shifts:
    """The regions of `side` × `side` tiles are moved by all multiples of `stride` tiles, along both axes.

    stride: whole tiles that divide the side, or 1/2, 1/3 … of a tile. Raises UsageError.
    """

    side: int
    stride: float

    def __post_init__(self) -> None:
        whole = 1 <= self.stride <= self.side and self.stride == int(self.stride) and self.side % int(self.stride) == 0
        part = 0 < self.stride < 1 and abs(1 / self.stride - round(1 / self.stride)) < 0.01
        if not whole and not part:
            known = ", ".join(str(n) for n in range(1, self.side + 1) if self.side % n == 0)
            raise UsageError(
                f"a stride of {self.stride:g} tiles does not fit into regions of {self.side}: take {known}, or 1/2, "
                "1/3 … of a tile (0.5, 0.333), for which the tiles are encoded anew"
            )

    @property
    def parts(self) -> int:
        """Shifts a tile, along one axis."""
        return max(1, round(1 / self.stride))

    @property
    def whole(self) -> list[tuple[int, int]]:
        """Tiles (columns, rows) by which the regions of one grid are moved."""
        steps = range(0, self.side, max(1, int(self.stride)))
        return [(x, y) for y in steps for x in steps]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """In 1/parts of a tile: by how much the grid of tiles is moved; the stored one first."""
        return [(x, y) for y in range(self.parts) for x in range(self.parts)]

    @property
    def steps(self) -> list[float]:
        """All shifts along one axis, in tiles."""
        return [i / self.parts for i in range(0, self.side * self.parts, max(1, int(self.stride)))]


def half(side: int) -> int:
    """The largest stride with which regions overlap."""
    return max(n for n in range(1, max(side, 2)) if side % n == 0)


class Look(NamedTuple):
    """What a head says of the n tiles of one grid, the mean over its whole shifts."""

    moved: tuple[int, int]  # the grid, in 1/parts of a tile
    grid: np.ndarray  # (n, 2)
    region: np.ndarray  # (heads, n)
    slide: np.ndarray  # (n,)
    tile: np.ndarray | None  # (n, s, s) of the tile encoder, NaN where it crops


def look(
    head: HViT,
    bag: Bag,
    shifts: Shifts,
    moved: tuple[int, int] = (0, 0),
    tile: np.ndarray | None = None,
    by_foreground: bool = True,
) -> Look:
    """All whole shifts of a bag's regions. `tile` (N, s, s) of all its tiles.

    by_foreground: a tile's share times the part of its region that was looked at. Else a tile alone in its region has
    all of the attention there, whatever it shows.
    """
    region, slide = torch.zeros(()), torch.zeros(())
    for shift in shifts.whole:
        one = head.attention(bag, shift)
        region = region + (one.tile * one.size / shifts.side**2 if by_foreground else one.tile)
        slide = slide + one.region
    seen, count = slide.isfinite().numpy(), len(shifts.whole)
    means = (region / count).numpy()[:, seen], (slide / count).numpy()[seen]
    return Look(moved, bag.grid.numpy()[seen], *means, None if tile is None else tile[seen])


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps (rows, columns) of cells, NaN where the head never looked. `low`: the tile whose corner is theirs."""

    low: tuple[int, int]
    per_tile: int  # cells along a tile
    slide: np.ndarray
    region: np.ndarray  # (heads, rows, columns)
    tile: np.ndarray | None

    def stitched(self, gamma: float) -> np.ndarray:
        """(heads, rows, columns): the product of the scales, each from 0 to 1; one that is not there counts as 1."""
        product = stretched(self.region) ** gamma * stretched(self.slide[None]) ** gamma
        return product if self.tile is None else product * stretched(self.tile[None]) ** (1 - gamma)


def stitch_looks(looks: Iterable[Look], shifts: Shifts) -> Maps:
    """The looks of all grids, where they overlap their mean."""
    looks = list(looks)
    low = np.min([one.grid.min(0) for one in looks], axis=0)
    high = np.max([one.grid.max(0) for one in looks], axis=0) + 2  # a moved grid ends beyond its last tile
    tokens = {one.tile.shape[-1] for one in looks if one.tile is not None} or {1}
    per_tile = math.lcm(shifts.parts, *tokens)
    heads = len(looks[0].region)
    coarse, fine = Canvas(low, high, per_tile, heads + 1), Canvas(low, high, per_tile, 1)
    for one in looks:
        moved = (one.moved[0] * per_tile // shifts.parts, one.moved[1] * per_tile // shifts.parts)
        coarse.add(one.grid, np.concatenate([one.slide[None], one.region]), moved)
        if one.tile is not None:
            fine.add(one.grid, one.tile[None], moved)
    slide, *region = coarse.mean()
    tile = fine.mean()[0] if tokens != {1} else None
    return Maps((int(low[0]), int(low[1])), per_tile, slide, np.stack(region), tile)


def stretched(values: np.ndarray) -> np.ndarray:
    """Each channel from 0 to 1 over all that was looked at; one that is the same everywhere says nothing and is 1."""
    low, high = (least(values, axis=(1, 2), keepdims=True) for least in (np.nanmin, np.nanmax))
    spread = high - low
    differs = spread > ROUNDING * abs(high)
    return np.where(differs, (values - low) / np.where(differs, spread, 1), values * 0 + 1)
