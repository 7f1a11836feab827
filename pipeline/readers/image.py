"""Plain images (PNG, JPEG, JPEG 2000) and arrays as slides of one level, held in memory. Not rotated by EXIF."""

from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from ..errors import UnreadableSlide
from ..places import honest, opened
from ..scale import ScaleTags
from ..slide import MAX_PIXELS, Slide, make_levels

FORMATS = ("PNG", "JPEG", "JPEG2000")
Image.MAX_IMAGE_PIXELS = None  # judged here, by a limit of our own
VERSION = f"pillow {Image.__version__}"


def open(path: Path) -> Slide:
    """Pillow decodes damaged pixels without complaint, so that PNG and JPEG files are checked before."""
    _require_checksums(path)
    with opened(path) as file, honest(file), Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableSlide(
                str(path),
                "open",
                f"{width} x {height} pixels are too many for a plain image; convert it to a pyramidal TIFF",
            )
        if image.mode in ("I", "F", "I;16"):
            raise UnreadableSlide(str(path), "open", f"pixels of type {image.mode} are not supported")
        if image.format == "JPEG":
            simplejpeg.decode_jpeg(path.read_bytes(), "GRAY")  # makes an error of what libjpeg only warns of
        if image.format == "JPEG2000":
            _refuse_uneven(path)
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return ArraySlide(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")), path)


def _require_checksums(path: Path) -> None:
    """Of every chunk of a PNG file."""
    with opened(path) as file, honest(file), Image.open(file, formats=FORMATS) as image:
        if image.format == "PNG":
            image.verify()


def _refuse_uneven(path: Path) -> None:
    """JPEG 2000 says bits and sampling of each channel; where these differ, or not as its container has it: damage."""
    data = path.read_bytes()
    start, box = data.find(b"\xff\x4f\xff\x51"), data.find(b"ihdr")
    channels = data[start + 42 : start + 42 + 3 * int.from_bytes(data[start + 40 : start + 42])]
    bits = data[box + 14] if 0 <= box < start else channels[0]
    if channels != bytes([bits, 1, 1]) * (len(channels) // 3):
        raise UnreadableSlide(str(path), "open", "its channels differ in bits or size, which is not supported")


class ArraySlide(Slide):
    """(H, W, 3) uint8 RGB pixels as a slide."""

    def __init__(self, pixels: np.ndarray, path: Path = Path("array")) -> None:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
            raise UnreadableSlide(str(path), "open", f"(H, W, 3) uint8 is needed, not {pixels.shape} {pixels.dtype}")
        super().__init__(path, make_levels([(pixels.shape[1], pixels.shape[0])]), ScaleTags(), "image")
        self._pixels = pixels

    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        left, top = round(x), round(y)
        out = np.full((height, width, 3), 255, np.uint8)
        rows = slice(max(top, 0), max(min(top + height, self.size[1]), 0))
        columns = slice(max(left, 0), max(min(left + width, self.size[0]), 0))
        part = self._pixels[rows, columns]
        if part.size:
            at_y, at_x = rows.start - top, columns.start - left
            out[at_y : at_y + part.shape[0], at_x : at_x + part.shape[1]] = part
        return out

    def close(self) -> None:
        pass
