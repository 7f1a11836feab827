"""What reading costs: tiles of one slide by several readers, beside a loop over the file's own tiles written by hand.

    python benchmarks/feed.py [--kind medium] [--repeats 5]

256-px tiles at 1, 2 and 4 times the µm/px of level 0, by 1 and 2 threads, the contestants taking turns; then every
codec a TIFF file may have, native decoding beside OpenSlide, which decides the reader of each. CPU seconds are of all
threads; on a busy machine they are steadier than wall time. Prints tables, writes benchmarks/out/feed.json.

The loop by hand decodes the file's tiles under each output tile and averages them with OpenCV: no check of what it
decodes, no other level, no tile that is not aligned. It is the limit of what this library can do.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import cv2
import numpy as np
import openslide
import simplejpeg
import tifffile
import tiffslide
from slides import SIDES, cohort

from pipeline.agreement import tissue_tiles
from pipeline.config import make_config
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.slide import thumbnail
from pipeline.stream import TileReader
from pipeline.tissue import tissue_in
from pipeline.worker import set_up_process

OUT = Path(__file__).parent / "out"
PX = 256
CODECS = ("jpeg", "lzw", "deflate", "zstd", None, "aperio_jp2000_rgb", "webp")


class Cost(NamedTuple):
    tiles: int
    wall: float
    cpu: float
    native: float  # tiles of the file that were decoded, where that is known


def tree_of(path: Path, mpp: float, levels: int = 1) -> QuadTree:
    with open_slide(path) as slide:
        mask = tissue_in(thumbnail(slide, 8.0), make_config().tissue)
        return build_quadtree(slide, mask, mpp=mpp, tile_px=PX, levels=levels)


class Clock:
    """Started when the file is open: what opening costs is measured in end_to_end.py."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def cost(self, tiles: int, native: float) -> Cost:
        return Cost(tiles, time.perf_counter() - self.wall, time.process_time() - self.cpu, native)


def ours(path: Path, tree: QuadTree, reader: str, threads: int) -> Cost:
    with open_slide(path, reader=reader) as slide, ThreadPoolExecutor(threads) as pool:
        clock = Clock()
        tiles = TileReader(slide, tree)
        parts = map(tiles.read, tiles.blocks) if threads == 1 else pool.map(tiles.read, tiles.blocks)
        count = sum(len(some) for some in tiles.joined(iter(parts)))
        return clock.cost(count, slide.cost.pixels / PX**2)


def each_tile(path: Path, tree: QuadTree, threads: int, library: Any, mpp: float) -> Cost:
    """One read_region for each tile, as most tools do it, a handle for each thread, resized by area."""
    handles = threading.local()
    factor = round(mpp / 0.25)
    with library(path) as slide:
        level = slide.get_best_level_for_downsample(factor)
        side = round(PX * factor / slide.level_downsamples[level])

    def read(xy: np.ndarray) -> np.ndarray:
        if not hasattr(handles, "slide"):
            handles.slide = library(path)
        pixels = np.asarray(handles.slide.read_region((int(xy[0]), int(xy[1])), level, (side, side)))[..., :3]
        return pixels if side == PX else cv2.resize(pixels, (PX, PX), interpolation=cv2.INTER_AREA)

    clock = Clock()
    return clock.cost(len(in_threads(read, list(tree.levels[-1].xy), threads)), 0.0)


def by_hand(path: Path, tree: QuadTree, threads: int, mpp: float) -> Cost:
    factor = round(mpp / 0.25)
    with tifffile.TiffFile(path) as file, open(path, "rb") as raw:
        levels = sorted((page for page in file.pages if page.is_tiled), key=lambda page: -page.imagewidth)
        page, factor = (levels[1], factor // 4) if factor >= 4 else (levels[0], factor)
        across, tables, descriptor = -(-page.imagewidth // PX), page.jpegtables, raw.fileno()
        head = tables[:-2] if tables else b"\xff\xd8"

        def read(corner: np.ndarray) -> np.ndarray:
            column, row = (int(edge) * factor for edge in corner)
            canvas = np.empty((PX * factor, PX * factor, 3), np.uint8)
            for dy in range(factor):
                for dx in range(factor):
                    index = min(row + dy, across - 1) * across + min(column + dx, across - 1)
                    data = os.pread(descriptor, page.databytecounts[index], page.dataoffsets[index])
                    tile = simplejpeg.decode_jpeg(head + data[2:])
                    canvas[dy * PX : (dy + 1) * PX, dx * PX : (dx + 1) * PX] = tile
            return canvas if factor == 1 else cv2.resize(canvas, (PX, PX), interpolation=cv2.INTER_AREA)

        clock = Clock()
        count = len(in_threads(read, list(tree.levels[-1].grid), threads))
        return clock.cost(count, count * factor**2)


def in_threads(
    read: Callable[[np.ndarray], np.ndarray], items: list[np.ndarray], threads: int
) -> list[tuple[int, ...]]:
    if threads == 1:
        return [read(item).shape for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda item: read(item).shape, items))


def contestants(path: Path, mpp: float, threads: int) -> dict[str, Callable[[], Cost]]:
    flat, deep = tree_of(path, mpp), tree_of(path, mpp, 3)
    return {
        "loop by hand": lambda: by_hand(path, flat, threads, mpp),
        "slidestream": lambda: ours(path, flat, "auto", threads),
        "slidestream, 3 levels": lambda: ours(path, deep, "auto", threads),
        "slidestream by OpenSlide": lambda: ours(path, flat, "openslide", threads),
        "OpenSlide, read_region a tile": lambda: each_tile(path, flat, threads, openslide.OpenSlide, mpp),
        "TiffSlide, read_region a tile": lambda: each_tile(path, flat, threads, tiffslide.TiffSlide, mpp),
    }


def race(path: Path, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for mpp in (0.25, 0.5, 1.0):
        for threads in (1, 2):
            runs: dict[str, list[Cost]] = {}
            for turn in range(repeats + 1):  # the first warms the file and the code
                for name, work in contestants(path, mpp, threads).items():
                    cost = work()
                    if turn:
                        runs.setdefault(name, []).append(cost)
            rows += [row(name, mpp, threads, costs, runs["loop by hand"]) for name, costs in runs.items()]
    return rows


def row(name: str, mpp: float, threads: int, costs: list[Cost], limit: list[Cost]) -> dict[str, Any]:
    """Medians; the ratio to the limit is that of each turn, taken side by side."""
    ratios = [(best.cpu / best.tiles) / (cost.cpu / cost.tiles) for cost, best in zip(costs, limit, strict=True)]
    natives = [1e3 * cost.cpu / cost.native for cost in costs if cost.native]
    return {
        "um/px": mpp,
        "threads": threads,
        "reader": name,
        "tiles": costs[0].tiles,
        "CPU s per 1,000": median(1e3 * cost.cpu / cost.tiles for cost in costs),
        "tiles/s": median(cost.tiles / cost.wall for cost in costs),
        "CPU ms per native tile": median(natives) if natives else None,
        "of the limit": median(ratios),
    }


def codecs(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """CPU ms for each 256-px tile of a 4096² slide in each codec: native decoding, OpenSlide in blocks, their ratio."""
    pixels = np.concatenate(np.concatenate(tissue_tiles(16, 1024).reshape(4, 4, 1024, 1024, 3), axis=2), axis=0)
    rows = []
    for codec in CODECS:
        path = folder / f"{codec}.svs"
        options: dict[str, Any] = {"compression": codec, "photometric": "rgb", "metadata": None}
        words = "Aperio Image Library v12.0\n|MPP = 0.25|AppMag = 40"
        tifffile.imwrite(path, pixels, tile=(PX, PX), description=words, **options)
        costs: dict[str, list[float]] = {"tiffslide": [], "openslide": []}
        for _ in range(repeats):
            for reader, found in costs.items():
                found.append(per_tile(path, reader))
        native, other = (median(costs[reader]) for reader in costs)
        with open_slide(path) as slide:
            chosen = slide.reader
        rows.append(
            {"codec": str(codec), "native, ms": native, "OpenSlide, ms": other, "ratio": other / native, "auto": chosen}
        )
    return rows


def per_tile(path: Path, reader: str) -> float:
    """NaN where this reader does not open the file."""
    try:
        with open_slide(path, reader=reader) as slide:
            started, count = time.process_time(), 0
            for y in range(0, slide.size[1], 1024):
                for x in range(0, slide.size[0], 1024):
                    slide.read(x, y, 0, 1024, 1024)
                    count += 16
            return 1e3 * (time.process_time() - started) / count
    except Exception as error:  # noqa: BLE001 - a row of the table, not a fault
        print(f"  {path.name}: {reader}: {error}")
        return float("nan")


def show(rows: list[dict[str, Any]]) -> None:
    print(" | ".join(rows[0]))
    for one in rows:
        print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value or "-") for value in one.values()))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SIDES, default="medium")
    parser.add_argument("--repeats", type=int, default=1)
    wanted = parser.parse_args()
    set_up_process()
    (path,) = cohort(OUT / "slides", wanted.kind, 1)
    rows = race(path, wanted.repeats)
    show(rows)
    with tempfile.TemporaryDirectory() as folder:
        table = codecs(Path(folder), wanted.repeats)
    show(table)
    (OUT / "feed.json").write_text(json.dumps({"race": rows, "codecs": table}, indent=1))


if __name__ == "__main__":
    main()
