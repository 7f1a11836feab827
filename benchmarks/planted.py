"""Which heads can learn what: bags with a planted signal, held-out accuracy over seeds.

    python benchmarks/planted.py needle|pair|coarse [--heads abmil longmil] [--seeds 100]

Bags come in twins, a negative and a positive one, of the same noise (normal, DIM channels):

needle: NEEDLES tiles. One tile of the positive bag has AMPLITUDE more in its first channel. Transformers are tested on
bags of eight times as many tiles, too.
pair: SIDE × SIDE tiles, one marked in the first channel and one in the second. Both twins have the same tiles: in the
positive one the marks lie at most RADIUS tiles apart, in the negative one more than 2 RADIUS, and every place has a
mark equally often. So heads that know no places give twins the same answer. Heads that read the order of the tiles get
them row by row, and shuffled. What was learned is also tested on LARGE × LARGE tiles, with one pair and with PAIRS.
coarse: two levels, REGIONS tiles and CHILDREN below each. In the positive bag one child of each of SICK regions has
AMPLITUDE more; the regions themselves have a cue, by which they are ranked with an AUC of about 0.7: a share of them
4 more in the first channel, or all of them a little more. hagmil looks below K regions, with the coarse level a fifth
of all tiles, or below all; without a cue it can only choose at random. It has no loss on tiles: that calls the 8 tiles
with the highest attention examples of the slide's class, which among 25 they are not.

A bag is a step; the weights are those of the epoch with the lowest loss on VALIDATION other twins. Settings were chosen
on seeds 100 to 102. Intervals (95 %) are those of the mean over seeds and test twins, by bootstrap of both. Writes
benchmarks/out/planted_<task>.json.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from heads import Bag, BagLevel, Head, list_heads, load_head
from heads.train import fit, predict

OUT = Path(__file__).parent / "out"
DIM, AMPLITUDE, VALIDATION, TEST = 4, 8.0, 50, 200
NEEDLES = 500
RADIUS, SIDE, LARGE, PAIRS = 2, 10, 28, 8
REGIONS, CHILDREN, SICK, K = 25, 16, 6, 3
CUES = {"visible in some": (0.4, 4.0), "weak in all": (1.0, 0.742), "none": (0.0, 0.0)}  # of sick regions, how much
WIDTHS = {"widths": (64, 96, 32, 64)}
SMALL: dict[str, dict[str, Any]] = {  # at the sizes of the papers they would only be slower
    "attention": {"width": 32, "heads": 2},
    "hagmil": WIDTHS,
    "iat": WIDTHS,
    "longmil": {"width": 32, "heads": 2, "radius": RADIUS},
    "transmil": {"width": 64, "landmarks": 32, "heads": 4},
}
ORDERED, PLACED = ("iat", "transmil"), ("attention", "longmil")

Twins = tuple[Bag, Bag]  # negative, positive
Make = Callable[[np.random.Generator], Twins]


@dataclass(frozen=True)
class Plan:
    twins: int  # to train on
    epochs: int
    lr: float = 5e-4
    seeds: int = 5


@dataclass(frozen=True)
class Trial:
    name: str
    head: str
    make: Make
    plan: Plan
    options: dict[str, Any] = field(default_factory=dict)
    larger: Mapping[str, Make] = field(default_factory=dict)  # other tests, on larger bags
    larger_twins: int = TEST


PLANS = {"needle": Plan(400, 3), "pair": Plan(200, 4)}
OWN_PLANS = {  # a step of iat takes twenty times as long as one of dsmil
    ("needle", "clam_mb"): Plan(200, 2),
    ("needle", "dsmil"): Plan(400, 6, lr=1e-3),
    ("needle", "dtfd"): Plan(400, 4),
    ("needle", "iat"): Plan(200, 2),
    ("needle", "longmil"): Plan(400, 4),
    ("needle", "max"): Plan(400, 6, lr=1e-2),
    ("needle", "mean"): Plan(400, 6, lr=1e-2),
    ("pair", "attention"): Plan(1200, 8),
    ("pair", "iat"): Plan(1200, 3),
    ("pair", "iat, shuffled"): Plan(200, 1),
    ("pair", "longmil"): Plan(1200, 4),
    ("pair", "transmil"): Plan(1200, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("needle", "pair", "coarse"))
    parser.add_argument("--heads", nargs="+", default=list_heads(), choices=list_heads(), metavar="HEAD")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--twins", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    changes = {name: getattr(wanted, name) for name in ("twins", "epochs", "lr") if getattr(wanted, name)}
    if wanted.task == "coarse":
        describe_coarse()
    rows = []
    for trial in trials(wanted.task):
        if trial.head in wanted.heads:
            rows.append(row(replace(trial, plan=replace(trial.plan, **changes)), wanted.seeds))
            print(json.dumps(rows[-1]), flush=True)
    OUT.mkdir(exist_ok=True)
    (OUT / f"planted_{wanted.task}.json").write_text(json.dumps(rows, indent=1) + "\n")


def trials(task: str) -> Iterator[Trial]:
    if task == "coarse":
        return coarse_trials()
    return flat_trials(task)


def coarse_trials() -> Iterator[Trial]:
    for words, cue in CUES.items():
        for k in (K, REGIONS) if words == "visible in some" else (K,):
            options = {"levels": 2, "k": k, "instance_weight": 0.0, **SMALL["hagmil"]}
            yield Trial(f"cue {words}, k = {k}", "hagmil", partial(coarse, cue=cue), Plan(250, 4), options)


def flat_trials(task: str) -> Iterator[Trial]:
    for head in list_heads():
        options = SMALL.get(head, {})
        if load_head(head, DIM, 2, **options).needs.levels > 1:
            continue
        if task == "needle":
            sizes: dict[str, Make] = (
                {"8 times": partial(needle, tiles=8 * NEEDLES)} if head in ("transmil", *PLACED) else {}
            )
            yield Trial(head, head, needle, plan(task, head), options, sizes, larger_twins=50)
            continue
        sizes = {"one pair": partial(pair, side=LARGE), f"{PAIRS} pairs": partial(pair, side=LARGE, pairs=PAIRS)}
        yield Trial(head, head, pair, plan(task, head), options, sizes if head in ORDERED + PLACED else {})
        if head in ORDERED:
            name = f"{head}, shuffled"
            yield Trial(name, head, partial(shuffled, make=pair), plan(task, name), options)


def plan(task: str, name: str) -> Plan:
    return OWN_PLANS.get((task, name), PLANS[task])


def row(trial: Trial, seeds: list[int] | None) -> dict[str, Any]:
    start = time.perf_counter()
    runs = [run(trial, seed) for seed in seeds or range(trial.plan.seeds)]
    figures = {test: summary(np.stack([one[test] for one in runs])) for test in runs[0]}
    return {"head": trial.name, **asdict(trial.plan), "s": round(time.perf_counter() - start), **figures}


def run(trial: Trial, seed: int) -> dict[str, np.ndarray]:
    """test → (TEST,) the share of each pair of twins that it got right."""
    random = np.random.default_rng(seed)
    train, validation, test = (drawn(trial.make, n, random) for n in (trial.plan.twins, VALIDATION, TEST))
    torch.manual_seed(seed)
    head = load_head(trial.head, DIM, 2, **trial.options)
    epochs = trial.plan.epochs
    fit(head, *train, validation=validation, epochs=epochs, patience=epochs, lr=trial.plan.lr, seed=seed)
    tests = {"accuracy": test} | {name: drawn(make, trial.larger_twins, random) for name, make in trial.larger.items()}
    shares = {name: right(head, *bags) for name, bags in tests.items()}
    return shares if trial.head != "hagmil" else shares | {"found": found(head, test[0])}


def drawn(make: Make, twins: int, random: np.random.Generator) -> tuple[list[Bag], np.ndarray]:
    return [bag for _ in range(twins) for bag in make(random)], np.arange(2 * twins) % 2


def right(head: Head, bags: list[Bag], labels: np.ndarray) -> np.ndarray:
    return (predict(head, bags).argmax(1) == labels).reshape(-1, 2).mean(1)


def summary(shares: np.ndarray) -> dict[str, Any]:
    """(seeds, twins) → the mean, its interval, the mean of each seed."""
    random, (seeds, twins) = np.random.default_rng(0), shares.shape
    means = []
    for _ in range(2000):
        some, others = random.integers(seeds, size=seeds), random.integers(twins, size=twins)
        means.append(shares[some][:, others].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    figures = {"mean": shares.mean(), "low": low, "high": high}
    rounded = {name: round(float(value), 4) for name, value in figures.items()}
    return rounded | {"seeds": shares.mean(1).round(3).tolist()}


# -- bags --


def needle(random: np.random.Generator, tiles: int = NEEDLES) -> Twins:
    noise = random.normal(size=(tiles, DIM))
    raised = noise.copy()
    raised[random.integers(tiles), 0] += AMPLITUDE
    grid = square(math.isqrt(tiles - 1) + 1)[:tiles]
    return Bag.flat(noise, grid=grid), Bag.flat(raised, grid=grid)


def pair(random: np.random.Generator, side: int = SIDE, pairs: int = 1) -> Twins:
    """Marks of different pairs are more than RADIUS apart."""
    grid = square(side)
    tiles = random.normal(size=(len(grid), DIM))
    tiles[:pairs, 0] += AMPLITUDE
    tiles[pairs : 2 * pairs, 1] += AMPLITUDE
    far, near = (laid_out(tiles, grid, places(random, side, close, pairs)) for close in (False, True))
    return far, near


def laid_out(tiles: np.ndarray, grid: np.ndarray, marked: np.ndarray) -> Bag:
    """Row by row, the first tiles at the marked places and the others, in their order, at those that are left."""
    place = np.concatenate([marked, np.setdiff1d(np.arange(len(grid)), marked)])
    return Bag.flat(tiles[place.argsort()], grid=grid)


def places(random: np.random.Generator, side: int, close: bool, pairs: int) -> np.ndarray:
    """(2 pairs,) places: the first marks, then the second ones."""
    grid, sums = square(side), cumulated(side, close)
    chosen = np.empty((0, 2), dtype=int)
    while len(chosen) < pairs:
        one = np.array(divmod(int(np.searchsorted(sums, random.random() * sums[-1])), len(grid)))
        if not (apart(grid[one], grid[chosen.ravel()]) <= RADIUS).any():
            chosen = np.vstack([chosen, one])
    return chosen.T.ravel()


@cache
def cumulated(side: int, close: bool) -> np.ndarray:
    """(side⁴,) running sum of the chances of all pairs of places; every place is in a pair as often as any other."""
    distance = apart(square(side), square(side))
    chance = ((distance > 0) & (distance <= RADIUS) if close else distance > 2 * RADIUS).astype(float)
    for _ in range(100):  # Sinkhorn's iteration
        scale = chance.sum(1) ** -0.5
        chance *= scale[:, None] * scale
    return chance.cumsum()


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.hypot(*(a[:, None] - b).transpose(2, 0, 1))


def square(side: int) -> np.ndarray:
    return np.stack([np.arange(side**2) % side, np.arange(side**2) // side], axis=1)


def shuffled(random: np.random.Generator, make: Make) -> Twins:
    def mixed(bag: Bag) -> Bag:
        order = random.permutation(len(bag))
        return Bag.flat(bag.features[order], grid=bag.grid[order])

    negative, positive = make(random)
    return mixed(negative), mixed(positive)


def coarse(random: np.random.Generator, cue: tuple[float, float]) -> Twins:
    above, below = random.normal(size=(REGIONS, DIM)), random.normal(size=(REGIONS * CHILDREN, DIM))
    sick = random.permutation(REGIONS)[:SICK]
    cued, raised = above.copy(), below.copy()
    share, amount = cue
    cued[sick[random.random(SICK) < share], 0] += amount
    raised[sick * CHILDREN + random.integers(CHILDREN, size=SICK), 0] += AMPLITUDE
    parent = np.arange(REGIONS).repeat(CHILDREN)
    levels = ((above, below), (cued, raised))
    negative, positive = (Bag([BagLevel.of(first), BagLevel.of(second, parent=parent)]) for first, second in levels)
    return negative, positive


def pairs_of(bags: list[Bag]) -> list[Twins]:
    return list(zip(bags[::2], bags[1::2], strict=True))


def changed(twins: Twins) -> np.ndarray:
    """(N,) bool: the tiles of the finest level in which the positive bag differs."""
    negative, positive = (twin.finest.features for twin in twins)
    return (negative != positive).any(1).numpy()


def found(head: Head, bags: list[Bag]) -> np.ndarray:
    """(TEST,) whether a raised tile was among those that were looked at."""
    with torch.no_grad():
        looked = [~head(bag).tiles[-1].raw.isnan().numpy() for bag in bags[1::2]]
    return np.array([(seen & changed(twins)).any() for seen, twins in zip(looked, pairs_of(bags), strict=True)])


def describe_coarse() -> None:
    for name, cue in CUES.items():
        bags, _ = drawn(partial(coarse, cue=cue), TEST, np.random.default_rng(0))
        sick = np.concatenate([changed(twins).reshape(REGIONS, -1).any(1) for twins in pairs_of(bags)])
        first = np.concatenate([bag.features[:REGIONS, 0].numpy() for bag in bags[1::2]])
        print(f"{name}: the coarse tile alone ranks sick regions with AUC {roc_auc_score(sick, first):.3f}")
    looked = (REGIONS + K * CHILDREN) / (REGIONS + REGIONS * CHILDREN)
    by_chance = 1 - math.comb(REGIONS - SICK, K) / math.comb(REGIONS, K)
    print(f"the coarse level and what is below K regions are {looked:.3f} of all tiles")
    print(f"chosen at random they hold a raised one with {by_chance:.3f}: accuracy {(1 + by_chance) / 2:.3f}")


if __name__ == "__main__":
    main()
