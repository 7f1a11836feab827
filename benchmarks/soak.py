"""2,000 small slides and 20 large ones in one run: does anything grow, does anything slow down?

    python benchmarks/soak.py [--small 2000] [--large 20]

The real command with two workers. Every two seconds each of its processes is looked at: resident memory, open files,
zombies. The largest slides come first, so the two kinds are timed apart: seconds for each of the first and of the last
quarter of a kind, without the first tenth of it: an encoder has just begun then, or finds many small slides prepared,
as it was at large ones for so long. Memory: the median of the last quarter of a process's life against its second
quarter, and its slope over the second half. Slides are links to 20 different ones. Writes benchmarks/out/soak.json.
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
    made = {kind: cohort(OUT / "slides", kind, min(20, count)) for kind, count in asked(wanted).items()}
    with tempfile.TemporaryDirectory(dir=OUT) as place:
        folder = Path(place) / "slides"
        folder.mkdir()
        for kind, count in asked(wanted).items():
            for number in range(count):
                os.link(made[kind][number % len(made[kind])], folder / f"{kind}-{number:05}.svs")
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
    found = {"zombies": watch.zombies, "kinds": {}, "processes": {}}
    for kind, times in ends.items():
        spans = [float(np.diff(part).mean()) for part in quarters(np.array(times[len(times) // 10 :]))]
        found["kinds"][kind] = {"slides": len(times), "s a slide": spans, "last over first": spans[0] / spans[-1]}
        print(f"{kind}: {len(times)} slides, speed of the last quarter {spans[0] / spans[-1]:.3f} of the first's")
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


def asked(wanted: argparse.Namespace) -> dict[str, int]:
    return {"tiny": wanted.small, "medium": wanted.large}


if __name__ == "__main__":
    main()
