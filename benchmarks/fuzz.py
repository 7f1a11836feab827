"""Mutated slide files: what every reader makes of seeded damage, against the undamaged slide, tile by tile.

    python benchmarks/fuzz.py --reader auto --count 5000 --seed 1
    python benchmarks/fuzz.py --reader auto --show 137       (that case again, in this process)

Each file goes the way of a run: open_slide, segment, tile, the tiles; then all tiles of all levels at the places where
the undamaged slide has them; every tenth through `prepare` as well. In a child process, under limits.

same       every tile and the thumbnail as in the undamaged slide
invalid    some tiles are marked invalid, the others are the same (a run fails a slide with more than 1 % of them)
failed     a SlideError
described  the file says that it is another slide: its size, its levels or its scale differ, which the store records.
           The finest pixels that both have are the same
told       the same, with a warning
recoded    a tag of RECODING, which nothing else in the file repeats, says that the numbers are others; pixels differ
different  a tile differs, and nothing tells: never where the damage is one of STRUCTURE
never      machine: what would stop the run; raw: an exception that is no SlideError; memory: over 500 MB, or a
           MemoryError; hang: over 30 s; crash: the process died

Writes benchmarks/out/fuzz-READER.json.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from datetime import date
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mutations import CODED, STRUCTURE, Base, bases, mutate, sites  # beside this file

from pipeline.config import TileConfig, TissueConfig, make_config
from pipeline.errors import CorruptTiles, SlideError, is_machine_fault
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.slide import Slide, thumbnail
from pipeline.stages import Recipe, SlideFile, make_recipe, open_encoder, prepare, segment, tile
from pipeline.stream import stream_tiles
from pipeline.tissue import TissueMask

OUT = Path(__file__).parent / "out"
READERS = ("auto", "tiffslide", "openslide", "image")
PX = 64
LIMIT_S, LIMIT_MB, LIMIT_ADDRESSES = 30, 500, 3 << 30
BAD = ("machine", "raw", "memory", "hang", "crash")
OUTCOMES = ("same", "invalid", "failed", "described", "told", "recoded", "different", *BAD)
# Tags that say what the numbers of a pixel are, and that nothing else in the file repeats.
RECODING = {262: "photometric", 266: "fill order", 317: "predictor", 338: "extra samples", 530: "subsampling"}


class Case(NamedTuple):
    number: int
    base: str
    kind: str
    outcome: str
    words: str


class Undamaged:
    """What a reader makes of a base: levels, scale, thumbnail, and the tiles of every level."""

    def __init__(self, base: Base, reader: str, folder: Path) -> None:
        path = folder / f"undamaged{base.suffix}"
        path.write_bytes(base.data)
        with open_slide(path, base.mpp, reader) as slide:
            self.levels, self.mpp, self.warnings = slide.levels, slide.mpp, slide.warnings
            self.rgb = thumbnail(slide, TissueConfig().tissue_mpp).rgb
            self.trees = list(_trees(slide))
            self.tiles = [{t.row: t.pixels for t in stream_tiles(slide, tree)} for tree in self.trees]
            self.whole = slide.read(0, 0, 0, *slide.size)
        path.unlink()  # OpenSlide takes DICOM files of one folder for one slide
        if any(pixels is None for tiles in self.tiles for pixels in tiles.values()):
            raise SystemExit(f"{base.name} is not whole with {reader}")

    def against(self, slide: Slide) -> tuple[str, str]:
        """The outcome of a slide that opened, and in what it differs."""
        said = self._said(slide)
        warned = slide.warnings != self.warnings
        slide.mpp = self.mpp  # the same places, whatever it says its scale is
        lost = 0
        if slide.size != (self.levels[0].width, self.levels[0].height):
            if not self._shares(slide):
                return "different", said
        else:
            trees = self.trees if slide.levels == self.levels else self.trees[:1]
            for level, (tree, tiles) in enumerate(zip(trees, self.tiles, strict=False)):
                for found in stream_tiles(slide, tree):  # damage changes their order
                    lost += found.pixels is None
                    if found.pixels is not None and not np.array_equal(found.pixels, tiles[found.row]):
                        return "different", f"{said} a tile of level {level}".strip()
            if slide.levels == self.levels:
                view = thumbnail(slide, TissueConfig().tissue_mpp)
                lost += int(view.unreadable.any())
                if (view.rgb != self.rgb)[~view.unreadable].any():
                    return "different", f"{said} thumbnail".strip()
        if said:
            return "told" if warned else "described", said
        return ("invalid", f"{lost} tiles") if lost else ("same", "")

    def _said(self, slide: Slide) -> str:
        words = []
        if slide.size != (self.levels[0].width, self.levels[0].height):
            words.append(f"size {slide.size}")
        elif slide.levels != self.levels:
            words.append(f"levels {[level[:2] for level in slide.levels]}")
        if slide.mpp != self.mpp:
            words.append(f"scale {slide.mpp:g}")
        return " ".join(words)

    def _shares(self, slide: Slide) -> bool:
        """True if the pixels that both have are the same."""
        width, height = (min(a, b) for a, b in zip(slide.size, self.levels[0][:2], strict=True))
        return np.array_equal(slide.read(0, 0, 0, width, height), self.whole[:height, :width])


def _trees(slide: Slide) -> Iterator[QuadTree]:
    """All tiles of each level: three levels over the finest, one over the others."""
    mask = TissueMask(np.ones((1, 1), bool), (float(slide.size[0]), float(slide.size[1])), slide.mpp, "all")
    for number, level in enumerate(slide.levels):
        mpp = slide.mpp * max(level.downsample)
        yield build_quadtree(slide, mask, mpp=mpp, tile_px=PX, levels=1 if number else 3, min_tissue=0.0)


class Judge:
    """One reader, all bases that it opens. `case(i)` depends on the seed and on nothing that was before."""

    def __init__(self, reader: str, seed: int, folder: Path) -> None:
        self.reader, self.seed, self.folder = reader, seed, folder
        self.bases = [base for base in bases() if reader in base.readers]
        self.kinds = [sites(base.data).kinds() for base in self.bases]
        self.undamaged = cache(lambda at: Undamaged(self.bases[at], reader, folder))
        config = make_config(encoder="lab_lbp", mpp=0.5, levels=3, tile_px=PX, reader=reader)
        self.recipe: Recipe = make_recipe(config, open_encoder(config))

    def choose(self, number: int) -> tuple[int, str]:
        """Bases in turn, and kinds of damage in turn."""
        at = number % len(self.bases)
        kinds = self.kinds[at]
        return at, kinds[number // len(self.bases) % len(kinds)]

    def file(self, number: int) -> Path:
        at, kind = self.choose(number)
        base = self.bases[at]
        path = self.folder / f"{number}{base.suffix}"
        path.write_bytes(mutate(base, kind, np.random.default_rng([self.seed, number])))
        return path

    def case(self, number: int) -> Case:
        at, kind = self.choose(number)
        base, want = self.bases[at], self.undamaged(at)
        path = self.file(number)
        _forget_peak()
        before = _peak_mb()
        try:
            outcome, words = self._outcome(path, base, want)
            if number % 10 == 0:
                prepare(SlideFile(path.name, path, base.mpp), self.recipe, self.folder / "out")
        except Exception as error:  # noqa: BLE001 - what it is, is what is asked
            outcome = "machine" if is_machine_fault(error) else "raw"
            words = "".join(traceback.format_exception_only(error)).strip()[:300]
        if _peak_mb() - before > LIMIT_MB:
            outcome, words = "memory", f"{_peak_mb() - before:.0f} MB; {words}"
        if outcome == "different" and kind == "entry" and (tag := _recoded(base.data, path)):
            outcome, words = "recoded", f"{tag}: {words}"
        path.unlink()
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return Case(number, base.name, kind, outcome, words)

    def _outcome(self, path: Path, base: Base, want: Undamaged) -> tuple[str, str]:
        try:
            with open_slide(path, base.mpp, self.reader) as slide:
                mask, _ = segment(slide, TissueConfig())
                tree = tile(slide, mask, TileConfig(mpp=max(slide.mpp, 0.5), tile_px=PX))
                for _ in stream_tiles(slide, tree):
                    pass
                return want.against(slide)
        except SlideError as error:
            if _has_memory_error(error):
                return "memory", str(error.reason)[:300]
            kind = "unreadable pixels" if isinstance(error, CorruptTiles) else ""
            return "failed", kind or error.reason[:200]


def _recoded(data: bytes, path: Path) -> str:
    """The tag of RECODING that is another one than in the undamaged file."""
    after = path.read_bytes()
    for at, size in sites(data).entries:
        if data[at : at + size] != after[at : at + size]:
            order = "little" if data[:2] == b"II" else "big"
            codes = [int.from_bytes(d[at : at + 2], order) for d in (data, after)]  # type: ignore[arg-type]
            return next((RECODING[code] for code in codes if code in RECODING), "")
    return ""


def _has_memory_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def work(reply: Connection, reader: str, seed: int, numbers: range, folder: Path) -> None:
    """In a process of its own: a case after the other, each told as it is done."""
    judge = Judge(reader, seed, folder)
    for at in range(len(judge.bases)):
        judge.undamaged(at)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + LIMIT_ADDRESSES,) * 2)
    reply.send("ready")
    for number in numbers:
        reply.send(judge.case(number))


def cases(reader: str, seed: int, count: int, folder: Path) -> Iterator[Case]:
    """All cases; a process that dies or hangs costs the case it was at, and another goes on with the next."""
    chooser, spawn = Judge(reader, seed, folder), multiprocessing.get_context("spawn")
    number = 0
    while number < count:
        ours, theirs = spawn.Pipe()
        child = spawn.Process(target=work, args=(theirs, reader, seed, range(number, count), folder))
        child.start()
        theirs.close()
        if not ours.poll(300) or ours.recv() != "ready":
            raise SystemExit("the child process did not start")
        while number < count:
            at, kind = chooser.choose(number)
            try:
                if not ours.poll(LIMIT_S):
                    child.kill()
                    yield Case(number, chooser.bases[at].name, kind, "hang", f"over {LIMIT_S} s")
                    break
                yield ours.recv()
            except EOFError:
                child.join()
                yield Case(number, chooser.bases[at].name, kind, "crash", f"exit code {child.exitcode}")
                break
            number += 1
        else:
            child.join()
            return
        number += 1
        child.join()


def table(found: list[Case]) -> str:
    """Kinds × outcomes, in Markdown."""
    counts = Counter((case.kind, case.outcome) for case in found)
    shown = [o for o in OUTCOMES if o not in BAD or any(case.outcome == o for case in found)]
    lines = [f"| damage | files | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
    for kind in (*STRUCTURE, *CODED):
        row = [counts[kind, outcome] for outcome in shown]
        if sum(row):
            lines.append(f"| {kind} | {sum(row)} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, default="auto")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, help="one case again, in this process")
    parser.add_argument("--out", type=Path, default=OUT)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if wanted.show is not None:
            show(Judge(wanted.reader, wanted.seed, Path(folder)), wanted.show, wanted.out)
            return
        found = []
        for case in cases(wanted.reader, wanted.seed, wanted.count, Path(folder)):
            found.append(case)
            silent = case.outcome == "different" and case.kind in STRUCTURE
            if case.outcome in BAD or silent:
                print(*case, sep="   ", flush=True)
    print(table(found))
    result: dict[str, Any] = {"reader": wanted.reader, "seed": wanted.seed, "count": len(found)}
    result |= {"date": date.today().isoformat(), "never": BAD, "structure": STRUCTURE}
    wanted.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result | {"cases": [case._asdict() for case in found]}, indent=1)
    (wanted.out / f"fuzz-{wanted.reader}.json").write_text(text)


def show(judge: Judge, number: int, out: Path) -> None:
    """What was changed, what came of it; the file is kept in `out`."""
    at, _ = judge.choose(number)
    judge.undamaged(at)
    path = judge.file(number)
    base, changed = judge.bases[at], path.read_bytes()
    places = [i for i, (a, b) in enumerate(zip(base.data, changed, strict=False)) if a != b]
    print(f"{len(base.data)} → {len(changed)} bytes, changed at {places[:8]}")
    for i in places[:8]:
        print(f"  {i}: {base.data[i]:#x} → {changed[i]:#x}")
    out.mkdir(parents=True, exist_ok=True)
    print(shutil.copy(path, out / path.name))
    print(*judge.case(number), sep="   ")
    path = judge.file(number)
    with open_slide(path, base.mpp, judge.reader) as slide:
        segment(slide, TissueConfig())
        print(slide.levels, slide.mpp, slide.reader, slide.warnings)


if __name__ == "__main__":
    main()
