"""Classical MIL benchmarks: do our heads reach the published accuracies?

    python benchmarks/mil.py ../shared/data/mil/musk1.csv [--heads "abmil, gated" dsmil] [--seeds 5] [--epochs 40]

10-fold stratified cross-validation, repeated with `--seeds` shuffles; features standardised on the training folds only.
CSV columns: bag, label, instance, f0 … Each fold is trained and tested three times over:

fixed: a fixed number of epochs on all training bags, the last weights. Nothing is chosen.
stopped: a fifth of the training bags is held out; the weights of the epoch with the lowest loss on them.
peeked: the fixed training, at the epoch that is best on the test fold. Not a result: what choosing there would add.

Settings, chosen before the first run and not tuned: as far as we know those of the AB-MIL paper (Ilse et al. 2018) for
its classical data sets: lr 5e-4, weight decay 5e-3, 100 epochs, one bag a step, first layer 256, attention 64. But the
paper has SGD with momentum and three hidden layers; `heads.train.fit` has Adam and the head one. The other heads, of
which no such protocol is known to us, have 20 epochs, the linear ones 40. Bags have two to forty instances: CLAM takes
one of each end as an example, DTFD parts them in two.

The interval is 95 % over bags: take for each bag the share of runs in which it was right; mean ± t · sd / √bags. It
says how far another draw of as many bags may move the figure. The sd over folds is near to what papers print after ±;
the sd over runs shows how little of it comes from seeds and shuffles. Writes benchmarks/out/mil_<data>_<head>.json.
"""

import argparse
import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from sklearn.model_selection import StratifiedKFold

from heads import Bag, Head, load_head
from heads.train import fit, predict, split

OUT = Path(__file__).parent / "out"
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean", {}),
    "max": ("max", {}),
    "maxscore": ("maxscore", {}),
    "abmil, plain": ("abmil", {"gated": False, "hidden": 256, "attention": 64}),
    "abmil, gated": ("abmil", {"gated": True, "hidden": 256, "attention": 64}),
    "clam_sb": ("clam_sb", {"instances": 1}),
    "clam_mb": ("clam_mb", {"instances": 1}),
    "dsmil": ("dsmil", {}),
    "dtfd": ("dtfd", {"groups": 2}),
}
TRAINING: dict[str, Any] = {"lr": 5e-4, "weight_decay": 5e-3, "class_weights": False}
FOLDS, PATIENCE = 10, 10
EPOCHS = {"abmil, plain": 100, "abmil, gated": 100, "mean": 40, "max": 40}
OTHER_EPOCHS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS, metavar="HEAD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="of all heads, in place of their own")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    bags, labels = read_bags(wanted.csv)
    OUT.mkdir(exist_ok=True)
    for head in wanted.heads:
        start = time.perf_counter()
        epochs = wanted.epochs or EPOCHS.get(head, OTHER_EPOCHS)
        runs = [cross_validate(bags, labels, head, seed, epochs) for seed in range(wanted.seeds)]
        row = {"data": wanted.csv.stem, "head": head, "seeds": wanted.seeds, "epochs": epochs}
        row |= {"folds": FOLDS, "patience": PATIENCE, **TRAINING, "s": round(time.perf_counter() - start)}
        row |= {protocol: summary([run[protocol] for run in runs]) for protocol in runs[0]}
        print(json.dumps(row), flush=True)
        (OUT / f"mil_{wanted.csv.stem}_{head.replace(', ', '_')}.json").write_text(json.dumps(row, indent=1) + "\n")


def read_bags(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    rows: dict[str, list[list[float]]] = {}
    labels: dict[str, int] = {}
    with path.open(newline="") as file:
        for bag, label, _, *features in list(csv.reader(file))[1:]:
            rows.setdefault(bag, []).append([float(value) for value in features])
            labels[bag] = int(label)
    return [np.array(rows[bag]) for bag in rows], np.array([labels[bag] for bag in rows])


@dataclass(frozen=True)
class Fold:
    bags: list[Bag]  # all, standardised on those for training
    labels: np.ndarray
    train: np.ndarray  # rows
    test: np.ndarray


Hits = list[tuple[np.ndarray, np.ndarray]]  # of each fold: its test bags, and whether each was right


def cross_validate(bags: list[np.ndarray], labels: np.ndarray, name: str, seed: int, epochs: int) -> dict[str, Hits]:
    """One run, by protocol."""
    hits: dict[str, Hits] = {"fixed": [], "stopped": [], "peeked": []}
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels):
        fold = Fold(standardised(bags, train), labels, train, test)
        by_epoch = fixed(made(name, fold, seed), fold, seed, epochs)
        hits["fixed"].append((test, by_epoch[-1]))
        hits["stopped"].append((test, stopped(made(name, fold, seed), fold, seed, epochs)))
        hits["peeked"].append((test, by_epoch[by_epoch.mean(1).argmax()]))
    return hits


def standardised(bags: list[np.ndarray], train: np.ndarray) -> list[Bag]:
    seen = np.concatenate([bags[i] for i in train])
    mean, sd = seen.mean(axis=0), seen.std(axis=0)
    return [Bag.flat((bag - mean) / np.where(sd > 0, sd, 1)) for bag in bags]


def made(name: str, fold: Fold, seed: int) -> Head:
    head, options = HEADS[name]
    torch.manual_seed(seed)
    return load_head(head, fold.bags[0].dim, 2, **options)


def fixed(head: Head, fold: Fold, seed: int, epochs: int) -> np.ndarray:
    """(epochs, test bags): which were right after each epoch."""
    by_epoch: list[np.ndarray] = []

    def look(epoch: int, train_loss: float, validation_loss: float | None) -> None:
        by_epoch.append(right(head, fold))

    fit(head, *some(fold, fold.train), seed=seed, epochs=epochs, on_epoch=look, **TRAINING)
    return np.stack(by_epoch)


def stopped(head: Head, fold: Fold, seed: int, epochs: int) -> np.ndarray:
    train, others = (some(fold, fold.train[rows]) for rows in split(fold.labels[fold.train], seed=seed))
    fit(head, *train, validation=others, seed=seed, epochs=epochs, patience=PATIENCE, **TRAINING)
    return right(head, fold)


def some(fold: Fold, rows: np.ndarray) -> tuple[list[Bag], np.ndarray]:
    return [fold.bags[i] for i in rows], fold.labels[rows]


def right(head: Head, fold: Fold) -> np.ndarray:
    bags, labels = some(fold, fold.test)
    return predict(head, bags).argmax(axis=1) == labels


def summary(runs: list[Hits]) -> dict[str, float]:
    of_folds = [hits.mean() for run in runs for _, hits in run]
    of_runs = np.stack([in_order(run) for run in runs])  # (runs, bags)
    of_bags = of_runs.mean(axis=0)
    half = t.ppf(0.975, len(of_bags) - 1) * of_bags.std(ddof=1) / np.sqrt(len(of_bags))
    figures = {
        "accuracy": of_bags.mean(),
        "low": of_bags.mean() - half,
        "high": of_bags.mean() + half,
        "sd_folds": np.std(of_folds, ddof=1),
        "sd_runs": of_runs.mean(axis=1).std(ddof=1) if len(runs) > 1 else 0.0,
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def in_order(run: Hits) -> np.ndarray:
    """(bags,): each is in one test fold."""
    test, hits = (np.concatenate(parts) for parts in zip(*run, strict=True))
    return hits[test.argsort()]


if __name__ == "__main__":
    main()
