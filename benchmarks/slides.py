"""The slides that the benchmarks run on: Aperio-style pyramids of real tissue texture, made here and kept.

    python benchmarks/slides.py FOLDER --kind biopsies --count 6

256-px JPEG tiles (quality 80, 4:2:0), 0.25 µm/px, levels 1, 4 and 16; tissue on 40 % of the area in blobs of a few
thousand pixels, noisy glass around. Kinds by their side in pixels: big 32768, medium 16384, biopsies 6144, tiny 1024.
The same seed gives the same slide; a slide that is there already is not made again.

Inside the blobs a slide repeats a few hundred different tiles, each encoded once: so a gigapixel takes seconds. Every
place has bytes of its own in the file; a reader that goes by place decodes them all.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from skimage.data import immunohistochemistry

SIDES = {"big": 32768, "medium": 16384, "biopsies": 6144, "tiny": 1024}
TILE = 256
MPP = 0.25
FACTORS = (4, 16)
GLASS = 243
TISSUE_SHARE = 0.4
BLOB_PX = 700  # the width of the smoothing that makes the blobs: they come out a few times as wide
NODE_PX = TILE // 2  # the blobs are decided on a grid this coarse and are linear in between
EDGE_PX = 24  # over how many pixels tissue thins out
NOISES = 12  # different noises on each piece of texture
# From the 3 nodes of a tile to its 256 pixels.
SPREAD = np.array([np.interp(np.arange(TILE) + 0.5, (0, NODE_PX, TILE), corner) for corner in np.eye(3)]).T


@dataclass(frozen=True)
class Tile:
    """A tile as the file holds it, and its area means, from the pixels before the JPEG, for the coarser levels."""

    jpeg: bytes
    means: dict[int, np.ndarray]


def make_tile(pixels: np.ndarray) -> Tile:
    means = {f: cv2.resize(pixels, (TILE // f, TILE // f), interpolation=cv2.INTER_AREA) for f in FACTORS}
    return Tile(encode(pixels), means)


def encode(pixels: np.ndarray) -> bytes:
    return imagecodecs.jpeg8_encode(pixels, level=80, colorspace="RGB", outcolorspace="YCBCR", subsampling="420")


def texture(rng: np.random.Generator) -> np.ndarray:
    """(rows, columns, TILE, TILE, 3) uint8: stained tissue in tiles that fit together however often they repeat.

    Mirrored over its borders, so that it has no seams; turned, shifted and tinted, so that no two slides are alike.
    """
    base = np.rot90(immunohistochemistry(), int(rng.integers(4)))
    whole = np.pad(base, ((0, len(base)), (0, len(base)), (0, 0)), mode="symmetric")
    whole = np.roll(whole, tuple(rng.integers(0, len(whole), 2)), (0, 1))
    whole = 255 * (whole / 255) ** rng.uniform(0.92, 1.12, 3)
    across = len(whole) // TILE
    return whole.reshape(across, TILE, across, TILE, 3).swapaxes(1, 2).round().astype(np.uint8)


def tissue_pixels(rng: np.random.Generator) -> np.ndarray:
    """(rows, columns, NOISES, TILE, TILE, 3) uint8: the texture, with the noise of a scanner."""
    clean = texture(rng)[:, :, None]
    shape = (*clean.shape[:2], NOISES, *clean.shape[3:])
    return np.clip(clean + rng.integers(-6, 7, shape, dtype=np.int16), 0, 255).astype(np.uint8)


def glass_pixels(rng: np.random.Generator) -> np.ndarray:
    """(NOISES, TILE, TILE, 3) uint8."""
    return (GLASS + rng.normal(0, 1.2, (NOISES, TILE, TILE, 1))).round().repeat(3, axis=-1).astype(np.uint8)


def blobs(side: int, rng: np.random.Generator) -> np.ndarray:
    """Nodes of a smooth field, in pixels from the border of the tissue: positive on TISSUE_SHARE of the slide."""
    nodes = side // NODE_PX + 1
    field = cv2.GaussianBlur(rng.normal(size=(nodes, nodes)), (0, 0), BLOB_PX / NODE_PX, borderType=cv2.BORDER_REFLECT)
    rim = np.minimum(np.arange(nodes), np.arange(nodes)[::-1]) * NODE_PX / BLOB_PX
    field = field / field.std() - 1.5 * np.exp(-np.minimum.outer(rim, rim))  # less towards the border of the slide
    return (field - np.quantile(field, 1 - TISSUE_SHARE)) * BLOB_PX


class Pieces:
    """The tiles of one slide by their place; those that are all tissue or all glass come from a pool."""

    def __init__(self, side: int, seed: int) -> None:
        rng = np.random.default_rng([seed, side])
        self.across = side // TILE
        self.field = blobs(side, rng)
        self.tissue, self.glass = tissue_pixels(rng), glass_pixels(rng)
        self.noise = rng.integers(NOISES, size=(self.across, self.across))
        self.tissue_tiles = [[[make_tile(p) for p in column] for column in row] for row in self.tissue]
        self.glass_tiles = [make_tile(pixels) for pixels in self.glass]

    def at(self, row: int, column: int) -> Tile:
        nodes = self.field[2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
        place, noise = (row % len(self.tissue), column % len(self.tissue)), self.noise[row, column]
        if nodes.min() >= EDGE_PX / 2:
            return self.tissue_tiles[place[0]][place[1]][noise]
        if nodes.max() <= -EDGE_PX / 2:
            return self.glass_tiles[noise]
        share = np.clip((SPREAD @ nodes @ SPREAD.T) / EDGE_PX + 0.5, 0, 1)[..., None].astype(np.float32)
        mixed = self.glass[noise] + share * (self.tissue[*place, noise].astype(np.float32) - self.glass[noise])
        return make_tile(np.rint(mixed).astype(np.uint8))


def make_slide(path: Path, side: int, seed: int = 0) -> Path:
    """Write the slide unless it is there. Memory stays below a few hundred MB whatever its size."""
    if path.exists():
        return path
    if side % TILE:
        raise ValueError(f"side must be a multiple of {TILE}, not {side}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a run that is killed leaves no half slide behind
        write(Path(folder) / path.name, Pieces(side, seed), side)
        (Path(folder) / path.name).rename(path)
    return path


def write(path: Path, pieces: Pieces, side: int) -> None:
    means: dict[int, list[np.ndarray]] = {factor: [] for factor in FACTORS}

    def finest() -> Iterator[bytes]:
        for row in range(pieces.across):
            for column in range(pieces.across):
                tile = pieces.at(row, column)
                for factor in FACTORS:
                    means[factor].append(tile.means[factor])
                yield tile.jpeg

    head = f"Aperio Image Library v12.0\n{side}x{side} [0,0 {side}x{side}] ({TILE}x{TILE})"
    tags = f"|AppMag = {round(10 / MPP)}|MPP = {MPP:g}"
    jpeg: dict[str, Any] = {"compression": "jpeg", "photometric": "rgb", "metadata": None, "software": False}
    with tifffile.TiffWriter(path) as file:

        def write_level(tiles: Callable[[], Iterator[bytes]], factor: int, words: str) -> None:
            shape, kind = (side // factor, side // factor, 3), int(factor > 1)
            description = f"{head}{words} JPEG/RGB{tags}"
            file.write(
                tiles(),
                shape=shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                description=description,
                subfiletype=kind,
                **jpeg,
            )

        write_level(finest, 1, "")
        small = thumbnail(means, pieces.across)
        line = f"Aperio Image Library v12.0\n{side}x{side} -> {small.shape[1]}x{small.shape[0]} - {tags}"
        file.write(small, description=line, compressionargs={"level": 80}, **jpeg)
        for factor in FACTORS:
            level = side // factor
            write_level(lambda f=factor: coarser(means[f], pieces.across), factor, f" -> {level}x{level}")


def coarser(means: list[np.ndarray], across: int) -> Iterator[bytes]:
    """The JPEG tiles of a level, row by row, of the means of the finest tiles."""
    each = len(means[0])
    group = TILE // each
    for top in range(0, across, group):
        for left in range(0, across, group):
            pixels = np.full((TILE, TILE, 3), GLASS, np.uint8)
            for row in range(top, min(top + group, across)):
                for column in range(left, min(left + group, across)):
                    y, x = (row - top) * each, (column - left) * each
                    pixels[y : y + each, x : x + each] = means[row * across + column]
            yield encode(pixels)


def thumbnail(means: dict[int, list[np.ndarray]], across: int) -> np.ndarray:
    """The whole slide in 16 pixels a tile, then in 768 at most."""
    tiles = np.stack(means[FACTORS[-1]])
    whole = tiles.reshape(across, across, *tiles.shape[1:]).swapaxes(1, 2).reshape(across * tiles.shape[1], -1, 3)
    side = min(768, len(whole))
    return cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA)


def cohort(folder: Path, kind: str, count: int) -> list[Path]:
    """The first `count` slides of a kind, made where they are missing; the n-th is the same in every cohort."""
    return [make_slide(folder / f"{kind}{seed:03}.svs", SIDES[kind], seed) for seed in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=SIDES, default="medium")
    parser.add_argument("--count", type=int, default=1)
    wanted = parser.parse_args()
    for path in cohort(wanted.folder, wanted.kind, wanted.count):
        print(f"{path}   {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
