"""Self-supervised pre-training of the ViT-tiny: do its neighbours know more than colour does?

    python benchmarks/dino.py ../shared/data/tiles --fold 0 [--epochs 10] [--out FOLDER]

Images of CRCHistoPhenotypes (99 fields of colon cancer of 500 px, about 0.55 µm/px) are parted into three folds; fold i
is tested, and the seed is i. DINO learns from windows of 128 px (every 62 px) of the other images and, unlabelled, of
GlaS. A tile (128 px, every 124 px) with five nuclei or more, 60 % of them of one class, has that class: epithelial,
fibroblast, inflammatory or others. Tiles of the test images are classified by the weighted 20 nearest neighbours among
those of the training images: by the teacher, by the same network with random weights, by the mean colour, and by
lab_lbp (histograms of colour and texture made by hand). Vectors are standardised by the training tiles; `raw` is DINO's
own measure, the cosine of what the network gives.

A quarter of an hour on a core is 1,700 steps; the authors' warm-up alone has 12,500 of 1,024 images. So batches have
32, the rate is 5e-4 all the same, the teacher's momentum 0.99, the head batch norms (an option of the authors'), and
wide views 96 px, which cost half. Five recipes were tried, for one to five epochs, on the training tiles of fold 0.

Figures are balanced accuracies; ± is the standard error over 2,000 draws of the test images, and a difference is drawn
as a difference. Writes dino_fold<i>.json and the weights to --out; `--pool` reads the three and tells them together.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from torch import Tensor

from extractors import load_encoder
from extractors.dino import RECIPES, Pretraining, network, read_checkpoint, save_checkpoint, save_weights
from extractors.neighbours import votes

CLASSES = ("epithelial", "fibroblast", "inflammatory", "others")
PX, FOLDS, DRAWS = 128, 3, 2000
ARCH = "vit_tiny_scorenet"
SHORT: dict[str, Any] = {"batch_size": 32, "lr": 4e-3, "momentum": 0.99, "wide_px": 96, "normed_head": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path)
    parser.add_argument("--fold", type=int, default=0, choices=range(FOLDS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--pool", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pool:
        tell(pooled([json.loads((args.out / f"dino_fold{i}.json").read_text()) for i in range(FOLDS)]))
        return
    torch.set_num_threads(1)
    found = trained(args)
    (args.out / f"dino_fold{args.fold}.json").write_text(json.dumps(found, indent=1))
    tell(compared(found["answers"]))


def trained(args: argparse.Namespace) -> dict[str, Any]:
    images = {path.stem: read(path) for path in sorted((args.tiles / "CRCHistoPhenotypes").glob("img*/img*.jpg"))}
    names = sorted(images)
    parts = np.array_split(np.random.default_rng(0).permutation(names), FOLDS)
    held = set(parts[args.fold].tolist())
    tiles, labels, owners = labelled(args.tiles / "CRCHistoPhenotypes", images)
    tested = np.isin(owners, list(held))
    pool = [image for name, image in images.items() if name not in held]
    pool += [read(path) for path in sorted((args.tiles / "GlaS").glob("*.jpg"))]
    windows = torch.cat([cut(image, 62) for image in pool])
    made = replace(RECIPES[ARCH], **SHORT, epochs=args.epochs, seed=args.fold)
    training = Pretraining(network(ARCH, made), load_encoder(ARCH).facts, made, len(windows) // made.batch_size)
    print(
        f"{len(windows)} windows, {training.steps} steps an epoch, {len(labels)} labelled tiles, {tested.sum()} tested"
    )
    place = args.out / f"dino_fold{args.fold}.pt"
    if place.is_file():
        training.restore(read_checkpoint(place))
    started, before = time.perf_counter(), training.epochs_done
    random = Pretraining(network(ARCH, made), load_encoder(ARCH).facts, made, steps=1).embed(tiles)
    while training.epochs_done < made.epochs:
        loss = training.epoch(batches(windows, made.batch_size, (args.fold, training.epochs_done)))
        vectors = {"teacher": training.embed(tiles)}
        training.course.watched.append(balanced(answers(vectors, labels, owners, tested)["teacher"]))
        save_checkpoint(place, training.state())
        speed = (training.epochs_done - before) * training.steps * made.batch_size / (time.perf_counter() - started)
        print(f"epoch {training.epochs_done}: loss {loss:.4f}, k-NN {training.course.watched[-1]:.3f}, "
              f"{speed:.0f} tiles/s", flush=True)  # fmt: skip
    save_weights(args.out / f"dino_fold{args.fold}.safetensors", training.backbone(), {"arch": ARCH})
    by_hand = load_encoder("lab_lbp").load().encode(tiles)
    colour = tiles.float().mean((1, 2))
    vectors = {"teacher": training.embed(tiles), "random weights": random, "mean colour": colour, "lab_lbp": by_hand}
    said = answers(vectors, labels, owners, tested)
    raw = answers({k: vectors[k] for k in ("teacher", "random weights")}, labels, owners, tested, standard=False)
    course = {"losses": training.course.losses, "watched": training.course.watched}
    return {
        "recipe": made.as_dict(),
        "windows": len(windows),
        "seconds": time.perf_counter() - started,
        "course": course,
        "answers": said | {f"{name}, raw": answer for name, answer in raw.items()},
    }


def read(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB")))


def cut(image: Tensor, step: int) -> Tensor:
    return image.unfold(0, PX, step).unfold(1, PX, step).flatten(0, 1).permute(0, 2, 3, 1).contiguous()


def labelled(folder: Path, images: dict[str, Tensor]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Tiles (N, 128, 128, 3), their classes, the images that they are of."""
    tiles, labels, owners = [], [], []
    for name, image in images.items():
        nuclei = [loadmat(folder / name / f"{name}_{kind}.mat")["detection"].reshape(-1, 2) for kind in CLASSES]
        for y in range(0, image.shape[0] - PX + 1, 124):
            for x in range(0, image.shape[1] - PX + 1, 124):
                counts = [int(((p >= (x, y)) & (p < (x + PX, y + PX))).all(1).sum()) for p in nuclei]
                if sum(counts) >= 5 and max(counts) >= 0.6 * sum(counts):
                    tiles.append(image[y : y + PX, x : x + PX])
                    labels.append(int(np.argmax(counts)))
                    owners.append(name)
    return torch.stack(tiles), torch.tensor(labels), np.array(owners)


def batches(windows: Tensor, size: int, seed: tuple[int, int]) -> Iterator[Tensor]:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(windows)))
    for start in range(0, len(windows) // size * size, size):
        yield windows[order[start : start + size]]


def answers(
    vectors: dict[str, Tensor], labels: Tensor, owners: np.ndarray, tested: np.ndarray, standard: bool = True
) -> dict[str, Any]:
    """What the neighbours say of the tested tiles: their images, classes, and the class that has most votes."""
    asked, known = torch.from_numpy(tested), torch.from_numpy(~tested)
    found = {}
    for name, x in vectors.items():
        if standard:
            x = (x - x[known].mean(0)) / x[known].std(0).clamp(min=1e-6)
        said = votes(x[asked], x[known], labels[known], len(CLASSES)).argmax(1)
        found[name] = {"image": owners[tested].tolist(), "truth": labels[asked].tolist(), "said": said.tolist()}
    return found


def balanced(answer: dict[str, Any], rows: np.ndarray | None = None) -> float:
    truth, said = (np.array(answer[name])[slice(None) if rows is None else rows] for name in ("truth", "said"))
    return float(np.mean([np.mean(said[truth == c] == c) for c in np.unique(truth)]))


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """Accuracies and the teacher's lead over each of the others, with standard errors over the images."""
    images = np.array(found["teacher"]["image"])
    rows = {name: np.flatnonzero(images == name) for name in np.unique(images)}
    random = np.random.default_rng(0)
    draws = [np.concatenate([rows[i] for i in random.choice(list(rows), len(rows))]) for _ in range(DRAWS)]
    drawn = {name: np.array([balanced(answer, draw) for draw in draws]) for name, answer in found.items()}
    table = {}
    for name, answer in found.items():
        main_one = "teacher, raw" if name.endswith("raw") else "teacher"
        lead = balanced(found[main_one]) - balanced(answer)
        table[name] = (balanced(answer), drawn[name].std(), lead, (drawn[main_one] - drawn[name]).std())
    return table


def pooled(results: list[dict[str, Any]]) -> dict[str, Any]:
    joined = {
        name: {key: [v for one in results for v in one["answers"][name][key]] for key in ("image", "truth", "said")}
        for name in results[0]["answers"]
    }
    return compared(joined)


def tell(table: dict[str, Any]) -> None:
    for name, (value, error, lead, lead_error) in table.items():
        words = "" if name.startswith("teacher") else f"   teacher leads by {lead:+.3f} ± {lead_error:.3f}"
        print(f"{name:22} {value:.3f} ± {error:.3f}{words}")


if __name__ == "__main__":
    main()
