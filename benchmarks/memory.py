"""What a run of 200 slides holds in memory: the peak, and whether it grows from the 50th slide to the 200th.

    python benchmarks/memory.py [--kind biopsies] [--slides 200] [--encoder lab_lbp]

The real command on a folder of biopsies (20 different ones, the rest are links to them), every process of it counted,
its memory and its open files, looked at each time a slide is finished. Ten thousand: --kind tiny --slides 10000. Then
the byte budget of the reading queue, with a reader ten times faster than the encoder and the other way round: the most
that was ever in flight, beside what was allowed. Writes benchmarks/out/memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from slides import SIDES, cohort

from pipeline.errors import SlideError
from pipeline.feed import Feed
from pipeline.meter import Meter
from pipeline.quadtree import build_quadtree
from pipeline.readers import open_slide
from pipeline.readers.image import ArraySlide
from pipeline.tissue import TissueMask

OUT = Path(__file__).parent / "out"
COMMAND = Path(sys.executable).with_name("slidestream")


def held(process: psutil.Process) -> tuple[float, int]:
    """MB and open files of a process and all below it; what they share is counted once for each."""
    total, files = 0, 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
            files += one.num_fds()
        except psutil.NoSuchProcess:
            continue
    return total / 1e6, files


def watch(folder: Path, out: Path, encoder: str) -> list[tuple[float, int]]:
    """MB and open files held when each slide was finished."""
    options = ["-e", encoder, "--levels", "1", *(() if encoder == "lab_lbp" else ("--weights", "random"))]
    run = subprocess.Popen([COMMAND, "run", folder, "-o", out, *options], stdout=subprocess.PIPE, text=True)
    process, found = psutil.Process(run.pid), []
    for line in run.stdout or ():
        if line.startswith("["):
            found.append(held(process))
        else:
            print(line, end="")
    if run.wait():
        raise SystemExit(f"the run ended with {run.returncode}")
    return found


class Slow(ArraySlide):
    def __init__(self, pixels: np.ndarray, seconds: float) -> None:
        super().__init__(pixels)
        self.mpp, self.seconds = 0.5, seconds

    def read(self, x: float, y: float, level: int, width: int, height: int) -> np.ndarray:
        time.sleep(self.seconds)
        return super().read(x, y, level, width, height)


class Source:
    """A slide of noise, all tissue, whose blocks take so many seconds each."""

    def __init__(self, seconds: float) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (4096, 4096, 3), np.uint8)
        slide = open_slide(pixels, mpp=0.5)
        mask = TissueMask(np.ones((1, 1), bool), (4096.0, 4096.0), 0.5, "all")
        self.slide, self.error, self.meter = "noise", None, Meter()
        self.error: SlideError | None = None
        self.tree = build_quadtree(slide, mask, mpp=0.5, tile_px=64, levels=3)
        self.missing = np.ones(len(self.tree), bool)
        self.open, self.unchanged = lambda: Slow(pixels, seconds), lambda: True


def in_flight(reading_s: float, encoding_s: float, allowed: int) -> int:
    """The most bytes that were in flight at a time."""
    with Feed([Source(reading_s)], 2, 2, allowed) as feed:
        for item in feed:
            if item and item[1]:
                time.sleep(encoding_s)
        return feed.budget.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SIDES, default="biopsies")
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--encoder", default="lab_lbp")
    wanted = parser.parse_args()
    made = cohort(OUT / "slides", wanted.kind, 20)
    with tempfile.TemporaryDirectory(dir=OUT) as place:
        folder = Path(place) / "slides"
        folder.mkdir()
        for number in range(wanted.slides):
            os.link(made[number % len(made)], folder / f"{number:04}.svs")
        started = time.perf_counter()
        seen = watch(folder, Path(place) / "out", wanted.encoder)
        seconds, found = time.perf_counter() - started, [mb for mb, _ in seen]
    quarter = [len(found) * k // 4 for k in (1, 2, 3, 4)]
    result: dict[str, Any] = {
        "kind": wanted.kind,
        "slides": len(found),
        "seconds": seconds,
        "peak MB": max(found),
        "MB at a quarter, half, three quarters, the end": [max(found[max(0, at - 10) : at]) for at in quarter],
    }
    result["open files there"] = [max(files for _, files in seen[max(0, at - 10) : at]) for at in quarter]
    first, *_, last = result["MB at a quarter, half, three quarters, the end"]
    result["growth from the first quarter to the end"] = last / first - 1
    allowed = 160 << 20  # two blocks and a half
    result["budget MB"] = allowed / 1e6
    result["in flight, reader 10 times faster, MB"] = in_flight(0.002, 0.02, allowed) / 1e6
    result["in flight, encoder 10 times faster, MB"] = in_flight(0.02, 0.002, allowed) / 1e6
    for name, value in result.items():
        print(f"{name}: {value}")
    (OUT / "memory.json").write_text(json.dumps(result | {"MB": found}, indent=1))


if __name__ == "__main__":
    main()
