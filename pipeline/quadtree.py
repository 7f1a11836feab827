"""Which tiles of a slide are taken: a quadtree over its tissue, as one table of nodes, coarse → fine.

The integer grid index (column, row) is the truth; the box of a node is `origin + grid · pitch`, float and exact, so
nothing drifts over a slide whose µm per pixel is 0.2525. The node above (c, r) is (c // 2, r // 2).
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .scale import check_resolution
from .slide import Slide
from .tissue import TissueMask

LEAVES_AT_ONCE = 1 << 13  # a slide of 100,000 px has a million; what is computed for so many stays in the cache


@dataclass(frozen=True)
class TreeLevel:
    """One resolution of a tree: rows start:stop of its table. `span_px` is the edge of a tile in level-0 pixels."""

    grid: np.ndarray  # (n, 2) int32, column and row
    xy: np.ndarray  # (n, 2) int32, floor of the upper-left corner in level-0 px
    tissue: np.ndarray  # (n,) float32
    parent: np.ndarray  # (n,) int32, row within the level above, -1 at the roots
    mpp: float
    tile_px: int
    span_px: float
    start: int
    stop: int


@dataclass(frozen=True)
class QuadTree:
    """A table of tiles. One level is a flat grid; `regular=False` means tiles that stand on no grid.

    Rows of a level stand in Morton order, so siblings are neighbours; tiles that stand on no grid keep their own order.
    """

    grid: np.ndarray
    xy: np.ndarray
    tissue: np.ndarray
    parent: np.ndarray
    scales: tuple[tuple[float, float, int, int], ...]  # (mpp, span_px, start, stop) of each level, coarse → fine
    tile_px: int
    origin: tuple[float, float] = (0.0, 0.0)
    overlap: float = 0.0
    regular: bool = True
    encoded: tuple[int, ...] = field(default=())  # the levels that get features; () = all

    def __post_init__(self) -> None:
        lengths = {
            len(self.grid),
            len(self.xy),
            len(self.tissue),
            len(self.parent),
            self.scales[-1][3] if self.scales else -1,
        }
        if len(lengths) != 1:
            raise ValueError(f"the columns of a QuadTree must be of one length, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.grid)

    @cached_property
    def levels(self) -> tuple[TreeLevel, ...]:
        return tuple(self._level(*scale) for scale in self.scales)

    def _level(self, mpp: float, span_px: float, start: int, stop: int) -> TreeLevel:
        grid, xy, tissue, parent = (c[start:stop] for c in (self.grid, self.xy, self.tissue, self.parent))
        return TreeLevel(grid, xy, tissue, parent, mpp, self.tile_px, span_px, start, stop)

    @property
    def encoded_levels(self) -> tuple[int, ...]:
        return self.encoded or tuple(range(len(self.scales)))

    @property
    def encoded_rows(self) -> np.ndarray:
        """The rows that get features, in table order: (M,) int64."""
        parts = [np.arange(self.scales[k][2], self.scales[k][3]) for k in self.encoded_levels]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def boxes(self, level: int) -> np.ndarray:
        """(n, 4) float64: x, y, width, height of the tiles of a level in level-0 pixels, exact."""
        part = self.levels[level]
        if self.regular:
            corner = np.asarray(self.origin) + part.grid * (part.span_px * (1 - self.overlap))
        else:
            corner = part.xy.astype(np.float64)
        return np.concatenate([corner, np.full((len(corner), 2), part.span_px)], axis=1)

    def children(self, level: int, row: int) -> np.ndarray:
        """Rows within the next finer level whose parent is `row`."""
        low, high = np.searchsorted(self.levels[level + 1].parent, [row, row + 1])
        return np.arange(low, high)

    def facts(self) -> dict[str, Any]:
        """Everything but the columns, as JSON."""
        # Plain types, as the hash is over their text: 1, 1.0 and numpy's 1.0 are one µm per pixel.
        levels = [
            {"mpp": float(m), "tile_px": int(self.tile_px), "span_px": float(s), "start": int(a), "stop": int(b)}
            for m, s, a, b in self.scales
        ]
        return {
            "levels": levels,
            "origin": [float(edge) for edge in self.origin],
            "overlap": float(self.overlap),
            "regular": bool(self.regular),
            "encoded": [int(k) for k in self.encoded_levels],
        }

    @cached_property
    def hash(self) -> str:
        """sha256 of the table and its levels: two tilers that take the same tiles have the same hash."""
        total = hashlib.sha256(repr(sorted(self.facts().items())).encode())
        for column, kind in ((self.grid, "<i4"), (self.xy, "<i4"), (self.tissue, "<f4"), (self.parent, "<i4")):
            total.update(np.ascontiguousarray(column, kind).tobytes())
        return total.hexdigest()

    @classmethod
    def from_points(
        cls, slide: Slide, xy: Iterable[Any], mpp: float, tile_px: int, mask: TissueMask | None = None
    ) -> "QuadTree":
        """Tiles centred on points (n, 2) in level-0 px (nuclei, annotations): one level, no grid, in their order."""
        centres = np.asarray(list(xy), np.float64).reshape(-1, 2)
        if not np.isfinite(centres).all():
            raise UsageError("from_points: every point needs two finite coordinates")
        span = tile_px * mpp / slide.mpp
        corner = np.floor(centres - span / 2).astype(np.int32)
        boxes = np.concatenate([corner.astype(np.float64), np.full((len(corner), 2), span)], axis=1)
        tissue = mask.fraction(boxes) if mask is not None else np.ones(len(corner), np.float32)
        grid = np.rint(corner / span).astype(np.int32)
        return cls(
            grid, corner, tissue, np.full(len(grid), -1, np.int32), ((mpp, span, 0, len(grid)),), tile_px, regular=False
        )

    @classmethod
    def from_shapes(
        cls,
        slide: Slide,
        shapes: str | Path | list[np.ndarray],
        mpp: float,
        tile_px: int,
        levels: int = 1,
        min_inside: float = 0.5,
    ) -> "QuadTree":
        """Tiles of the grid of which at least `min_inside` lies inside annotations.

        shapes: a GeoJSON or ASAP XML file, or polygons (n, 2) in level-0 px. `tissue` is the share inside.
        """
        from .shapes import read_shapes, shapes_mask

        polygons = (
            read_shapes(shapes) if isinstance(shapes, str | Path) else [(np.asarray(s, float), []) for s in shapes]
        )
        span = tile_px * mpp / slide.mpp
        mask = shapes_mask(polygons, slide.size, slide.mpp, cell_px=span / 16)
        return build_quadtree(slide, mask, mpp=mpp, tile_px=tile_px, levels=levels, min_tissue=min_inside)


def build_quadtree(
    slide: Slide,
    mask: TissueMask,
    *,
    mpp: float = 0.5,
    tile_px: int = 224,
    levels: int = 3,
    min_tissue: float = 0.1,
    min_region_tissue: float = 0.0,
    keep_background: bool = False,
    encode_levels: str | tuple[float, ...] = "all",
    overlap: float = 0.0,
    origin: tuple[float, float] = (0.0, 0.0),
    allow_upsampling: bool = False,
) -> QuadTree:
    """The tiles of a slide: leaves of `mpp`, each level above half as fine, kept where there is tissue.

    The tissue fraction of a leaf is over its whole box (outside the slide counts 0), that of an inner node the mean of
    its four children. A leaf is kept if its fraction ≥ min_tissue and its root's ≥ min_region_tissue; a node is kept if
    one of its children is. Raises TooCoarse if level 0 is more than 10 % coarser than `mpp`.
    """
    check_resolution(str(slide.path), slide.mpp, mpp, allow_upsampling)
    if overlap and levels > 1:
        raise UsageError("overlapping tiles do not nest: overlap needs levels = 1")
    span = tile_px * mpp / slide.mpp
    pitch = span * (1 - overlap)
    first, shape = _extent(slide.size, origin, pitch, levels)
    tissue = _fractions(mask, first, shape, origin, pitch, span)
    kept = _kept(
        tissue, _inside(slide.size, first, shape, origin, pitch), levels, min_tissue, min_region_tissue, keep_background
    )
    (grid, xy, fraction, parent), scales = _table(tissue, kept, first, levels, origin, pitch, mpp, span)
    encoded = _encoded(encode_levels, [scale[0] for scale in scales])
    return QuadTree(grid, xy, fraction, parent, tuple(scales), tile_px, (origin[0], origin[1]), overlap, True, encoded)


def _extent(
    size: tuple[int, int], origin: tuple[float, float], pitch: float, levels: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """The first leaf (column, row) and the (rows, columns) of leaves that cover the slide with whole roots."""
    root = 2 ** (levels - 1)
    low = np.array([math.floor(-o / pitch / root) * root for o in origin])
    high = [math.ceil((side - o) / pitch / root - 1e-9) * root for side, o in zip(size, origin, strict=True)]
    return low, (max(high[1] - int(low[1]), root), max(high[0] - int(low[0]), root))


def _fractions(
    mask: TissueMask, first: np.ndarray, shape: tuple[int, int], origin: tuple[float, float], pitch: float, span: float
) -> np.ndarray:
    rows, columns = shape
    x = origin[0] + (first[0] + np.arange(columns)) * pitch
    y = origin[1] + (first[1] + np.arange(rows)) * pitch
    out = np.empty(shape, np.float32)
    some = max(1, LEAVES_AT_ONCE // columns)
    for top in range(0, rows, some):
        out[top : top + some] = mask.share(x, y[top : top + some, None], span, span)
    return out


def _inside(
    size: tuple[int, int], first: np.ndarray, shape: tuple[int, int], origin: tuple[float, float], pitch: float
) -> np.ndarray:
    """(rows, columns) bool: the leaf lies at least partly on the slide."""
    sides = []
    for axis, count in ((1, shape[0]), (0, shape[1])):
        left = origin[axis] + (first[axis] + np.arange(count)) * pitch
        sides.append((left < size[axis] - 1e-6) & (left + pitch > 1e-6))
    rows, columns = sides
    return rows[:, None] & columns[None, :]


def _kept(
    tissue: np.ndarray, inside: np.ndarray, levels: int, min_tissue: float, min_region: float, background: bool
) -> np.ndarray:
    root = 2 ** (levels - 1)
    region = tissue
    for _ in range(levels - 1):
        region = halve(region)
    region_kept = np.repeat(np.repeat(region >= min_region, root, 0), root, 1)
    kept = (tissue >= min_tissue) & region_kept & inside
    if background:
        roots = kept.reshape(kept.shape[0] // root, root, kept.shape[1] // root, root).any(axis=(1, 3))
        kept = np.repeat(np.repeat(roots, root, 0), root, 1)
    return kept


def halve(values: np.ndarray) -> np.ndarray:
    """(2h, 2w) → (h, w): the mean of each four."""
    return values.reshape(values.shape[0] // 2, 2, values.shape[1] // 2, 2).mean(axis=(1, 3), dtype=np.float32)


def _table(
    tissue: np.ndarray,
    kept: np.ndarray,
    first: np.ndarray,
    levels: int,
    origin: tuple[float, float],
    pitch: float,
    mpp: float,
    span: float,
) -> tuple[tuple[np.ndarray, ...], list[tuple[float, float, int, int]]]:
    """The columns of all levels, coarse → fine, and (mpp, span_px, start, stop) of each."""
    parts, above = [], None
    layers = [(tissue, kept)]
    for _ in range(levels - 1):
        tissue = halve(tissue)
        kept = np.asarray(kept.reshape(kept.shape[0] // 2, 2, kept.shape[1] // 2, 2).any(axis=(1, 3)))
        layers.append((tissue, kept))
    for depth, (fraction, keep) in reversed(list(enumerate(layers))):
        rows, columns = np.nonzero(keep)
        order = np.argsort(morton(columns, rows), kind="stable")
        rows, columns = rows[order], columns[order]
        parent = np.full(len(rows), -1, np.int32) if above is None else above[rows // 2, columns // 2]
        above = np.full(keep.shape, -1, np.int32)
        above[rows, columns] = np.arange(len(rows), dtype=np.int32)
        grid = (np.stack([columns, rows], axis=1) + first // 2**depth).astype(np.int32)
        xy = np.floor(np.asarray(origin) + grid * (pitch * 2**depth)).astype(np.int32)
        parts.append((grid, xy, fraction[rows, columns], parent))
    stops = np.cumsum([len(part[0]) for part in parts]).tolist()
    depths = range(levels - 1, -1, -1)
    scales = [(mpp * 2**d, span * 2**d, a, b) for d, a, b in zip(depths, [0, *stops[:-1]], stops, strict=True)]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True)), scales


def morton(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) uint64: the bits of column and row interleaved, so that the four children of a node are neighbours."""
    return _spread(columns) | (_spread(rows) << np.uint64(1))


def _spread(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.uint64)
    for shift, pick in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        bits = (bits | (bits << np.uint64(shift))) & np.uint64(pick)
    return bits


def _encoded(wish: str | tuple[float, ...], mpps: list[float]) -> tuple[int, ...]:
    if wish == "all":
        return tuple(range(len(mpps)))
    if wish == "finest":
        return (len(mpps) - 1,)
    found = []
    for mpp in wish:
        near = [k for k, have in enumerate(mpps) if abs(have / float(mpp) - 1) < 0.01]
        if not near:
            raise UsageError(f"encode_levels: no level of {mpp} µm/px; there are {', '.join(f'{m:g}' for m in mpps)}")
        found += near
    return tuple(sorted(set(found)))
