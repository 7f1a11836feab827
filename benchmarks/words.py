"""HATNet trained with its network: memory and time of a training step against the number of words.

    python benchmarks/words.py --px 64

Pictures of n² × n² words (n = 2 … 7: 16 … 2,401 words) of px × px pixels, mobilenetv2_100 with random weights. In two
passes, 16 words at a time, as hatnet does; and, for few words, all at once with the graph kept. Each row in a process
of its own; memory is what the step needs on top of picture, network and head.
"""

import argparse
import subprocess
import sys
import time

import numpy as np
import torch
from scale import held, held_from_now  # beside this file

from heads import load_head
from heads.picture import Picture

AT_ONCE_LIMIT = 256  # words
SIDES = range(2, 8)


def step(side: int, px: int, at_once: bool) -> tuple[float, float]:
    """Seconds, MB."""
    torch.manual_seed(0)
    edge = side**2 * px
    picture = Picture.of(np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8))
    options = {"cnn": "mobilenetv2_100", "cnn_weights": "random", "word_px": px}
    head = load_head("hatnet", classes=4, side=side, **options).train()
    if at_once:
        words = head.cnn
        words.forward = lambda one, across: words.read(one, torch.arange(across**2), across, px)
    for weight in head.parameters():
        weight.grad = torch.zeros_like(weight)
    before, start = held_from_now("cpu"), time.perf_counter()
    head.loss(head(picture), 1).backward()
    return time.perf_counter() - start, (held("cpu") - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.one:
        print(*step(wanted.one[0], wanted.px, bool(wanted.one[1])))
        return
    print(f"{'words':>6} {'two passes MB':>14} {'s':>7} {'at once MB':>11} {'s':>7}")
    for side in SIDES:
        cells = [f"{side**4:>6}"]
        for at_once, wide in ((0, 14), (1, 11)):
            if at_once and side**4 > AT_ONCE_LIMIT:
                continue
            command = [sys.executable, __file__, "--px", str(wanted.px), "--one", str(side), str(at_once)]
            seconds, megabytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            cells.append(f"{float(megabytes):>{wide}.0f} {float(seconds):>7.1f}")
        print(*cells, flush=True)


if __name__ == "__main__":
    main()
