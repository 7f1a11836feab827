"""What the store costs: CPU and wall time of a small slide step by step, and how fast a large one is written.

    python benchmarks/store.py [--slides 30] [--repeats 3] [--against PATH]

The small slide is a biopsy of 67 tiles on three levels with 1,024 features each; the steps are those that the stages
go through. The CPU time is that of all threads of the process, zarr's included. `--against` names a checkout of another
version (git worktree add PATH REVISION): it is measured in the same run, by turns. Beside both: a bare zarr group of
two arrays that holds the same features and positions.

The large slide is (65536, 1024) float16 in chunks of 2,048 rows, beside the same bytes in one plain file. Nothing here
waits for the disk (no fsync), as the store does not. Prints tables, writes benchmarks/out/store.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.store import CHUNK_ROWS, BagStore, SlideGroup, read_attrs
from pipeline.tissue import TissueMask

DIM = 1024
LARGE = 65536
WARM_UP = 3
Table = dict[str, list[float]]  # step → [CPU ms, wall ms] of a slide


class Stopwatch:
    """CPU and wall ms between calls, summed by the name of what was done."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self.at = self.now()

    def now(self) -> tuple[float, float]:
        return time.process_time() * 1000, time.perf_counter() * 1000

    def __call__(self, step: str) -> None:
        now = self.now()
        before = self.spent.get(step, [0.0, 0.0])
        self.spent[step] = [b + end - start for b, start, end in zip(before, self.at, now, strict=True)]
        self.at = self.now()


class Biopsy:
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        image = np.zeros((128, 128), bool)
        image[10:112, 20:86] = True
        slide = open_slide(np.zeros((4096, 4096, 3), np.uint8), mpp=0.25)
        self.mask = TissueMask(image, (32.0, 32.0), 8.0, "brightfield", ())
        self.tree: QuadTree = build_quadtree(slide, self.mask, mpp=0.5, tile_px=224, levels=3)
        self.thumbnail = np.where(image[..., None], rng.integers(120, 200, (128, 128, 3)), 243).astype(np.uint8)
        self.x = rng.normal(size=(len(self.tree), DIM)).astype(np.float16)
        self.valid = np.ones(len(self.x), bool)
        # As many attributes as the stages write.
        self.facts = {
            "recipe": {f"setting{i}": i for i in range(30)},
            "versions": {f"v{i}": "1.2.3" for i in range(11)},
        }
        self.encoder = {"encoder": {f"fact{i}": "value" for i in range(12)}, "feature_hash": "0" * 64}

    def prepare(self, group: SlideGroup, watch: Stopwatch) -> None:
        group.begin(slide={"path": group.slide}, **self.facts)
        watch("begin")
        group.write_tissue(self.mask, self.thumbnail, "0" * 64)
        watch("write_tissue")
        group.write_tiles(self.tree)
        watch("write_tiles")

    def encode(self, group: SlideGroup, watch: Stopwatch) -> None:
        tree = group.tree()
        watch("tree")
        features = group.features("resnet50")
        features.begin(len(self.x), DIM, "float16", tiles=tree.hash, **self.encoder)
        watch("features.begin")
        features.missing_rows()
        watch("missing_rows")
        features.write_chunk(0, self.x, self.valid)
        watch("write_chunk")
        features.stored_valid()
        watch("stored_valid")
        features.finish()
        watch("features.finish")
        group.tree()
        watch("tree")
        group.finish("complete", counts={"tiles": [len(tree)], "invalid": 0})
        watch("finish")


def looked_at_again(group: SlideGroup) -> None:
    """What `is_current` asks the store."""
    features = group.features("resnet50")
    assert all([group.attrs, read_attrs(group.path / "tiles"), features.attrs, features.chunks_are_there()])


def small(folder: Path, slides: int) -> Table:
    """Medians over the slides, step by step; `whole` is all but the last, which is of another day."""
    biopsy, spent = Biopsy(), []
    for i in range(slides + WARM_UP):
        watch = Stopwatch()
        biopsy.prepare(BagStore(folder).group(f"{i}.svs"), watch)
        group = BagStore(folder).group(f"{i}.svs")
        biopsy.encode(group, watch)
        whole = [sum(column) for column in zip(*watch.spent.values(), strict=True)]
        looked_at_again(group)
        watch("(is it current?)")
        spent.append({"whole": whole} | watch.spent)
    return {step: [statistics.median(s[step][k] for s in spent[WARM_UP:]) for k in (0, 1)] for step in spent[0]}


def bare(folder: Path, slides: int) -> Table:
    biopsy, spent = Biopsy(), []
    for i in range(slides + WARM_UP):
        watch = Stopwatch()
        group = zarr.create_group(folder / f"bare{i}", zarr_format=3)
        group.create_array("xy", data=biopsy.tree.xy, chunks=biopsy.tree.xy.shape)
        x = group.create_array("x", shape=biopsy.x.shape, chunks=(CHUNK_ROWS, DIM), dtype="float16", compressors=None)
        x[:] = biopsy.x
        watch("bare zarr group, 2 arrays")
        spent.append(watch.spent["bare zarr group, 2 arrays"])
    return {"bare zarr group, 2 arrays": [statistics.median(s[k] for s in spent[WARM_UP:]) for k in (0, 1)]}


def large(folder: Path) -> dict[str, float]:
    """Seconds for 128 MiB of features. What earlier measurements left to the disk is let out first."""
    block = np.random.default_rng(0).normal(size=(CHUNK_ROWS, DIM)).astype(np.float16)
    group = BagStore(folder).group("large.svs")
    group.begin(slide={"path": "large.svs"})
    features = group.features("resnet50")
    features.begin(LARGE, DIM, "float16")

    def write() -> None:
        for chunk in range(LARGE // CHUNK_ROWS):
            features.write_chunk(chunk, block, np.ones(CHUNK_ROWS, bool))

    def write_file() -> None:
        with open(folder / "plain", "wb") as file:
            for _ in range(LARGE // CHUNK_ROWS):
                file.write(block)

    seconds = {"store": timed(write), "plain file": timed(write_file)}
    features.finish()
    seconds["store, read"] = timed(features.read)
    seconds["plain file, read"] = timed(lambda: np.fromfile(folder / "plain", np.float16))
    shutil.rmtree(group.path)
    os.unlink(folder / "plain")
    return seconds


def timed(work: Callable[[], object]) -> float:
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measured_here(slides: int, folder: Path) -> dict[str, Any]:
    return {"small": small(folder, slides) | bare(folder, slides), "large": large(folder)}


def measured_by(checkout: Path, slides: int, folder: Path) -> dict[str, Any]:
    """In a process of its own, with the packages of that checkout."""
    place = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, __file__, "--slides", str(slides), "--folder", str(place), "--once"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # The small slides stay until the end: ext4 looks for a new file's inode among those deleted in the last 5 s.
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def medians(runs: list[Any]) -> Any:
    """The median of equal trees of figures, leaf by leaf."""
    first = runs[0]
    if isinstance(first, dict):
        return {name: medians([run[name] for run in runs]) for name in first}
    if isinstance(first, list):
        return [medians(list(column)) for column in zip(*runs, strict=True)]
    return statistics.median(runs)


def show(versions: dict[str, Any]) -> None:
    print("ms a small slide".ljust(28), *(f"{name + ': CPU':>14}{'wall':>8}" for name in versions))
    for step in next(iter(versions.values()))["small"]:
        cells = (found["small"][step] for found in versions.values())
        print(step.ljust(28), *(f"{cpu:>14.2f}{wall:>8.2f}" for cpu, wall in cells))
    print()
    print(f"({LARGE}, {DIM}) float16".ljust(28), *(f"{name + ': rows/s':>14}{'MB/s':>8}" for name in versions))
    for step in next(iter(versions.values()))["large"]:
        times = (found["large"][step] for found in versions.values())
        print(step.ljust(28), *(f"{LARGE / s:>14,.0f}{LARGE * DIM * 2 / s / 1e6:>8.0f}" for s in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of another version")
    parser.add_argument("--folder", type=Path, help="on which disk; the system's temporary folder unless told")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.once:
        print(json.dumps(measured_here(wanted.slides, wanted.folder)))
        return
    checkouts = {"this": Path(__file__).parents[1]} | ({"other": wanted.against} if wanted.against else {})
    runs: dict[str, list[Any]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
        for _ in range(wanted.repeats):
            for name, checkout in checkouts.items():
                runs[name].append(measured_by(checkout, wanted.slides, Path(folder)))
    versions = {name: medians(found) for name, found in runs.items()}
    show(versions)
    place = Path(__file__).parent / "out"
    place.mkdir(exist_ok=True)
    setup = {"slides": wanted.slides, "repeats": wanted.repeats, "zarr": zarr.__version__, "load": os.getloadavg()}
    (place / "store.json").write_text(json.dumps(setup | {"median": versions, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
