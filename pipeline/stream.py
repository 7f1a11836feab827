"""A slide and its tree → tiles of pixels, every level from one reading of one level of the file.

A tile holds the area means over its exact box. A coarse tile is averaged from the same pixels as the fine ones below
it: a file's own coarser levels differ from such averages, and scales that come from different filters do not match.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from .errors import CorruptTiles
from .quadtree import QuadTree
from .slide import READ_PX, Box, Slide, read_box, source_level

Pixels = np.ndarray | None  # (tile_px, tile_px, 3) float32; None: unreadable
QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (column, row)


class Tile(NamedTuple):
    """`row` counts the encoded rows in table order; `pixels` (tile_px, tile_px, 3) uint8, None if unreadable."""

    row: int
    pixels: np.ndarray | None


def stream_tiles(slide: Slide, tree: QuadTree, wanted: np.ndarray | None = None) -> Generator[Tile, None, None]:
    """The wanted tiles of a slide, each once. `wanted` (M,) bool over the encoded rows; None = all.

    What is read, and how it is averaged, does not depend on what is wanted: a resumed slide gets the same pixels.
    """
    reader = _Reader(slide, tree, wanted)
    for row in range(len(tree.levels[reader.top].grid)):
        if reader.is_wanted(reader.top, row):
            yield from reader.node(reader.top, row, Box(*reader.boxes[reader.top][row]))


class _Reader:
    def __init__(self, slide: Slide, tree: QuadTree, wanted: np.ndarray | None) -> None:
        self.slide, self.tree, self.px = slide, tree, tree.tile_px
        self.top, self.bottom = min(tree.encoded_levels), max(tree.encoded_levels)
        self.source = source_level(slide, tree.levels[-1].mpp)  # also where the finest level is not encoded
        self.boxes = {k: tree.boxes(k) for k in range(self.top, self.bottom + 1)}
        counts = [level.stop - level.start if k in tree.encoded_levels else 0 for k, level in enumerate(tree.levels)]
        self.first = np.concatenate([[0], np.cumsum(counts)])  # the first encoded row of each level
        self.wanted = np.ones(self.first[-1], bool) if wanted is None else wanted

    def is_wanted(self, level: int, row: int) -> bool:
        """True if this node or one below it is wanted."""
        return any(
            k in self.tree.encoded_levels and self.wanted[self.first[k] + low : self.first[k] + high].any()
            for k, low, high in self._below(level, row)
        )

    def _below(self, level: int, row: int) -> list[tuple[int, int, int]]:
        """(level, first row, last row + 1) of a node and its descendants, which stand together in every level."""
        low, high = row, row + 1
        found = [(level, low, high)]
        for k in range(level + 1, self.bottom + 1):
            low, high = np.searchsorted(self.tree.levels[k].parent, [low, high])
            found.append((k, int(low), int(high)))
        return found

    def node(self, level: int, row: int | None, box: Box) -> Generator[Tile, None, Pixels]:
        """Yields the wanted tiles of a node and of all below it; returns the node's own pixels.

        `row` is None for a background node: it has no tiles, but the node above it shows its pixels all the same.
        """
        depth = self.bottom - level
        if depth == 0 or self._fits(box):
            try:
                side = self.px if row is None else self.px << depth
                pixels = read_box(self.slide, box, (side, side), self.source)
                return pixels if row is None else (yield from self._cut(level, row, pixels))
            except CorruptTiles:
                if depth == 0:
                    yield from self._tile(level, row, None)
                    return None
        return (yield from self._in_quarters(level, row, box))

    def _fits(self, box: Box) -> bool:
        return max(box.width, box.height) <= READ_PX * min(self.slide.levels[self.source].downsample)

    def _in_quarters(self, level: int, row: int | None, box: Box) -> Generator[Tile, None, Pixels]:
        """A node too large, or too damaged, to be read at once."""
        children = {} if row is None else self._children(level, row)
        whole = np.empty((2 * self.px, 2 * self.px, 3), np.float32)
        readable = True
        for dx, dy in QUARTERS:
            width, height = box.width / 2, box.height / 2
            quarter = Box(box.x + dx * width, box.y + dy * height, width, height)
            part = yield from self.node(level + 1, children.get((dx, dy)), quarter)
            if part is None:
                readable = False
            else:
                whole[dy * self.px : (dy + 1) * self.px, dx * self.px : (dx + 1) * self.px] = part
        pixels = _halve(whole) if readable else None
        yield from self._tile(level, row, pixels)
        return pixels

    def _children(self, level: int, row: int) -> dict[tuple[int, int], int]:
        """The kept children of a node by the quarter they stand in."""
        rows = self.tree.children(level, row)
        quarters = self.tree.levels[level + 1].grid[rows] - 2 * self.tree.levels[level].grid[row]
        return {(int(dx), int(dy)): int(child) for (dx, dy), child in zip(quarters, rows, strict=True)}

    def _cut(self, level: int, row: int, pixels: np.ndarray) -> Generator[Tile, None, Pixels]:
        """The tiles of a node and all below it, from its pixels at the finest level."""
        origin = self.tree.levels[level].grid[row].astype(np.int64)
        for k, low, high in reversed(self._below(level, row)):
            corners = (self.tree.levels[k].grid[low:high] - (origin << (k - level))) * self.px
            for at, (column, line) in zip(range(low, high), corners, strict=True):
                yield from self._tile(k, at, pixels[line : line + self.px, column : column + self.px])
            if k > level:
                pixels = _halve(pixels)
        return pixels

    def _tile(self, level: int, row: int | None, pixels: Pixels) -> Iterator[Tile]:
        if row is None or level not in self.tree.encoded_levels:
            return
        index = int(self.first[level]) + row
        if self.wanted[index]:
            yield Tile(index, None if pixels is None else np.rint(pixels).astype(np.uint8))


def _halve(pixels: np.ndarray) -> np.ndarray:
    """(2h, 2w, 3) float32 → (h, w, 3): the mean of each four."""
    return (pixels[0::2, 0::2] + pixels[1::2, 0::2] + pixels[0::2, 1::2] + pixels[1::2, 1::2]) * np.float32(0.25)
