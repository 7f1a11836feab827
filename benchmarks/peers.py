"""Side by side with the peers: the same slides, weights and machine; whole commands, from their start to their exit.

    python benchmarks/peers.py --slides medium|biopsies|big [--count 6] [--repeats 3] [--only slidestream slide2vec]

Each peer has a virtual environment of its own, made here with uv at the first run, with our torch; one that cannot be
had is left out, and it is said why. Then a round, `--repeats` times, is for each in turn: its encoder alone, its whole
line, its encoder alone again (the encoders of peers in the first round only); the turn moves on by one with every
round. All of it on the CPU, resnet50 in fp32 with one file of random weights, 256-px tiles at 0.5 µm/px on one level.
Peers: batches of 64, one process that loads tiles, else their defaults (what had to be set is in peer_drivers/). We:
our defaults; the row `slidestream, fp32` is the one to compare. The other is our default precision, bf16 where the CPU
has it, and no peer's.

Ratio: tiles/s of the whole command ÷ tiles/s of its encoder alone; 1 = only the encoder costs. On a busy machine
compare CPU ms/tile. LazySlide's encoder gets 224 px: 23 % fewer pixels. Each finds other tiles at the border of tissue.
Our encoder alone keeps freed memory and has a batch for each core, as in our workers. Memory is that of all processes
together (a shared page counts once), seen twice a second.

Then in-process: tissue and tiles only, per slide, medians of `--rounds`, ours for three levels, theirs for one; and
reading only, by one process and one thread, 256-px tiles in memory as uint8. Writes benchmarks/out/peers_<slides>.json,
over what an earlier run wrote there.
"""

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import timm
import torch
from safetensors.torch import save_file
from slides import SIDES, cohort

HERE = Path(__file__).parent
OUT = HERE / "out"
COUNTS = {"big": 1, "medium": 1, "biopsies": 6}
LIMIT = 3600  # seconds for one command
MPP = 0.5
BATCHES = 3  # of the encoder alone, after one that does not count
OURS = Path(sys.executable).parent


class Peer(NamedTuple):
    name: str
    packages: tuple[str, ...]  # none: our own environment
    driver: str
    precision: str = "fp32"
    tile_px: int = 256


PEERS = (
    Peer("slidestream", (), "slidestream", "auto", 224),  # its defaults
    Peer("slidestream, fp32", (), "slidestream"),
    Peer("slide2vec", ("slide2vec==7.1.4", "hs2p==6.1.0"), "slide2vec"),
    # With pandas 3 its `write` fails after all features are computed.
    Peer("LazySlide", ("lazyslide==0.13.0", "wsidata==0.12.0", "pandas<3"), "lazyslide"),
    # It asks for torchvision < 0.28, but runs with ours; so all encoders are the same build of torch.
    Peer("TIAToolbox", ("tiatoolbox==2.1.3",), "tiatoolbox"),
)
SHARED = ("torch", "torchvision", "timm")  # the versions of our environment, and the very files: uv links them


class Failure(Exception):
    """A peer cannot be installed, or its command failed; the words say why."""


@dataclass(frozen=True)
class Cost:
    """What a command took, children included."""

    wall: float
    cpu: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", choices=SIDES, default="medium")
    parser.add_argument("--count", type=int, help="slides [default: 6 biopsies, one of the others]")
    parser.add_argument("--repeats", type=int, default=1, help="0: tissue and tiles, and reading, only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[peer.name for peer in PEERS], metavar="PEER")
    parser.add_argument("--environments", type=Path, default=OUT / "peers")
    wanted = parser.parse_args()
    slides = wanted_slides(wanted.slides, wanted.count or COUNTS[wanted.slides])
    weights = make_weights(OUT / "resnet50-random.safetensors")
    pythons = interpreters([peer for peer in PEERS if peer.name in (wanted.only or peer.name)], wanted.environments)
    print(f"{len(slides)} slides: {slides[0].parent}   {machine()}", flush=True)
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        runs = [
            {"peer": peer.name} | line(peer, python, slides, weights, Path(folder) / f"{peer.name} {turn}", turn == 0)
            for turn in range(wanted.repeats)
            for peer, python in rotated(list(pythons.items()), turn)
        ]
        segmented = [segment(peer, python, slides, wanted.rounds, Path(folder)) for peer, python in pythons.items()]
        fed = [feed(peer, python, slides, wanted.rounds, Path(folder)) for peer, python in pythons.items()]
    lines = [summary(peer, [run for run in runs if run["peer"] == peer.name]) for peer in pythons]
    show([row for row in lines if row])
    show([row for row in segmented if row])
    show([row for row in fed if row])
    report = {"slides": [path.name for path in slides], "machine": machine(), "runs": runs, "lines": lines}
    versions = {peer.name: installed(python) for peer, python in pythons.items()}
    place = OUT / f"peers_{wanted.slides}.json"
    place.write_text(json.dumps(report | {"segment": segmented, "feed": fed, "versions": versions}, indent=1) + "\n")


def wanted_slides(kind: str, count: int) -> list[Path]:
    """In a folder with nothing else in it, for our command takes a folder."""
    return cohort(OUT / "slides" / f"{kind}-{count}", kind, count)


def make_weights(path: Path) -> Path:
    if not path.exists():
        torch.manual_seed(0)
        save_file(timm.create_model("resnet50", pretrained=False, num_classes=0).state_dict(), path)
    return path


def machine() -> str:
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}, torch {torch.__version__}"


def rotated(items: list[Any], by: int) -> list[Any]:
    by %= max(1, len(items))
    return items[by:] + items[:by]


# Environments


def interpreters(peers: list[Peer], folder: Path) -> dict[Peer, Path]:
    """The Python of each peer that can be had."""
    found = {}
    for peer in peers:
        try:
            found[peer] = environment(peer, folder) if peer.packages else Path(sys.executable)
        except Failure as failure:
            print(f"{peer.name} is left out: {failure}", flush=True)
    return found


def environment(peer: Peer, folder: Path) -> Path:
    """Made unless it stands as it should. Our torch replaces what the packages ask for: no second one is downloaded."""
    place = (folder / peer.driver).absolute()
    python, stamp = place / "bin" / "python", place / "benchmark.txt"
    overrides = "".join(f"{name}=={version(name).split('+')[0]}\n" for name in SHARED)
    words = "\n".join([*peer.packages, overrides])
    if stamp.exists() and stamp.read_text() == words:
        return python
    print(f"making the environment of {peer.name} in {place}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    uv("venv", "--python", sys.executable, str(place))
    (place / "overrides.txt").write_text(overrides)
    target = ("--python", str(python), "--override", str(place / "overrides.txt"))
    uv("pip", "install", "--compile-bytecode", *target, *peer.packages)  # else every first import compiles
    stamp.write_text(words)
    return python


def uv(*arguments: str) -> str:
    done = subprocess.run([OURS / "uv", *arguments], capture_output=True, text=True, env=surroundings())
    if done.returncode:
        raise Failure(f"uv {' '.join(arguments[:2])}: {' '.join(done.stderr.split())[-400:]}")
    return done.stdout


def installed(python: Path) -> list[str]:
    try:
        return uv("pip", "freeze", "--python", str(python)).splitlines()
    except Failure as failure:
        return [str(failure)]


# Measuring


def surroundings() -> dict[str, str]:
    """CPU only, and no model hub. Threads of OpenMP that wait should sleep: spinning, they take the loader's core."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "VIRTUAL_ENV")}
    ours = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive", "MPLBACKEND": "Agg"}
    return kept | ours


def measured(command: list[str | Path], folder: Path) -> tuple[Cost, str]:
    """Run in a folder of its own, as peers leave logs where they stand; returns the last line that was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=err, env=surroundings(), start_new_session=True
        )
        peak = watched(process)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = (folder / "stdout").read_text().strip().splitlines()
    if process.returncode:
        words = (folder / "stderr").read_text().strip().splitlines() or printed
        raise Failure(f"exit code {process.returncode}: {' | '.join(words[-3:])[-600:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, peak / 1e6), printed[-1] if printed else ""


def watched(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end; returns the most memory that the process and its children held, in bytes."""
    deadline, peak = time.monotonic() + LIMIT, 0
    while True:
        try:
            process.wait(0.5)
            return peak
        except subprocess.TimeoutExpired:
            peak = max(peak, held(process.pid))
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)


def held(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)  # only Linux tells the share of a page that is a process's own
    except psutil.Error:  # it ended while we looked
        pass
    return total


def driver(peer: Peer, python: Path, what: str, *arguments: str | Path) -> list[str | Path]:
    return [python, HERE / "peer_drivers" / f"drive_{peer.driver}.py", what, *arguments]


def line(
    peer: Peer, python: Path, slides: list[Path], weights: Path, folder: Path, first_round: bool
) -> dict[str, Any]:
    """One peer in one round: the encoder alone, the whole line, the encoder alone. `failed` says why where it did."""
    alone = driver(peer, python, "encoder", "--weights", weights, "--precision", peer.precision)
    alone += ["--repeats", str(BATCHES), "--tile-px", str(peer.tile_px)]
    out = folder / "out"
    if peer.packages:
        whole = driver(peer, python, "features", "--weights", weights, "--out", out, *slides)
    else:
        whole = [OURS / "slidestream", "run", slides[0].parent, "-o", out, "-e", "resnet50", "--weights", weights]
        whole += ["--levels", "1", "--precision", peer.precision, "--tile-px", str(peer.tile_px)]
    also_alone, sides = first_round or not peer.packages, []
    try:
        if also_alone:
            sides.append(json.loads(measured(alone, folder / "before")[1]))
        cost, printed = measured(whole, folder / "whole")
        if also_alone:
            sides.append(json.loads(measured(alone, folder / "after")[1]))
    except Failure as failure:
        print(f"{peer.name}: {failure}", flush=True)
        return {"failed": str(failure)}
    result = json.loads(printed) if peer.packages else {"tiles": stored(out / "slides.csv"), "stages": {}}
    shutil.rmtree(folder)
    print(f"{peer.name}: {result['tiles']} tiles in {cost.wall:.1f} s", flush=True)
    return {**asdict(cost), **result, "alone": sides}


def stored(table: Path) -> int:
    """Tiles of the slides that we finished."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [row["slide"] for row in rows if row["status"] not in ("done", "empty")]
    if missing:
        raise Failure(f"not done: {', '.join(missing)}")
    return sum(int(row["tiles"]) for row in rows)


def segment(peer: Peer, python: Path, slides: list[Path], rounds: int, folder: Path) -> dict[str, Any] | None:
    """Tissue and tiles only."""
    result = job(peer, python, "segment", slides, rounds, folder)
    if result is None:
        return None
    stages = result["stages"]
    reading = stages["reading"]["wall"] / stages["all"]["wall"] if "reading" in stages else None
    return {
        "tissue and tiles": peer.name,
        "tiles": result["tiles"],
        "s/slide": result["wall"],
        "CPU s/slide": result["cpu"],
        "of it reading": reading,
        "imports, s": stages["imports"]["wall"],
    }


def feed(peer: Peer, python: Path, slides: list[Path], rounds: int, folder: Path) -> dict[str, Any] | None:
    """Reading the tiles only."""
    result = job(peer, python, "feed", slides, rounds, folder)
    if result is None:
        return None
    names = {"tiles": "tiles", "tiles/s": "tiles_s", "CPU s per 1,000": "cpu_s_per_1000"}
    return {"reading": peer.name} | {name: result[key] for name, key in names.items()}


def job(peer: Peer, python: Path, what: str, slides: list[Path], rounds: int, folder: Path) -> dict[str, Any] | None:
    """What a driver prints of one job; None where it fails, and for our second row, which would do the same here."""
    if not peer.packages and peer.precision != "auto":
        return None
    try:
        command = driver(peer, python, what, "--repeats", str(rounds), *slides)
        result: dict[str, Any] = json.loads(measured(command, folder / f"{what} {peer.name}")[1])
    except Failure as failure:
        print(f"{peer.name}: {what}: {failure}", flush=True)
        return None
    return result


# Tables


def summary(peer: Peer, runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Medians over the runs that succeeded."""
    good = [run for run in runs if "failed" not in run]
    if not good:
        return None
    speeds = [run["tiles"] / run["wall"] for run in good]
    sides = [side for run in good for side in run["alone"]]
    alone_speed = median(side["tiles_s"] for side in sides)
    return {
        "whole command": peer.name,
        "tiles": good[0]["tiles"],
        "wall s": median(run["wall"] for run in good),
        "CPU s": median(run["cpu"] for run in good),
        "tiles/s": median(speeds),
        "mm²/s": median(speeds) * (peer.tile_px * MPP / 1000) ** 2,
        "encoder alone, tiles/s": alone_speed,
        "ratio": median(speeds) / alone_speed,
        "CPU ms/tile": median(1000 * run["cpu"] / run["tiles"] for run in good),
        "encoder alone, CPU ms": median(side["cpu_ms"] for side in sides),
        "peak MB": median(run["peak_mb"] for run in good),
    }


def show(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    cells = [list(rows[0]), *([words(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    print()
    for first, *rest in cells:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))


def words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
