"""What is wrong with a TIFF file, found before its pixels are used.

Decoders hide damage: a cut JPEG tile decodes to grey, a lost directory to a slide with fewer levels. Both are seen
here from the file's structure, for the price of reading its directories; single tiles are checked when they are read.
"""

import logging
import os
import struct
from typing import BinaryIO

import numpy as np
import tifffile

# What tifffile only logs about a damaged file is an error here, told once and with the slide's name.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

JPEG_LIKE = {6, 7, 33007, 34892}  # TIFF compression codes whose tiles are JPEG streams
JPEG_2000 = {33003, 33005, 34712}
APERIO_YCBCR = 33003
WEBP = {34927, 50001}
DEFLATE = {8, 32946}


def structure_fault(file: BinaryIO) -> str:
    """Why the file is not a whole TIFF file, or "": its directories, their tables, and where its pixel data end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tifffile.TiffFile(file) as tif:
        fault = _chain_fault(file, tif, size)
        if fault:
            return fault
        for number, frame in enumerate(tif.pages):
            page = frame.aspage()
            below = page.pages if page.subifds and page.pages is not None else []  # OME-TIFF keeps its pyramid there
            for part in (page, *below):
                fault = _page_fault(part.aspage(), size)
                if fault:
                    return f"{fault} (image {number} of the file)"
    return ""


def _chain_fault(file: BinaryIO, tif: tifffile.TiffFile, size: int) -> str:
    """Walk the directories to the closing 0; tifffile itself only logs a chain that leads nowhere."""
    form = tif.tiff
    file.seek(8 if form.version == 43 else 4)
    seen: set[int] = set()
    offset = _unpack(form.offsetformat, file.read(form.offsetsize))
    if offset == 0:
        return "the file has no image directory"
    while offset:
        if offset in seen:
            return "its chain of image directories runs in a circle"
        seen.add(offset)
        file.seek(offset)
        entries = _unpack(form.tagnoformat, file.read(form.tagnosize))
        file.seek(offset + form.tagnosize + max(entries, 0) * form.tagsize)
        following = _unpack(form.offsetformat, file.read(form.offsetsize))
        if offset >= size or entries < 1 or following < 0:
            return f"truncated: an image directory should stand at byte {offset:,} of {size:,}"
        offset = following
    return ""


def _unpack(form: str, data: bytes) -> int:
    return struct.unpack(form, data)[0] if len(data) == struct.calcsize(form) else -1


def _page_fault(page: tifffile.TiffPage, size: int) -> str:
    width, height, samples = page.imagewidth, page.imagelength, page.samplesperpixel
    if width < 1 or height < 1:
        return f"corrupt: an image of {width} x {height} pixels"
    if 258 not in page.tags and (page.is_tiled or page.index == 0):  # a label may do without it: 1 bit
        return "corrupt: BitsPerSample is missing"
    offsets, counts = np.asarray(page.dataoffsets, np.int64), np.asarray(page.databytecounts, np.int64)
    if len(offsets) == 0 or len(offsets) != len(counts):
        return "corrupt: its table of tiles is missing"
    if 324 in page.tags and not (page.tilewidth and page.tilelength):
        return "corrupt: its tile size is missing"
    expected = int(np.prod(page.chunked))
    if len(offsets) != expected and not page.is_ndpi:
        return f"corrupt: {len(offsets)} tiles for an image of {width} x {height}, which needs {expected}"
    beyond = int(np.count_nonzero((counts > 0) & (offsets + counts > size)))
    if beyond:
        return f"truncated: {beyond} of {len(offsets)} tiles lie beyond the end of the file"
    if np.any((offsets == 0) & (counts > 0)) or np.any((offsets < 0) | (counts < 0)):
        return "corrupt: tiles without an address"
    if page.jpegtables is not None and not (
        page.jpegtables[:2] == b"\xff\xd8" and page.jpegtables.rstrip(b"\0")[-2:] == b"\xff\xd9"
    ):
        return "corrupt: its JPEG tables are cut"
    if samples > 1 and page.planarconfig == 1 and page.dtype is None:
        return "corrupt: unknown pixel type"
    return ""


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
