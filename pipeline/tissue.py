"""Where the tissue is: classical segmentation of a slide's thumbnail. Nothing to download, nothing random.

    mask = find_tissue(slide)                      # bool image, level-0 px per mask px
    mask.fraction([[0, 0, 512, 512]])              # share of each level-0 box that is tissue

Brightfield tissue is what differs from the glass in optical density and in colour; fluorescence is what is brighter
than the dark. Otsu's threshold is trusted between absolute anchors only: it means nothing on a slide that is all glass
or all tissue. Areas are in um²; the few kernels in pixels belong to thumbnails of about 8 um/px.
"""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import binary_fill_holes
from scipy.signal import find_peaks
from skimage.filters import apply_hysteresis_threshold, threshold_otsu
from skimage.measure import label
from skimage.morphology import disk

from .config import TissueConfig
from .slide import Slide, Thumbnail, thumbnail

BLACK = 20  # grey values up to here are scanner gaps or borders, JPEG noise included: no stain is so dark at 8 um/px
WHITE = 254  # from here on it may be glass, or what a scanner writes where it did not scan
EVEN = 0.12  # the local standard deviation of ink, relative to its density; that of most tissue is larger
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
        x, y, width, height = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).T
        fx, fy = self.downsample
        x0, x1, y0, y1 = x / fx, (x + width) / fx, y / fy, (y + height) / fy
        tissue = self._before(x1, y1) - self._before(x0, y1) - self._before(x1, y0) + self._before(x0, y0)
        area = (x1 - x0) * (y1 - y0)
        return np.clip(tissue / np.where(area > 0, area, np.inf), 0, 1).astype(np.float32)

    def _before(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tissue left of x and above y, in mask px. Bilinear between cumulative sums is exact: a pixel is uniform."""
        total, (h, w) = self._integral, self.image.shape
        x, y = np.clip(x, 0, w), np.clip(y, 0, h)
        c, r = np.minimum(x.astype(np.int64), w - 1), np.minimum(y.astype(np.int64), h - 1)
        x, y = x - c, y - r
        above = total[r, c] * (1 - x) + total[r, c + 1] * x
        below = total[r + 1, c] * (1 - x) + total[r + 1, c + 1] * x
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
    _, mean, high = _across_channels(rgb)
    lit = mean[readable & (high > 12)]
    return lit.size > 0 and bool(np.median(lit) < 80 and np.percentile(high[readable], 25) < 50)


def _find_signal(rgb: np.ndarray, readable: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    dark = np.percentile(rgb[readable], 5, axis=0).astype(np.float32)
    _, _, signal = _across_channels(rgb - dark)
    signal = cv2.GaussianBlur(signal * readable, (0, 0), 2)  # cells are dots: this joins them to tissue
    high = np.clip(_otsu(signal[readable], unit=1), 6, 25)
    return apply_hysteresis_threshold(signal, high / 2, high), {}


def _find_stain(rgb: np.ndarray, readable: np.ndarray, config: TissueConfig) -> tuple[np.ndarray, dict[str, float]]:
    black = readable & (_across_channels(rgb)[2] <= BLACK)
    usable = readable & ~_grow(black, 2)
    od = _optical_density(rgb, usable)
    ink = _find_ink(od, usable) if config.remove_pen else np.zeros_like(usable)
    usable &= ~ink
    low, mean, high = _across_channels(cv2.GaussianBlur(od, (0, 0), 1))
    density = (mean + high - low) * usable  # a stain is dark and has a colour; a shadow is only dark
    start = np.clip(_otsu(density[usable], unit=0.01), config.min_density * 5 / 3, config.min_density * 10 / 3)
    found = apply_hysteresis_threshold(density, config.min_density, start)
    return found, {"pen marks removed": float(ink.mean()), "black areas removed": float(black.mean())}


def _optical_density(rgb: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """How much darker than the glass, per channel: 0 for glass, 1 for a tenth of its light."""
    glass = _glass_colour(rgb, usable)
    return np.clip(np.log10((glass + 1) / (rgb + np.float32(1))), 0, None) * usable[..., None]


def _glass_colour(rgb: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """(h, w, 3): the brightest frequent colour among what looks like glass, and its slow drift over the slide."""
    low, mean, high = _across_channels(rgb)
    plain = usable & (_local_std(mean) < 4) & (low > 170) & (low < WHITE) & (high - low < 35)
    if plain.sum() <= 0.005 * usable.sum():
        return np.full(rgb.shape, 245, np.float32)  # no glass in sight: tissue everywhere, or glass as white as can be
    counts = np.convolve(np.bincount(mean[plain].astype(int), minlength=260), np.ones(5), mode="same")
    peak = find_peaks(counts, height=0.2 * counts.max())[0][-1]
    glass = np.median(rgb[plain & (abs(mean - peak) <= 5)], axis=0).astype(np.float32)
    away = rgb - glass
    near = (plain & (_across_channels(abs(away))[2] < 25)).astype(np.float32)
    # vignetting: the mean difference of the glass nearby, by normalised convolution; none where there is no glass
    away, weight = (
        cv2.GaussianBlur(cv2.resize(v, (32, 32), interpolation=cv2.INTER_AREA), (0, 0), 4)
        for v in (away * near[..., None], near)
    )
    return glass + cv2.resize(away / (weight + 0.05)[..., None], rgb.shape[1::-1])


def _find_ink(od: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Felt pen: patches of a colour that no common stain has, or black, and more even than tissue."""
    strong, faint = _ink_coloured(od)
    _, mean, _ = _across_channels(od)
    inner = usable & (cv2.erode(strong.astype(np.uint8), np.ones((5, 5))) > 0)  # edges are never even
    even = inner & (_local_std(mean) < EVEN * mean)
    patches = label(strong & usable)
    inner_px, even_px = (np.bincount(patches[where], minlength=patches.max() + 1) for where in (inner, even))
    ink = ((inner_px >= 20) & (even_px > 0.7 * inner_px))[patches]
    return _grow(_grow(ink, 6) & faint, 2)  # with its thin and half-covered edges


def _ink_coloured(od: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the colour is that of ink: laid on strongly, and at all. r, g, b: which channels absorb, in shares."""
    low, mean, high = _across_channels(od)
    r, g, b = (od[..., i] / (3 * mean + 1e-6) for i in range(3))
    blue = (b < 0.2) & (r > 1.05 * g)  # haematoxylin absorbs more green than red, also where it looks blue
    green = (g < 0.28) & (r > g)
    red = (r < 0.08) & (b > 0.3) & (g > 0.3)  # eosin absorbs less blue, blood more red
    black = high - low < np.where(b < r, 0.35, 0.25) * mean  # it may be bluish; brownish black is DAB
    coloured = blue | green | red
    return coloured & (high > 0.4) | black & (mean > 0.55), coloured & (high > 0.1) | black & (mean > 0.1)


def _tidy(mask: np.ndarray, mpp: float, config: TissueConfig) -> np.ndarray:
    """Close cracks, drop debris, fill holes."""
    crack = min(max(1, round(16 / mpp)), 16)  # px; finer than 1 um/px are tiny slides only
    padded = np.pad(mask.astype(np.uint8), crack, mode="edge")
    mask = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disk(crack))[crack:-crack, crack:-crack] > 0
    # a crop may be smaller than the smallest piece of tissue worth keeping, and yet be all tissue
    mask = _drop_small(mask, min(config.min_area_um2 / mpp**2, 0.05 * mask.size))
    holes = binary_fill_holes(mask) & ~mask
    return mask | holes & ~_drop_small(holes, config.max_hole_um2 / mpp**2)


def _settle_unreadable(mask: np.ndarray, unreadable: np.ndarray, mpp: float) -> np.ndarray:
    """Add the unreadable regions that touch tissue, or could hide it: rather invalid tiles than lost tissue."""
    regions = label(unreadable, connectivity=2)
    tissue = np.bincount(regions.ravel()) > min(UNDECIDED_UM2 / mpp**2, 0.5 * mask.size)
    tissue[regions[_grow(mask, 3) & unreadable]] = True
    return mask | tissue[regions] & unreadable


def _otsu(values: np.ndarray, unit: float) -> float:
    """In whole units up to 255, as skimage 0.26 cannot bin floats that are all but equal."""
    return float(threshold_otsu(np.clip(values / unit, 0, 255).astype(np.uint8))) * unit if values.size else 0.0


def _drop_small(mask: np.ndarray, min_px: float) -> np.ndarray:
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return mask & (stats[:, cv2.CC_STAT_AREA] >= min_px)[regions]


def _grow(mask: np.ndarray, radius: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), disk(radius)) > 0


def _local_std(image: np.ndarray) -> np.ndarray:
    mean, square = cv2.blur(image, (5, 5)), cv2.blur(image * image, (5, 5))
    return np.sqrt(np.maximum(square - mean * mean, 0))


def _across_channels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest, mean and largest channel, float32: many times faster than numpy's reductions over so short an axis."""
    r, g, b = (plane.astype(np.float32) for plane in cv2.split(image))
    return np.minimum(np.minimum(r, g), b), (r + g + b) / 3, np.maximum(np.maximum(r, g), b)
