"""What the drivers share: a process does one job of one peer and prints one line of JSON.

    python drive_PEER.py features --weights FILE --out FOLDER SLIDE...    the peer's own line, slides to stored features
    python drive_PEER.py encoder --weights FILE                           its encoder on tiles that lie in memory
    python drive_PEER.py segment SLIDE...                                 tissue and tiles only, repeated
    python drive_PEER.py feed SLIDE...                                    reading the tiles as uint8, with no encoder

A driver runs in the environment of its peer: nothing here may import more than the standard library, and no driver may
be called what its peer is called, as it stands first in the search path.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

TILE_PX = 256
MPP = 0.5
BATCH = 64
LOADERS = (
    1  # processes that load tiles, for every peer; by default LazySlide and TIAToolbox have none, slide2vec one a core
)
STARTED = time.perf_counter()


@dataclass
class Job:
    slides: list[Path]
    weights: Path
    out: Path
    precision: str
    tile_px: int
    repeats: int
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds up the wall and CPU seconds of a stage over the slides."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield
        spent = self.stages.setdefault(name, {"wall": 0.0, "cpu": 0.0})
        spent["wall"] += time.perf_counter() - wall
        spent["cpu"] += cpu_seconds() - cpu


Features = Callable[[Job], int]  # writes the features of all slides; returns the number of tiles
Encode = Callable[[], object]  # one batch
Segment = Callable[[Job, Path], int]  # returns the number of tiles of one slide
Feed = Callable[[Path], Callable[[], int]]  # finds the tiles of one slide; what is returned reads and counts them


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main(features: Features | None, encoder: Callable[[Job], Encode], segment: Segment, feed: Feed) -> None:
    """`encoder(job)` gives the call that encodes one batch as the peer does it."""
    imports = {"wall": time.perf_counter() - STARTED, "cpu": cpu_seconds()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["features", "encoder", "segment", "feed"])
    parser.add_argument("slides", nargs="*", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tile-px", type=int, default=TILE_PX, help="of our own encoder")
    parser.add_argument("--repeats", type=int, default=3, help="batches of the encoder, rounds over the slides")
    wanted = vars(parser.parse_intermixed_args())
    what, job = wanted.pop("what"), Job(**wanted)
    if what == "encoder":
        result = time_encoder(encoder(job), job.repeats)
    elif what == "segment":
        result = time_segment(segment, job)
    elif what == "feed":
        result = time_feed([feed(slide) for slide in job.slides], job.repeats)
    else:
        assert features is not None
        result = {"tiles": features(job)}
    sys.stdout.write("\n" + json.dumps(result | {"stages": {"imports": imports} | job.stages}) + "\n")


def time_encoder(encode: Encode, batches: int) -> dict[str, float]:
    encode()  # the first call chooses kernels and takes memory
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        encode()
    tiles = batches * BATCH
    return {"tiles_s": tiles / (time.perf_counter() - wall), "cpu_ms": 1000 * (cpu_seconds() - cpu) / tiles}


def time_segment(segment: Segment, job: Job) -> dict[str, float]:
    """Per slide: the median over the rounds after a first one, each over all slides."""
    tiles, rounds = sum(segment(job, slide) for slide in job.slides), []
    job.stages.clear()
    for _ in range(job.repeats):
        wall, cpu = time.perf_counter(), cpu_seconds()
        with job.stage("all"):
            tiles = sum(segment(job, slide) for slide in job.slides)
        rounds.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    wall, cpu = (median(spent) / len(job.slides) for spent in zip(*rounds, strict=True))
    return {"tiles": tiles, "wall": wall, "cpu": cpu}


def time_feed(readers: list[Callable[[], int]], repeats: int) -> dict[str, float]:
    """By one process and one thread; medians over the rounds after a first one, each over all slides."""
    tiles, rounds = sum(read() for read in readers), []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), cpu_seconds()
        tiles = sum(read() for read in readers)
        rounds.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    wall, cpu = (median(spent) for spent in zip(*rounds, strict=True))
    return {"tiles": tiles, "tiles_s": tiles / wall, "cpu_s_per_1000": 1000 * cpu / tiles}
