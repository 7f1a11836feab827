"""Pictures of one slide: the thumbnail with the tissue's contour and the quadtree drawn on it, and heatmaps."""

import struct
import zlib
from pathlib import Path

import cv2
import imagecodecs
import numpy as np

from .places import put
from .quadtree import QuadTree
from .tissue import TissueMask

EDGE = 1600  # the longest edge of a picture, px
CONTOUR = (0, 140, 0)
ANNOTATED = (230, 20, 20)
LEVELS = ((200, 30, 30), (230, 120, 0), (40, 90, 220), (130, 60, 180))  # coarse → fine
MARGIN = 34


def overview(thumbnail: np.ndarray, mask: TissueMask, tree: QuadTree, caption: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the slide, the contour of its tissue, and the tiles of every level, a colour a level."""
    whole, picture, scale = _canvas(thumbnail, caption)
    x, y = scale / mask.downsample[0], scale / mask.downsample[1]
    deepest = len(tree.levels) - 1
    for k in range(deepest, -1, -1):
        colour, inset = LEVELS[min(k, len(LEVELS) - 1)], 0 if k == deepest else 1
        left, top, right, bottom = np.add(_sides(tree.boxes(k), (x, y)), (inset, inset, -inset, -inset)).T
        corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1).reshape(-1, 4, 2)
        cv2.polylines(picture, list(corners), True, colour, 1 if k else 2)
    _outline(picture, mask, CONTOUR)
    return whole


def heatmap(thumbnail: np.ndarray, mask: TissueMask, boxes: np.ndarray, weight: np.ndarray, caption: str) -> np.ndarray:
    """The slide, each tile coloured by the rank of its weight; tiles never looked at (NaN) stay as they are."""
    whole, picture, scale = _canvas(thumbnail, caption)
    x, y = scale / mask.downsample[0], scale / mask.downsample[1]
    seen = np.flatnonzero(np.isfinite(weight))
    ranks = np.zeros(len(weight))
    ranks[seen[np.argsort(weight[seen], kind="stable")]] = np.linspace(0, 1, len(seen)) if len(seen) > 1 else 1.0
    colours = cv2.applyColorMap((ranks * 255).astype(np.uint8).reshape(-1, 1), cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
    layer = picture.copy()
    sides = _sides(boxes[seen], (x, y)).tolist()
    for (left, top, right, bottom), colour in zip(sides, colours[seen].tolist(), strict=True):
        cv2.rectangle(layer, (left, top), (right, bottom), colour, -1)
    cv2.addWeighted(layer, 0.55, picture, 0.45, 0, dst=picture)
    return whole


def annotated(
    thumbnail: np.ndarray,
    mask: TissueMask,
    boxes: np.ndarray,
    weight: np.ndarray,
    annotation: TissueMask,
    caption: str,
) -> np.ndarray:
    """A heatmap with the outline of what is annotated; `annotation` covers the slide as the tissue's mask does."""
    whole = heatmap(thumbnail, mask, boxes, weight, caption)
    _outline(whole[MARGIN:], annotation, ANNOTATED)
    return whole


def _outline(picture: np.ndarray, mask: TissueMask, colour: tuple[int, int, int]) -> None:
    image = cv2.resize(mask.image.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(image, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, colour, 2)


def overlay(
    thumbnail: np.ndarray,
    mask: TissueMask,
    values: np.ndarray,
    origin_px: tuple[float, float],
    cell_px: float,
    caption: str,
) -> np.ndarray:
    """The slide under a map (rows, columns) of square cells, from its least to its largest value; NaN stays as it is.

    origin_px: (x, y) of the map's corner. A pixel has the colour of the cell that its middle lies in.
    """
    whole, picture, scale = _canvas(thumbnail, caption)
    rows, columns = values.shape
    x, y = (
        np.floor(((np.arange(side) + 0.5) / scale * fine - corner) / cell_px).astype(int)
        for side, fine, corner in zip(picture.shape[1::-1], mask.downsample, origin_px, strict=True)
    )
    beyond = ((y < 0) | (y >= rows))[:, None] | ((x < 0) | (x >= columns))[None]
    placed = values[y.clip(0, rows - 1)[:, None], x.clip(0, columns - 1)[None]]
    placed = np.where(beyond, np.nan, placed)
    seen = np.isfinite(placed)
    low, high = np.nanmin(values), np.nanmax(values)
    grey = (np.nan_to_num(placed - low) / (high - low if high > low else 1) * 255).astype(np.uint8)
    layer = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    picture[seen] = cv2.addWeighted(np.ascontiguousarray(layer), 0.55, picture, 0.45, 0)[seen]
    _outline(picture, mask, CONTOUR)
    return whole


def _canvas(thumbnail: np.ndarray, caption: str) -> tuple[np.ndarray, np.ndarray, float]:
    """A picture with its caption, the part of it that shows the thumbnail, and by how much this is enlarged.

    So much that lines can be seen. What is drawn on the part is drawn on the whole.
    """
    scale = EDGE / max(thumbnail.shape[:2])
    width, height = (max(1, round(side * scale)) for side in thumbnail.shape[1::-1])
    whole = np.full((MARGIN + height, width, 3), 255, np.uint8)
    text = caption.encode("ascii", "replace").decode()  # OpenCV's fonts know no more
    cv2.putText(whole[:MARGIN], text, (8, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (30, 30, 30), 1, cv2.LINE_AA)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    cv2.resize(thumbnail, (width, height), dst=whole[MARGIN:], interpolation=how)
    return whole, whole[MARGIN:], scale


def _sides(boxes: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """(n, 4) int32: left, top, right and bottom, in px of the picture, of boxes in level-0 px."""
    corner, size = boxes[:, :2], boxes[:, 2:]
    return np.rint(np.concatenate([corner * scale, (corner + size) * scale], axis=1)).astype(np.int32)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture in one step. Raises OSError if it cannot be written."""
    put(path, _png(picture))


def _png(picture: np.ndarray) -> bytes:
    """Written by hand for libdeflate: OpenCV's zlib takes twice as long, and its rows differ from the pixel before."""
    height, width, _ = picture.shape
    rows = picture.reshape(height, width * 3)
    data = bytearray(height * (1 + width * 3))
    lines = np.frombuffer(data, np.uint8).reshape(height, -1)
    lines[:, 0] = 2  # what follows is the difference to the row above
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, 2: RGB
    parts = ((b"IHDR", head), (b"IDAT", imagecodecs.deflate_encode(data, level=1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*part) for part in parts)


def _png_chunk(name: bytes, data: bytes | bytearray) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
