"""2,000 small slides and 20 large ones in one run: does anything grow, does anything slow down?

    python benchmarks/soak.py [--small 2000] [--large 20]

The real command with two workers. Every two seconds each of its processes is looked at: resident memory, open files,
zombies. A run takes the largest files first, so the small slides are padded: between two large slides come some of
them, and every quarter of the run has the same work. Speed: how long the last quarter took against the first, without
the first and the last tenth of the slides, in which what is prepared ahead gathers and is used up. Memory: the median
of the last quarter of a process's life against its second quarter, and its slope over the second half.
Slides are links to 20 different ones of each kind. Writes benchmarks/out/soak.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from slides import cohort

OUT = Path(__file__).parent / "out"
COMMAND = Path(sys.executable).with_name("slidestream")
EVERY_S = 2.0


class Watch(threading.Thread):
    """Samples of (seconds, MB, open files) of each process, by its kind and number; zombies that were seen."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.began, self.zombies = process, time.monotonic(), 0
        self.samples: dict[str, list[tuple[float, float, int]]] = defaultdict(list)

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            for one in [self.process, *self.process.children(recursive=True)]:
                try:
                    if one.status() == psutil.STATUS_ZOMBIE:
                        self.zombies += 1
                        continue
                    name = "client" if one.pid == self.process.pid else f"child {one.pid}"
                    sample = time.monotonic() - self.began, one.memory_info().rss / 1e6, one.num_fds()
                    self.samples[name].append(sample)
                except psutil.Error:
                    continue
            time.sleep(EVERY_S)


def quarters(values: np.ndarray) -> list[np.ndarray]:
    return np.array_split(values, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=2000)
    parser.add_argument("--large", type=int, default=20)
    wanted = parser.parse_args()
    kinds = {"medium": wanted.large, "tiny": wanted.small}
    large, small = (cohort(OUT / "slides", kind, min(20, count)) for kind, count in kinds.items())
    with tempfile.TemporaryDirectory(dir=OUT) as place:
        folder = Path(place) / "slides"
        folder.mkdir()
        for kind, files in {"medium": large, "tiny": padded(small, large, Path(place))}.items():
            for number in range(kinds[kind]):
                os.link(files[number % len(files)], folder / f"{kind}-{number:05}.svs")
        options = ["-e", "lab_lbp", "--levels", "1", "--workers", "2"]
        run = subprocess.Popen([COMMAND, "run", folder, "-o", f"{place}/out", *options], stdout=-1, text=True)
        watch, ends = Watch(psutil.Process(run.pid)), defaultdict(list)
        watch.start()
        for line in run.stdout or ():
            if line.startswith("[") and " done " in line:
                ends[line.split()[2].split("-")[0]].append(time.monotonic())
            else:
                print(line, end="")
        if run.wait():
            raise SystemExit(f"the run ended with {run.returncode}")
    spans = np.diff([ends_of(ends, share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]).tolist()
    speed = spans[0] / spans[-1]
    found: dict[str, Any] = {"zombies": watch.zombies, "seconds": spans, "speed": speed, "processes": {}}
    print(f"quarters of the run: {[round(span, 1) for span in spans]} s; the last at {speed:.3f} of the first's speed")
    for name, samples in watch.samples.items():
        if len(samples) < 40:
            continue  # it did not live long
        seconds, memory, files = np.array(samples).T
        half = len(samples) // 2
        slope = np.polyfit(seconds[half:], memory[half:], 1)[0] * 3600
        ratio = np.median(quarters(memory)[3]) / np.median(quarters(memory)[1])
        about = {"MB": [float(np.median(part)) for part in quarters(memory)], "peak MB": float(memory.max())}
        about |= {"last over second quarter": float(ratio), "MB an hour, second half": float(slope)}
        found["processes"][name] = about | {"open files": [int(part.max()) for part in quarters(files)]}
        print(f"{name}: {json.dumps(found['processes'][name])}")
    print(f"zombies: {watch.zombies}")
    (OUT / "soak.json").write_text(json.dumps(found, indent=1) + "\n")


def padded(small: list[Path], large: list[Path], folder: Path) -> list[Path]:
    """Copies of the small slides with zeros behind them, as large as to lie between two of the large ones."""
    sizes = sorted(path.stat().st_size for path in large)
    made = []
    for number, path in enumerate(small):
        copy = folder / path.name
        copy.write_bytes(path.read_bytes())
        os.truncate(copy, sizes[number % len(sizes)] - 1)
        made.append(copy)
    return made


def ends_of(ends: dict[str, list[float]], share: float) -> float:
    """When this share of the slides of every kind was done."""
    return max(times[max(0, round(share * len(times)) - 1)] for times in ends.values())


if __name__ == "__main__":
    main()
