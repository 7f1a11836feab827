"""Every format that OpenSlide knows. It is strict about damaged tiles, so its word on them is taken."""

import builtins
import threading
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import openslide as library
import tifffile

from ..errors import CorruptTiles, UnreadableSlide, slide_door
from ..scale import GIVEN_RANGE, ScaleTags, aperio_tags, resolution_tags
from ..slide import Box, Slide, make_levels
from .tiffcheck import DEFLATE, JPEG_2000, JPEG_LIKE, WEBP, same_shape

CACHE_BYTES = 64 << 20  # one for all slides of a process; OpenSlide's default is one of 32 MB for every handle
VERSION = f"openslide {library.__library_version__}"


@cache
def _shared_cache() -> library.OpenSlideCache:
    return library.OpenSlideCache(CACHE_BYTES)


PLAIN_TIFF = ("aperio", "generic-tiff")  # one grid of tiles a level: TiffSlide reads these as well


def open(path: Path) -> Slide:
    slide = OpenSlideSlide(path)
    if slide.vendor in PLAIN_TIFF:
        slide.doubt = _doubt(path, slide)
    return slide


def _doubt(path: Path, slide: "OpenSlideSlide") -> str:
    """Where OpenSlide's own word on a TIFF file is not to be taken; refused where its pixels are certainly wrong."""
    with builtins.open(path, "rb") as file, tifffile.TiffFile(file) as tif:
        page = tif.pages.first
        planes = len(tif.series[0].pages)
        fault = _misread(page) if planes == 1 else f"it is a stack of {planes} images"  # the first would be shown
        if not all(same_shape(slide.size, (level.width, level.height)) for level in slide.levels):
            fault = "it has a level of another shape"  # stretched to that of the slide
        if tif.is_ome:
            fault = "it is an OME-TIFF, with levels and a scale of its own"  # both would be lost
    if fault:
        slide.close()
        raise UnreadableSlide(str(path), "open", f"{fault}, which OpenSlide misreads")
    # The native decoders of these do not notice damage, and are not faster (docs/performance.md).
    if page.compression in (*JPEG_2000, *WEBP):
        return ""
    reasons = [f"it interpolates between the pixels of levels {slide.interpolated}"] if slide.interpolated else []
    if page.compression in (*JPEG_LIKE, *DEFLATE):
        kind = "deflate" if page.compression in DEFLATE else "JPEG"
        reasons.append(f"it does not notice damage within {kind} tiles")
    return "; ".join(reasons) or "it is slower than native decoding"


def _misread(page: tifffile.TiffPage) -> str:
    """What libtiff's conversion to RGBA was seen to get wrong without an error."""
    turned = page.tags[274].value if 274 in page.tags else 1
    samples, bits = page.samplesperpixel, page.bitspersample
    if turned != 1:
        return f"its orientation tag is {turned}"  # each tile is mirrored in its place
    if page.sampleformat not in (None, 1) or bits not in (1, 2, 4, 8, 16):
        return f"its pixels are {page.dtype} of {bits} bits"  # signed as unsigned; others do not decode
    if samples > 4 or (samples == 4 and page.extrasamples and int(page.extrasamples[0]) == 0):
        return "it has a sample of unknown meaning"  # taken for alpha
    if page.photometric in (0, 1) and (samples > 1 or bits > 8):
        return f"it is grey with {samples} samples of {bits} bits"  # black at the border, alpha blended wrongly
    return ""


def series(path: Path) -> tuple[str, str] | None:
    """The ids of a DICOM file's series and of the file itself, None if OpenSlide does not open it.

    One series is one slide; two files with one id are copies and not two parts.
    """
    try:
        with library.OpenSlide(path) as handle:
            uid = handle.properties.get("dicom.SeriesInstanceUID")
    except (library.OpenSlideError, OSError):
        return None
    return (uid, _instance(path)) if uid else None


def _instance(path: Path) -> str:
    """MediaStorageSOPInstanceUID (0002,0003) of a DICOM file; OpenSlide tells only that of the whole slide."""
    with builtins.open(path, "rb") as file:
        head = file.read(4096)
    at = head.find(b"\x02\x00\x03\x00UI", 132)
    if at < 0:
        return ""
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    return head[at + 8 : at + 8 + length].rstrip(b"\0 ").decode("ascii", "replace")


class OpenSlideSlide(Slide):
    """One handle for each thread that reads: an error sticks to a handle, and a handle serves one thread at a time."""

    def __init__(self, path: Path) -> None:
        handle = _open(path)
        self._handles: dict[int, library.OpenSlide] = {threading.get_ident(): handle}
        properties = dict(handle.properties)
        super().__init__(
            path,
            make_levels(list(handle.level_dimensions)),
            scale_tags(properties),
            properties.get("openslide.vendor", ""),
            _bounds(properties),
        )
        self._downsamples = handle.level_downsamples

    @property
    def interpolated(self) -> list[int]:
        """The levels whose whole pixels have no whole position at level 0, where OpenSlide wants one."""
        return [k for k, factor in enumerate(self._downsamples) if abs(factor - round(factor)) > 1e-9]

    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        scale, (w, h) = self.levels[level].downsample, self.levels[level][:2]
        left, top = round(x / scale[0]), round(y / scale[1])
        out = np.full((height, width, 3), 255, np.uint8)
        # What lies outside is not asked for: OpenSlide rounds negative positions to whole pixels of the level.
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, w), min(top + height, h)
        if x1 > x0 and y1 > y0:
            out[y0 - top : y1 - top, x0 - left : x1 - left] = self._read_inside(x0, y0, level, (x1 - x0, y1 - y0))
        return out

    def _read_inside(self, x: int, y: int, level: int, size: tuple[int, int]) -> np.ndarray:
        # OpenSlide divides by a downsample of its own, so the position goes through this level's whole pixels.
        factor = self._downsamples[level]
        corner = (round(x * factor), round(y * factor))
        try:
            return self._region(corner, level, size)
        except library.OpenSlideError:
            if stuck := self._handles.pop(threading.get_ident(), None):
                stuck.close()  # the error may be that of a busy file server: once more, with a new handle
        with slide_door(str(self.path), "encode", CorruptTiles):
            return self._region(corner, level, size)

    def _region(self, corner: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
        thread = threading.get_ident()
        if thread not in self._handles:
            self._handles[thread] = _open(self.path)
        pixels = _on_white(np.asarray(self._handles[thread].read_region(corner, level, size)))
        self.cost.add(size[0] * size[1])
        return pixels

    def close(self) -> None:
        while self._handles:
            self._handles.popitem()[1].close()


def _open(path: Path) -> library.OpenSlide:
    handle = library.OpenSlide(path)
    handle.set_cache(_shared_cache())
    return handle


def _on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)  # ten times as fast as a copy by numpy
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
