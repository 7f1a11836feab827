"""Area means: pixels → fewer pixels, each the mean over its exact box.

Means are uint16 in 1/256 of a grey level, so that four halvings of whole pixels are exact and rounding to uint8 happens
once, at the end. OpenCV has a fast path for that; float32 costs three times as much.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from scipy import sparse

GREY = 256  # one grey level
STRIP_BYTES = 1 << 19  # of uint8 pixels averaged at once: what stays in the cache of a core
STRIP_CELLS = 32  # the same, where cells cut pixels and their weighted sums are float32


class Strip(NamedTuple):
    """The weights of a few cells, over pixels low:high."""

    low: int
    high: int
    matrix: sparse.csr_array


@dataclass(frozen=True, eq=False)
class Weights:
    """(cells, pixels) weights that average pixels over equal cells of one axis; `first` pixel has the first column."""

    matrix: sparse.csr_array
    first: int
    factor: int  # pixels per cell where every pixel belongs wholly to one cell, else 0

    @property
    def pixels(self) -> int:
        return int(self.matrix.shape[1])

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        """The same weights, a few cells at a time."""
        starts = range(0, self.matrix.shape[0], STRIP_CELLS)
        return tuple(_strip(self.matrix, start, start + STRIP_CELLS) for start in starts)


def _strip(matrix: sparse.csr_array, start: int, stop: int) -> Strip:
    part = slice(matrix.indptr[start], matrix.indptr[min(stop, matrix.shape[0])])
    rows = matrix.indptr[start : stop + 1] - matrix.indptr[start]
    low, high = int(matrix.indices[part].min()), int(matrix.indices[part].max()) + 1
    shape = (len(rows) - 1, high - low)
    return Strip(low, high, sparse.csr_array((matrix.data[part], matrix.indices[part] - low, rows), shape=shape))


@lru_cache(maxsize=512)
def weights(start: float, length: float, cells: int) -> Weights:
    """Weights over [start, start + length) with 0 ≤ start < 1, in pixels.

    An edge within a thousandth of a pixel of a pixel border is on it: the drift of floats must not widen a read.
    """
    edges = start + np.arange(cells + 1) * (length / cells)
    edges = np.where(np.abs(edges - np.rint(edges)) < 1e-3, np.rint(edges), edges)
    first, last = math.floor(edges[0]), math.ceil(edges[-1])
    borders = np.arange(first, last + 1, dtype=float)
    cuts = np.union1d(edges, borders)
    cuts = cuts[(cuts >= edges[0]) & (cuts <= edges[-1])]
    middle = (cuts[:-1] + cuts[1:]) / 2
    cell = np.clip(np.searchsorted(edges, middle, side="right") - 1, 0, cells - 1)
    pixel = np.floor(middle).astype(int) - first
    weight = (np.diff(cuts) / np.diff(edges)[cell]).astype(np.float32)
    matrix = sparse.csr_array((weight, (cell, pixel)), shape=(cells, last - first))
    whole = len(weight) == last - first and float(np.ptp(weight)) < 1e-6
    return Weights(matrix, first, (last - first) // cells if whole else 0)


def area_mean(pixels: np.ndarray, columns: Weights, rows: Weights, rounded: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 → (h, w, 3): uint8 as it is where a cell is a pixel, else uint16 in 1/256 of a grey level.

    rounded: uint8, where no coarser means are made of these. The values are those of `to_uint8`.
    """
    if columns.factor == rows.factor == 1:
        return pixels
    if rounded and columns.factor == rows.factor == 2:  # of whole numbers OpenCV rounds halves up, as we do
        return cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
    same = columns.factor == rows.factor and columns.factor
    mean = _whole_mean(pixels, columns.factor) if same else _cut_mean(pixels, columns.matrix, rows.strips)
    return to_uint8(mean) if rounded else mean


def _whole_mean(pixels: np.ndarray, factor: int) -> np.ndarray:
    """A few rows at a time, which are widened and averaged before they leave the cache."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    out = np.empty((height, width, 3), np.uint16)
    step = max(1, STRIP_BYTES // (pixels.shape[1] * 3 * factor))
    for y in range(0, height, step):
        strip, into = fixed(pixels[y * factor : (y + step) * factor]), out[y : y + step]
        cv2.resize(strip, (width, len(into)), dst=into, interpolation=cv2.INTER_AREA)
    return out


def _cut_mean(pixels: np.ndarray, columns: sparse.csr_array, strips: tuple[Strip, ...]) -> np.ndarray:
    (cells, width), parts = columns.shape, []
    for low, high, rows in strips:
        down = rows @ pixels[low:high].reshape(high - low, -1).astype(np.float32)
        turned = cv2.transpose(down.reshape(-1, width, 3))
        across = columns @ turned.reshape(width, -1)
        whole = cv2.addWeighted(across, GREY, across, 0, 0, dtype=cv2.CV_16U)  # scales and rounds
        parts.append(cv2.transpose(whole.reshape(cells, -1, 3)))
    return np.concatenate(parts)


def fixed(pixels: np.ndarray) -> np.ndarray:
    """uint8 → uint16 in 1/256 of a grey level; what is uint16 is so already."""
    return np.multiply(pixels, np.uint16(GREY), dtype=np.uint16) if pixels.dtype == np.uint8 else pixels


def halve(pixels: np.ndarray) -> np.ndarray:
    """(2h, 2w, 3) uint8 or uint16 → (h, w, 3) uint16: the mean of each four."""
    return _whole_mean(pixels, 2)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Whole grey levels, halves rounded up; what is uint8 is so already."""
    # OpenCV rounds halves to even: a quarter of the smallest step pushes them over and nothing else.
    return pixels if pixels.dtype == np.uint8 else cv2.convertScaleAbs(pixels, alpha=1 / GREY, beta=0.25 / GREY)
