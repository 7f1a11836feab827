"""Opening a slide: which reader, what it may not be, and what its resolution is.

A reader is a module of this folder that defines `open(path) -> Slide`; adding one is one new file.
"""

import errno
import stat
from dataclasses import replace
from importlib import import_module
from io import BufferedReader
from pathlib import Path

import numpy as np

from ..errors import MACHINE_ERRNOS, UnreadableSlide, UsageError, nearest, slide_door
from ..places import honest, is_remote, opened, placed
from ..scale import RESOLUTION_TAG, resolve_scale
from ..slide import Slide
from .levels import levels_fault
from .tiffcheck import Structure, structure

# `auto` tries them in this order. OpenSlide first: it knows most formats and is strict about damaged tiles. A reader
# may say that it is in doubt about a file; then it serves only where the others do not find the same levels.
READERS = ("openslide", "tiffslide", "image")

# Vendors of whose images all that are in tiles are levels; label and macro image are in strips.
PYRAMIDS = ("aperio", "generic-tiff", "tiff", "trestle")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FORMATS: tuple[tuple[bytes, str], ...] = (
    *((magic, "TIFF") for magic in TIFF_MAGIC),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"ZISRAWFILE", "Zeiss CZI"),
    (b"SIS\0", "Olympus ETS, the pixels of a VSI slide"),
)
NOT_SLIDES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer; fetch the slide itself with `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page, probably of a failed download"),
    (b"<html", "an HTML page, probably of a failed download"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
)


def sniff(head: bytes) -> str:
    """The format that the first 132 bytes announce, "" if unknown."""
    if head[128:132] == b"DICM":
        return "DICOM"
    return next((name for magic, name in FORMATS if head.startswith(magic)), "")


def open_slide(
    path: str | Path | np.ndarray, mpp: float | None = None, reader: str = "auto", mpp_source: str = "argument"
) -> Slide:
    """Open a slide, or an (H, W, 3) uint8 array as one.

    mpp: µm per pixel of level 0, where the file does not say it or says it wrongly; reader: auto, openslide, tiffslide
    or image. `slide.reader` is the one used and `slide.refusals` say why those before it refused.
    Raises UnreadableSlide, MissingMpp; OSError where the machine and not the slide is at fault.
    """
    if isinstance(path, np.ndarray):
        slide: Slide = _reader("image").ArraySlide(path)
        slide.reader, slide.reader_version = "image", _reader("image").VERSION
    else:
        slide = _open_file(placed(path), reader)
    try:
        scale = resolve_scale(str(path) if not isinstance(path, np.ndarray) else "array", slide.tags, mpp, mpp_source)
    except BaseException:
        slide.close()
        raise
    slide.mpp, slide.mpp_source = scale.mpp, scale.source
    slide.warnings = (*slide.warnings, *scale.warnings)
    return slide


def _reader(name: str):  # type: ignore[no-untyped-def]  # a module
    if name not in READERS:
        raise UsageError(nearest(name, ["auto", *READERS], "reader"))
    return import_module(f".{name}", __name__)


def _open_file(path: Path, requested: str) -> Slide:
    """The first reader that opens the file and vouches for its pixels; one that doubts them where no other will."""
    kind, what, found = _examine(path)
    if is_remote(path):
        return _open_remote(path, requested, kind, what, found)
    refusals: list[str] = []
    doubted: Slide | None = None
    for name in _in_order(kind) if requested == "auto" else (requested,):
        slide = _open_with(name, path, refusals, found)
        if slide is None:
            continue
        slide.warnings = (*_name_warnings(path, kind), *_level_warnings(slide, found))
        if doubted and slide.levels != doubted.levels:
            slide.close()  # it knows less of this format than the one before
        elif slide.doubt:
            refusals.append(f"{name}: {slide.doubt}")
            doubted = slide
        else:
            if doubted:
                doubted.close()
            return slide
    if doubted:
        doubted.warnings = (*doubted.warnings, f"{doubted.reader}: {doubted.doubt}")
        return doubted
    raise UnreadableSlide(str(path), "open", f"no reader here supports it ({what}). {' | '.join(refusals)}")


def _open_remote(path: Path, requested: str, kind: str, what: str, found: Structure) -> Slide:
    """The one reader of a format that reads from an object store, unless OpenSlide is to be preferred."""
    name = ("tiffslide" if kind == "TIFF" else "image") if requested == "auto" else requested
    if name not in READERS:
        raise UsageError(nearest(name, ["auto", *READERS], "reader"))
    if name == "openslide" or (requested == "auto" and kind not in ("TIFF", "PNG", "JPEG", "JPEG 2000")):
        reason = f"OpenSlide, which may know it ({what}), reads from disks only: copy the slide to one"
        raise UnreadableSlide(str(path), "open", reason)
    refusals: list[str] = []
    slide = _open_with(name, path, refusals, found)
    if slide is None:
        reason = f"{refusals[0]}. OpenSlide may know it, and reads from disks only: copy the slide to one"
        raise UnreadableSlide(str(path), "open", reason)
    if slide.doubt and requested == "auto":
        slide.close()
        reason = f"{slide.doubt}, and it reads from disks only: copy the slide to one, or pass --reader {name}"
        raise UnreadableSlide(str(path), "open", reason)
    slide.warnings = (*_name_warnings(path, kind), *_level_warnings(slide, found))
    return slide


def _examine(path: Path) -> tuple[str, str, Structure]:
    """The format of a file by its content, the same in words, and its structure; what is no whole slide is refused."""
    found = Structure("")
    with _regular_file(path) as file:
        head = file.read(132)
        file.seek(0)
        kind = sniff(head)
        _refuse_impostor(path, head)
        if kind == "TIFF":
            with slide_door(str(path), "open"), honest(file):
                found = structure(file)
            if found.fault:
                raise UnreadableSlide(str(path), "open", found.fault)
    return kind, kind or _describe(head), found


def _open_with(name: str, path: Path, refusals: list[str], found: Structure) -> Slide | None:
    module = _reader(name)
    try:
        with slide_door(str(path), "open"):
            slide: Slide = module.open(path)
    except UnreadableSlide as error:
        refusals.append(f"{name}: {error.reason}")
        return None
    fault = levels_fault(slide) if found.mixed else ""
    if fault:
        slide.close()
        refusals.append(f"{name}: {fault}")
        return None
    if slide.tags.origin == RESOLUTION_TAG:
        slide.tags = replace(slide.tags, odd=found.scale)
    slide.reader, slide.reader_version, slide.refusals = name, module.VERSION, tuple(refusals)
    return slide


def _in_order(kind: str) -> list[str]:
    """The readers to try: OpenSlide knows formats that we do not, the others are for what they are for."""
    fit = {"openslide": True, "tiffslide": kind == "TIFF", "image": kind in ("PNG", "JPEG", "JPEG 2000")}
    return [name for name in READERS if fit[name]]


def _describe(head: bytes) -> str:
    if len(head) < 8:
        return f"only {len(head)} bytes"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return "unknown format, its first bytes are " + head[:4].hex(" ")


def _regular_file(path: Path) -> BufferedReader:
    """Open without following into a FIFO or device, and with the true reason where it fails: readers hide errno."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UnreadableSlide(str(path), "open", "it is a directory")
        if not stat.S_ISREG(mode):
            raise UnreadableSlide(str(path), "open", "it is not a regular file")
        if path.stat().st_size == 0:
            raise UnreadableSlide(str(path), "open", "the file is empty (0 bytes)")
        return opened(path)
    except OSError as error:
        if error.errno in MACHINE_ERRNOS:
            raise
        words = {
            errno.EACCES: "no permission to read it",
            errno.ENOENT: "there is no such file",
            errno.ELOOP: "a loop of links",
        }
        reason = words.get(error.errno or 0, error.strerror or str(error))
        raise UnreadableSlide(str(path), "open", reason) from error


def _refuse_impostor(path: Path, head: bytes) -> None:
    for magic, what in NOT_SLIDES:
        if head.lstrip()[: len(magic)].lower() == magic.lower():
            raise UnreadableSlide(str(path), "open", f"not a slide but {what}")


def _level_warnings(slide: Slide, found: Structure) -> tuple[str, ...]:
    missing = found.tiled - slide.images if slide.vendor in PYRAMIDS else 0
    words = f"{missing} of the {found.tiled} tiled images of the file are no level of the slide" if missing > 0 else ""
    return tuple(filter(None, (found.warning, words)))


def _name_warnings(path: Path, kind: str) -> tuple[str, ...]:
    suffix = path.suffix.lower()
    images = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jp2": "JPEG 2000"}
    slides = {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif"}
    if (suffix in images and kind != images[suffix]) or (suffix in slides and kind != "TIFF"):
        return (f"its name ends in {suffix}, but its content is {kind or 'unknown'}",)
    return ()
