"""How many µm a pixel is, and how we know: from a tag of the file, from a table, or not at all.

A wrong resolution spoils features without a sign, so there is no default: what is not believable is refused.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .errors import MissingMpp, TooCoarse

RESOLUTION_TAG = "TIFF resolution tag"
MPP_RANGE = (0.05, 20.0)  # what a tag is believed
GIVEN_RANGE = (0.01, 500.0)  # what a person is believed: there are macro images at 165 µm/px


@dataclass(frozen=True)
class ScaleTags:
    """What the file itself says about its scale, unparsed: µm per pixel in x and y, where that stood, the objective."""

    x: str | None = None
    y: str | None = None
    origin: str = ""
    objective: str | None = None
    refused: str = ""  # why a value that stands in the file is no evidence
    coarsest: float = MPP_RANGE[1]  # the largest value that is believed
    odd: str = ""  # what in the file speaks against it, and is no reason not to believe it


class Scale(NamedTuple):
    """The µm per pixel of level 0, where the figure is from (`tag: …`, `csv`, `argument`), and what is odd about it."""

    mpp: float
    source: str
    warnings: tuple[str, ...]


def aperio_tags(mpp: str | None, objective: str | None, description: str) -> ScaleTags:
    first_line = description.split("|")[0]
    reduced = "it belongs to the slide that this image was reduced from" if "->" in first_line else ""
    return ScaleTags(mpp, mpp, "aperio.MPP", objective, f"aperio.MPP is no evidence: {reduced}" if reduced else "")


def resolution_tags(x: str | None, y: str | None, objective: str | None = None) -> ScaleTags:
    """TIFF resolution tags; 72 and 96 dpi are what image editors write when they know nothing."""
    try:
        dpi = 25400 / float(x) if x is not None else 0.0
    except (ValueError, ZeroDivisionError):
        dpi = 0.0
    default = next((d for d in (72, 96) if abs(dpi - d) < 0.6), None)
    refused = (
        f"its TIFF resolution tag says {default} dpi, which image editors write when they know nothing"
        if default
        else ""
    )
    return ScaleTags(x, y, RESOLUTION_TAG, objective, refused)


def resolve_scale(path: str, tags: ScaleTags, given: float | None = None, source: str = "argument") -> Scale:
    """The µm per pixel of level 0: what was `given`, else what the file says, else MissingMpp with the line to add."""
    if given is not None:
        _check_given(path, given, source)
        said = _parse(tags.x)
        odd = said is not None and not tags.refused and abs(said / given - 1) > 0.05
        return Scale(given, source, (f"the {source} says {given:g} µm/px, the file's own tag {tags.x}",) if odd else ())
    x, y = _parse(tags.x), _parse(tags.y if tags.y is not None else tags.x)
    fault = tags.refused or _fault(tags, x, y)
    if fault or x is None or y is None:
        raise MissingMpp(path, "open", f"{fault}. Add its line to a CSV and pass --mpp-csv:  {csv_line(path)}")
    mpp = (x + y) / 2
    return Scale(mpp, f"tag: {tags.origin}", tuple(_oddities(tags, x, y, mpp)))


def csv_line(path: str) -> str:
    quoted = '"' + path.replace('"', '""') + '"' if any(c in path for c in ',"\n\r') else path
    return f"{quoted},<µm per pixel>"


def _check_given(path: str, given: float, source: str) -> None:
    low, high = GIVEN_RANGE
    if not (math.isfinite(given) and low <= given <= high):
        raise MissingMpp(path, "open", f"the {source} says {given} µm/px; a value between {low} and {high:g} is needed")


def _parse(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _fault(tags: ScaleTags, x: float | None, y: float | None) -> str:
    low, high = MPP_RANGE[0], tags.coarsest
    if tags.x is None:
        return "the file does not say how many µm a pixel is"
    if x is None or y is None:
        return f"{tags.origin} is {tags.x!r}, which is not a number"
    if not all(math.isfinite(v) and low <= v <= high for v in (x, y)):
        return f"{tags.origin} says {tags.x} µm/px, outside the believable {low}-{high:g}"
    if abs(x - y) > 0.05 * max(x, y):
        return f"{tags.origin} says {x:g} µm/px in x but {y:g} in y, which differ by more than 5 %"
    return ""


def _oddities(tags: ScaleTags, x: float, y: float, mpp: float) -> Iterator[str]:
    if tags.odd:
        yield tags.odd
    if abs(x - y) > 0.005 * mpp:
        yield f"µm/px in x ({x:g}) and y ({y:g}) differ; their mean is used"
    power = _parse(tags.objective)
    if power and power > 0 and not 1 / 1.6 < mpp * power / 10 < 1.6:  # 20x is near 0.5 µm/px, 40x near 0.25
        yield f"{mpp:g} µm/px disagrees with the objective tag {power:g}x (usually {10 / power:g} µm/px)"


def check_resolution(path: str, slide_mpp: float, mpp: float, allow_upsampling: bool = False) -> None:
    """TooCoarse if level 0 is more than 10 % coarser than the asked `mpp`: nothing is made up by enlarging."""
    if slide_mpp > 1.1 * mpp and not allow_upsampling:
        raise TooCoarse(
            path,
            "open",
            f"level 0 has {slide_mpp:g} µm/px, coarser than the asked {mpp:g}. "
            f"Ask for --mpp {slide_mpp:g} or coarser, or pass --allow-upsampling",
        )
