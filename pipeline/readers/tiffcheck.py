"""What is wrong with a TIFF file, found before its pixels are used.

Decoders hide damage: a cut JPEG tile decodes to grey, a lost directory to a slide with fewer levels. Both are seen
here from the file's structure, for the price of reading its directories; single tiles are checked when they are read.
"""

import logging
import os
import re
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile

from .tiffbytes import (
    SHORT,
    Directory,
    claims,
    directory_fault,
    has_lost_directory,
    read_directory,
    unclaimed,
    unpack,
    value_spans,
)

# What tifffile only logs about a damaged file is an error here, told once and with the slide's name.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

JPEG_LIKE = {6, 7, 33007, 34892}  # TIFF compression codes whose tiles are JPEG streams
JPEG_2000 = {33003, 33005, 34712}
APERIO_YCBCR = 33003
WEBP = {34927, 50001}
DEFLATE = {8, 32946}
OLD_JPEG = 6
NEEDED = {258: "BitsPerSample", 259: "Compression", 262: "PhotometricInterpretation"}
MINISWHITE, GREY, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6  # photometric
OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")  # of OME-XML, one for each image
# What the numbers of a pixel are, by tag, and what they are where it is missing.
PIXEL = {258: 1, 262: None, 266: 1, 277: 1, 284: 1, 317: 1, 338: (), 530: (2, 2)}
LARGEST_TILE = 65535  # px of an edge: what a JPEG stream can say; libtiff miscounts far larger ones
INCH = 2  # of resolutions
TOLD = 0.002  # of a file that belongs to no image


class Structure(NamedTuple):
    """Why a file is not a whole TIFF file, and what is odd about it; "" if there is nothing to say.

    `tiled`: how many of its images are in tiles, as the levels of a slide are; `mixed`: these say different things
    about what the numbers of a pixel are; `scale`: what is odd about their resolution tags.
    """

    fault: str
    warning: str = ""
    tiled: int = 0
    mixed: bool = False
    scale: str = ""


def structure(file: BinaryIO) -> Structure:
    """Its directories, their tables, where its pixel data stand, and what of the file belongs to nothing."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tifffile.TiffFile(file) as tif:
        fault, directories = _chain(file, tif, size)
        if fault:
            return Structure(fault)
        offsets, counts, tiled = [], [], []
        for number, frame in enumerate(tif.pages):
            page = frame.aspage()
            below = page.pages if page.subifds and page.pages is not None else []  # OME-TIFF keeps its pyramid there
            for part in (page, *(sub.aspage() for sub in below)):
                if part is not page:
                    directories.append(read_directory(file, tif.tiff, part.offset))
                fault = _entries_fault(tif, directories[-1], size) if part is not page else ""
                fault = fault or _page_fault(part, size)
                if fault:
                    return Structure(f"{fault} (image {number} of the file)")
                offsets.append(np.asarray(part.dataoffsets, np.int64))
                counts.append(np.asarray(part.databytecounts, np.int64))
                tiled += [part] if part.is_tiled else []
        if tif.tiff.is_ndpi or any(page.aspage().compression == OLD_JPEG for page in tif.pages):
            return Structure("")  # data that no table names
        spans = np.concatenate(offsets), np.concatenate(counts), _others(tif, directories)
        fault, gaps = claims(*spans, size)
        share = unclaimed(gaps) / size
        words = f"{share:.1%} of the file belong to no image in it"
        if share > 0.5 and _is_reduced(tif.pages.first.aspage()):
            fault = fault or f"corrupt: {words}, and there is only a reduced one: an image directory is lost"
        warning = f"{words}: a level or tiles are lost, or a label was taken out" if share > TOLD else ""
        if not warning and has_lost_directory(file, tif.tiff, gaps):
            warning = "to one of its images no link leads: a level is lost, or a label was taken out"
        if not warning and tif.ome_metadata:
            warning = _ome_warning(tif.ome_metadata, tif.pages.first.aspage())
        mixed = len({_coding(page) for page in tiled}) > 1
        return Structure(fault, warning, len(tiled), mixed, _scale_warning(tiled))


def _ome_warning(xml: str, first: tifffile.TiffPage) -> str:
    """OME-XML says the size of every image once more."""
    said = OME_PIXELS.findall(xml)
    size = [rf"""\bSize{axis}=["']{side}["']""" for axis, side in (("X", first.imagewidth), ("Y", first.imagelength))]
    if not said or any(all(re.search(part, pixels) for part in size) for pixels in said):
        return ""
    return f"its first image has {first.imagewidth} x {first.imagelength} pixels, and none has by its OME-XML"


def _coding(page: tifffile.TiffPage) -> tuple[object, ...]:
    return tuple(page.tags[code].value if code in page.tags else missing for code, missing in PIXEL.items())


def _scale_warning(tiled: list[tifffile.TiffPage]) -> str:
    """Levels say the scale of their own pixels, or all of them that of the slide; only level 0 is ever asked."""
    said = [page for page in tiled if 282 in page.tags and page.resolution[0] > 0]
    for page in said[1:]:
        ratio, own = _per_cm(said[0]) / _per_cm(page), said[0].imagewidth / page.imagewidth
        if all(abs(ratio / usual - 1) > 0.01 + 2 / page.imagewidth for usual in (1, own)):
            return "the resolution tags disagree about the scale of its levels"
    return ""


def _per_cm(page: tifffile.TiffPage) -> float:
    """Pixels per centimetre in x, by tags 282 and 296; per unit of its own where the file knows none."""
    return float(page.resolution[0]) / (2.54 if page.resolutionunit == INCH else 1)


def _is_reduced(page: tifffile.TiffPage) -> bool:
    """True if the image is smaller than the one it was made of."""
    return bool(page.subfiletype & 1) or (page.is_svs and "->" in page.description.split("|")[0])


def _chain(file: BinaryIO, tif: tifffile.TiffFile, size: int) -> tuple[str, list[Directory]]:
    """Walk the directories to the closing 0; tifffile itself only logs a chain that leads nowhere."""
    form = tif.tiff
    found: list[Directory] = []
    file.seek(8 if form.version == 43 else 4)
    seen: set[int] = set()
    offset = unpack(form.offsetformat, file.read(form.offsetsize))
    if offset == 0:
        return "the file has no image directory", []
    while offset:
        if offset in seen:
            return "its chain of image directories runs in a circle", []
        seen.add(offset)
        directory = read_directory(file, form, offset) if 0 < offset < size else None
        if directory is None or len(directory.entries) == 0 or directory.following < 0:
            return f"truncated: an image directory should stand at byte {offset:,} of {size:,}", []
        fault = _entries_fault(tif, directory, size)
        if fault:
            return f"{fault} (image {len(found)} of the file)", []
        found.append(directory)
        offset = directory.following
    return "", found


def _entries_fault(tif: tifffile.TiffFile, directory: Directory, size: int) -> str:
    return "" if tif.tiff.is_ndpi else directory_fault(directory, size)  # NDPI keeps half of its numbers elsewhere


def _others(tif: tifffile.TiffFile, directories: list[Directory]) -> np.ndarray:
    """(m, 2) int64: start and bytes of the header, of the directories and of their values."""
    form = tif.tiff
    fixed = form.tagnosize + form.offsetsize
    heads = [(d.offset, fixed + len(d.entries) * form.tagsize) for d in directories]
    header = (0, 16 if form.version == 43 else 8)
    return np.concatenate([np.array([header, *heads], np.int64), *map(value_spans, directories)])


def _page_fault(page: tifffile.TiffPage, size: int) -> str:
    width, height, samples = page.imagewidth, page.imagelength, page.samplesperpixel
    if width < 1 or height < 1:
        return f"corrupt: an image of {width} x {height} pixels"
    # A label may do without the first, 1 bit, and an image in strips without the others.
    needed = NEEDED if page.is_tiled else dict(list(NEEDED.items())[: int(page.index == 0)])
    missing = next((name for tag, name in needed.items() if tag not in page.tags), "")
    if missing:
        return f"corrupt: {missing} is missing"
    offsets, counts = np.asarray(page.dataoffsets, np.int64), np.asarray(page.databytecounts, np.int64)
    if len(offsets) == 0 or len(offsets) != len(counts):
        return "corrupt: its table of tiles is missing"
    if 324 in page.tags and not (page.tilewidth and page.tilelength):
        return "corrupt: its tile size is missing"
    if page.is_tiled and max(page.tilewidth, page.tilelength) > LARGEST_TILE:
        return f"corrupt: tiles of {page.tilewidth} x {page.tilelength} pixels"
    expected = int(np.prod(page.chunked))
    if len(offsets) != expected and not page.is_ndpi:
        return f"corrupt: {len(offsets)} tiles for an image of {width} x {height}, which needs {expected}"
    beyond = int(np.count_nonzero((counts > 0) & (offsets + counts > size)))
    if beyond:
        return f"truncated: {beyond} of {len(offsets)} tiles lie beyond the end of the file"
    if page.compression == 1 and _is_askew(offsets, counts):
        return "corrupt: its tiles have the same size, but do not stand at the same distance"
    if np.any((offsets == 0) & (counts > 0)) or np.any((offsets < 0) | (counts < 0)):
        return "corrupt: tiles without an address"
    if page.jpegtables is not None and not (
        page.jpegtables[:2] == b"\xff\xd8" and page.jpegtables.rstrip(b"\0")[-2:] == b"\xff\xd9"
    ):
        return "corrupt: its JPEG tables are cut"
    if page.photometric in (RGB, YCBCR) and samples < 3:
        return f"corrupt: colours of {samples} samples"
    if page.is_tiled or page.index == 0:  # what is no level may be as it likes
        if 262 in page.tags and not isinstance(page.photometric, tifffile.PHOTOMETRIC):
            return f"corrupt: its colours are coded in an unknown way, {page.photometric}"
        if page.photometric == PALETTE and (samples != 1 or page.colormap is None):
            return f"corrupt: a palette for colours of {samples} samples"
    if samples > 1 and page.planarconfig == 1 and page.dtype is None:
        return "corrupt: unknown pixel type"
    return ""


def _is_askew(offsets: np.ndarray, counts: np.ndarray) -> bool:
    """True if one of many tiles of one size is a few bytes from its place, as the padding between them may hide."""
    steps = np.diff(np.sort(offsets[(counts > 0) & (counts == counts.max())]))
    if len(steps) < 2:
        return False
    off = np.abs(steps - np.median(steps))
    return bool(np.any((off > 0) & (off <= SHORT)))


def same_shape(size: tuple[int, int], small: tuple[int, int]) -> bool:
    """True if one factor makes both sides of an image those of a smaller one, to 2 pixels: each may be rounded."""
    factors = [(side / (less + 2), side / max(less - 2, 0.5)) for side, less in zip(size, small, strict=True)]
    return max(low for low, _ in factors) <= min(high for _, high in factors)


def tile_fault(page: tifffile.TiffPage, data: bytes) -> str:
    """Why the bytes of one tile or strip must not be decoded, or "".

    imagecodecs decodes a cut JPEG or JPEG 2000 stream without complaint, and allocates what a damaged header asks for.
    """
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if page.compression in JPEG_LIKE:
        return _jpeg_fault(data, rows, columns, page)
    if page.compression in JPEG_2000:
        return "" if data.rstrip(b"\0")[-2:] == b"\xff\xd9" else "its JPEG 2000 stream is cut"
    if page.compression == 50001 or data[:4] == b"RIFF":
        whole = len(data) >= 12 and int.from_bytes(data[4:8], "little") + 8 <= len(data) and any(data[-64:])
        return "" if whole else "its WebP stream is cut"
    return ""


def _jpeg_fault(data: bytes, rows: int, columns: int, page: tifffile.TiffPage) -> str:
    stream = data.rstrip(b"\0")
    if stream[:2] != b"\xff\xd8":
        return "it is not a JPEG stream"
    if stream[-2:] != b"\xff\xd9":
        return "its JPEG stream is cut"
    height, width, components = _frame_header(stream)
    if height > rows or width > columns or (page.is_tiled and (height, width) != (rows, columns)):
        return f"its JPEG header says {width} x {height}, the slide {columns} x {rows}"
    if components != page.samplesperpixel:
        return f"its JPEG header says {components} channels, the slide {page.samplesperpixel}"
    if page.jpegtables is None and not (b"\xff\xdb" in stream and b"\xff\xc4" in stream):
        return "the tables it needs are missing"
    return ""


FRAME = struct.Struct(">BBHBHHB")  # 0xFF, marker, length, bits, height, width, components


def _frame_header(stream: bytes) -> tuple[int, int, int]:
    """(height, width, components) of a JPEG stream; zeros where it has none."""
    at, end = 2, len(stream) - 10
    while at <= end:
        begins, marker, length, _, height, width, components = FRAME.unpack_from(stream, at)
        if begins != 0xFF:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return height, width, components
        at += 2 + length
    return 0, 0, 0
