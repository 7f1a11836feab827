"""All heads on real tissue: are there epithelial cells in a field of colon tissue?

    python benchmarks/tissue.py ../shared/data/tiles/CRCHistoPhenotypes --out benchmarks/out/tissue

99 fields of 500 × 500 px at 0.55 µm/px (Sirinukunwattana et al., IEEE TMI 2016), each taken as a slide; 49 have no
annotated epithelial nucleus. From the files to the table: `slidestream run` with lab_lbp, tiles of 64 px, three levels
(one, two and four times 0.55 µm/px), `compare` on five folds, once for each group of heads. Those of 30 million weights
and more have fewer epochs; scorenet reads the pixels.
"""

import argparse
import csv
import os
import shutil
from pathlib import Path

from pipeline import compare, run

MPP = 0.55
SMALL = ("mean", "max", "maxscore", "abmil", "clam_sb", "clam_mb", "dsmil", "dtfd", "transmil", "attention", "longmil")
GROUPS = {"small": SMALL, "large": ("iat", "hagmil"), "regions": ("abmil", "longmil", "hatnet", "hvit", "scorenet")}


def prepare(folder: Path, slides: Path) -> None:
    """Links to the fields, and the tables beside them."""
    slides.mkdir(parents=True, exist_ok=True)
    with open(folder / "counts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, scale = ["slide,label"], ["slide,mpp"]
    for row in rows:
        name = f"{row['image']}.jpg"
        if not (slides / name).exists():
            shutil.copy(folder / row["image"] / name, slides / name)
        labels.append(f"{name},{'epithelial' if int(row['epithelial']) else 'none'}")
        scale.append(f"{name},{MPP}")
    (slides.parent / "labels.csv").write_text("\n".join(labels) + "\n")
    (slides.parent / "mpp.csv").write_text("\n".join(scale) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "tissue")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--epochs-large", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    wanted = parser.parse_args()
    prepare(wanted.folder, wanted.out / "slides")
    store = wanted.out / "store"
    settings = {"encoder": "lab_lbp", "mpp": MPP, "tile_px": 64, "levels": 3}
    run(wanted.out / "slides", store, mpp_csv=wanted.out / "mpp.csv", **settings)
    for name in wanted.groups:
        epochs = wanted.epochs_large if name == "large" else wanted.epochs
        how = {"name": name, "epochs": epochs, "lr": wanted.lr, "seeds": wanted.seeds}
        print(*compare(store, wanted.out / "labels.csv", heads=GROUPS[name], **how).lines(), sep="\n", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
