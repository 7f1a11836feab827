"""kill -9 at random moments over all processes of a run, again and again: nothing is lost, and the bytes are the same.

    python benchmarks/kills.py [--kills 100] [--seed 0]

Half of the kills are of a run with workers of its own (its client holds the scheduler, its children are the workers),
half of one at a Dask scheduler with two workers beside it: client, scheduler, nanny or worker. After each the same
command is given again, until it says that all is done; then the arrays are held against an undisturbed run's, and it
is looked whether a slide is missing or a lock has been left. Writes benchmarks/out/kills.json.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from skimage.data import immunohistochemistry

from pipeline.demo import write_slide
from pipeline.leases import FOLDER, GUARD
from pipeline.outcome import read_outcomes

OUT = Path(__file__).parent / "out"
COMMAND = Path(sys.executable).with_name("slidestream")
SLIDES, SIDE = 8, 900
ENCODER = """
import dataclasses, time
from extractors.lab_lbp import FACTS, LabLbp

class Slow(LabLbp):
    def encode(self, tiles):
        time.sleep(0.01)
        return super().encode(tiles)

def build(weights=None):
    return Slow(dataclasses.replace(FACTS, name="slow"))
"""


def make(place: Path) -> None:
    (place / "code").mkdir(parents=True)
    (place / "code/slow_tiles.py").write_text(ENCODER)
    for number in range(SLIDES):
        noise = np.random.default_rng(number).integers(-12, 13, (SIDE, SIDE, 3))
        tissue = np.tile(immunohistochemistry(), (3, 3, 1))[:SIDE, :SIDE]
        pixels = np.clip(tissue + noise, 0, 255).astype(np.uint8)
        write_slide(place / f"slides/{number}.svs", pixels, 0.5, downsamples=(4,))


class Cluster:
    """A Dask scheduler and two workers, each with its nanny."""

    def __init__(self, place: Path) -> None:
        self.place, self.file = place, place / "scheduler.json"
        self.processes: list[psutil.Popen] = []

    def start(self) -> str:
        self.stop()
        self.file.unlink(missing_ok=True)
        common = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(self.file)]
        worker = [
            "--nthreads",
            "1",
            "--preload",
            "pipeline.worker",
            "--resources",
            "ENCODER=1",
            "--death-timeout",
            "20",
        ]
        kinds = [["scheduler", "--port", "0", *common]]
        kinds += [["worker", *common, *worker, "--local-directory", str(self.place / f"w{n}")] for n in (1, 2)]
        self.processes = [spawn([sys.executable, "-m", "dask", *kind], self.place) for kind in kinds]
        while not (self.file.exists() and self.file.read_text().endswith("}")):
            time.sleep(0.1)
        return json.loads(self.file.read_text())["address"]

    def stop(self) -> None:
        for process in self.processes:
            end(process)
        self.processes = []


def spawn(command: list[str | Path], place: Path) -> psutil.Popen:
    path = f"{place / 'code'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return psutil.Popen(list(map(str, command)), env=os.environ | {"PYTHONPATH": path}, **quiet)


def end(process: psutil.Popen) -> None:
    family = family_of(process)
    for one in family:
        if one.is_running():
            one.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def family_of(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kind_of(victim: psutil.Process, run: psutil.Popen, cluster: Cluster | None) -> str:
    if victim.pid == run.pid:
        return "client"
    if cluster and cluster.processes and victim.pid == cluster.processes[0].pid:
        return "scheduler"
    if cluster and victim.pid in [process.pid for process in cluster.processes]:
        return "nanny"
    return "worker" if "spawn_main" in " ".join(victim.cmdline()) else "child"


def command(place: Path, out: Path, address: str | None) -> list[str | Path]:
    where = ["--scheduler", address] if address else ["--workers", "2"]
    flags = ["-e", "slow_tiles:build", "--tile-px", "16", "--levels", "2", "--batch-size", "16", *where]
    return [COMMAND, "run", place / "slides", "-o", out, *flags]


def arrays(out: Path) -> dict[str, str]:
    """The digest of every chunk; documents may hold times."""
    files = [p for p in sorted((out / "slides").rglob("*")) if p.is_file() and p.name != "zarr.json"]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    place, chance = OUT / "kills", random.Random(wanted.seed)
    shutil.rmtree(place, ignore_errors=True)
    make(place)
    began = time.time()
    if spawn(command(place, place / "reference", None), place).wait():
        raise SystemExit("the undisturbed run failed")
    whole, expected = time.time() - began, arrays(place / "reference")
    killed: collections.Counter[str] = collections.Counter()
    codes: collections.Counter[str] = collections.Counter()
    rounds = 0
    while sum(killed.values()) < wanted.kills:
        cluster = Cluster(place) if rounds % 2 else None
        out, rounds = place / f"out{rounds}", rounds + 1
        address = cluster.start() if cluster else None
        for _ in range(200):
            more = sum(killed.values()) < wanted.kills
            if cluster and cluster.processes[0].poll() is not None:
                address = cluster.start()
            run = spawn(command(place, out, address), place)
            try:
                run.wait(timeout=chance.uniform(0.3, 1.1) * whole if more else 900)
            except psutil.TimeoutExpired:
                if not more:
                    raise SystemExit(f"a run of {out} hangs") from None
                victims = family_of(run) + [p for one in (cluster.processes if cluster else []) for p in family_of(one)]
                victim = chance.choice(victims)
                try:
                    kind = kind_of(victim, run, cluster)
                    victim.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
                killed[kind] += 1
                print(f"{sum(killed.values()):4} {kind} ({'named' if cluster else 'local'})", flush=True)
                try:
                    run.wait(timeout=900)
                except psutil.TimeoutExpired:
                    raise SystemExit(f"after the death of a {kind} the run of {out} hangs") from None
            end(run)
            codes[str(run.returncode)] += 1
            if run.returncode == 0:
                break
        if cluster:
            cluster.stop()
        rows = read_outcomes(out / "slides.csv")
        left = [p for p in (out / FOLDER).rglob("*") if p.is_file() and p.name != GUARD]
        if arrays(out) != expected or [row.status for row in rows] != ["done"] * SLIDES or left:
            raise SystemExit(f"{out} is not what an undisturbed run makes: {[row.status for row in rows]}, {left}")
        if not cluster or rounds % 2 == 0:
            shutil.rmtree(out)
    found = {"killed": killed, "exit codes": codes, "rounds": rounds, "undisturbed_s": round(whole, 1)}
    print(json.dumps(found))
    (OUT / "kills.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
