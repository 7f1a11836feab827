"""Heads that look at regions, on real tissue: is a field of colon glands benign or malignant?

    python benchmarks/regions.py ../shared/data/tiles/GlaS --out benchmarks/out/regions

Fields of 775 × 522 px at 0.62 µm/px (GlaS: Sirinukunwattana et al., Medical Image Analysis 2017), each taken as a
slide; those of a patient are never parted. hatnet, hvit, abmil and longmil read features of lab_lbp, tiles of 32 px;
scorenet the pixels. One `compare` on the same folds. scorenet has 1.8 million weights for two dozen images, and nothing
was pre-trained, which its authors say it needs.
"""

import argparse
import csv
import os
import shutil
from pathlib import Path

from pipeline import compare, run

MPP = 0.62
HEADS = ("abmil", "longmil", "hatnet", "hvit", "scorenet")


def prepare(folder: Path, slides: Path) -> None:
    """The fields, and the tables beside them."""
    slides.mkdir(parents=True, exist_ok=True)
    with open(folder / "Grade.csv", newline="") as file:
        rows = [{key.strip(): cell.strip() for key, cell in row.items()} for row in csv.DictReader(file)]
    labels, scale = ["slide,label,patient"], ["slide,mpp"]
    for row in rows:
        name = f"{row['name']}.jpg"
        if (folder / name).is_file():
            shutil.copy(folder / name, slides / name)
            labels.append(f"{name},{row['grade (GlaS)']},{row['patient ID']}")
            scale.append(f"{name},{MPP}")
    (slides.parent / "labels.csv").write_text("\n".join(labels) + "\n")
    (slides.parent / "mpp.csv").write_text("\n".join(scale) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "regions")
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-4)
    wanted = parser.parse_args()
    prepare(wanted.folder, wanted.out / "slides")
    settings = {"encoder": "lab_lbp", "mpp": MPP, "tile_px": 32, "levels": 1, "force_scale": True}
    run(wanted.out / "slides", wanted.out / "store", mpp_csv=wanted.out / "mpp.csv", **settings)
    found = compare(
        wanted.out / "store",
        wanted.out / "labels.csv",
        heads=wanted.heads,
        epochs=wanted.epochs,
        lr=wanted.lr,
        seeds=wanted.seeds,
        on_head=lambda head, trained: print(head, trained.folder, flush=True),
    )
    print(*found.lines(), sep="\n", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
