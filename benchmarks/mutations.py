"""Small slides, and seeded damage to their files: what `fuzz.py` reads.

A base is an undamaged file with the readers that open it; `mutate` spoils one thing of it, of a kind that is named.
STRUCTURE are the kinds of damage that must never go unseen; what else there is touches the coded pixels themselves.
"""

import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from skimage.data import immunohistochemistry

from pipeline.demo import write_slide

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
from conftest import Page, read_tiff, shared_tables, write_tiff  # the tests' own writer

SIDE, TILE = 256, 64
REAL = Path(__file__).parents[2] / "shared" / "data"
TIFF, OTHER = ("auto", "tiffslide", "openslide"), ("auto", "openslide")
TABLES = (273, 279, 324, 325)  # tags: offsets and byte counts of strips, of tiles
JPEG_TABLES = 347
STRUCTURE = ("header", "entry", "value", "table", "link", "chunk", "cut", "appended")
CODED = ("frame", "jpeg tables", "range", "bit", "swapped")
LARGEST = 65535


# --- bases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """An undamaged file; `mpp` where it does not say it itself."""

    name: str
    suffix: str
    data: bytes
    readers: tuple[str, ...]
    mpp: float | None = None


def texture() -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: stained tissue on noisy glass."""
    rng = np.random.default_rng(5)
    pixels = np.clip(rng.normal(243, 2, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    pixels[32:-32, 32:-32] = immunohistochemistry()[:192, :192]
    return pixels


def bases() -> list[Base]:
    """All of them, in a fixed order; the real ones only where they are."""
    with tempfile.TemporaryDirectory() as folder:
        found = [*_pyramids(Path(folder)), *_plain_tiffs(Path(folder)), *_images()]
    for name, readers in (
        ("broken/slide_without_extension", TIFF),
        ("slides/small.svs", TIFF),
        ("slides/OS-1-detail.ome.tif", ("auto", "tiffslide")),
        ("slides/sm_image.dcm", OTHER),
        ("slides/jpeg.dicom", OTHER),
    ):
        path = REAL / name
        if path.exists():
            found.append(Base(path.name, path.suffix or ".svs", path.read_bytes(), readers))
    return found


def _pyramids(folder: Path) -> list[Base]:
    """Aperio-like: three levels and a thumbnail, in the layouts that scanners and libraries write."""
    path, pixels, found = folder / "a.svs", texture(), []
    for name, layout, shared, lossless in (
        ("own tables", "directories first", False, False),
        ("shared tables", "each after its data", True, False),
        ("level 0 last", "level 0 last", True, False),
        ("deflate", "directories last", False, True),
    ):
        write_slide(path, pixels, 0.5, downsamples=(2, 4), tile_px=TILE, lossless=lossless)
        pages: list[Page] = read_tiff(path)
        for page in (pages[0], *pages[2:]) if shared else ():
            shared_tables(page)
        found.append(Base(name, ".svs", write_tiff(path, pages, layout).read_bytes(), TIFF))
    return found


def _plain_tiffs(folder: Path) -> list[Base]:
    path, pixels, found = folder / "a.tif", texture(), []
    tiles: dict[str, Any] = {"tile": (TILE, TILE)}
    for name, form, options, readers in (
        ("raw", {}, tiles, TIFF),
        ("lzw", {}, tiles | {"compression": "lzw", "predictor": True}, TIFF),
        ("zstd big endian", {"byteorder": ">"}, tiles | {"compression": "zstd"}, ("auto", "tiffslide")),
        ("big tiff", {"bigtiff": True}, tiles | {"compression": "jpeg"}, TIFF),
        ("trestle", {"software": "MedScan"}, tiles | {"compression": "jpeg"}, OTHER),  # only OpenSlide's
        ("raw strips", {}, {"rowsperstrip": 32}, ("auto", "tiffslide")),
        ("lzw strips", {}, {"rowsperstrip": 32, "compression": "lzw"}, ("auto", "tiffslide")),
        ("jpeg strips", {}, {"rowsperstrip": 32, "compression": "jpeg"}, ("auto", "tiffslide")),
    ):
        software = form.pop("software", False)
        about = "Background Color=ffffff;White Balance=ffffff;Objective Power=20" if software else None
        with tifffile.TiffWriter(path, **form) as file:
            for step in (1, 2, 4) if "tile" in options else (1,):
                scale = {"resolution": (20000 / step, 20000 / step), "resolutionunit": "CENTIMETER"}
                file.write(
                    np.ascontiguousarray(pixels[::step, ::step]),
                    photometric="rgb",
                    subfiletype=int(step > 1),
                    metadata=None,
                    software=software,
                    description=about,
                    **scale,
                    **options,
                )
        found.append(Base(name, ".tif", path.read_bytes(), readers, 0.5 if software else None))
    return found


def _images() -> list[Base]:
    found = []
    for kind, suffix, options in (("PNG", ".png", {}), ("JPEG", ".jpg", {"quality": 90}), ("JPEG2000", ".jp2", {})):
        out = BytesIO()
        Image.fromarray(texture()).save(out, kind, **options)
        found.append(Base(kind, suffix, out.getvalue(), ("auto", "image"), 0.5))
    return found


# --- what a file has that can be spoiled -----------------------------------------------------------------------------


@dataclass
class Sites:
    """Places in a file as (start, bytes), by what stands there; `width`: bytes of one number of a table of tiles."""

    order: str = "<"
    header: int = 8
    entries: list[tuple[int, int]] = field(default_factory=list)
    values: list[tuple[int, int]] = field(default_factory=list)
    tables: list[tuple[int, int, int]] = field(default_factory=list)  # start, numbers, bytes of each
    links: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    data: list[tuple[int, int]] = field(default_factory=list)
    frames: list[tuple[int, int]] = field(default_factory=list)
    jpeg_tables: list[tuple[int, int]] = field(default_factory=list)

    def pairs(self) -> list[tuple[tuple[int, int, int], ...]]:
        """The tables of offsets and counts of each image that has more than one tile."""
        return [pair for pair in zip(self.tables[::2], self.tables[1::2], strict=True) if pair[0][1] > 1]

    def kinds(self) -> list[str]:
        there = {
            "entry": self.entries,
            "value": self.values,
            "table": self.tables,
            "swapped": self.pairs(),
            "link": self.links,
            "chunk": self.chunks,
            "frame": self.frames,
            "jpeg tables": self.jpeg_tables,
        }
        return [kind for kind in (*STRUCTURE, *CODED) if there.get(kind, True)]


def sites(data: bytes) -> Sites:
    if data[:2] in (b"II", b"MM"):
        return _of_tiff(data)
    if data[:4] == b"\x89PNG":
        return _of_png(data)
    found = Sites()
    if data[:2] == b"\xff\xd8":
        _add_jpeg(found, data, 0, len(data))
        return found
    dicom, codestream = data.find(b"\xe0\x7f\x10\x00"), data.find(b"\xff\x4f\xff\x51")
    found.header = dicom + 12 if dicom > 0 else codestream + 4 + int.from_bytes(data[codestream + 4 : codestream + 6])
    found.data = [(found.header, len(data) - found.header)]
    return found


def _of_tiff(data: bytes) -> Sites:
    with tifffile.TiffFile(BytesIO(data)) as tif:
        form = tif.tiff
        found = Sites(tif.byteorder, 16 if form.version == 43 else 8)
        found.links.append((8 if form.version == 43 else 4, form.offsetsize))
        pages = [page.aspage() for page in tif.pages]
        for page in pages:
            found.links.append((page.offset + form.tagnosize + len(page.tags) * form.tagsize, form.offsetsize))
            for tag in page.tags.values():
                found.entries.append((tag.offset, form.tagsize))
                inside = tag.offset < tag.valueoffset < tag.offset + form.tagsize
                if tag.code in TABLES:
                    found.tables.append((tag.valueoffset, tag.count, tag.valuebytecount // tag.count))
                elif tag.code == JPEG_TABLES:
                    _add_jpeg(found, data, tag.valueoffset, tag.count)
                elif not inside:
                    found.values.append((tag.valueoffset, tag.valuebytecount))
            for at, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                if data[at : at + 2] == b"\xff\xd8":
                    _add_jpeg(found, data, at, count)
                elif count > 8:
                    found.data.append((at, count))
    return found


def _of_png(data: bytes) -> Sites:
    found, at = Sites(header=33), 33
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.chunks += [(at, 8), (at + 8 + length, 4)]
        if data[at + 4 : at + 8] == b"IDAT":
            found.data.append((at + 8, length))
        at += 12 + length
    return found


def _add_jpeg(found: Sites, data: bytes, start: int, count: int) -> None:
    """The segments of a JPEG stream: frame, scan and end; tables; what is coded."""
    at, end = start + 2, start + count
    while at + 4 <= end and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xD9:
            break
        place = (at, 2 + length)
        (found.jpeg_tables if marker in (0xDB, 0xC4) else found.frames).append(place)
        at += 2 + length
        if marker == 0xDA:
            found.data.append((at, end - at - 2))
            found.frames.append((end - 2, 2))
            break


# --- damage -----------------------------------------------------------------------------------------------------------


def mutate(base: Base, kind: str, rng: np.random.Generator) -> bytes:
    """The base's file with one piece of damage of this kind. Never the same bytes."""
    places = sites(base.data)
    while True:
        out = bytearray(base.data)
        _DAMAGE[kind](out, places, rng)
        if out != base.data:
            return bytes(out)


def _one(places: list[Any], rng: np.random.Generator) -> Any:
    return places[rng.integers(len(places))]


def _scribble(out: bytearray, at: int, count: int, rng: np.random.Generator) -> None:
    """One to four random bytes of a place, or one of its bits, or what is next to its value."""
    how = rng.integers(3)
    if how == 0:
        for _ in range(rng.integers(1, 5)):
            out[at + rng.integers(count)] = rng.integers(256)
    elif how == 1:
        out[at + rng.integers(count)] ^= 1 << rng.integers(8)
    else:
        place = at + rng.integers(count)
        out[place] = (out[place] + rng.choice([-1, 1])) % 256


def _header(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    _scribble(out, 0, places.header, rng)


def _entry(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    """The tag, type, count or value of an entry of a directory."""
    at, size = _one(places.entries, rng)
    wide = (size - 4) // 2  # of count and of value
    start, length, form = _one([(0, 2, "H"), (2, 2, "H"), (4, wide, "I"), (4 + wide, wide, "I")], rng)
    if rng.random() < 0.5:
        _scribble(out, at + start, length, rng)
    else:
        value = _one([0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 255, 1000, LARGEST, int(rng.integers(LARGEST))], rng)
        struct.pack_into(places.order + form, out, at + start, value)


def _value(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    _scribble(out, *_one(places.values, rng), rng)


def _table(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    """One number of a table of offsets or counts, or a run of them zeroed."""
    at, numbers, wide = _one(places.tables, rng)
    first = int(rng.integers(numbers))
    place, form = at + first * wide, places.order + {2: "H", 4: "I", 8: "Q"}[wide]
    (old,) = struct.unpack_from(form, out, place)
    how = rng.integers(5)
    if how == 0:
        _scribble(out, place, wide, rng)
    elif how == 1:
        count = wide * int(rng.integers(1, numbers - first + 1))
        out[place : place + count] = bytes(count)
    else:
        other = struct.unpack_from(form, out, at + int(rng.integers(numbers)) * wide)[0]
        near = old + int(rng.integers(-64, 65))
        anything = int(rng.integers(2 * len(out)))
        value = {2: other, 3: near, 4: anything}[int(how)]
        struct.pack_into(form, out, place, min(max(value, 0), 256**wide - 1))


def _link(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    """Where the next directory stands: nowhere, at another one, or anywhere."""
    at, wide = _one(places.links, rng)
    other = bytes(out[slice(*np.add(_one(places.links, rng)[0], (0, wide)))])
    how = rng.integers(4)
    if how == 0:
        out[at : at + wide] = bytes(wide)
    elif how == 1:
        out[at : at + wide] = other
    elif how == 2:
        _scribble(out, at, wide, rng)
    else:
        struct.pack_into(places.order + {4: "I", 8: "Q"}[wide], out, at, int(rng.integers(2 * len(out))))


def _chunk(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    _scribble(out, *_one(places.chunks, rng), rng)


def _cut(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    """Anywhere, or just before the end."""
    near = min(len(out), 64)
    del out[int(rng.integers(len(out)) if rng.random() < 0.7 else len(out) - rng.integers(1, near)) :]


def _appended(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    count = int(rng.integers(1, 2000))
    out += bytes(count) if rng.random() < 0.3 else rng.bytes(count)


def _range(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    """Two bytes or more of coded pixels, zeroed or random."""
    at, count = _one(places.data, rng)
    first = int(rng.integers(count - 1))
    length = int(rng.integers(2, max(3, min(count - first, 2000))))
    out[at + first : at + first + length] = bytes(length) if rng.random() < 0.5 else rng.bytes(length)


def _bit(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    at, count = _one(places.data, rng)
    out[at + int(rng.integers(count))] ^= 1 << int(rng.integers(8))


def _frame(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    _scribble(out, *_one(places.frames, rng), rng)


def _jpeg_tables(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    _scribble(out, *_one(places.jpeg_tables, rng), rng)


def _swapped(out: bytearray, places: Sites, rng: np.random.Generator) -> None:
    """Two tiles change places: offsets and counts both, as no damage does."""
    pair = _one(places.pairs(), rng)
    i, j = rng.choice(pair[0][1], 2, replace=False)
    for at, _, wide in pair:
        one, other = at + int(i) * wide, at + int(j) * wide
        out[one : one + wide], out[other : other + wide] = out[other : other + wide], out[one : one + wide]


_DAMAGE: dict[str, Callable[[bytearray, Sites, np.random.Generator], None]] = {
    "header": _header,
    "entry": _entry,
    "value": _value,
    "table": _table,
    "link": _link,
    "chunk": _chunk,
    "cut": _cut,
    "appended": _appended,
    "range": _range,
    "bit": _bit,
    "frame": _frame,
    "jpeg tables": _jpeg_tables,
    "swapped": _swapped,
}
