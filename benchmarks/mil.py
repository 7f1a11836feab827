"""Classical MIL benchmarks: do our heads reach the published accuracies?

    python benchmarks/mil.py ../shared/data/mil/musk1.csv --seeds 5

10-fold stratified cross-validation, repeated with `--seeds` shuffles; features standardised on the training folds only;
a fixed number of epochs and no validation split, so nothing is chosen on a test fold. CSV columns: bag, label,
instance, f0 …

Settings, chosen before the first run and not tuned: as far as we know those of the AB-MIL paper (Ilse et al. 2018) for
its classical data sets: lr 5e-4, weight decay 5e-3, 100 epochs, one bag a step, first layer 256, attention 64. But the
paper has SGD with momentum and three hidden layers; `heads.train.fit` has Adam and the head one. Published for MUSK1:
attention .892 ± .040, gated .900 ± .050. Mean and max are linear here: baselines of ours, not rows of the paper.

The interval is 95 % over bags: take for each bag the share of runs in which it was right; mean ± t · sd / √bags. It
says how far another draw of as many bags may move the figure. The sd over folds is near to what papers print after ±;
the sd over runs shows how little of it comes from seeds and shuffles.
"""

import argparse
import csv
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t
from sklearn.model_selection import StratifiedKFold

from heads import Bag, load_head
from heads.train import fit, predict

HEADS = {
    "abmil, gated": ("abmil", {"gated": True, "hidden": 256, "attention": 64}),
    "abmil, plain": ("abmil", {"gated": False, "hidden": 256, "attention": 64}),
    "mean": ("mean", {}),
    "max": ("max", {}),
}
TRAINING = {"epochs": 100, "lr": 5e-4, "weight_decay": 5e-3, "class_weights": False}
FOLDS = 10


def read_bags(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    rows: dict[str, list[list[float]]] = {}
    labels: dict[str, int] = {}
    with path.open(newline="") as file:
        for bag, label, _, *features in list(csv.reader(file))[1:]:
            rows.setdefault(bag, []).append([float(value) for value in features])
            labels[bag] = int(label)
    return [np.array(rows[bag]) for bag in rows], np.array([labels[bag] for bag in rows])


def standardised(bags: list[np.ndarray], train: np.ndarray) -> list[Bag]:
    seen = np.concatenate([bags[i] for i in train])
    mean, sd = seen.mean(axis=0), seen.std(axis=0)
    return [Bag.flat((bag - mean) / np.where(sd > 0, sd, 1)) for bag in bags]


def cross_validate(path: Path, head: str, seed: int) -> list[list[tuple[int, bool]]]:
    """One run: for each fold its test bags, and whether each was right."""
    torch.set_num_threads(1)  # the networks are too small to share, the processes are not
    bags, labels = read_bags(path)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(labels, labels)
    return [test_fold(bags, labels, head, train, test, seed) for train, test in folds]


def test_fold(
    bags: list[np.ndarray], labels: np.ndarray, head: str, train: np.ndarray, test: np.ndarray, seed: int
) -> list[tuple[int, bool]]:
    name, options = HEADS[head]
    ready = standardised(bags, train)
    torch.manual_seed(seed)
    model = load_head(name, ready[0].dim, classes=2, **options)
    fit(model, [ready[i] for i in train], labels[train], seed=seed, **TRAINING)
    right = predict(model, [ready[i] for i in test]).argmax(axis=1) == labels[test]
    return [(int(i), bool(hit)) for i, hit in zip(test, right, strict=True)]


def summary(runs: list[list[list[tuple[int, bool]]]]) -> dict[str, float]:
    of_folds = [np.mean([hit for _, hit in fold]) for run in runs for fold in run]
    hits = np.array([[hit for _, hit in sorted(pair for fold in run for pair in fold)] for run in runs])  # (runs, bags)
    of_bags = hits.mean(axis=0)
    half = t.ppf(0.975, len(of_bags) - 1) * of_bags.std(ddof=1) / np.sqrt(len(of_bags))
    return {
        "accuracy": of_bags.mean(),
        "low": of_bags.mean() - half,
        "high": of_bags.mean() + half,
        "sd_folds": np.std(of_folds, ddof=1),
        "sd_runs": hits.mean(axis=1).std(ddof=1) if len(runs) > 1 else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="10-fold cross-validation of the flat heads on a classical MIL data set"
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    jobs = list(product(HEADS, range(args.seeds)))
    with ProcessPoolExecutor(args.workers) as pool:
        runs = list(pool.map(cross_validate, [args.csv] * len(jobs), *zip(*jobs, strict=True)))
    table = {head: summary([run for (h, _), run in zip(jobs, runs, strict=True) if h == head]) for head in HEADS}

    print(f"{args.csv.stem}: {FOLDS} folds x {args.seeds} seeds, {TRAINING}")
    print(f"{'head':<14}{'accuracy':>9}  {'95 % over bags':<16}{'sd folds':>9}{'sd runs':>9}")
    for head, row in table.items():
        interval = f"{row['low']:.3f} – {row['high']:.3f}"
        print(f"{head:<14}{row['accuracy']:>9.3f}  {interval:<16}{row['sd_folds']:>9.3f}{row['sd_runs']:>9.3f}")
    out = Path(__file__).parent / "out" / f"mil_{args.csv.stem}.json"
    out.parent.mkdir(exist_ok=True)
    setup = {"data": args.csv.name, "folds": FOLDS, "seeds": args.seeds, "training": TRAINING, "heads": HEADS}
    out.write_text(json.dumps({**setup, "results": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
