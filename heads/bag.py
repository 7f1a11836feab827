"""What a head reads (`Bag`) and what it answers (`Prediction`).

    bag = Bag.flat(features)                                    # (N, D), numpy or torch, any float type
    bag = Bag([BagLevel.of(...), BagLevel.of(...)], slide="a.svs")   # coarse -> fine
    bag.at(0.5)                                                 # the level of 0.5 µm per pixel, as a bag of its own

One bag at a time: no batch axis and no padding, so nothing here has to be told apart from padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

GAP = 256  # tiles between two slides of one bag: more than any head looks

Array = Tensor | np.ndarray
Device = torch.device | str

# column of a level -> its type and the length of one row (None: any)
COLUMNS: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
    "features": (torch.float32, (None,)),
    "grid": (torch.int64, (2,)),
    "tissue": (torch.float32, ()),
    "parent": (torch.int64, ()),
    "valid": (torch.bool, ()),
    "xy": (torch.int64, (2,)),
}


class BadBag(ValueError):
    """A bag that contradicts itself; said when it is made, not in the middle of a head."""


@dataclass(frozen=True, eq=False)
class BagLevel:
    """The tiles of one resolution. What is not known of foreign features is None."""

    features: Tensor | None  # (N, D) float32; None: this level was not encoded
    grid: Tensor | None  # (N, 2) column, row
    tissue: Tensor | None  # (N,) share of the tile that is tissue, 0..1
    parent: Tensor  # (N,) row within the level above, -1 at the roots
    valid: Tensor  # (N,) bool; False: there are no features to trust in this row
    xy: Tensor | None  # (N, 2) upper left corner, level-0 pixels
    mpp: float | None = None
    tile_px: float | None = None
    span_px: float | None = None  # edge of a tile in level-0 pixels, exact

    @classmethod
    def of(
        cls,
        features: Array | None = None,
        *,
        grid: Array | None = None,
        tissue: Array | None = None,
        parent: Array | None = None,
        valid: Array | None = None,
        xy: Array | None = None,
        mpp: float | None = None,
        tile_px: float | None = None,
        span_px: float | None = None,
    ) -> "BagLevel":
        """A level from what there is: all rows valid and all roots unless told otherwise."""
        rows = features if features is not None else grid
        if rows is None:
            raise BadBag("a level needs features, or a grid where it was not encoded")
        valid = torch.ones(len(rows), dtype=torch.bool) if valid is None else valid
        parent = torch.full((len(rows),), -1) if parent is None else parent
        device = rows.device if isinstance(rows, Tensor) else "cpu"
        columns = {"features": features, "grid": grid, "tissue": tissue, "parent": parent, "valid": valid, "xy": xy}
        tensors = {name: None if x is None else torch.as_tensor(x, device=device) for name, x in columns.items()}
        return cls(**tensors, mpp=mpp, tile_px=tile_px, span_px=span_px)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name in COLUMNS:
            if getattr(self, name) is not None:
                self._set(name, _column(name, getattr(self, name), len(self.valid)))
        _refuse_bad_tissue(self.tissue)
        if self.features is None:
            self._set("valid", torch.zeros_like(self.valid))
        elif not bool(self.valid.all()):
            # zeroed whatever they hold: 0 · NaN is NaN, so a mask alone would not keep them out of a sum
            self._set("features", self.features.masked_fill(~self.valid[:, None], 0.0))
        _refuse_non_finite(self.features)

    def _set(self, name: str, value: Tensor) -> None:
        object.__setattr__(self, name, value)  # the only way into a frozen dataclass

    def __len__(self) -> int:
        return len(self.valid)

    def to(self, device: Device) -> "BagLevel":
        return replace(self, **{k: x.to(device) for k in COLUMNS if (x := getattr(self, k)) is not None})


@dataclass(frozen=True, eq=False, repr=False)
class Bag:
    """All tiles of one slide: a table, of which each level (coarse -> fine) is a slice."""

    levels: Sequence[BagLevel]
    slide: str = ""

    @classmethod
    def flat(
        cls,
        features: Array,
        grid: Array | None = None,
        tissue: Array | None = None,
        valid: Array | None = None,
        xy: Array | None = None,
        mpp: float | None = None,
        *,
        tile_px: float | None = None,
        span_px: float | None = None,
        slide: str = "",
    ) -> "Bag":
        """A bag of one level, from anyone's features."""
        level = BagLevel.of(
            features, grid=grid, tissue=tissue, valid=valid, xy=xy, mpp=mpp, tile_px=tile_px, span_px=span_px
        )
        return cls([level], slide)

    @classmethod
    def joined(cls, bags: Sequence["Bag"], slide: str = "") -> "Bag":
        """The slides of one patient as one bag: side by side on the grid, out of each other's sight."""
        if len(bags) == 1:
            return bags[0]
        counts = sorted({len(bag.levels) for bag in bags})
        if len(counts) > 1:
            raise BadBag(f"slides with {' and '.join(map(str, counts))} levels cannot be one bag")
        if len(dims := sorted({bag.dim for bag in bags})) > 1:
            raise BadBag(f"slides with {' and '.join(map(str, dims))} features a tile cannot be one bag")
        moves = _side_by_side(bags)
        levels = [_joined_level([bag.levels[k] for bag in bags], moves << k) for k in range(counts[0])]
        above = [0] * len(bags)
        for k, level in enumerate(levels):
            if k:
                shift = [torch.full_like(bag.levels[k].parent, start) for bag, start in zip(bags, above, strict=True)]
                levels[k] = replace(level, parent=level.parent + torch.cat(shift))
            ends = np.cumsum([len(bag.levels[k]) for bag in bags]).tolist()
            above = [0, *ends[:-1]]
        return cls(levels, slide or bags[0].slide)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        _refuse_empty(self)
        _refuse_bad_order(self.levels)
        _refuse_bad_parents(self.levels)

    def __len__(self) -> int:
        return sum(map(len, self.levels))

    def __repr__(self) -> str:
        return f"Bag(slide={self.slide!r}, tiles={[len(level) for level in self.levels]}, dim={self.dim})"

    @property
    def dim(self) -> int:
        return next(level.features.shape[1] for level in self.levels if level.features is not None)

    @property
    def device(self) -> torch.device:
        return self.levels[0].valid.device

    @property
    def features(self) -> Tensor:
        """(N, D); rows of levels that were not encoded are zero, and not valid."""
        parts = [
            x.valid.new_zeros(len(x), self.dim, dtype=torch.float32) if x.features is None else x.features
            for x in self.levels
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def valid_features(self) -> Tensor:
        """The features of valid rows only: all that a flat head should see."""
        return self.features if bool(self.valid.all()) else self.features[self.valid]

    @property
    def valid(self) -> Tensor:
        return self._joined("valid")

    @property
    def grid(self) -> Tensor:
        return self._joined("grid")

    @property
    def tissue(self) -> Tensor:
        return self._joined("tissue")

    @property
    def parent(self) -> Tensor:
        """(N,) rows *within the level above*, as in the levels themselves."""
        return self._joined("parent")

    @property
    def xy(self) -> Tensor:
        return self._joined("xy")

    @property
    def finest(self) -> "Bag":
        """The finest level that has features, as a bag of its own."""
        return self._only([level for level in self.levels if level.features is not None][-1])

    def at(self, mpp: float) -> "Bag":
        """The level of this resolution (within 1 %), as a bag of its own."""
        for level in self.levels:
            if level.mpp is not None and abs(level.mpp / mpp - 1) <= 0.01:
                return self._only(level)
        there = ", ".join("unknown" if level.mpp is None else f"{level.mpp:g}" for level in self.levels)
        raise ValueError(f"no level of {mpp:g} µm per pixel in bag {self.slide!r}; there are: {there}")

    def to(self, device: Device) -> "Bag":
        if self.device == torch.device(device):
            return self
        return replace(self, levels=[level.to(device) for level in self.levels])

    def _only(self, level: BagLevel) -> "Bag":
        # its parents are rows of a level that is not in the new bag
        return replace(self, levels=[replace(level, parent=torch.full_like(level.parent, -1))])

    def _joined(self, name: str) -> Tensor:
        parts = [getattr(level, name) for level in self.levels]
        if any(part is None for part in parts):
            raise BadBag(
                f"bag {self.slide!r} has no {name}: give it when making the bag, Bag.flat(features, {name}=...)"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, eq=False)
class TileScores:
    """How much each tile counted, one row per input tile; NaN where the head never looked."""

    raw: Tensor  # (N,) before the softmax, any real number
    weight: Tensor  # (N,) >= 0, sums to 1 over the tiles that were looked at
    per_class: Tensor | None = None  # (K, N)

    @classmethod
    def place(cls, valid: Tensor, raw: Tensor, weight: Tensor, per_class: Tensor | None = None) -> "TileScores":
        """Scores of the valid tiles, put back at the rows they came from."""
        return cls(spread(valid, raw), spread(valid, weight), None if per_class is None else spread(valid, per_class))


def spread(valid: Tensor, scores: Tensor) -> Tensor:
    """(…, n) of the valid tiles → (…, N), NaN where there is none."""
    rows = scores.new_full((*scores.shape[:-1], len(valid)), torch.nan)
    rows[..., valid] = scores
    return rows


@dataclass(frozen=True, eq=False)
class Prediction:
    logits: Tensor  # (C,)
    embedding: Tensor  # (E,) the slide as a vector: what the classifier saw
    tiles: tuple[TileScores, ...]  # one per level of the bag
    regions: tuple[TileScores, ...] = ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # what the head's own loss reads

    @property
    def probabilities(self) -> Tensor:
        return self.logits.softmax(-1)


def _side_by_side(bags: Sequence[Bag]) -> Tensor:
    """(B, 2) columns and rows of the coarsest level by which each bag is moved: to row 0, GAP tiles apart.

    Each begins at an even column, so that squares of 2 x 2 that are counted from a bag's first tile stay the same.
    """
    moves, free = [], 0
    for bag in bags:
        grid = bag.levels[0].grid
        if grid is None:
            return torch.zeros(len(bags), 2, dtype=torch.int64)
        first = grid.amin(0).cpu()
        moves.append(torch.stack([free - first[0], -first[1]]))
        free += int(grid[:, 0].max() - first[0]) + 1 + GAP
        free += free % 2
    return torch.stack(moves)


def _joined_level(levels: Sequence[BagLevel], moves: Tensor) -> BagLevel:
    first = levels[0]
    _refuse_mixed(levels)
    columns: dict[str, Tensor | None] = {}
    for name in COLUMNS:
        parts = [getattr(level, name) for level in levels]
        known = [part for part in parts if part is not None]
        if name == "grid" and len(known) == len(parts):
            known = [grid + move.to(grid.device) for grid, move in zip(known, moves, strict=True)]
        if name == "features" and known and len(known) < len(parts):
            raise BadBag("slides of which only some have features at a level cannot be one bag")
        columns[name] = torch.cat(known) if len(known) == len(parts) else None
    return BagLevel(**columns, mpp=first.mpp, tile_px=first.tile_px)  # type: ignore[arg-type]


def _refuse_mixed(levels: Sequence[BagLevel]) -> None:
    known = sorted(level.mpp for level in levels if level.mpp is not None)
    if known and (len(known) < len(levels) or known[-1] / known[0] > 1.01):
        there = ", ".join("unknown" if level.mpp is None else f"{level.mpp:g}" for level in levels)
        raise BadBag(f"tiles of different resolutions cannot be one level of a bag: {there} µm per pixel")


def _column(name: str, values: Tensor, count: int) -> Tensor:
    dtype, row = COLUMNS[name]
    if dtype == torch.int64 and values.is_floating_point():
        raise BadBag(f"{name} must hold whole numbers, not {values.dtype}")
    if values.ndim != 1 + len(row) or any(
        want not in (None, got) for want, got in zip(row, values.shape[1:], strict=True)
    ):
        wanted = ", ".join(["N", *("D" if n is None else str(n) for n in row)])
        raise BadBag(f"{name} must be ({wanted}), not {tuple(values.shape)}")
    if len(values) != count:
        raise BadBag(f"{name} has {len(values)} rows, but valid has {count}")
    return values.to(dtype)


def _refuse_bad_tissue(tissue: Tensor | None) -> None:
    # asked this way round because NaN is neither inside nor outside
    if tissue is not None and not bool(((tissue >= 0) & (tissue <= 1)).all()):
        raise BadBag(f"tissue must lie in 0..1, not {tissue.min():g}..{tissue.max():g}")


def _refuse_non_finite(features: Tensor | None) -> None:
    if features is None or bool(features.isfinite().all()):
        return
    rows = (~features.isfinite().all(dim=1)).nonzero().flatten()
    raise BadBag(f"{len(rows)} of {len(features)} tiles have features that are not finite, the first in row {rows[0]}")


def _refuse_empty(bag: Bag) -> None:
    name = f"bag {bag.slide!r}"
    if len(bag) == 0:
        raise BadBag(f"{name} has no tile at all")
    if not any(bool(level.valid.any()) for level in bag.levels):
        raise BadBag(f"{name} has {len(bag)} tiles, but none with features to use: not encoded, or all invalid")
    dims = {level.features.shape[1] for level in bag.levels if level.features is not None}
    if len(dims) > 1:
        raise BadBag(f"{name} has levels with features of different lengths: {sorted(dims)}")


def _refuse_bad_order(levels: Sequence[BagLevel]) -> None:
    known = [level.mpp for level in levels if level.mpp is not None]
    if any(coarse <= fine for coarse, fine in pairwise(known)):
        raise BadBag(f"levels must go from coarse to fine, not {known} µm per pixel")


def _refuse_bad_parents(levels: Sequence[BagLevel]) -> None:
    if bool((levels[0].parent != -1).any()):
        raise BadBag("the coarsest level has no level above: its parents must all be -1")
    for above, level in pairwise(levels):
        if bool(((level.parent < 0) | (level.parent >= len(above))).any()):
            raise BadBag(f"parent must be a row of the level above, 0..{len(above) - 1}")
