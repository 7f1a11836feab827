"""The tiles of one level of many slides, in random order, as a training wants them: streamed from the slides.

An epoch takes a random part of all tiles. Slides come in random order, each is read block by block, every block once,
and a buffer of so many bytes mixes what was read. The order depends on the seed, not on which thread was faster.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from .errors import RunStopped, SlideError, UsageError
from .feed import Feed
from .fingerprint import stamp
from .meter import Meter
from .output import read_run
from .places import placed
from .quadtree import QuadTree
from .readers import open_slide
from .slide import Slide
from .store import BagStore, SlideGroup

MIXED_BYTES = 512 << 20  # of tiles that wait to be drawn; 2,800 of 256 px
QUEUE_BYTES = 256 << 20  # read ahead


class Asked:
    """Tiles of a slide on their way, as the feed wants it."""

    def __init__(
        self, slide: str, open: Callable[[], Slide], unchanged: Callable[[], bool], tree: QuadTree, wanted: np.ndarray
    ) -> None:
        self.slide, self.open, self.unchanged, self.tree, self.missing = slide, open, unchanged, tree, wanted
        self.error: SlideError | None = None
        self.meter = Meter()


@dataclass(frozen=True)
class Part:
    """A slide of the pool: its file, and the tree of which one level is taken."""

    name: str
    path: Path
    tree: QuadTree
    mpp: float | None  # as a table gives it
    reader: str
    size_bytes: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tree.encoded_rows)

    def asked(self, wanted: np.ndarray) -> Asked:
        """`wanted` (n,) bool over the level."""
        before = stamp(self.path)
        opened = partial(open_slide, self.path, self.mpp, self.reader, mpp_source="csv")
        return Asked(self.name, opened, lambda: stamp(self.path) == before, self.tree, wanted)


class Pool:
    """Slides of an output folder. `lost` says of slides that were read how many tiles had no pixels, or why."""

    def __init__(self, parts: list[Part], mixed_bytes: int = MIXED_BYTES) -> None:
        self.parts = parts
        self._first = np.cumsum([0, *(len(part) for part in parts)])
        self._mixed = max(1, mixed_bytes // (3 * self.tile_px**2))
        self.lost: dict[str, str] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def tile_px(self) -> int:
        return self.parts[0].tree.tile_px

    def draw(self, count: int, seed: tuple[int, ...], rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
        """`count` tiles (px, px, 3) uint8 in random order, none of them twice; of these the share of a process.

        A tile that cannot be read leaves its place to another one. RunStopped if there is none at all.
        """
        random = np.random.default_rng(seed)
        chosen = random.permutation(len(self))[:count]
        order = random.permutation(len(self.parts))
        place = np.empty(len(order), int)
        place[order] = np.arange(len(order))
        owner = self._owner(chosen)
        mine = np.array_split(np.lexsort((chosen, place[owner])), world)[
            rank
        ]  # slide after slide, so each is read once
        rows = chosen[mine]
        return self._mixing(
            (tile for _, tile in self._read(rows, owner[mine])), len(rows), np.random.default_rng([*seed, rank])
        )

    def sample(self, most: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """About as many tiles of each slide, together at most so many: (n, px, px, 3) uint8 and (n,) which part."""
        random = np.random.default_rng(seed)
        each = max(1, most // len(self.parts))
        rows = [np.sort(random.permutation(len(part))[:each]) + self._first[k] for k, part in enumerate(self.parts)]
        chosen = np.concatenate(rows)
        came = [(k, tile.copy()) for k, tile in self._read(chosen, self._owner(chosen))]
        if not came:
            raise RunStopped(f"not one tile could be read: {next(iter(self.lost.values()), 'there is none')}")
        return np.stack([tile for _, tile in came]), np.array([k for k, _ in came])

    def _owner(self, rows: np.ndarray) -> np.ndarray:
        """Which of the parts each row is of."""
        return np.searchsorted(self._first, rows, side="right") - 1

    def _read(self, rows: np.ndarray, owner: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(part, pixels) of rows, of which those of one slide stand together. What cannot be read is left out."""
        runs = np.split(rows, np.flatnonzero(np.diff(owner)) + 1)
        parts = {self.parts[k].name: int(k) for k in owner}
        came = dict.fromkeys(parts, 0)
        feed: Feed[Asked] = Feed(map(self._asked, runs), None, os.cpu_count() or 1, QUEUE_BYTES)
        with feed:
            for item in feed:
                if item is None:
                    continue
                source, tiles = item
                for tile in tiles or ():
                    if tile.pixels is not None:
                        came[source.slide] += 1
                        yield parts[source.slide], tile.pixels
                if tiles is None:
                    self._note(source, came[source.slide])

    def _asked(self, rows: np.ndarray) -> Asked:
        k = int(self._owner(rows[:1])[0])
        wanted = np.zeros(len(self.parts[k]), bool)
        wanted[rows - self._first[k]] = True
        return self.parts[k].asked(wanted)

    def _note(self, source: Asked, came: int) -> None:
        short = int(source.missing.sum()) - came
        if short:
            self.lost[source.slide] = str(source.error or f"{source.slide}: {short} tiles cannot be decoded")

    def _mixing(self, tiles: Iterable[np.ndarray], count: int, random: np.random.Generator) -> Iterator[np.ndarray]:
        held: list[np.ndarray] = []
        given = 0
        for tile in tiles:
            if len(held) == self._mixed:
                at = int(random.integers(len(held)))
                yield held[at]
                given += 1
                held[at] = tile.copy()  # it may be a view of a whole block
            else:
                held.append(tile.copy())
        if not held:
            raise RunStopped(f"not one tile could be read: {next(iter(self.lost.values()), 'there is none')}")
        order = random.permutation(len(held))
        while given < count:  # twice through where tiles are missing
            for at in order[: count - given]:
                yield held[at]
            given += min(count - given, len(held))


def read_pool(out: Path, slides: Iterable[str], level: float | None) -> tuple[Pool, float]:
    """The tiles of these slides at a level (µm/px, the finest unless told), and its µm/px. Raises UsageError."""
    root = read_run(out).get("root")
    if root is None:
        raise UsageError(f"{out} is no output folder of `slidestream run`")
    store, parts, mpps, absent = BagStore(out), [], set(), []
    for name in slides:
        group = store.group(name)
        tree = group.tree()
        k = _level(tree, level)
        part = _part(placed(root) / name, group, replace(tree, encoded=(k,)))
        absent += [] if _is_there(part) else [name]
        mpps.add(round(tree.levels[k].mpp, 6))
        parts.append(part)
    if absent:
        raise UsageError(
            f"{len(absent)} slides are not in {root} as they were when the tiles were chosen, {absent[0]} for one; "
            "tiles are read from the slides: put them back, or run `slidestream run` again"
        )
    sizes = {part.tree.tile_px for part in parts}
    if len(sizes) > 1 or len(mpps) > 1:
        raise UsageError(f"the slides have tiles of several sizes or scales ({sorted(sizes)} px, {sorted(mpps)} µm/px)")
    if not parts:
        raise UsageError(f"{out}: there is no slide with tiles")
    return Pool(parts), mpps.pop()


def _level(tree: QuadTree, wanted: float | None) -> int:
    known = [level.mpp for level in tree.levels]
    if wanted is None:
        return len(known) - 1
    near = [k for k, mpp in enumerate(known) if abs(mpp - wanted) <= 0.01 * wanted]
    if not near:
        raise UsageError(f"--level {wanted:g}: the tiles have {', '.join(f'{mpp:g}' for mpp in known)} µm/px")
    return near[0]


def _part(path: Path, group: SlideGroup, tree: QuadTree) -> Part:
    attrs = group.attrs
    slide, reader = attrs["slide"], attrs["reader"]["requested"]
    return Part(group.slide, path, tree, attrs["scale"]["given"], reader, slide["size_bytes"], slide["fingerprint"])


def _is_there(part: Part) -> bool:
    try:
        return stamp(part.path)[0] == part.size_bytes
    except OSError:
        return False
