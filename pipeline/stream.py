"""A slide and its tree → blocks → tiles of pixels, every level from one reading of one level of the file.

A tile holds the area means over its exact box. A coarse tile is averaged from the same pixels as the fine ones below
it: a file's own coarser levels differ from such averages, and scales that come from different filters do not match.

A block is what is read at once: a node of the tree with all below it, several such nodes where they are small, a part
of one where it is large. Blocks may be read by many threads; `joined` puts their tiles in order and makes the nodes
that are larger than a block.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from .area import fixed, halve, to_uint8
from .errors import CorruptTiles
from .quadtree import QuadTree
from .slide import READ_PX, Box, Slide, Window, read_mean, source_level, window

GROUP_PX = 2048
QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (column, row)


class Tile(NamedTuple):
    """`row` counts the encoded rows in table order; `pixels` (tile_px, tile_px, 3) uint8, None if unreadable.

    Where nothing was averaged they are a view of the block that was read: who keeps a few tiles of many copies them.
    """

    row: int
    pixels: np.ndarray | None


class Block(NamedTuple):
    """A square of side × side nodes of a level of the tree, rows low:high of its table.

    It has no rows where it is background, which has no tiles; the node above it shows its pixels all the same.
    """

    level: int
    column: int
    line: int
    side: int
    low: int
    high: int
    box: Box


class Part(NamedTuple):
    """A block that was read: its wanted tiles, and its pixels at its own level, None if they are not all readable."""

    tiles: list[Tile]
    pixels: np.ndarray | None


class TileReader:
    """The wanted tiles of a slide, each once. `wanted` (M,) bool over the encoded rows; None = all.

    What is read, and how it is averaged, does not depend on what is wanted: a resumed slide gets the same pixels.
    """

    def __init__(self, slide: Slide, tree: QuadTree, wanted: np.ndarray | None = None) -> None:
        self.slide, self.tree, self.px = slide, tree, tree.tile_px
        self._top, self._bottom = min(tree.encoded_levels), max(tree.encoded_levels)
        self.source = source_level(slide, tree.levels[-1].mpp)  # also where the finest level is not encoded
        self._scale = min(slide.levels[self.source].downsample)
        self._boxes = {k: tree.boxes(k) for k in range(self._top, self._bottom + 1)}
        counts = [level.stop - level.start if k in tree.encoded_levels else 0 for k, level in enumerate(tree.levels)]
        self._first = np.concatenate([[0], np.cumsum(counts)])  # the first encoded row of each level
        self._wanted = np.ones(self._first[-1], bool) if wanted is None else wanted
        self._want_all = bool(self._wanted.all())
        self.blocks = list(self._plan())
        slide.expect(self.source, [self._window(block) for block in self.blocks])

    # -- what to read --

    def _plan(self) -> Iterator[Block]:
        if self._fits(self._top):
            yield from (block for block in self._groups() if self._is_wanted(self._top, block.low, block.high))
            return
        for row in self._large_rows():
            yield from self._blocks_below(self._node(self._top, row))

    def _large_rows(self) -> list[int]:
        """The rows of the top level, where its nodes are larger than a block."""
        return [row for row in range(len(self.tree.levels[self._top].grid)) if self._is_wanted(self._top, row, row + 1)]

    def _fits(self, level: int) -> bool:
        return level == self._bottom or self.tree.levels[level].span_px <= READ_PX * self._scale

    def _groups(self) -> Iterator[Block]:
        """Rows of the top level in squares as large as is useful: their rows stand together, in Morton order."""
        part = self.tree.levels[self._top]
        side = 1
        if self.tree.regular and not self.tree.overlap:
            while 2 * side * part.span_px <= GROUP_PX * self._scale:
                side *= 2
        row = 0
        while row < len(part.grid):
            size = side
            while size > 1 and not self._is_square(part.grid, row, size):
                size //= 2
            yield self._square(self._top, row, size)
            row += size * size

    @staticmethod
    def _is_square(grid: np.ndarray, row: int, size: int) -> bool:
        """True if the size² rows from this one on are all the nodes of one square.

        All are looked at: the Morton order counts from the first node, which need not stand at a multiple of `size`.
        """
        rows = grid[row : row + size * size] - grid[row]
        if len(rows) < size * size or (grid[row] % size).any() or (rows[-1] != size - 1).any():
            return False
        return bool((rows >= 0).all() and (rows < size).all())

    def _square(self, level: int, row: int, size: int) -> Block:
        column, line = self.tree.levels[level].grid[row].tolist()
        x, y, width, height = self._boxes[level][row].tolist()
        return Block(level, column, line, size, row, row + size * size, Box(x, y, width * size, height * size))

    def _node(self, level: int, row: int) -> Block:
        return self._square(level, row, 1)

    def _blocks_below(self, node: Block) -> Iterator[Block]:
        if self._fits(node.level):
            yield node
        else:
            for _, _, quarter in self._quarters(node):
                yield from self._blocks_below(quarter)

    def _quarters(self, node: Block) -> Iterator[tuple[int, int, Block]]:
        """The four nodes below one, those of the background included, with the column and line of each."""
        children = {}
        if node.high > node.low:
            rows = self.tree.children(node.level, node.low)
            at = self.tree.levels[node.level + 1].grid[rows] - 2 * np.array([node.column, node.line])
            children = {(int(dx), int(dy)): int(child) for (dx, dy), child in zip(at, rows, strict=True)}
        for dx, dy in QUARTERS:
            width, height = node.box.width / 2, node.box.height / 2
            box = Box(node.box.x + dx * width, node.box.y + dy * height, width, height)
            low = children.get((dx, dy), 0)
            high = low + ((dx, dy) in children)
            yield dx, dy, Block(node.level + 1, 2 * node.column + dx, 2 * node.line + dy, 1, low, high, box)

    def _is_wanted(self, level: int, low: int, high: int) -> bool:
        """True if one of these nodes or one below them is wanted."""
        return self._want_all or any(
            k in self.tree.encoded_levels and self._wanted[self._first[k] + a : self._first[k] + b].any()
            for k, a, b in self._below(level, low, high)
        )

    def _below(self, level: int, low: int, high: int) -> list[tuple[int, int, int]]:
        """(level, first row, last row + 1) of nodes and their descendants, which stand together in every level."""
        found = [(level, low, high)]
        for k in range(level + 1, self._bottom + 1):
            low, high = np.searchsorted(self.tree.levels[k].parent, [low, high])
            found.append((k, int(low), int(high)))
        return found

    # -- reading --

    def nbytes(self, block: Block) -> int:
        """What reading a block takes at most: its source, its means, its tiles."""
        at = self._window(block)
        return 3 * at.width * at.height + 12 * self._side_px(block) ** 2

    @property
    def needed(self) -> int:
        """Pixels of the source under the finest tiles of all blocks."""
        each = (self.tree.levels[self._bottom].span_px / self._scale) ** 2
        below = [self._below(block.level, block.low, block.high)[-1] for block in self.blocks]
        return round(each * sum(high - low for _, low, high in below))

    def _window(self, block: Block) -> Window:
        side = self._side_px(block)
        return window(self.slide, block.box, (side, side), self.source)[0]

    def _side_px(self, block: Block) -> int:
        """The edge of a block in pixels of the finest level; background is read as coarse as it is shown."""
        return block.side * self.px << (self._bottom - block.level if block.high > block.low else 0)

    def read(self, block: Block) -> Part:
        """The wanted tiles of a block and of all below it. Damage costs the tiles that touch it, and no others."""
        side = self._side_px(block)
        try:
            pixels = read_mean(self.slide, block.box, (side, side), self.source, rounded=self._top == self._bottom)
        except CorruptTiles:
            return self._salvage(block)
        return self._cut(block, pixels) if block.high > block.low else Part([], pixels)

    def _salvage(self, block: Block) -> Part:
        """A damaged block, read again in parts."""
        if block.side > 1:
            step = (block.side // 2) ** 2
            squares = [self._square(block.level, row, block.side // 2) for row in range(block.low, block.high, step)]
            return Part([tile for square in squares for tile in self.read(square).tiles], None)
        if block.level == self._bottom:
            return Part(self._tiles(block.level, block.low, block.high, None), None)
        tiles: list[Tile] = []
        parts = []
        for _, _, quarter in self._quarters(block):
            parts.append(self.read(quarter))
            tiles += parts[-1].tiles
        pixels = self._quartered(parts)
        return Part([*tiles, *self._tiles(block.level, block.low, block.high, pixels)], pixels)

    def _quartered(self, parts: list[Part]) -> np.ndarray | None:
        """The pixels of a node from those of its quarters."""
        whole = np.empty((2 * self.px, 2 * self.px, 3), np.uint16)
        for (dx, dy), part in zip(QUARTERS, parts, strict=True):
            if part.pixels is None:
                return None
            whole[dy * self.px : (dy + 1) * self.px, dx * self.px : (dx + 1) * self.px] = fixed(part.pixels)
        return halve(whole)

    def _cut(self, block: Block, pixels: np.ndarray) -> Part:
        """The tiles of a block and all below it, from its pixels at the finest level."""
        if block.side == 1 and block.level == self._bottom:
            return Part(self._tiles(block.level, block.low, block.high, pixels), pixels)
        tiles: list[Tile] = []
        for k, low, high in reversed(self._below(block.level, block.low, block.high)):
            left, top = block.column << (k - block.level), block.line << (k - block.level)
            for row, (column, line) in enumerate(self.tree.levels[k].grid[low:high].tolist(), low):
                x, y = (column - left) * self.px, (line - top) * self.px
                tiles += self._tiles(k, row, row + 1, pixels[y : y + self.px, x : x + self.px])
            if k > block.level:
                pixels = halve(pixels)
        return Part(tiles, pixels)

    def _tiles(self, level: int, low: int, high: int, pixels: np.ndarray | None) -> list[Tile]:
        """The tile of a row, if the row is one and is wanted."""
        if level not in self.tree.encoded_levels:
            return []
        index = int(self._first[level]) + low
        if high == low or not self._wanted[index]:
            return []
        return [Tile(index, None if pixels is None else to_uint8(pixels))]

    # -- putting together --

    def joined(self, parts: Iterator[Part]) -> Iterator[list[Tile]]:
        """The tiles of all blocks, whose parts come in the order of `blocks`, and of the nodes above them."""
        if self._fits(self._top):
            yield from (part.tiles for part in parts)
            return
        for row in self._large_rows():
            yield from self._joined(self._node(self._top, row), parts)

    def _joined(self, node: Block, parts: Iterator[Part]) -> Generator[list[Tile], None, Part]:
        if self._fits(node.level):
            part = next(parts)
            yield part.tiles
            return part
        quarters = []
        for _, _, quarter in self._quarters(node):
            quarters.append((yield from self._joined(quarter, parts)))
        pixels = self._quartered(quarters)
        yield self._tiles(node.level, node.low, node.high, pixels)
        return Part([], pixels)


def stream_tiles(slide: Slide, tree: QuadTree, wanted: np.ndarray | None = None) -> Generator[Tile, None, None]:
    """The wanted tiles of a slide, each once, read block by block in this thread."""
    if not tree.levels:
        return
    reader = TileReader(slide, tree, wanted)
    for tiles in reader.joined(map(reader.read, reader.blocks)):
        yield from tiles
