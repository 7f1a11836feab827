"""1, 2, 4, 8 devices on a cohort of unequal slides, with an encoder that only waits: who gives out the slides how well?

    python benchmarks/scaling.py [--devices 1 2 4 8] [--tiles-per-s 100]

A stand-in for a device takes a fixed time for a tile and sleeps, so that two cores can hold eight of them; each is a
worker of the real command, which reads, encodes and stores. 40 slides of very unequal size. Measured is from the first
tile that any device began to the last that one ended. Ideal is that no device ever waits between its own first tile and
one common end; so loading libraries in eight processes on two cores is left out, and everything else is in. Beside it
the best static split: whole slides, the largest first, each to the device that has least, nothing given out later. Then
four devices of which one takes three times as long, which a static split cannot know. Writes
benchmarks/out/scaling.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from skimage.data import immunohistochemistry

from pipeline.demo import write_slide
from pipeline.outcome import read_outcomes

OUT = Path(__file__).parent / "out"
COMMAND = Path(sys.executable).with_name("slidestream")
TILE = 32
ENCODER = """
import os, threading, time
import distributed, numpy as np, torch
from extractors import Encoder, EncoderFacts

FACTS = EncoderFacts(name="waiting:build", dim=8, tile_px=32, any_tile_px=True, source="", licence="", citation="")
ONE_AT_A_TIME = threading.Lock()

def name():
    try:
        return str(distributed.get_worker().name)
    except ValueError:  # in the process that started them
        return ""

class Waiting(Encoder):
    pace = 1.0

    def _features(self, tiles):
        with ONE_AT_A_TIME:
            began = time.time()
            time.sleep(len(tiles) * float(os.environ["WAITING_S"]) * self.pace)
            with open(os.path.join(os.environ["WAITING_LOG"], str(os.getpid())), "a") as log:
                log.write(f"{began} {time.time()}\\n")
        return torch.from_numpy(np.asarray(tiles).reshape(len(tiles), -1)[:, :8].astype(np.float32))

def build(weights):
    encoder = Waiting(FACTS, weights)
    encoder.pace = 3.0 if name() == os.environ["WAITING_SLOW"] else 1.0
    return encoder
"""


def make_slides(folder: Path, count: int) -> None:
    """Sides from 300 to some 3,000 px, most of them small."""
    sides = np.clip(np.random.default_rng(0).lognormal(6.9, 0.55, count), 300, 3200).astype(int)
    for number, side in enumerate(sides):
        pixels = np.tile(immunohistochemistry(), (-(-side // 512), -(-side // 512), 1))[:side, :side]
        write_slide(folder / f"{number:03}.svs", pixels, 0.5, downsamples=(4,))


def measured(slides: Path, devices: int, seconds: float, slow: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "waiting.py").write_text(ENCODER)
        (place / "log").mkdir()
        environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"WAITING_S": str(seconds), "WAITING_LOG": str(place / "log"), "WAITING_SLOW": slow}
        flags = [
            "-e",
            "waiting:build",
            "--tile-px",
            str(TILE),
            "--levels",
            "1",
            "--min-tissue",
            "0",
            "--batch-size",
            "16",
        ]
        command = [COMMAND, "run", slides, "-o", place / "out", "--workers", str(devices), "--devices", "cpu", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        logs = {path.name: np.loadtxt(path, ndmin=2) for path in (place / "log").iterdir()}
        tiles = [row.tiles or 0 for row in read_outcomes(place / "out/slides.csv")]
    begun, ended = min(log[0, 0] for log in logs.values()), max(log[-1, 1] for log in logs.values())
    paces = [1.0] * devices if slow == "none" else [3.0] + [1.0] * (devices - 1)
    late = sum((log[0, 0] - begun) / pace_of(log, seconds) for log in logs.values())
    ideal = (sum(tiles) * seconds + late) / sum(1 / pace for pace in paces)
    return {
        "devices": devices,
        "tiles": sum(tiles),
        "ideal": ideal,
        "measured": ended - begun,
        "static": static(tiles, paces) * seconds,
    }


def pace_of(log: np.ndarray, seconds: float) -> float:
    """1, or 3 for a slow device."""
    return 3.0 if np.median(log[:, 1] - log[:, 0]) > 2 * 16 * seconds else 1.0


def static(tiles: list[int], paces: list[float]) -> float:
    """Tiles × pace of the device that ends last, if whole slides are split beforehand by their tiles alone."""
    loads = [0] * len(paces)
    for count in sorted(tiles, reverse=True):
        loads[loads.index(min(loads))] += count
    return max(load * pace for load, pace in zip(loads, paces, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--tiles-per-s", type=float, default=100)
    parser.add_argument("--slides", type=int, default=40)
    wanted = parser.parse_args()
    folder = OUT / "scaling"
    shutil.rmtree(folder, ignore_errors=True)
    make_slides(folder, wanted.slides)
    cases = [(devices, "none") for devices in wanted.devices] + [(4, "0")]
    rows = []
    print(f"{'devices':>8} {'ideal s':>9} {'measured s':>11} {'of ideal':>9} {'static split':>13}")
    for devices, slow in cases:
        row = measured(folder, devices, 1 / wanted.tiles_per_s, slow)
        rows.append(row | {"slow": slow != "none"})
        words = f"{devices:>8} {row['ideal']:9.1f} {row['measured']:11.1f} {row['ideal'] / row['measured']:9.3f}"
        print(f"{words} {row['ideal'] / row['static']:13.3f}{'  one of them slow' * (slow != 'none')}", flush=True)
    (OUT / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
