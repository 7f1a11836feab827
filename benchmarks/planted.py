"""Which heads can learn what: bags with a planted signal, held-out accuracy over seeds.

    python benchmarks/planted.py --task needle|pair [--heads abmil longmil] [--seeds 5]

needle: 500 tiles of noise; in a positive bag one of them has AMPLITUDE more in its first channel.
pair: a full square of tiles; two of them are marked, one in the first channel and one in the second. In a positive bag
they are at most RADIUS tiles apart, in a negative one more than 2 RADIUS. A head that knows no places sees the same in
both, so its accuracy is that of a coin. Heads that read the order of the bag get it twice: row by row, and shuffled.

Half of the bags are positive. Trained on --bags of them, one bag a step, the best epoch by 100 others; tested on 400.
The interval is that of the mean over all test bags of all seeds (95 %, bootstrap by bag). Writes
benchmarks/out/planted_<task>.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heads import Bag, list_heads, load_head
from heads.train import fit, predict

OUT = Path(__file__).parent / "out"
DIM, AMPLITUDE, RADIUS, SIDE, NEEDLES = 4, 8.0, 2, 14, 500
VALIDATION, TEST = 100, 400
SMALL: dict[str, dict[str, Any]] = {  # at the sizes of the papers they would only be slower
    "attention": {"width": 32, "heads": 2},
    "longmil": {"width": 32, "heads": 2, "radius": RADIUS},
    "transmil": {"width": 64, "landmarks": 32, "heads": 4},
}
ORDERED = ("iat", "transmil")


def main() -> None:
    flat = [name for name in list_heads() if load_head(name, DIM, 2).needs.levels == 1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--heads", nargs="+", choices=flat, default=flat, metavar="HEAD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bags", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in wanted.heads:
        for shuffled in (False, True) if name in ORDERED else (False,):
            start = time.perf_counter()
            right = np.stack([learned(name, wanted, seed, shuffled) for seed in range(wanted.seeds)])
            low, high = interval(right)
            row = {
                "head": name + (", shuffled" if shuffled else ""),
                "accuracy": float(right.mean()),
                "low": low,
                "high": high,
                "seeds": [float(seed.mean()) for seed in right],
                "s": time.perf_counter() - start,
            }
            rows.append(row)
            print(
                f"{row['head']:20} {row['accuracy']:.3f} ({low:.3f}-{high:.3f})  "
                + " ".join(f"{seed:.3f}" for seed in row["seeds"])
                + f"  {row['s']:.0f} s",
                flush=True,
            )
    OUT.mkdir(exist_ok=True)
    settings = vars(wanted) | {"dim": DIM, "amplitude": AMPLITUDE, "radius": RADIUS, "side": SIDE, "needles": NEEDLES}
    (OUT / f"planted_{wanted.task}.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def learned(name: str, wanted: argparse.Namespace, seed: int, shuffled: bool) -> np.ndarray:
    """(TEST,) bool: which of the test bags it got right."""
    random = np.random.default_rng([seed, shuffled])
    train, validation, test = (
        bags(TASKS[wanted.task], count, random, shuffled) for count in (wanted.bags, VALIDATION, TEST)
    )
    torch.manual_seed(seed)
    head = load_head(name, DIM, 2, **SMALL.get(name, {}))
    fit(head, *train, validation=validation, epochs=wanted.epochs, patience=wanted.epochs, lr=wanted.lr, seed=seed)
    return predict(head, test[0]).argmax(1) == test[1]


def bags(make: Any, count: int, random: np.random.Generator, shuffled: bool) -> tuple[list[Bag], np.ndarray]:
    labels = np.arange(count) % 2
    made = []
    for label in labels:
        features, grid = make(bool(label), random)
        order = random.permutation(len(grid)) if shuffled else np.arange(len(grid))
        made.append(Bag.flat(features[order], grid=grid[order]))
    return made, labels


def needle(positive: bool, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    features = random.normal(size=(NEEDLES, DIM))
    features[random.integers(NEEDLES), 0] += AMPLITUDE * positive
    return features, np.stack([np.arange(NEEDLES) % 25, np.arange(NEEDLES) // 25], axis=1)


def pair(positive: bool, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2)
    features = random.normal(size=(len(grid), DIM))
    distance = -1.0
    while not (0 < distance <= RADIUS if positive else distance > 2 * RADIUS):
        a, b = random.integers(len(grid), size=2)
        distance = float(np.hypot(*(grid[a] - grid[b])))
    features[a, 0] += AMPLITUDE
    features[b, 1] += AMPLITUDE
    return features, grid


def interval(right: np.ndarray) -> tuple[float, float]:
    random, values = np.random.default_rng(0), right.ravel()
    means = values[random.integers(len(values), size=(2000, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


TASKS = {"needle": needle, "pair": pair}

if __name__ == "__main__":
    main()
