"""Masked attention beside plain attention, in the hierarchical ViT: what background does to answers, learning, time.

    python benchmarks/masked.py [--seeds 0 1 2 3 4] [--twins 100] [--epochs 4]

Bags have REGIONS regions of 8 × 8 tiles (normal, DIM channels), of which 10 to 30 % have tissue. Background is glass
(GLASS less in the last channel, so that it can be told from tissue) and some of it debris. Bags come in twins of the
same noise: in the positive one SICK tiles of tissue have AMPLITUDE more in the first channel. In both as many tiles of
background, from none to DEBRIS, have the same: what lies on the glass says nothing of the slide.

learning: the same head from the same weights on the same bags in the same order, masked=True and masked=False; a bag is
a step; the weights are those of the epoch with the lowest loss on 50 other twins; tested on 200 twins. The difference
and its interval (95 %) are over seeds and test twins, bootstrap of both (planted.py).
background: the trained heads on the test bags, and on the same with the features of all background drawn anew.
time: a forward pass, and a step, of LARGE regions with SHARE of tissue: background left out, background computed and
hidden from the others (as a key mask does it, which gives the same answer), and seen. Medians of REPEATS.

Writes benchmarks/out/masked.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planted import Twins, drawn, right, square, summary

from heads import Bag, load_head
from heads.hvit import HViT, regions_of
from heads.train import fit

OUT = Path(__file__).parent / "out"
SIDE, DIM, REGIONS = 8, 8, 2
SICK, AMPLITUDE, DEBRIS, GLASS = 8, 6.0, 12, 3.0
VALIDATION, TEST, LR = 50, 200, 1e-4
LARGE, SHARE, REPEATS = 40, 0.2, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--twins", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=4)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    shares: dict[str, list[np.ndarray]] = {"masked": [], "unmasked": []}
    moved: dict[str, list[np.ndarray]] = {"masked": [], "unmasked": []}
    for seed in wanted.seeds:
        random = np.random.default_rng(seed)
        train, validation, test = (drawn(sparse, n, random) for n in (wanted.twins, VALIDATION, TEST))
        anew = [with_other_background(bag, random) for bag in test[0]]
        for name in shares:
            torch.manual_seed(seed)
            head = load_head("hvit", DIM, 2, side=SIDE, masked=name == "masked")
            epochs = wanted.epochs
            fit(head, *train, validation=validation, epochs=epochs, patience=epochs, lr=LR, seed=seed)
            shares[name].append(right(head, *test))
            moved[name].append(margins(head, anew) - margins(head, test[0]))
            print(seed, name, shares[name][-1].mean().round(3), abs(moved[name][-1]).max(), flush=True)
    figures: dict[str, Any] = {
        "settings": vars(wanted),
        "accuracy": {name: summary(np.stack(each)) for name, each in shares.items()},
        "difference": summary(np.stack(shares["masked"]) - np.stack(shares["unmasked"])),
        "background": {name: spread(np.concatenate(each)) for name, each in moved.items()},
        "time": times(),
    }
    figures["s"] = round(time.perf_counter() - start)
    print(json.dumps(figures, indent=1))
    OUT.mkdir(exist_ok=True)
    (OUT / "masked.json").write_text(json.dumps(figures, indent=1) + "\n")


# -- bags --


def sparse(random: np.random.Generator) -> Twins:
    grid = side_by_side(REGIONS)
    count = len(grid)
    tissue = np.zeros(count)
    seen = random.permutation(count)[: int(count * random.uniform(0.1, 0.3))]
    tissue[seen] = random.uniform(0.1, 1, len(seen))
    glass = np.flatnonzero(tissue == 0)
    negative = random.normal(size=(count, DIM))
    negative[glass] = background(len(glass), random)
    positive = negative.copy()
    positive[seen[:SICK], 0] += AMPLITUDE
    return Bag.flat(negative, grid=grid, tissue=tissue), Bag.flat(positive, grid=grid, tissue=tissue)


def side_by_side(regions: int) -> np.ndarray:
    return np.concatenate([square(SIDE) + np.array([SIDE * i, 0]) for i in range(regions)])


def background(count: int, random: np.random.Generator) -> np.ndarray:
    features = random.normal(size=(count, DIM))
    features[:, -1] -= GLASS
    features[random.permutation(count)[: random.integers(DEBRIS + 1)], 0] += AMPLITUDE
    return features


def with_other_background(bag: Bag, random: np.random.Generator) -> Bag:
    features, glass = bag.features.numpy().copy(), bag.tissue.numpy() == 0
    features[glass] = background(glass.sum(), random)
    return Bag.flat(features, grid=bag.grid, tissue=bag.tissue)


# -- what background does --


@torch.no_grad()
def margins(head: HViT, bags: list[Bag]) -> np.ndarray:
    """(n,) the logit of the second class less that of the first."""
    head.eval()
    return np.array([float(logits[1] - logits[0]) for logits in (head(bag).logits.double() for bag in bags)])


def spread(moved: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(abs(moved))), "largest": float(abs(moved).max())}


# -- time --


def times() -> dict[str, Any]:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    grid = side_by_side(LARGE)
    tissue = (random.random(len(grid)) < SHARE).astype(float)
    bag = Bag.flat(random.normal(size=(len(grid), DIM)), grid=grid, tissue=tissue)
    masked = load_head("hvit", DIM, 2, side=SIDE).eval()
    plain = load_head("hvit", DIM, 2, side=SIDE, masked=False).eval()
    plain.load_state_dict(masked.state_dict())
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "left out": lambda: masked(bag).logits,
        "computed and hidden": lambda: hidden(masked, bag),
        "seen": lambda: plain(bag).logits,
    }
    with torch.no_grad():
        apart = float((ways["left out"]() - ways["computed and hidden"]()).abs().max())
    found = {name: {"forward_s": forward(way), "step_s": step(way)} for name, way in ways.items()}
    fastest = found["left out"]
    ratios = {name: {k: round(v / fastest[k], 2) for k, v in each.items()} for name, each in found.items()}
    return {"tiles": len(grid), "tissue": int(tissue.sum()), "seconds": found, "ratio": ratios, "apart": apart}


def hidden(head: HViT, bag: Bag) -> torch.Tensor:
    """Every tile goes through the region transformer; nobody looks at background."""
    regions = regions_of(bag.grid, SIDE)
    vectors, _ = head.regions(bag.features[regions.rows], regions.within[regions.rows], bag.tissue[regions.rows] > 0)
    return head.slide(vectors)[0]


def forward(way: Callable[[], torch.Tensor]) -> float:
    with torch.no_grad():
        return median(way)


def step(way: Callable[[], torch.Tensor]) -> float:
    return median(lambda: way().sum().backward())


def median(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return round(float(np.median(seconds[1:])), 4)


if __name__ == "__main__":
    main()
