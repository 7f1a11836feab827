"""Pictures of one slide: the thumbnail with the tissue's contour and the quadtree drawn on it, and heatmaps."""

import os
from pathlib import Path

import cv2
import numpy as np

from .quadtree import QuadTree
from .tissue import TissueMask

EDGE = 1600  # the longest edge of a picture, px
CONTOUR = (0, 140, 0)
LEVELS = ((200, 30, 30), (230, 120, 0), (40, 90, 220), (130, 60, 180))  # coarse → fine
MARGIN = 34


def overview(thumbnail: np.ndarray, mask: TissueMask, tree: QuadTree, caption: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the slide, the contour of its tissue, and the tiles of every level, a colour a level."""
    picture, scale = _enlarged(thumbnail)
    x, y = scale / mask.downsample[0], scale / mask.downsample[1]
    deepest = len(tree.levels) - 1
    for k in range(deepest, -1, -1):
        colour, inset = LEVELS[min(k, len(LEVELS) - 1)], 0 if k == deepest else 1
        for left, top, width, height in tree.boxes(k):
            corner = (round(left * x) + inset, round(top * y) + inset)
            opposite = (round((left + width) * x) - inset, round((top + height) * y) - inset)
            cv2.rectangle(picture, corner, opposite, colour, 1 if k else 2)
    image = cv2.resize(mask.image.astype(np.uint8), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(image, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, CONTOUR, 2)
    return _captioned(picture, caption)


def heatmap(thumbnail: np.ndarray, mask: TissueMask, boxes: np.ndarray, weight: np.ndarray, caption: str) -> np.ndarray:
    """The slide, each tile coloured by the rank of its weight; tiles never looked at (NaN) stay as they are."""
    picture, scale = _enlarged(thumbnail)
    x, y = scale / mask.downsample[0], scale / mask.downsample[1]
    seen = np.flatnonzero(np.isfinite(weight))
    ranks = np.zeros(len(weight))
    ranks[seen[np.argsort(weight[seen], kind="stable")]] = np.linspace(0, 1, len(seen)) if len(seen) > 1 else 1.0
    colours = cv2.applyColorMap((ranks * 255).astype(np.uint8).reshape(-1, 1), cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
    layer = picture.copy()
    for row in seen:
        left, top, width, height = boxes[row]
        corner, opposite = (round(left * x), round(top * y)), (round((left + width) * x), round((top + height) * y))
        cv2.rectangle(layer, corner, opposite, tuple(int(c) for c in colours[row]), -1)
    return _captioned(cv2.addWeighted(layer, 0.55, picture, 0.45, 0), caption)


def _enlarged(thumbnail: np.ndarray) -> tuple[np.ndarray, float]:
    """The thumbnail at a size in which lines can be seen, and by how much it grew."""
    scale = EDGE / max(thumbnail.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in thumbnail.shape[1::-1])
    return cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC), scale


def _captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    band = np.full((MARGIN, picture.shape[1], 3), 255, np.uint8)
    text = caption.encode("ascii", "replace").decode()  # OpenCV's fonts know no more
    cv2.putText(band, text, (8, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (30, 30, 30), 1, cv2.LINE_AA)
    return np.concatenate([band, picture])


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture in one step. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, data = cv2.imencode(".png", picture[..., ::-1])
    if not ok:
        raise ValueError(f"a picture of shape {picture.shape} cannot be coded as PNG")
    part = path.with_name(f"{os.fsdecode(os.fsencode(path.name)[:200])}.{os.getpid()}.partial")
    part.write_bytes(data.tobytes())
    os.replace(part, path)
