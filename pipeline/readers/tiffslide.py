"""TIFF files whose tiles are decoded natively; TiffSlide reads their metadata, tifftiles.py their pixels."""

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import tiffslide as library

from ..errors import UnreadableSlide
from ..places import honest, is_remote, opened, read_at
from ..scale import ScaleTags, aperio_tags, resolution_tags
from ..slide import Slide, Window, make_levels
from .tiffcheck import (
    APERIO_YCBCR,
    GREY,
    JPEG_2000,
    JPEG_LIKE,
    MINISWHITE,
    OME_PIXELS,
    PALETTE,
    RGB,
    WEBP,
    YCBCR,
    same_shape,
)
from .tifftiles import TileCache, TilePage

MAX_TILE_BYTES = 512 << 20
VERSION = f"tiffslide {library.__version__}, tifffile {tifffile.__version__}"
UNKNOWN = 0  # of an extra sample
UNITS_UM = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}  # of OME-XML


def open(path: Path) -> Slide:
    return TiffSlideSlide(path)


class TiffSlideSlide(Slide):
    """`pages[level]` are the directories whose pixels make up a level: one, or one for each fluorescence channel."""

    def __init__(self, path: Path) -> None:
        # An open file and not a name: TiffSlide takes "::" in a name for a chain of addresses.
        self._file = opened(path)
        try:
            with honest(self._file):
                self._read_directories(path)
        except BaseException:
            self._file.close()
            raise

    def _read_directories(self, path: Path) -> None:
        library_slide = library.TiffSlide(self._file)
        tif = library_slide.ts_tifffile
        self._pages = _level_pages(path, tif)
        self._colours = _channel_colours(self._pages[0])
        sizes = [(pages[0].imagewidth, pages[0].imagelength) for pages in self._pages]
        properties = library_slide.properties
        super().__init__(
            path, make_levels(sizes), _scale_tags(properties, tif), properties.get("tiffslide.vendor") or "tiff"
        )
        if is_remote(path):
            self.doubt = _better_from_a_disk(tif, self._pages[0][0])
        self.images = sum(map(len, self._pages))
        self._cache, where = TileCache(), read_at(self._file)
        numbers = count()
        self._tiles = [
            [TilePage(path, where, page, next(numbers), f"level {level}", self._cache, self.cost) for page in pages]
            for level, pages in enumerate(self._pages)
        ]
        if any(page.holds_more() for pages in self._tiles for page in pages):
            raise UnreadableSlide(str(path), "open", "corrupt: its tiles have more pixels than their size allows")

    def expect(self, level: int, windows: Sequence[Window]) -> None:
        for page in self._tiles[level]:
            page.expect(windows)

    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        scale = self.levels[level].downsample
        left, top = round(x / scale[0]), round(y / scale[1])
        pages = self._tiles[level]
        if len(pages) == 1:
            out = np.empty((height, width, 3), np.uint8)
            if not pages[0].covers(left, top, width, height):
                out.fill(255)
            pages[0].paste(out, left, top)
            return out
        return self._mixed(pages, level, left, top, width, height)

    def _mixed(self, pages: list[TilePage], level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Fluorescence: the sum of the channels in their colours. Dark is the background, but outside is white."""
        mixed = np.zeros((height, width, 3), np.float32)
        for page, colour in zip(pages, self._colours, strict=True):
            plane = np.zeros((height, width, 3), np.uint8)
            page.paste(plane, left, top)
            mixed += np.multiply.outer(plane[..., 0].astype(np.float32), colour)
        out = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
        rows, columns = top + np.arange(height), left + np.arange(width)
        out[(rows < 0) | (rows >= self.levels[level].height)] = 255
        out[:, (columns < 0) | (columns >= self.levels[level].width)] = 255
        return out

    def close(self) -> None:
        self._cache.clear()
        self._file.close()


def _better_from_a_disk(tif: tifffile.TiffFile, page: tifffile.TiffPage) -> str:
    """What OpenSlide would read, if it could read from an object store: it knows how these are made, we guess."""
    software = f"{page.description[:400]} {page.software}".lower()
    makes = ("leica" if tif.is_scn else "", "philips" if tif.is_philips else "", "ventana" if tif.is_bif else "")
    make = next(filter(None, (*makes, "trestle" if "medscan" in software else "")), "")
    if make:
        return f"OpenSlide knows how files of {make.title()} are to be read"
    if page.compression in (*JPEG_2000, *WEBP):
        return "OpenSlide notices damage within JPEG 2000 and WebP tiles"
    return ""


def _level_pages(path: Path, tif: tifffile.TiffFile) -> list[list[tifffile.TiffPage]]:
    """The directories of each level, finest first.

    Found by what they are (same pixel type, same aspect, ever smaller, tiled as level 0 is), because tifffile takes
    the second directory of an Aperio file for the thumbnail even where there is none.
    """
    series = tif.series[0]
    if series.axes == "CYX" and len(series.pages) == series.shape[0]:
        levels = [[page.aspage() for page in level.pages if page is not None] for level in series.levels]
        for page in levels[0]:
            _refuse_unsupported(path, page, series.axes)
        return levels
    base = series.keyframe
    _refuse_unsupported(path, base, series.axes)
    if not base.is_tiled:
        return [[base]]
    candidates = [page for page in (*tif.pages, *_sub_pages(base)) if isinstance(page, tifffile.TiffPage)]
    levels = [[base]]
    for page in sorted((p for p in candidates if _is_level_of(p, base)), key=lambda p: -p.imagewidth):
        if page.imagewidth < levels[-1][0].imagewidth:
            levels.append([page])
    return levels


def _sub_pages(page: tifffile.TiffPage) -> list[Any]:
    return list(page.pages) if page.subifds and page.pages is not None else []  # OME-TIFF keeps its pyramid there


def _is_level_of(page: tifffile.TiffPage, base: tifffile.TiffPage) -> bool:
    same = ("bitspersample", "samplesperpixel", "planarconfig")
    if (
        page.imagewidth >= base.imagewidth
        or not page.is_tiled
        or any(getattr(page, n) != getattr(base, n) for n in same)
    ):
        return False
    return same_shape((base.imagewidth, base.imagelength), (page.imagewidth, page.imagelength))


def _refuse_unsupported(path: Path, page: tifffile.TiffPage, axes: str) -> None:
    bits, samples = page.bitspersample, page.samplesperpixel
    fault = ""
    if page.is_ndpi:
        fault = "its tiles are pieces of one JPEG stream (NDPI)"
    elif axes not in ("YXS", "YX", "CYX") or page.planarconfig != 1:
        fault = f"its pixels are laid out as {axes} (a stack or separate planes), not as one colour image"
    elif page.photometric not in (MINISWHITE, GREY, RGB, PALETTE, YCBCR) or samples > 4 or _is_coloured_grey(page):
        fault = f"its colours are coded as {getattr(page.photometric, 'name', page.photometric)} with {samples} samples"
    elif samples in (2, 4) and page.extrasamples[:1] in ((), (UNKNOWN,)):
        fault = f"it does not say what the last of its {samples} samples is"
    elif page.compression == APERIO_YCBCR or (page.photometric == YCBCR and page.compression not in JPEG_LIKE):
        fault = "its colours are coded as YCbCr by another codec than JPEG, which is not converted"
    elif (
        page.dtype is None
        or page.dtype.kind not in "ub"
        or bits not in (1, 8, 16)
        or (page.photometric == PALETTE and bits > 8)
    ):
        fault = f"its pixels are {page.dtype} of {bits} bits"
    elif int(np.prod(page.chunks)) * page.dtype.itemsize > MAX_TILE_BYTES:
        fault = f"its tiles of {page.chunks} pixels are too large to decode at once"
    if fault:
        raise UnreadableSlide(str(path), "open", f"{fault}, which is not supported")


def _is_coloured_grey(page: tifffile.TiffPage) -> bool:
    """Three samples that are called grey may be red, green and blue, but not if they are inverted or in a JPEG."""
    grey = page.photometric in (MINISWHITE, GREY) and page.samplesperpixel > 2
    return grey and (page.photometric == MINISWHITE or page.compression in JPEG_LIKE)


def _channel_colours(pages: list[tifffile.TiffPage]) -> list[np.ndarray]:
    """The display colour of each channel as RGB weights: what the file says (PerkinElmer), else red, green, blue."""
    colours = []
    for number, page in enumerate(pages):
        said = re.search(r"<Color>(\d+),(\d+),(\d+)</Color>", page.description)
        fallback = np.eye(3, dtype=np.float32)[number % 3]
        colours.append(np.array(said.groups(), np.float32) / 255 if said else fallback)
    return colours


def _scale_tags(properties: Any, tif: tifffile.TiffFile) -> ScaleTags:
    objective = properties.get("tiffslide.objective-power")
    objective = None if objective is None else str(objective)
    if properties.get("tiffslide.vendor") == "aperio":
        description = tif.pages.first.description
        mpp = re.search(r"\|\s*MPP\s*=\s*([^|\s]+)", description)
        return aperio_tags(mpp.group(1) if mpp else None, objective, description)
    if tif.ome_metadata and (said := _ome_mpp(tif.ome_metadata)):
        return ScaleTags(*said, "OME-XML PhysicalSize", objective)
    x, y = (properties.get(f"tiffslide.mpp-{axis}") for axis in "xy")
    return resolution_tags(None if x is None else str(x), None if y is None else str(y), objective)


def _ome_mpp(xml: str) -> tuple[str, str] | None:
    """PhysicalSizeX and Y of the first image in µm, as text; None where they are missing or in no unit of length."""
    pixels = OME_PIXELS.search(xml)
    if not pixels:
        return None
    found = []
    for axis in "XY":
        size = re.search(rf'PhysicalSize{axis}="([^"]+)"', pixels.group())
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', pixels.group())
        factor = UNITS_UM.get(unit.group(1) if unit else "µm")
        if not size or factor is None:
            return None
        try:
            found.append(f"{float(size.group(1)) * factor:.10g}")
        except ValueError:
            found.append(size.group(1))  # not a number: said where the scale is resolved
    return found[0], found[1]
