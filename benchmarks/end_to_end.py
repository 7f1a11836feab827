"""Slides in, features on the disk, beside the encoder alone on tiles in memory, in one process and taking turns.

    python benchmarks/end_to_end.py [--kinds big medium biopsies] [--count 100] [--encoders resnet50] [--repeats 5]

One large slide, one medium, a cohort of biopsies; 1 level and 3 from 0.5 µm/px, 224-px tiles, random weights in what
precision the device has. Prepared beforehand: measured are opening, reading, encoding and writing, slide boundaries
included. "of the parts" is what the slower of the two parts alone (encoder on tiles in memory, reading by as many
threads) would take, divided by what the whole took; 1 means that the rest costs nothing. "busy" is the share of the
time between the first batch and the last in which the encoder worked. The start of the process is left out.

Prints a table, writes benchmarks/out/end_to_end.json, and with --trace a picture of the encoder's batches over time.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from dask.system import CPU_COUNT
from matplotlib import pyplot
from slides import SIDES, cohort

from extractors import PRECISIONS, Encoder, Pending
from pipeline.config import Config, make_config
from pipeline.encode import Settings
from pipeline.lanes import Lanes
from pipeline.meter import Meter
from pipeline.outcome import Outcome
from pipeline.readers import open_slide
from pipeline.stages import Recipe, SlideFile, encode, make_recipe, open_encoder, prepare
from pipeline.store import BagStore
from pipeline.stream import TileReader
from pipeline.worker import set_up_process

OUT = Path(__file__).parent / "out"
ALONE_TILES = 512  # tiles of the slides that the encoder gets from memory
ZOOM_S = 12  # of the trace that are drawn batch by batch


class Span(NamedTuple):
    """A batch: when it began and ended, by which thread."""

    begin: float
    end: float
    lane: str


class Traced:
    """An encoder that remembers when it worked."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.spans: list[Span] = []
        self.finished: list[float] = []  # when each slide was

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def start(self, tiles: torch.Tensor) -> Pending:
        began = time.perf_counter()
        pending = self._encoder.start(tiles)
        self.spans.append(Span(began, time.perf_counter(), threading.current_thread().name))
        return pending

    @property
    def limits(self) -> tuple[float, float]:
        return min(span.begin for span in self.spans), max(span.end for span in self.spans)

    def busy(self) -> float:
        """Share of the time between the first batch and the last in which the lanes worked."""
        first, last = self.limits
        lanes = len({span.lane for span in self.spans})
        return sum(span.end - span.begin for span in self.spans) / (last - first) / lanes


def prepared(files: list[SlideFile], recipe: Recipe, out: Path) -> list[tuple[SlideFile, Outcome]]:
    rows = [(file, prepare(file, recipe, out)) for file in files]
    return [(file, row) for file, row in rows if row.status == "ready"]


def tiles_of(files: list[SlideFile], out: Path, limit: int | None = None) -> Iterator[np.ndarray]:
    count = 0
    for file in files:
        with open_slide(file.path) as slide:
            tiles = TileReader(slide, BagStore(out).group(file.name).tree())
            for some in tiles.joined(map(tiles.read, tiles.blocks)):
                for tile in some:
                    if tile.pixels is not None:
                        yield tile.pixels
                        count += 1
                        if count == limit:
                            return


def encoder_alone(encoder: Encoder, tiles: np.ndarray, batch: int, threads: int) -> tuple[float, float]:
    """Tiles a second and CPU ms a tile, on tiles in memory, in batches and lanes as the run had them."""
    tiles = tiles[: len(tiles) // batch * batch] if len(tiles) > batch else tiles
    batches = [torch.from_numpy(tiles[at : at + batch]) for at in range(0, len(tiles), batch)]
    with Lanes(encoder, "cpu", threads) as lanes:
        started, cpu = time.perf_counter(), time.process_time()
        for pending in [lanes.start(one) for one in batches]:
            pending.result()
        return len(tiles) / (time.perf_counter() - started), 1e3 * (time.process_time() - cpu) / len(tiles)


def reading_alone(files: list[SlideFile], out: Path, threads: int) -> float:
    """Tiles a second, by so many threads."""
    started, count = time.perf_counter(), 0
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            with open_slide(file.path) as slide:
                tiles = TileReader(slide, BagStore(out).group(file.name).tree())
                count += sum(len(some) for some in tiles.joined(iter(pool.map(tiles.read, tiles.blocks))))
    return count / (time.perf_counter() - started)


def measure(kind: str, count: int, config: Config, threads: int, repeats: int) -> tuple[dict[str, Any], Traced]:
    paths = cohort(OUT / "slides", kind, count)
    files = [SlideFile(path.name, path) for path in paths]
    encoder = open_encoder(config).load(precision=config.precision)
    recipe = make_recipe(config, encoder)
    settings = Settings(config.batch_size, config.readers, threads, config.queue_mb << 20)
    runs: list[dict[str, float]] = []
    batch = config.batch_size
    with tempfile.TemporaryDirectory() as folder:
        ready = prepared(files, recipe, Path(folder) / "0")
        memory = np.stack(list(tiles_of([file for file, _ in ready], Path(folder) / "0", ALONE_TILES)))
        encoder.encode(memory[:64])
        for turn in range(repeats):
            out = Path(folder) / str(turn)
            ready = prepared(files, recipe, out)
            traced, started, cpu = Traced(encoder), time.perf_counter(), time.process_time()
            results = []
            for result in encode(ready, traced, out, recipe, settings=settings):  # type: ignore[arg-type]
                results.append(result)
                traced.finished.append(time.perf_counter())
            whole, cpu = time.perf_counter() - started, time.process_time() - cpu
            assert all(row.status == "done" for row, _ in results), results
            meter = sum((result.meter for _, result in results), Meter())
            batch = results[-1][1].batch_size
            alone, alone_cpu = encoder_alone(encoder, memory, batch, threads)
            reading = reading_alone([file for file, _ in ready], out, threads)
            runs.append(
                {
                    "end to end, tiles/s": meter.tiles / whole,
                    "encoder alone, tiles/s": alone,
                    "reading alone, tiles/s": reading,
                    "end to end ÷ encoder alone": meter.tiles / whole / alone,
                    "of the slower part": meter.tiles / whole / min(alone, reading),
                    "busy": traced.busy(),
                    "CPU ms/tile": 1e3 * cpu / meter.tiles,
                    "CPU ÷ encoder alone": 1e3 * cpu / meter.tiles / alone_cpu,
                    "s per 1,000 native tiles": 1e3 * whole / (meter.decoded / 256**2),
                }
            )
    row: dict[str, Any] = {
        "slides": f"{len(ready)} {kind}",
        "encoder": f"{config.encoder} {encoder.precision}",
        "levels": config.levels,
        "tiles": meter.tiles,
        "batch": batch,
    }
    row |= {name: median(run[name] for run in runs) for name in runs[0]}
    row |= {"bound by": meter.bound_by, "unneeded": meter.rates()["unneeded"], "meter": asdict(meter)}
    return row, traced


def show(rows: list[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if name != "meter"]
    print(" | ".join(names))
    for one in rows:
        print(" | ".join(f"{one[n]:.3g}" if isinstance(one[n], float) else str(one[n]) for n in names), flush=True)


def draw(traced: Traced, path: Path, words: str) -> None:
    """How busy the encoder was all along, and batch by batch in the first seconds; dotted: a slide is finished."""
    first, last = traced.limits
    lanes = sorted({span.lane for span in traced.spans})
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(10, 4), height_ratios=(2, 1), layout="constrained")
    edges = np.linspace(0, last - first, max(2, round(last - first) + 1))
    shares = [share_of(traced.spans, low, high, first) / len(lanes) for low, high in pairwise(edges)]
    above.stairs(shares, edges, fill=True, color="tab:blue")
    above.set(xlim=(0, last - first), ylim=(0, 1.05), ylabel="encoder busy", title=words)
    for span in traced.spans:
        below.barh(
            lanes.index(span.lane), span.end - span.begin, left=span.begin - first, color="tab:blue", edgecolor="w"
        )
    below.set(xlim=(0, min(ZOOM_S, last - first)), yticks=range(len(lanes)), xlabel="seconds", ylabel="batches of lane")
    for axis in (above, below):
        for moment in traced.finished:
            axis.axvline(moment - first, color="tab:orange", linewidth=0.6, linestyle=":")
    figure.savefig(path, dpi=90)


def share_of(spans: list[Span], low: float, high: float, zero: float) -> float:
    inside = (min(span.end - zero, high) - max(span.begin - zero, low) for span in spans)
    return sum(max(0.0, part) for part in inside) / (high - low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=SIDES, default=["medium", "biopsies"])
    parser.add_argument("--count", type=int, default=20, help="biopsies")
    parser.add_argument("--encoders", nargs="+", default=["resnet50", "lab_lbp"])
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--threads", type=int, default=CPU_COUNT)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--trace", type=Path, help="a PNG of the last run")
    wanted = parser.parse_args()
    set_up_process()
    torch.set_num_threads(wanted.threads)
    rows: list[dict[str, Any]] = []
    for name in wanted.encoders:
        for kind in wanted.kinds:
            for levels in wanted.levels:
                weights = None if name == "lab_lbp" else "random"
                config = make_config(encoder=name, weights=weights, levels=levels, precision=wanted.precision)
                count = wanted.count if kind == "biopsies" else 1
                row, traced = measure(kind, count, config, wanted.threads, wanted.repeats)
                show([row])
                rows.append(row)
    print()
    show(rows)
    OUT.mkdir(exist_ok=True)
    (OUT / "end_to_end.json").write_text(json.dumps(rows, indent=1))
    if wanted.trace:
        draw(traced, wanted.trace, f"{rows[-1]['slides']}, {rows[-1]['encoder']}: busy {traced.busy():.1%}")


if __name__ == "__main__":
    main()
