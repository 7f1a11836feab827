"""A slide: levels of pixels and one number, the µm per pixel of level 0, with the evidence for it.

Positions are (x, y) in level-0 pixels from the image origin, sizes are (width, height), images are (H, W, 3) uint8 RGB.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from .area import Weights, area_mean, weights
from .errors import CorruptTiles, UnreadableSlide
from .scale import ScaleTags

MAX_PIXELS = 1 << 28  # of a picture in memory, 0.8 GB: a kilobyte can declare more than any machine has
THUMBNAIL_PIXELS = 1 << 27  # at most: to find the tissue on it takes 35 bytes for each
UNREADABLE = 0.5  # of a thumbnail, at most
READ_PX = 4096  # the longest edge that is read at once: bounds memory to 50 MB a read


class Box(NamedTuple):
    """A rectangle in level-0 pixels; the edges may lie between pixels."""

    x: float
    y: float
    width: float
    height: float


class Level(NamedTuple):
    """One resolution of the file; `downsample` is level-0 pixels per pixel of this level, (x, y)."""

    width: int
    height: int
    downsample: tuple[float, float]


class Window(NamedTuple):
    """Whole pixels of a level of a slide."""

    x: int
    y: int
    width: int
    height: int


class ReadCost:
    """What reading a slide has cost so far, over all threads: pixels decoded, and seconds of waiting for the disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pixels = 0
        self.disk = 0.0

    def add(self, pixels: int, disk: float = 0.0) -> None:
        with self._lock:
            self.pixels += pixels
            self.disk += disk


class Slide(ABC):
    """An open slide. Readers subclass it and implement `read`; everything else is derived.

    `mpp` and `mpp_source` are set by `readers.open_slide`, which decides what counts as evidence.
    """

    mpp: float
    mpp_source: str

    def __init__(
        self, path: Path, levels: list[Level], tags: ScaleTags, vendor: str, bounds: Box | None = None
    ) -> None:
        self.path = path
        self.levels = levels
        self.tags = tags
        self.vendor = vendor
        self.images = len(levels)  # of the file, of which the levels are: one each, or one for each channel
        self.bounds = bounds  # the scanned part, where the format has one
        self.reader = ""
        self.reader_version = ""
        self.refusals: tuple[str, ...] = ()  # why the readers that were tried before this one refused
        self.doubt = ""  # why another reader of the same file is to be preferred
        self.warnings: tuple[str, ...] = ()
        self.cost = ReadCost()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of level 0 in pixels."""
        return self.levels[0].width, self.levels[0].height

    @abstractmethod
    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 of `level`, with its upper-left corner at (x, y).

        The corner is given in level-0 pixels and rounded to the grid of the level; the size is in pixels of the level.
        Outside the slide is white, alpha is blended on white. Raises CorruptTiles where pixels cannot be decoded;
        nothing is ever made up in their place. Threads may read at the same time.
        """

    def expect(self, level: int, windows: Sequence[Window]) -> None:  # noqa: B027 - a reader need not care
        """Told what is going to be read, each window once, so that what two of them share is decoded only once."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_levels(sizes: list[tuple[int, int]]) -> list[Level]:
    """Levels from their sizes, finest first.

    A downsample that is an integer up to rounding of the size is that integer: 2967 → 741 is 4 and not 4.004, which
    would misplace the last row by three pixels.
    """
    (width, height), levels = sizes[0], []
    for w, h in sizes:
        factor = round(width / w)
        rounded = all(big // factor <= small <= -(-big // factor) for big, small in ((width, w), (height, h)))
        levels.append(Level(w, h, (float(factor), float(factor)) if rounded else (width / w, height / h)))
    return levels


def source_level(slide: Slide, mpp: float) -> int:
    """The coarsest level that is at least as fine as `mpp` (1 % of tolerance), else level 0."""
    fit = [i for i, level in enumerate(slide.levels) if slide.mpp * max(level.downsample) <= mpp * 1.01]
    return max(fit, key=lambda i: slide.levels[i].downsample, default=0)


def window(slide: Slide, box: Box, shape: tuple[int, int], level: int) -> tuple[Window, Weights, Weights]:
    """The pixels of `level` that `shape` = (width, height) equal cells of `box` touch, and their weights (x, y)."""
    scale = slide.levels[level].downsample
    left, top = box.x / scale[0], box.y / scale[1]
    columns, rows = weights(left % 1, box.width / scale[0], shape[0]), weights(top % 1, box.height / scale[1], shape[1])
    corner = math.floor(left) + columns.first, math.floor(top) + rows.first
    return Window(*corner, columns.pixels, rows.pixels), columns, rows


def read_mean(slide: Slide, box: Box, shape: tuple[int, int], level: int, rounded: bool = False) -> np.ndarray:
    """(height, width, 3): the area means of `level` over `shape` = (width, height) equal cells of `box`.

    uint8 if they are `rounded` or a cell is a pixel of the level, else uint16 in 1/256 of a grey level (see area.py).
    The box need not lie on pixel borders: a pixel that is cut counts by the part inside. Raises CorruptTiles.
    """
    at, columns, rows = window(slide, box, shape, level)
    scale = slide.levels[level].downsample
    pixels = slide.read(at.x * scale[0], at.y * scale[1], level, at.width, at.height)
    return area_mean(pixels, columns, rows, rounded)


@dataclass(frozen=True)
class Thumbnail:
    """rgb (h, w, 3) uint8; downsample = level-0 px per thumbnail px (x, y); unreadable (h, w) bool."""

    rgb: np.ndarray
    downsample: tuple[float, float]
    mpp: float
    unreadable: np.ndarray


def thumbnail(slide: Slide, mpp: float, min_px: int = 64) -> Thumbnail:
    """The whole slide at about `mpp`, finer where its short side would have less than `min_px` pixels.

    Read in blocks, so that a slide of one huge level costs time but not memory. Raises UnreadableSlide where the
    thumbnail itself would be huge, as that of a file that is damaged or of a coarse one at a fine `mpp`; CorruptTiles
    where most of it cannot be decoded.
    """
    factor = max(1.0, min(mpp / slide.mpp, min(slide.size) / min_px))
    width, height = (max(1, round(side / factor)) for side in slide.size)
    if width * height > THUMBNAIL_PIXELS:
        fault = f"its picture of {width} x {height} pixels would be too large; look for tissue at more µm per pixel"
        raise UnreadableSlide(str(slide.path), "segment", fault)
    fx, fy = slide.size[0] / width, slide.size[1] / height
    level = source_level(slide, slide.mpp * min(fx, fy))
    step = max(1, int(READ_PX * max(slide.levels[level].downsample) / max(fx, fy)))
    rgb = np.full((height, width, 3), 255, np.uint8)
    unreadable = np.zeros((height, width), bool)
    for y in range(0, height, step):
        for x in range(0, width, step):
            w, h = min(step, width - x), min(step, height - y)
            try:
                rgb[y : y + h, x : x + w] = read_mean(slide, Box(x * fx, y * fy, w * fx, h * fy), (w, h), level, True)
            except CorruptTiles:
                _salvage(slide, rgb, unreadable, (x, y, w, h), (fx, fy), level)
    if unreadable.mean() > UNREADABLE:
        raise CorruptTiles(str(slide.path), "segment", f"{unreadable.mean():.1%} of its pixels cannot be decoded")
    return Thumbnail(rgb, (fx, fy), slide.mpp * math.sqrt(fx * fy), unreadable)


def _salvage(
    slide: Slide,
    rgb: np.ndarray,
    unreadable: np.ndarray,
    part: tuple[int, int, int, int],
    scale: tuple[float, float],
    level: int,
) -> None:
    """Read a damaged part again in quarters, down to about 64 pixels of the level, so that little else is lost."""
    x, y, w, h = part
    fx, fy = scale
    try:
        rgb[y : y + h, x : x + w] = read_mean(slide, Box(x * fx, y * fy, w * fx, h * fy), (w, h), level, True)
        return
    except CorruptTiles:
        if max(w, h) == 1 or max(w * fx, h * fy) <= 64 * max(slide.levels[level].downsample):
            unreadable[y : y + h, x : x + w] = True
            return
    for dy, dh in ((0, h // 2), (h // 2, h - h // 2)):
        for dx, dw in ((0, w // 2), (w // 2, w - w // 2)):
            if dw and dh:
                _salvage(slide, rgb, unreadable, (x + dx, y + dy, dw, dh), scale, level)
