"""Do the levels of a slide show one picture?

Asked where their tags say different things about what the numbers of a pixel are. Mostly they do all the same: the
tool that made the lower levels coded them in its own way. Where one of the tags is damaged, they do not.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..errors import CorruptTiles
from ..slide import READ_PX, Box, Slide, read_mean

CELLS = 8  # compared are the means of 8 x 8 cells: texture and rounding do not count
CELL_PX = 8  # of the coarser of two levels
PLACES = (0.5, 0.25, 0.75)  # of width and height
ALIKE = 12.0  # grey levels, the mean over a place; real levels differ by 3 at most, YCbCr taken for RGB by 27 or more


def levels_fault(slide: Slide) -> str:
    """Which two levels show different pictures, "" if none do. What cannot be decoded is not compared."""
    for finer, coarser in pairwise(range(len(slide.levels))):
        if any(_differ(slide, finer, coarser, box) for box in _places(slide, finer, coarser)):
            return (
                f"corrupt: levels {finer} and {coarser} show different pictures, and are said to be coded differently"
            )
    return ""


def _places(slide: Slide, finer: int, coarser: int) -> Iterator[Box]:
    """Parts of the slide, in the middle and around it, of whole pixels of the coarser level."""
    width, height, (fx, fy) = slide.levels[coarser]
    side = min(CELLS * CELL_PX, int(READ_PX * min(slide.levels[finer].downsample) / max(fx, fy)))
    if side == 0:
        return  # a pixel of it is more of the finer one than is read at once
    w, h = min(side, width), min(side, height)
    for across in PLACES:
        for down in PLACES:
            x, y = round(across * (width - w)), round(down * (height - h))
            yield Box(x * fx, y * fy, w * fx, h * fy)


def _differ(slide: Slide, finer: int, coarser: int, box: Box) -> bool:
    try:
        one, other = (read_mean(slide, box, (CELLS, CELLS), level, True).astype(float) for level in (finer, coarser))
    except CorruptTiles:
        return False
    return float(np.abs(one - other).mean()) > ALIKE
