"""What people annotated: which file is of which slide, and the file as a mask over the slide.

    found, notes = find_annotations("annotations/", {"case1/a.svs": Path("slides/case1/a.svs")})
    mask = read_annotation(found["case1/a.svs"], slide_size, slide_mpp)     # TissueMask: True where it is annotated

GeoJSON (QuPath and others) and ASAP XML hold polygons in level-0 pixels. A mask image (PNG, BMP, TIFF) lies over the
whole slide at any downsample; every pixel that is not zero is annotated, in colours one of which a channel is not, and
none that is fully transparent.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from .errors import SlideError, UnreadableSlide, UsageError, slide_door
from .labels import listed
from .shapes import read_shapes, shapes_mask
from .slide import MAX_PIXELS
from .tables import SlideNames
from .tissue import TissueMask

SHAPES = frozenset([".geojson", ".json", ".xml"])
IMAGES = frozenset([".png", ".bmp"])
TIFFS = frozenset([".tif", ".tiff"])
ENDINGS = ("_mask", "_anno", "_annotation", "_annotations")  # what may stand after the slide's name
CELLS = 1 << 26  # of a mask that is drawn or chosen here; with its integral image 0.3 GB
ASPECT = 0.01  # by which a mask may be wider or higher than its slide


def find_annotations(folder: str | Path, slides: Mapping[str, Path]) -> tuple[dict[str, Path], list[str]]:
    """{slide: its annotation} and notes. `slides`: names → files, which are not taken for annotations.

    A file is named after the slide or its stem (`a.svs.xml`, `a.xml`, `a_mask.png`) and stands in the folder that the
    slide has below its root, or at the top where the stem is that of one slide only. Raises UsageError if it is not
    clear whose a file is, or none is of these slides.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder of annotations")
    names, themselves = SlideNames(slides), {os.path.realpath(path) for path in slides.values()}
    of: dict[str, list[Path]] = defaultdict(list)
    nobodys, faults = [], []
    for path in _candidates(root):
        if os.path.realpath(path) in themselves:
            continue
        try:
            slide = _slide_of(path, root, names)
        except UsageError as error:
            faults.append(str(error))
            continue
        if slide is None:
            nobodys.append(path.relative_to(root).as_posix())
        else:
            of[slide].append(path)
    for slide, paths in of.items():
        if len(paths) > 1:
            there = ", ".join(path.relative_to(root).as_posix() for path in paths)
            faults.append(f"{root}: more than one annotation of {slide}: {there}; leave one of them there")
    if faults:
        raise UsageError("\n".join(faults))
    if not of:
        first = Path(min(slides, default="a.svs"))
        wanted = f"{first.with_suffix('')}.geojson, .xml, _mask.png"
        raise UsageError(f"{root}: no file is named after a slide here, as {wanted} would be after {first}")
    return {slide: paths[0] for slide, paths in sorted(of.items())}, [
        note for note in [listed("annotations are of no slide here", nobodys)] if note
    ]


def _candidates(root: Path) -> Iterator[Path]:
    """Sorted; output folders of ours, full of pictures that are named after slides, are left out."""
    for folder, names, files in os.walk(root):
        if "run.json" in files:
            names[:] = []
            continue
        names[:] = sorted(name for name in names if not name.startswith(".") and not name.endswith(".zarr"))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SHAPES | IMAGES | TIFFS:
                yield Path(folder, name)


def _slide_of(path: Path, root: Path, names: SlideNames) -> str | None:
    name = path.relative_to(root).with_suffix("").as_posix()
    for ending in ("", *ENDINGS):
        found = names.find(name.removesuffix(ending), path) if name.endswith(ending) else None
        if found is not None:
            return found
    return None


def read_annotation(path: Path, size: tuple[int, int], slide_mpp: float) -> TissueMask:
    """The annotation of a slide of `size` (width, height), level-0 px. Raises UsageError that names the file."""
    if path.suffix.lower() in SHAPES:
        return _drawn(path, size, slide_mpp)
    try:
        with slide_door(str(path), "open"):
            image = _tiff(path, size) if path.suffix.lower() in TIFFS else _picture(path, size)
    except SlideError as error:
        raise UsageError(f"{path}: not a usable mask: {error.reason}") from error
    downsample = (size[0] / image.shape[1], size[1] / image.shape[0])
    return TissueMask(image, downsample, slide_mpp * math.sqrt(downsample[0] * downsample[1]), "annotation")


def _drawn(path: Path, size: tuple[int, int], slide_mpp: float) -> TissueMask:
    """In cells of a pixel, or as many as there may be."""
    mask = shapes_mask(read_shapes(path), size, slide_mpp, max(1.0, math.sqrt(size[0] * size[1] / CELLS)))
    if not mask.image.any():
        raise UsageError(
            f"{path}: none of its polygons lies on the slide of {size[0]} x {size[1]} px; are they in level-0 pixels?"
        )
    return mask


def _picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    with Image.open(path, formats=("PNG", "BMP")) as image:
        _require_fit(path, image.size, size)
        values = np.asarray(image)
        if image.mode in ("LA", "RGBA"):
            return np.asarray(values[..., :-1].any(axis=-1) & (values[..., -1] > 0))
        return np.asarray(values != 0 if values.ndim == 2 else values.any(axis=-1))


def _tiff(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The largest level of a pyramid that is not too large."""
    with tifffile.TiffFile(path) as tif:
        pages = [level.keyframe for level in tif.series[0].levels]
        fitting = (page for page in pages if page.imagewidth * page.imagelength <= CELLS)
        page = next(fitting, pages[-1])
        _require_fit(path, (page.imagewidth, page.imagelength), size)
        ends = np.add(page.dataoffsets, page.databytecounts)
        if len(ends) != np.prod(page.chunked) or (ends > os.path.getsize(path)).any():
            raise UnreadableSlide(str(path), "open", "it is cut: pixels lie beyond the end of the file")
        values = np.asarray(page.asarray())
        channels = page.samplesperpixel if page.planarconfig == 1 else 1
        return np.asarray(values.reshape(-1, page.imagelength, page.imagewidth, channels).any(axis=(0, 3)))


def _require_fit(path: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    if found[0] * found[1] > MAX_PIXELS:
        raise UsageError(f"{path}: {found[0]} x {found[1]} pixels are too many for a mask; save a smaller one")
    if abs(found[0] / found[1] / (size[0] / size[1]) - 1) > ASPECT:
        raise UsageError(
            f"{path}: a mask of {found[0]} x {found[1]} px does not lie over a slide of {size[0]} x {size[1]} px: they "
            f"differ in shape by more than {ASPECT:.0%}"
        )
