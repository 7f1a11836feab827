"""The tiles of TIFF files, decoded natively: many at once, in threads that let each other run, and each only once.

JPEG goes through simplejpeg, which makes an error of what libjpeg only warns of: OpenSlide and imagecodecs were seen to
hand out noise for every tile whose stream was damaged in the middle. imagecodecs decodes the rest, and returns grey for
what is cut and black for what is missing, so the bytes are checked before.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from time import perf_counter

import imagecodecs
import numpy as np
import simplejpeg
import tifffile

from ..errors import CorruptTiles
from ..slide import ReadCost, Window
from .tiffcheck import MINISWHITE, RGB, YCBCR, tile_fault

CACHE_BYTES = 128 << 20  # of decoded tiles, for each open slide
JPEG = 7
SPARE = 16  # bytes after a tile that may be padding
# Codecs that cut off what is too much, by TIFF code; the others make an error of it.
UNBOUNDED: dict[int, Callable[..., bytes | bytearray]] = {
    1: lambda data, out: data,
    5: imagecodecs.lzw_decode,
    34925: imagecodecs.lzma_decode,
}
NO_TRANSFORM = bytes.fromhex("ffee000e41646f626500640000000000")  # Adobe's marker that says: these are RGB
PREMULTIPLIED = 1  # of an extra sample

Key = tuple[int, int]  # of a page, of a tile in it


class TileCache:
    """Decoded tiles of one slide that will be needed again, within CACHE_BYTES.

    Where it is known how often a tile will be asked for, it is dropped at the last time and never kept for less than
    two; else the oldest go first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tiles: OrderedDict[Key, Future[np.ndarray]] = OrderedDict()
        self._due: dict[int, np.ndarray] = {}  # of a page: how often each of its tiles will still be asked for
        self._bytes = 0

    def expect(self, page: int, counts: np.ndarray) -> None:
        """`counts` (n,) int: how often each tile of a page is going to be asked for from now on."""
        with self._lock:
            self._due[page] = counts

    def get(self, key: Key, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The tile; whoever asks first decodes it, whoever asks meanwhile waits."""
        with self._lock:
            again = self._is_due_again(key)
            kept = self._tiles.get(key)
            if kept is not None and not again:
                self._drop(key)
            if kept is None and again:
                mine = self._tiles[key] = Future()
            elif kept is not None and again:
                self._tiles.move_to_end(key)
        if kept is not None:
            return kept.result()
        if not again:
            return decode()
        try:
            tile = decode()
        except BaseException as error:
            mine.set_exception(error)
            raise
        with self._lock:
            mine.set_result(tile)  # in here: who drops a tile that is there takes off its bytes
            if self._tiles.get(key) is mine:
                self._bytes += tile.nbytes
            while self._bytes > CACHE_BYTES and len(self._tiles) > 1:
                self._drop(next(iter(self._tiles)))
        return tile

    def _is_due_again(self, key: Key) -> bool:
        due = self._due.get(key[0])
        if due is None:
            return True
        due[key[1]] -= 1
        return bool(due[key[1]] > 0)

    def _drop(self, key: Key) -> None:
        tile = self._tiles.pop(key)
        if tile.done() and not tile.exception():  # else its bytes were never counted
            self._bytes -= tile.result().nbytes

    def clear(self) -> None:
        with self._lock:
            self._tiles.clear()
            self._bytes = 0


class TilePage:
    """One directory of a TIFF file: its tiles (or strips) as RGB, pasted where they belong.

    `number` tells it from the slide's other directories, `name` says in errors which it is. The file's position is not
    used, so threads may read at the same time.
    """

    def __init__(
        self,
        path: Path,
        read_at: Callable[[int, int], bytes],
        page: tifffile.TiffPage,
        number: int,
        name: str,
        cache: TileCache,
        cost: ReadCost,
    ) -> None:
        self.path, self.page, self.number, self.name = path, page, number, name
        self._read_at, self._cache, self._cost = read_at, cache, cost
        self._rows, self._columns = page.chunks[:2]
        self._across, self._down = -(-page.imagewidth // self._columns), -(-page.imagelength // self._rows)
        self._decode = page.decode  # reads tags on its first use, which moves the file's position: now and not later
        self._jpeg_head = _jpeg_head(page)
        self._is_whole = all(page.databytecounts)  # else some tiles are left out: they are background

    def expect(self, windows: Iterable[Window]) -> None:
        """Which windows are going to be read, each once."""
        counts = np.zeros((self._down, self._across), np.int32)
        for window in windows:
            rows, columns = self._tiles_under(window.x, window.y, window.width, window.height)
            counts[rows.start : rows.stop, columns.start : columns.stop] += 1
        self._cache.expect(self.number, counts.ravel())

    def _tiles_under(self, left: int, top: int, width: int, height: int) -> tuple[range, range]:
        rows = _under(top, top + height, self._rows, self.page.imagelength)
        columns = _under(left, left + width, self._columns, self.page.imagewidth)
        return rows, columns

    def holds_more(self) -> bool:
        """True if the first tile has more pixels than the file says: it is of another size, and all rows are shifted.

        A tile that does not decode tells nothing, and is told where it is read.
        """
        codec = UNBOUNDED.get(self.page.compression)
        index = next((i for i, count in enumerate(self.page.databytecounts) if count), None)
        if codec is None or index is None:
            return False
        rows = self._rows if self.page.is_tiled else min(self._rows, self.page.imagelength - index * self._rows)
        size = rows * -(-self._columns * self.page.samplesperpixel * self.page.bitspersample // 8)
        data = self._read_at(self.page.databytecounts[index], self.page.dataoffsets[index])
        try:
            return len(codec(data, out=size + SPARE)) >= size + SPARE
        except RuntimeError:
            return False

    def covers(self, left: int, top: int, width: int, height: int) -> bool:
        """True if the page has every pixel of a region."""
        inside = (
            left >= 0 and top >= 0 and left + width <= self.page.imagewidth and top + height <= self.page.imagelength
        )
        return inside and self._is_whole

    def paste(self, out: np.ndarray, left: int, top: int) -> None:
        """Put what the page has of a region, whose corner is at (left, top), on `out` (h, w, 3) uint8.

        Tiles that the file leaves out are background, and leave `out` as it is. Raises CorruptTiles.
        """
        height, width = out.shape[:2]
        rows, columns = self._tiles_under(left, top, width, height)
        for row in rows:
            for column in columns:
                index = row * self._across + column
                if self.page.databytecounts[index] == 0:
                    continue
                tile = self._cache.get((self.number, index), partial(self._read, index))
                x, y = column * self._columns - left, row * self._rows - top
                # Tiles at the border are filled up with anything.
                h = min(tile.shape[0], height - y, self.page.imagelength - row * self._rows)
                w = min(tile.shape[1], width - x, self.page.imagewidth - column * self._columns)
                out[max(y, 0) : y + h, max(x, 0) : x + w] = tile[max(-y, 0) : h, max(-x, 0) : w]

    def _read(self, index: int) -> np.ndarray:
        """One tile as (h, w, 3) uint8."""
        started, count = perf_counter(), self.page.databytecounts[index]
        data = self._read_at(count, self.page.dataoffsets[index])
        waited = perf_counter() - started
        fault = "it is cut" if len(data) < count else tile_fault(self.page, data)
        if fault:
            raise self._corrupt(index, f"is damaged: {fault}")
        tile = self._rgb(data, index)
        row, column = divmod(index, self._across)
        height = min(self._rows, self.page.imagelength - row * self._rows)
        width = min(self._columns, self.page.imagewidth - column * self._columns)
        if tile.shape[0] < height or tile.shape[1] < width:
            raise self._corrupt(index, f"is damaged: it holds {tile.shape[1]} x {tile.shape[0]} pixels")
        self._cost.add(tile.shape[0] * tile.shape[1], waited)
        return tile

    def _rgb(self, data: bytes, index: int) -> np.ndarray:
        try:
            if self._jpeg_head:
                buffer = _unaligned(self._rows * self._columns * 3)
                return simplejpeg.decode_jpeg(self._whole_jpeg(data), buffer=buffer)
            segment, _, shape = self._decode(data, index, jpegtables=self.page.jpegtables)
            if segment is None:
                raise ValueError("it is empty")
            return to_rgb(segment[0, : shape[1], : shape[2]], self.page)
        except Exception as error:
            raise self._corrupt(index, f"does not decode: {error}") from error

    def _whole_jpeg(self, data: bytes) -> bytes:
        return data if len(self._jpeg_head) == 2 else self._jpeg_head + data[2:]

    def _corrupt(self, index: int, what: str) -> CorruptTiles:
        return CorruptTiles(str(self.path), "encode", f"tile {index} of {self.name} {what}")


def _under(start: int, stop: int, step: int, size: int) -> range:
    """The tiles of `step` pixels that hold pixels start:stop of an axis of `size`."""
    start, stop = max(start, 0), min(stop, size)
    return range(start // step, -(-stop // step)) if stop > start else range(0)


def _unaligned(count: int) -> np.ndarray:
    """(count,) uint8 that does not begin at a multiple of 32.

    Where it does, libjpeg-turbo writes past the cache, and what comes next waits for the memory: 28 of 200 µs a tile.
    """
    out = np.empty(count + 16, np.uint8)
    return out[16 if out.__array_interface__["data"][0] % 32 == 0 else 0 :][:count]


def _jpeg_head(page: tifffile.TiffPage) -> bytes:
    """What to put in place of a tile's first two bytes, so that it is a whole JPEG of colour; empty if it is none."""
    plain = page.compression == JPEG and page.photometric in (RGB, YCBCR) and not page.extrasamples
    if not plain or page.samplesperpixel != 3 or page.bitspersample != 8 or page.is_ndpi:
        return b""
    tables = page.jpegtables.rstrip(b"\0")[2:-2] if page.jpegtables else b""
    return b"\xff\xd8" + (NO_TRANSFORM if page.photometric == RGB and not page.is_jfif else b"") + tables


def to_rgb(tile: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    """(h, w, samples) of any supported pixel type → (h, w, 3) uint8; 16 bits are scaled, alpha is blended on white."""
    if page.colormap is not None:
        return (page.colormap.T[tile[..., 0]] >> 8).astype(np.uint8)
    if tile.dtype == np.uint16:
        full = (1 << page.bitspersample) - 1
        tile = ((tile.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)
    elif page.bitspersample == 1:
        tile = tile.astype(np.uint8) * np.uint8(255)
    if page.photometric == MINISWHITE:
        tile = np.concatenate([255 - tile[..., :1], tile[..., 1:]], axis=-1)
    if tile.shape[-1] in (1, 2):
        tile = np.concatenate([np.repeat(tile[..., :1], 3, axis=-1), tile[..., 1:]], axis=-1)
    if tile.shape[-1] == 4:
        alpha = tile[..., 3:].astype(np.uint16)
        colour = tile[..., :3].astype(np.uint16)
        if page.extrasamples[0] == PREMULTIPLIED:
            tile = np.minimum(colour + (255 - alpha), 255).astype(np.uint8)
        else:
            tile = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(tile)
