"""Every format that OpenSlide knows. It is strict about damaged tiles, so its word on them is taken."""

from functools import cache
from pathlib import Path

import numpy as np
import openslide as library
from PIL.Image import Image

from ..errors import CorruptTiles
from ..scale import GIVEN_RANGE, ScaleTags, aperio_tags, resolution_tags
from ..slide import Box, Slide, make_levels

CACHE_BYTES = 64 << 20  # one for all slides of a process; OpenSlide's default is one of 32 MB for every handle
VERSION = f"openslide {library.__library_version__}"


@cache
def _shared_cache() -> library.OpenSlideCache:
    return library.OpenSlideCache(CACHE_BYTES)


def open(path: Path) -> Slide:
    return OpenSlideSlide(path)


def series(path: Path) -> str | None:
    """The id of the DICOM series that a file belongs to, None if it is none: one series is one slide."""
    try:
        with library.OpenSlide(path) as handle:
            return handle.properties.get("dicom.SeriesInstanceUID")
    except (library.OpenSlideError, OSError):
        return None


class OpenSlideSlide(Slide):
    def __init__(self, path: Path) -> None:
        self._handle = _open(path)
        properties = dict(self._handle.properties)
        super().__init__(
            path,
            make_levels(list(self._handle.level_dimensions)),
            scale_tags(properties),
            properties.get("openslide.vendor", ""),
            _bounds(properties),
        )
        self._downsamples = self._handle.level_downsamples

    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        scale = self.levels[level].downsample
        # OpenSlide divides by a downsample of its own, so the position goes through this level's whole pixels.
        factor = self._downsamples[level]
        corner = (round(round(x / scale[0]) * factor), round(round(y / scale[1]) * factor))
        try:
            image = self._handle.read_region(corner, level, (width, height))
        except library.OpenSlideError:
            image = self._read_again(corner, level, (width, height))
        return _on_white(np.asarray(image))

    def _read_again(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Image:
        """An error sticks to the handle, also one of a busy file server: reopen and try once more."""
        self._handle.close()
        self._handle = _open(self.path)
        try:
            return self._handle.read_region(corner, level, size)
        except library.OpenSlideError as error:
            self._handle.close()
            self._handle = _open(self.path)
            raise CorruptTiles(
                str(self.path), "encode", f"OpenSlide cannot decode the pixels at {corner}: {error}"
            ) from error

    def close(self) -> None:
        self._handle.close()


def _open(path: Path) -> library.OpenSlide:
    handle = library.OpenSlide(path)
    handle.set_cache(_shared_cache())
    return handle


def _on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    colour = rgba[..., :3].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha.astype(np.uint16)) + 127) // 255).astype(np.uint8)


def scale_tags(properties: dict[str, str]) -> ScaleTags:
    """What OpenSlide's properties say about the scale; Aperio's own text is read, as both readers must agree on it."""
    objective = properties.get("openslide.objective-power")
    description = properties.get("tiff.ImageDescription", "")
    if properties.get("openslide.vendor") == "aperio":
        return aperio_tags(properties.get("aperio.MPP"), objective, description)
    x, y = properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")
    if properties.get("openslide.vendor") == "generic-tiff":
        return resolution_tags(x, y, objective)
    if properties.get("openslide.vendor") == "dicom":
        # The standard fixes the unit of PixelSpacing, and a file may hold one coarse level alone.
        return ScaleTags(x, y, "DICOM PixelSpacing", objective, coarsest=GIVEN_RANGE[1])
    return ScaleTags(x, y, "openslide.mpp-x/y", objective)


def _bounds(properties: dict[str, str]) -> Box | None:
    names = ("x", "y", "width", "height")
    values = [properties.get(f"openslide.bounds-{name}") for name in names]
    return None if None in values else Box(*(float(v) for v in values if v is not None))
