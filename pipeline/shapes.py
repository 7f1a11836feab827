"""Annotations as polygons in level-0 pixels: GeoJSON (QuPath and others) and ASAP XML, drawn as a mask."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .tissue import TissueMask

Polygon = tuple[np.ndarray, list[np.ndarray]]  # outline (n, 2) and holes, level-0 px
MAX_CELLS = 1 << 28  # of the drawn mask


def read_shapes(path: str | Path) -> list[Polygon]:
    """The closed shapes of a GeoJSON or ASAP XML file. Raises UsageError if it is neither, or holds none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    shapes = _asap(path, text) if text.lstrip().startswith("<") else _geojson(path, text)
    if not shapes:
        raise UsageError(f"{path}: holds no polygon")
    return shapes


def _geojson(path: str | Path, text: str) -> list[Polygon]:
    try:
        found: list[Polygon] = []
        _collect(json.loads(text), found)
        return found
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a GeoJSON file: {error}") from error


def _collect(node: Any, found: list[Polygon]) -> None:
    if isinstance(node, list):
        for part in node:
            _collect(part, found)
    elif node is None:
        return
    elif node["type"] == "FeatureCollection":
        _collect(node["features"], found)
    elif node["type"] == "Feature":
        _collect(node["geometry"], found)
    elif node["type"] == "GeometryCollection":
        _collect(node["geometries"], found)
    elif node["type"] == "Polygon":
        found.append(_rings(node["coordinates"]))
    elif node["type"] == "MultiPolygon":
        found.extend(_rings(part) for part in node["coordinates"])


def _rings(rings: list[Any]) -> Polygon:
    outline, *holes = (np.asarray(ring, np.float64)[:, :2] for ring in rings)
    if not all(np.isfinite(ring).all() for ring in (outline, *holes)):
        raise ValueError("a coordinate is not a number")
    return outline, holes


def _asap(path: str | Path, text: str) -> list[Polygon]:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UsageError(
            f"{path}: an annotation file needs no document type; refused, as it could expand without bound"
        )
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(text)
        found: list[Polygon] = []
        for annotation in root.iter("Annotation"):
            points = [
                (int(c.get("Order", i)), float(c.attrib["X"].replace(",", ".")), float(c.attrib["Y"].replace(",", ".")))
                for i, c in enumerate(annotation.iter("Coordinate"))
            ]
            if annotation.get("Type") in ("Polygon", "Rectangle", "Spline") and len(points) > 2:
                found.append((np.array([p[1:] for p in sorted(points)]), []))
        return found
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise UsageError(f"{path}: not an ASAP XML file: {error}") from error


def shapes_mask(shapes: list[Polygon], size: tuple[int, int], slide_mpp: float, cell_px: float) -> TissueMask:
    """The inside of polygons as a mask of cells of about `cell_px` level-0 pixels: those whose centre is inside."""
    cell = max(cell_px, math.sqrt(size[0] * size[1] / MAX_CELLS))
    width, height = (max(1, math.ceil(side / cell)) for side in size)
    scale = np.array([width / size[0], height / size[1]])
    image = np.zeros((height, width), bool)
    for outline, holes in shapes:
        low, high = (np.clip(np.rint(edge(outline * scale, axis=0)), 0, (width, height)) for edge in (np.min, np.max))
        (x, y), (right, bottom) = low.astype(int), high.astype(int)
        one = _inside(outline * scale - low, (right - x, bottom - y))
        for hole in holes:
            one &= ~_inside(hole * scale - low, (right - x, bottom - y))
        image[y:bottom, x:right] |= one
    downsample = (size[0] / width, size[1] / height)
    return TissueMask(image, downsample, slide_mpp * math.sqrt(downsample[0] * downsample[1]), "shapes", ())


def _inside(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: the centres of these cells that a ring holds; `shape` is (width, height).

    Every edge of the ring turns inside to outside, and back, right of where it crosses the centre line of a row.
    """
    width, height = shape
    (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
    first, stop = (np.clip(np.ceil(edge(y0, y1) - 0.5), 0, height).astype(int) for edge in (np.minimum, np.maximum))
    edge = np.repeat(np.arange(len(ring)), stop - first)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(stop - first) - stop, stop - first)
    crossing = x0[edge] + (row + 0.5 - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
    turns = np.zeros((height, width + 1), bool)
    np.logical_xor.at(turns, (row, np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)), True)
    return np.asarray(np.logical_xor.accumulate(turns, axis=1)[:, :width])
