"""Where the tissue is: classical segmentation of a slide's thumbnail. Nothing to download, nothing random.

    mask = find_tissue(slide)                      # bool image, level-0 px per mask px
    mask.fraction([[0, 0, 512, 512]])              # share of each level-0 box that is tissue

Brightfield tissue is what differs from the glass in optical density and in colour; fluorescence is what is brighter
than the dark. Otsu's threshold is trusted between absolute anchors only: it means nothing on a slide that is all glass
or all tissue. Areas are in um²; the few kernels in pixels belong to thumbnails of about 8 um/px.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import ArrayLike

from .config import TissueConfig
from .slide import Slide, Thumbnail, thumbnail

BLACK = 20  # grey values up to here are scanner gaps or borders, JPEG noise included: no stain is so dark at 8 um/px
WHITE = 254  # from here on it may be glass, or what a scanner writes where it did not scan
EVEN = 0.12  # the local standard deviation of ink, relative to its density; that of most tissue is larger
BAND_PX = 1 << 15  # pixels that are handled at once: some planes of them fit into the cache of a core
ROUNDING = 1e-6  # mask px: differences of sums over a mask of 10,000 × 10,000 px are exact to 1e-8
UNDECIDED_UM2 = 1e6  # a region on glass that cannot be read may hide tissue when it is larger


@dataclass(frozen=True, eq=False)
class TissueMask:
    """A bool image and where it lies on the slide. `downsample` is level-0 px per mask px, (x, y)."""

    image: np.ndarray  # (h, w)
    downsample: tuple[float, float]
    mpp: float
    method: str  # brightfield | fluorescence
    warnings: tuple[str, ...] = ()

    @property
    def area_mm2(self) -> float:
        return float(np.count_nonzero(self.image)) * self.mpp**2 / 1e6

    @cached_property
    def _integral(self) -> np.ndarray:
        return cv2.integral(self.image.astype(np.uint8))  # (h + 1, w + 1) int32

    def fraction(self, boxes: ArrayLike) -> np.ndarray:
        """Share of each box (x, y, width, height; level-0 px) that is tissue; outside the slide there is none."""
        return self.share(*np.asarray(boxes, dtype=np.float64).reshape(-1, 4).T)

    def share(self, x: np.ndarray, y: np.ndarray, width: np.ndarray | float, height: np.ndarray | float) -> np.ndarray:
        """The same of boxes whose parts broadcast: those of a grid are a row of x and a column of y."""
        fx, fy = self.downsample
        x0, x1, y0, y1 = x / fx, (x + width) / fx, y / fy, (y + height) / fy
        tissue = self._before(x1, y1) - self._before(x0, y1) - self._before(x1, y0) + self._before(x0, y0)
        tissue = np.where(tissue > ROUNDING, tissue, 0)  # none is none: masked heads see all that has any
        area = (x1 - x0) * (y1 - y0)
        return np.clip(tissue / np.where(area > 0, area, np.inf), 0, 1).astype(np.float32)

    def _before(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tissue left of x and above y, in mask px. Bilinear between cumulative sums is exact: a pixel is uniform."""
        total, (h, w) = self._integral, self.image.shape
        x, y = np.clip(x, 0, w), np.clip(y, 0, h)
        c, r = np.minimum(x.astype(np.int64), w - 1), np.minimum(y.astype(np.int64), h - 1)
        x, y = x - c, y - r
        at = r * (w + 1) + c
        above = total.take(at) * (1 - x) + total.take(at + 1) * x
        below = total.take(at + w + 1) * (1 - x) + total.take(at + w + 2) * x
        return above * (1 - y) + below * y


def find_tissue(slide: Slide, config: TissueConfig = TissueConfig()) -> TissueMask:
    """The tissue of a slide. Raises CorruptTiles if no part of the slide can be read."""
    return tissue_in(thumbnail(slide, config.tissue_mpp), config)


def tissue_in(view: Thumbnail, config: TissueConfig = TissueConfig()) -> TissueMask:
    """The tissue in a thumbnail that has been read already."""
    image, method, warnings = segment(view.rgb, view.mpp, config, view.unreadable)
    return TissueMask(image, view.downsample, view.mpp, method, warnings)


def segment(
    rgb: np.ndarray, mpp: float, config: TissueConfig = TissueConfig(), unreadable: np.ndarray | None = None
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """The tissue (h, w) bool in an image (h, w, 3) uint8; by which method; and what the user should know.

    `unreadable` pixels (h, w) never count in a threshold. They are tissue unless it is plain that they are not.
    """
    readable = np.ones(rgb.shape[:2], bool) if unreadable is None else ~unreadable.astype(bool)
    if is_fluorescence(rgb, readable):
        method, (found, shares) = "fluorescence", _find_signal(rgb, readable)
    else:
        method, (found, shares) = "brightfield", _find_stain(rgb, readable, config)
    mask = _tidy(found & readable, mpp, config)
    mask = _settle_unreadable(mask, ~readable, mpp)
    shares["unreadable areas counted as tissue"] = float((mask & ~readable).mean())
    warnings = tuple(f"{what} ({share:.1%} of the thumbnail)" for what, share in shares.items() if share > 0.0005)
    return mask, method, warnings


def is_fluorescence(rgb: np.ndarray, readable: np.ndarray) -> bool:
    """Dark, and what is lit is dim too. Black borders of a stained slide are dark, but what they frame is bright."""
    high = _brightest(rgb)
    lit = readable & (high > 12)
    if not lit.any() or 4 * np.count_nonzero(readable & (high < 50)) < np.count_nonzero(readable):
        return False
    _, mean, _ = _across_channels(rgb)
    return bool(np.median(mean[lit]) < 80 and np.percentile(high[readable], 25) < 50)


def _find_signal(rgb: np.ndarray, readable: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    dark = np.percentile(rgb[readable], 5, axis=0).astype(np.float32)
    _, _, signal = _across_channels(rgb - dark)
    signal = cv2.GaussianBlur(signal * readable, (0, 0), 2)  # cells are dots: this joins them to tissue
    high = np.clip(_otsu(signal, readable, unit=1), 6, 25)
    return _hysteresis(signal, high / 2, high), {}


def _find_stain(rgb: np.ndarray, readable: np.ndarray, config: TissueConfig) -> tuple[np.ndarray, dict[str, float]]:
    black = readable & (_brightest(rgb) <= BLACK)
    usable = readable & ~_grow(black, 2)
    od = _optical_density(rgb, usable)
    ink = _find_ink(od, usable) if config.remove_pen else np.zeros_like(usable)
    usable &= ~ink
    density = _density(cv2.GaussianBlur(od, (0, 0), 1), usable)
    start = np.clip(_otsu(density, usable, unit=0.01), config.min_density * 5 / 3, config.min_density * 10 / 3)
    found = _hysteresis(density, config.min_density, start)
    return found, {"pen marks removed": float(ink.mean()), "black areas removed": float(black.mean())}


def _optical_density(rgb: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """How much darker than the glass, per channel: 0 for glass, 1 for a tenth of its light."""
    od = _glass_colour(rgb, usable)
    for rows in _bands(rgb):
        part, light = od[rows], rgb[rows].astype(np.float32)
        part += 1
        light += 1
        part /= light
        np.log10(part, out=part)
        np.maximum(part, 0, out=part)
        part[~usable[rows]] = 0
    return od


def _density(od: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """How much stain, as one number: a stain is dark and has a colour; a shadow is only dark."""
    density = np.empty(usable.shape, np.float32)
    for rows in _bands(od):
        low, mean, high = _across_channels(od[rows])
        np.multiply(mean + high - low, usable[rows], out=density[rows])
    return density


def _glass_colour(rgb: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(h, w, 3): the brightest frequent colour among what looks like glass, and its slow drift over the slide."""
    plain, mean = np.empty(usable.shape, bool), np.empty(usable.shape, np.float32)
    for rows in _bands(rgb):
        low, mean[rows], high = _across_channels(rgb[rows])
        plain[rows] = usable[rows] & (low > 170) & (low < WHITE) & (high - low < 35)
    plain &= _local_std(mean) < 4
    if np.count_nonzero(plain) <= 0.005 * np.count_nonzero(usable):
        return np.full(rgb.shape, 245, np.float32)  # no glass in sight: tissue everywhere, or glass as white as can be
    counts = np.convolve(np.append(_count(mean, plain), [0] * 4), np.ones(5), mode="same")  # white may be a peak too
    peak = _last_peak(counts, 0.2 * counts.max())
    frequent = plain & (mean >= peak - 5) & (mean <= peak + 5)
    glass = [_median(_count(plane, frequent)) for plane in _planes(rgb)]
    near = plain & (cv2.inRange(rgb, np.floor(glass) - 24, np.ceil(glass) + 24) > 0)  # less than 25 away
    # vignetting: the mean difference of the glass nearby, by normalised convolution; none where there is no glass
    away = cv2.subtract(rgb, (*glass, 0), mask=near.view(np.uint8), dtype=cv2.CV_32F)  # type: ignore[call-overload]
    away, weight = (
        cv2.GaussianBlur(cv2.resize(v, (32, 32), interpolation=cv2.INTER_AREA), (0, 0), 4)
        for v in (away, near.astype(np.float32))
    )
    colour = cv2.resize(away / (weight + 0.05)[..., None], rgb.shape[1::-1])
    flat = colour.reshape(len(colour), -1)
    flat += np.tile(np.array(glass, np.float32), rgb.shape[1])
    return colour


def _find_ink(od: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Felt pen: patches of a colour that no common stain has, or black, and more even than tissue."""
    strong = _ink_coloured(od, 0.4, 0.55)
    inner = usable & (cv2.erode(strong.view(np.uint8), np.ones((5, 5))) > 0)  # edges are never even
    if not inner.any():
        return inner
    r, g, b = _planes(od)
    mean = (r + g + b) / 3
    even = inner & (_local_std(mean) < EVEN * mean)
    count, patches = _regions(strong & usable)
    inner_px, even_px = (np.bincount(patches[where], minlength=count) for where in (inner, even))
    found = (inner_px >= 20) & (even_px > 0.7 * inner_px)
    if not found.any():
        return np.zeros_like(usable)
    return _grow(_grow(found[patches], 6) & _ink_coloured(od, 0.1, 0.1), 2)  # with its thin and half-covered edges


def _ink_coloured(od: np.ndarray, dense: float, dark: float) -> np.ndarray:
    """Where the colour is that of ink and a channel of it is over `dense`; the mean of black has to be over `dark`."""
    coloured = np.zeros(od.shape[:2], bool)
    for rows in _bands(od):
        planes = _planes(od[rows])
        laid = np.maximum(np.maximum(planes[0], planes[1]), planes[2]) > 0.9 * min(dense, dark)  # the others cannot be
        r, g, b = (plane[laid] for plane in planes)
        low, mean, high = np.minimum(np.minimum(r, g), b), (r + g + b) / 3, np.maximum(np.maximum(r, g), b)
        total = 3 * mean + 1e-6
        r, g, b = r / total, g / total, b / total
        blue = (b < 0.2) & (r > 1.05 * g)  # haematoxylin absorbs more green than red, also where it looks blue
        green = (g < 0.28) & (r > g)
        red = (r < 0.08) & (b > 0.3) & (g > 0.3)  # eosin absorbs less blue, blood more red
        black = high - low < np.where(b < r, 0.35, 0.25) * mean  # it may be bluish; brownish black is DAB
        coloured[rows][laid] = (blue | green | red) & (high > dense) | black & (mean > dark)
    return coloured


def _tidy(mask: np.ndarray, mpp: float, config: TissueConfig) -> np.ndarray:
    """Close cracks, drop debris, fill holes."""
    crack = min(max(1, round(16 / mpp)), 16)  # px; finer than 1 um/px are tiny slides only
    padded = cv2.copyMakeBorder(mask.view(np.uint8), crack, crack, crack, crack, cv2.BORDER_REPLICATE)
    mask = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, _disk(crack))[crack:-crack, crack:-crack] > 0
    # a crop may be smaller than the smallest piece of tissue worth keeping, and yet be all tissue
    mask = _drop_small(mask, min(config.min_area_um2 / mpp**2, 0.05 * mask.size))
    holes = _holes(mask)
    return mask | holes & ~_drop_small(holes, config.max_hole_um2 / mpp**2)


def _settle_unreadable(mask: np.ndarray, unreadable: np.ndarray, mpp: float) -> np.ndarray:
    """Add the unreadable regions that touch tissue, or could hide it: rather invalid tiles than lost tissue."""
    if not unreadable.any():
        return mask
    _, regions = _regions(unreadable)
    tissue = np.bincount(regions.ravel()) > min(UNDECIDED_UM2 / mpp**2, 0.5 * mask.size)
    tissue[regions[_grow(mask, 3) & unreadable]] = True
    return mask | tissue[regions] & unreadable


def _hysteresis(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Above `low`, and connected to where it is above `high`."""
    above, seeds = image > np.float64(low), image > np.float64(high)  # a float32 has no 0.06 to compare with
    count, regions = _regions(above, neighbours=4)
    seeds[:, 1:] &= ~seeds[:, :-1]  # of those in a row the first speaks for all
    kept = np.zeros(count, bool)
    kept[regions[seeds]] = True
    return np.take(kept, regions)


def _holes(mask: np.ndarray) -> np.ndarray:
    """Background from which no way leads to the border, corners not counting as ways."""
    canvas = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(canvas, None, (0, 0), 2, flags=4)
    return canvas[1:-1, 1:-1] == 0


def _drop_small(mask: np.ndarray, min_px: float) -> np.ndarray:
    if not mask.any():
        return mask
    _, regions = _regions(mask)
    large = np.bincount(regions.ravel()) >= min_px
    return mask & np.take(large, regions)


def _regions(mask: np.ndarray, neighbours: int = 8) -> tuple[int, np.ndarray]:
    """(h, w) int32: the number of the region that each pixel belongs to, 0 outside; and how many there are with it."""
    count, regions = cv2.connectedComponents(mask.view(np.uint8), connectivity=neighbours)
    return count, regions


def _grow(mask: np.ndarray, radius: int) -> np.ndarray:
    return cv2.dilate(mask.view(np.uint8), _disk(radius)) > 0 if mask.any() else mask


def _disk(radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def _local_std(image: np.ndarray) -> np.ndarray:
    mean: np.ndarray = cv2.blur(image, (5, 5))
    variance: np.ndarray = cv2.blur(image * image, (5, 5))
    mean *= mean
    variance -= mean
    return np.sqrt(np.maximum(variance, 0, out=variance), out=variance)


def _otsu(values: np.ndarray, where: np.ndarray, unit: float) -> float:
    """The threshold that divides the values best, in whole units up to 255; the one value if there is but one."""
    counts = _count(values, where, unit)
    steps = np.flatnonzero(counts)
    if len(steps) < 2:
        return float(steps[0]) * unit if len(steps) else 0.0
    steps = np.arange(steps[0], steps[-1] + 1)
    share = counts[steps].astype(np.float32)
    below, above = np.cumsum(share), np.cumsum(share[::-1])[::-1]
    mean_below = np.cumsum(share * steps) / below
    mean_above = np.cumsum((share * steps)[::-1])[::-1] / above
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(steps[np.argmax(between)]) * unit


def _last_peak(counts: np.ndarray, height: float) -> int:
    """The last that is at least `height` and larger than what is beside it; the middle of those that are equal."""
    ends = np.append(np.flatnonzero(np.diff(counts)), len(counts) - 1)
    value = counts[ends]
    peaks = (value[1:-1] > value[:-2]) & (value[1:-1] > value[2:]) & (value[1:-1] >= height)
    last = np.flatnonzero(peaks)[-1] + 1
    return int(ends[last - 1] + 1 + ends[last]) // 2


def _median(counts: np.ndarray) -> float:
    """Of whole numbers, from how often each occurs."""
    ranks = np.cumsum(counts)
    middle = [(ranks[-1] - 1) // 2, ranks[-1] // 2]
    return float(np.searchsorted(ranks, middle, side="right").mean())


def _count(values: np.ndarray, where: np.ndarray, unit: float = 1) -> np.ndarray:
    """(256,) how often each number of whole units occurs; what is more than 255 is counted as 255."""
    counts = np.zeros(256, np.int64)
    for rows in _bands(values):  # of each OpenCV gives a float32, which is exact up to 16 million
        whole = np.clip(values[rows] / np.float32(unit), 0, 255).astype(np.uint8)
        counts += cv2.calcHist([whole], [0], where[rows].view(np.uint8), [256], [0, 256]).ravel().astype(np.int64)
    return counts


def _brightest(rgb: np.ndarray) -> np.ndarray:
    r, g, b = _planes(rgb)
    return np.maximum(np.maximum(r, g), b)


def _across_channels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest, mean and largest channel, float32: many times faster than numpy's reductions over so short an axis."""
    r, g, b = (plane.astype(np.float32, copy=False) for plane in _planes(image))
    return np.minimum(np.minimum(r, g), b), (r + g + b) / 3, np.maximum(np.maximum(r, g), b)


def _planes(image: np.ndarray) -> list[np.ndarray]:
    """The channels, each of a piece."""
    planes = [np.empty(image.shape[:2], image.dtype) for _ in range(3)]
    cv2.split(image, planes)  # without a place for them it copies them once more
    return planes


def _bands(image: np.ndarray) -> Iterator[slice]:
    """Rows to take at once where each pixel is for itself: what is computed on the way then stays in the cache."""
    rows = max(1, BAND_PX // image.shape[1])
    return (slice(top, top + rows) for top in range(0, image.shape[0], rows))
