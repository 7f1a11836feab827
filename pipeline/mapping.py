"""Stitched attention of the slides of an output folder: read or encoded, laid over each other, stored, and drawn.

predictions/<model>.stitched/ of a slide: map (h, w), the mean over heads of per_head (heads, h, w); region (heads, h,
w), slide (h, w) and tile (h, w), the scales before they are stretched and multiplied; float32, NaN where the head never
looked. Cell (row, column) is the square of `cell_px` level-0 pixels at `origin_px` + (column, row) · cell_px.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heads import BadBag, Bag
from heads.hvit import HViT

from .batch import Progress, Silent
from .draw import overlay, save_png
from .errors import BrokenBag, SlideError, UsageError
from .meter import Meter
from .outcome import Outcome, Report, failed
from .prediction import Model, find_model, load_model, matching_features
from .quadtree import QuadTree, TreeLevel
from .regrid import Regrid
from .stitching import Look, Maps, Shifts, half, look, stitch_looks
from .store import BagStore, SlideGroup, read_attrs, short_name
from .tables import SlideNames


@dataclass(frozen=True)
class Wish:
    """What is asked of every slide."""

    shifts: Shifts
    gamma: float
    within_tiles: bool
    by_foreground: bool

    @property
    def encoded(self) -> int:
        """Grids of tiles that go through the encoder."""
        return len(self.shifts.grids) - (not self.within_tiles)

    def about(self) -> dict[str, Any]:
        return {
            "region_tiles": self.shifts.side,
            "shifts_tiles": self.shifts.steps,
            "scales": ["slide", "region", *(["tile"] if self.within_tiles else [])],
            "gamma": self.gamma,
            "normalisation": "min-max over the slide, each scale and head",
            "times_foreground": self.by_foreground,
        }


def stitch(
    out: str | Path,
    model: str | Path,
    *,
    stride: float | None = None,
    gamma: float = 0.5,
    within_tiles: bool = False,
    unweighted: bool = False,
    slides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Stitched attention of the slides of an output folder by a model with a hierarchical ViT (hvit, hipt).

    stride: tiles by which its regions are moved, half a region unless told; below one tile the tiles are encoded anew,
    and how many is said before it begins. gamma: see stitching.py. within_tiles: also the attention of the tile
    encoder, a ViT; again all tiles are encoded. unweighted: not times the share of a region's tiles that was looked at,
    so that regions with few tiles outshine all others. slides: these only. Writes predictions/<model>.stitched into
    the store and heatmaps/<model>/<slide>.stitched.png; what is there already is left. Raises UsageError, RunStopped.
    """
    started, place, progress = time.time(), Path(os.path.abspath(out)), progress or Silent()
    trained = load_model(find_model(model, place))
    head = require_regions(trained)
    if not 0 <= gamma <= 1:
        raise UsageError(f"gamma lies in 0..1, not {gamma:g}")
    side = head.options["side"]
    wish = Wish(Shifts(side, half(side) if stride is None else stride), gamma, within_tiles, not unweighted)
    sights = [_Sight(place, name, trained, wish) for name in _chosen(place, slides)]
    todo = [sight for sight in sights if not sight.is_current()]
    regrid = Regrid(place, trained, within_tiles, progress.tiles) if wish.encoded and todo else None
    progress.note(_cost(todo, trained, wish))
    progress.start(len(sights), len(todo))
    outcomes = [sight.row() for sight in sights if sight not in todo]
    meter = Meter()
    for sight in todo:
        begun = time.time()
        try:
            sight.stitch(regrid)
            outcome = sight.row()
        except SlideError as error:
            outcome = failed(sight.name, error)
        meter += sight.meter
        outcomes.append(outcome.after(time.time() - begun))
        progress.slide(outcomes[-1])
    return Report(tuple(sorted(outcomes, key=lambda row: row.slide)), meter, time.time() - started)


def require_regions(model: Model) -> HViT:
    """The head, if it attends within regions. Raises UsageError."""
    if not isinstance(model.head, HViT):
        raise UsageError(
            f"{model.name} is {model.about['head']}, which has no regions whose attention could be stitched: take a "
            "model of hvit or hipt (`slidestream predict` draws the attention of every head)"
        )
    return model.head


def _chosen(out: Path, wanted: Sequence[str]) -> list[str]:
    """Slides with features, or those that are named. Raises UsageError."""
    store = BagStore(out)
    names = store.slides()
    if not names:
        raise UsageError(f"{out} is no output folder of `slidestream run`, or holds no slide yet")
    if not wanted:
        return [name for name in names if store.group(name).status == "complete"]
    known = SlideNames(names)
    found = {name: known.find(name, out) for name in wanted}
    if lost := [name for name, slide in found.items() if slide is None]:
        raise UsageError(f"{out} holds no slide {lost[0]!r}; `slidestream status` tells what it holds")
    return sorted({slide for slide in found.values() if slide is not None})


def _cost(todo: "list[_Sight]", model: Model, wish: Wish) -> str:
    """What is going to be done, in one line, before it is."""
    count = len(wish.shifts.grids) * len(wish.shifts.whole)
    moved = f"{count} shifts of the regions, by {wish.shifts.stride:g} tiles"
    if not wish.encoded:
        return f"{moved}; stored features are used again, no tile is encoded"
    tiles = wish.encoded * sum(sight.tiles() for sight in todo)
    return f"{moved}; about {tiles} tiles to encode with {model.about['encoder_key']}, on {wish.encoded} grids"


class _Sight:
    """One slide, and what a model sees of it."""

    def __init__(self, out: Path, name: str, model: Model, wish: Wish) -> None:
        self.name, self.meter = name, Meter()
        self._out, self._model, self._wish = out, model, wish
        self._head = require_regions(model)
        self._group: SlideGroup = BagStore(out).group(name)
        self._key = f"{model.name}.stitched"
        place = Path(name)
        self._png = out / "heatmaps" / model.name / place.parent / short_name(place.name, ".stitched.png")

    def row(self) -> Outcome:
        return Outcome(self.name, "done", "predict", tiles=self.tiles())

    def is_current(self) -> bool:
        """True if these very maps of these very tiles are there."""
        attrs = read_attrs(self._group.path / "predictions" / self._key)
        wanted = self._wish.about() | {
            "status": "complete",
            "model_sha256": self._model.sha256,
            "tiles": self._group.attrs.get("hashes", {}).get("tiles"),
        }
        return self._png.is_file() and all(attrs.get(name) == value for name, value in wanted.items())

    def tiles(self) -> int:
        """That the head looks at; 0 where the slide is at fault, which is told in its turn."""
        try:
            return int(self._seen(self._level(self._group.tree())).sum())
        except SlideError:
            return 0

    def stitch(self, regrid: Regrid | None) -> None:
        """Maps into the store, after their picture. Raises SlideError."""
        key = matching_features(self._group, self._model)
        tree = self._group.tree()
        if not tree.regular or tree.overlap:
            raise BrokenBag(self.name, "predict", "its tiles overlap or stand on no grid, so they make no map")
        try:
            maps = stitch_looks(self._looks(key, tree, regrid), self._wish.shifts)
        except (BadBag, ValueError) as error:
            raise BrokenBag(self.name, "predict", str(error)) from error
        self._store(maps, tree, read_attrs(self._group.path / "features" / key)["feature_hash"])

    def _store(self, maps: Maps, tree: QuadTree, feature_hash: str) -> None:
        per_head = maps.stitched(self._wish.gamma)
        whole = per_head.mean(0)
        span = self._level(tree).span_px
        about = self._wish.about() | {
            "origin_px": [tree.origin[0] + maps.low[0] * span, tree.origin[1] + maps.low[1] * span],
            "cell_px": span / maps.per_tile,
            "feature_hash": feature_hash,
            "tiles": tree.hash,
            "model_sha256": self._model.sha256,
        }
        scales = " x ".join(self._wish.about()["scales"])
        shifts = f"{len(self._wish.shifts.steps)}^2 shifts by {self._wish.shifts.stride:g} tiles"
        caption = f"{self.name}   {self._model.name}: attention, {scales}, of {shifts}   colour: least to most"
        picture = overlay(
            self._group.thumbnail(), self._group.mask(), whole, about["origin_px"], about["cell_px"], caption
        )
        save_png(self._png, picture)
        arrays = {"map": whole, "per_head": per_head, "region": maps.region, "slide": maps.slide}
        arrays |= {} if maps.tile is None else {"tile": maps.tile}
        self._group.write_prediction(self._key, arrays, **about)

    def _level(self, tree: QuadTree) -> TreeLevel:
        """The level that the head reads."""
        wanted = self._model.level
        fit = [level for level in tree.levels if wanted is not None and abs(level.mpp / wanted - 1) < 0.01]
        if not fit:
            raise BrokenBag(self.name, "predict", f"it has no tiles of {wanted} µm/px, which {self._model.name} reads")
        return fit[0]

    def _seen(self, level: TreeLevel) -> np.ndarray:
        """(n,) bool: the tiles whose features the head reads."""
        masked, threshold = (self._head.options[name] for name in ("masked", "threshold"))
        return level.tissue > threshold if masked else np.ones(len(level.tissue), bool)

    def _looks(self, key: str, tree: QuadTree, regrid: Regrid | None) -> Iterator[Look]:
        """One for each grid of tiles."""
        wish, stored = self._wish, self._model.choose(BagStore(self._out).bag(self.name, key))
        pitch = self._level(tree).span_px / wish.shifts.parts
        for moved in wish.shifts.grids:
            bag, tile = stored, None
            if regrid is not None and (wish.within_tiles or moved != (0, 0)):
                by_px = (moved[0] * pitch, moved[1] * pitch)
                part = tree if moved == (0, 0) else regrid.tree(self._group, tree, by_px)
                level = self._level(part)
                seen = self._seen(level)
                if not seen.any():
                    continue
                made = regrid.encode(self._group, part, level, seen)
                self.meter += made.meter
                tile = made.attention
                if moved != (0, 0):
                    bag = Bag.flat(made.features, level.grid, level.tissue, made.valid, mpp=level.mpp, slide=self.name)
            yield look(self._head, bag, wish.shifts, moved, tile, wish.by_foreground)
