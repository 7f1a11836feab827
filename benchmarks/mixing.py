"""ScoreNet on few images with and without mixing: none, CutMix, SaliencyMix, ScoreMix.

    python benchmarks/mixing.py ../shared/data/tiles/CRCHistoPhenotypes

Are there epithelial cells in a field of colon tissue? 99 fields of 500 × 500 px (Sirinukunwattana et al., IEEE TMI
2016; 9 places of 128 px each), 49 of them without. For each seed 50 train, 17 validate and the others test, the same
for all; ScoreNet/4/1 from random weights, its augmentations, the weights of the epoch with the lowest validation loss.
Intervals: 95 %, bootstrap over seeds; differences are paired.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from heads import load_head
from heads.picture import Picture
from heads.train import fit, predict

MIXES = ("none", "cutmix", "saliencymix", "scoremix")
TRAIN, VALIDATION = 50, 17
OUT = Path(__file__).parent / "out"


def images(folder: Path) -> tuple[list[Picture], np.ndarray]:
    with open(folder / "counts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [folder / row["image"] / f"{row['image']}.jpg" for row in rows]
    pictures = [Picture.of(np.array(Image.open(name).convert("RGB")), name.name) for name in names]
    return pictures, np.array([int(int(row["epithelial"]) > 0) for row in rows])


def run(pictures: list[Picture], labels: np.ndarray, mix: str, seed: int, epochs: int, lr: float) -> dict[str, float]:
    order = np.random.default_rng(seed).permutation(len(labels))
    train, validation, test = np.split(order, [TRAIN, TRAIN + VALIDATION])

    def some(rows: np.ndarray) -> tuple[list[Picture], np.ndarray]:
        return [pictures[i] for i in rows], labels[rows]

    torch.manual_seed(seed)
    head = load_head("scorenet", classes=2, k=4)
    changes = {"epochs": epochs, "patience": epochs, "lr": lr, "augment": True, "mix": mix}
    fit(head, *some(train), validation=some(validation), seed=seed, **changes)
    said = predict(head, some(test)[0])
    return {
        "auc": float(roc_auc_score(labels[test], said[:, 1])),
        "accuracy": float((said.argmax(1) == labels[test]).mean()),
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean over seeds."""
    random = np.random.default_rng(0)
    means = values[random.integers(len(values), size=(2000, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=3e-4)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    pictures, labels = images(wanted.folder)
    found: dict[str, list[dict[str, float]]] = {mix: [] for mix in MIXES}
    for seed in range(wanted.seeds):
        for mix in MIXES:
            found[mix].append(run(pictures, labels, mix, seed, wanted.epochs, wanted.lr))
            print(seed, mix, found[mix][-1], flush=True)
    OUT.mkdir(exist_ok=True)
    (OUT / "mixing.json").write_text(json.dumps(found, indent=1) + "\n")
    plain = np.array([one["auc"] for one in found["none"]])
    for mix, runs in found.items():
        auc, accuracy = (np.array([one[name] for one in runs]) for name in ("auc", "accuracy"))
        (low, high), (down, up) = interval(auc), interval(auc - plain)
        print(
            f"{mix:12} AUC {auc.mean():.3f} ({low:.3f}-{high:.3f})  accuracy {accuracy.mean():.3f}  "
            f"AUC less none {np.mean(auc - plain):+.3f} ({down:+.3f} to {up:+.3f})  {auc.round(2).tolist()}"
        )


if __name__ == "__main__":
    main()
