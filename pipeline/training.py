"""Labels × stored bags → a trained model folder. The loop itself stands in heads.train.

A label table is `slide,label[,patient][,split]`. Nothing is left out quietly: unknown, missing and unusable slides are
listed, and what contradicts itself is refused.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heads import Bag, UnknownName, UnknownOption, load_head
from heads.train import fit, split
from heads.train import predict as predict_bags

from .errors import BrokenBag, UsageError
from .output import read_run
from .prediction import save_model
from .store import BagStore, read_attrs
from .tables import SlideNames, read_table

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


CACHE_BYTES = 4 << 30  # of bags that are kept in memory between epochs


class StoredBags(Sequence[Bag]):
    """The bags of named slides, read when they are asked for; kept in memory while they fit."""

    def __init__(self, store: BagStore, slides: Iterable[str], encoder: str, level: float | None) -> None:
        self.store, self.slides, self.encoder, self.level = store, list(slides), encoder, level
        self._kept: dict[int, Bag] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index in self._kept:
            return self._kept[index]
        bag = self.store.bag(self.slides[index], self.encoder)
        bag = bag if self.level is None else bag.at(self.level)
        if self._bytes < CACHE_BYTES:
            self._kept[index] = bag
            self._bytes += bag.features.nbytes
        return bag


@dataclass(frozen=True)
class Labels:
    """The labelled slides that can be used: parallel lists, and what the user should know about the rest."""

    slides: list[str]
    labels: list[str]
    patients: list[str] | None
    splits: list[str] | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A finished training: the model's folder, its metrics by part (train, val, test), and warnings."""

    folder: Path
    metrics: dict[str, dict[str, float]]
    best_epoch: int
    warnings: tuple[str, ...]


def read_labels(path: str | Path, store: BagStore) -> Labels:
    """Match a label table with a store. Raises UsageError if it contradicts itself or nothing of it can be used."""
    table = read_table(path, ("slide", "label"))
    root = read_run(store.root).get("root")
    names = SlideNames(store.slides(), Path(root) if root else None)
    rows, unknown = _match(Path(path), table, names)
    usable = {slide: row for slide, row in rows.items() if store.group(slide).status == "complete"}
    warnings = [
        _listed("rows name no slide of this store", unknown),
        _listed("labelled slides have no features (empty or unfinished)", sorted(rows.keys() - usable.keys())),
        _listed("slides of the store have no label", sorted(names.names - rows.keys())),
    ]
    if not usable:
        raise UsageError(
            f"{path}: not one row names a slide with features in {store.root}. {' '.join(filter(None, warnings))}"
        )
    slides = sorted(usable)
    return Labels(
        slides,
        [usable[slide]["label"] for slide in slides],
        _column(usable, slides, "patient"),
        _splits(path, usable, slides),
        tuple(filter(None, warnings)),
    )


def _match(path: Path, table: list[dict[str, str]], names: SlideNames) -> tuple[dict[str, dict[str, str]], list[str]]:
    rows: dict[str, dict[str, str]] = {}
    unknown = []
    for row in table:
        if not row["label"]:
            raise UsageError(f"{path}: {row['slide']!r} has an empty label; leave the row out if it is unknown")
        slide = names.find(row["slide"], path)
        if slide is None:
            unknown.append(row["slide"])
        elif rows.setdefault(slide, row) != row:
            raise UsageError(f"{path}: two rows for {slide} that differ: {rows[slide]} and {row}")
    return rows, unknown


def _column(rows: dict[str, dict[str, str]], slides: list[str], name: str) -> list[str] | None:
    if any(name not in rows[slide] for slide in slides):
        return None
    return [rows[slide][name] or slide for slide in slides]  # an empty patient cell is a patient of its own


def _splits(path: str | Path, rows: dict[str, dict[str, str]], slides: list[str]) -> list[str] | None:
    if any("split" not in rows[slide] for slide in slides):
        return None
    for slide in slides:
        if rows[slide]["split"].lower() not in SPLITS:
            raise UsageError(f"{path}: split of {slide} is {rows[slide]['split']!r}; known are {', '.join(SPLITS)}")
    return [SPLITS[rows[slide]["split"].lower()] for slide in slides]


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}." if names else ""


def train(
    out: str | Path,
    labels: str | Path,
    *,
    head: str = "abmil",
    name: str | None = None,
    level: float | None = None,
    encoder: str | None = None,
    epochs: int = 50,
    patience: int = 10,
    lr: float = 1e-4,
    weight_decay: float = 1e-5,
    seed: int = 0,
    on_epoch: Callable[[int, float, float | None], None] | None = None,
    **options: Any,
) -> Trained:
    """Train a head on the stored features of labelled slides; writes OUT/models/<name>.

    `level`: µm/px of the level that a flat head reads, by default the finest with features; `encoder`: which features,
    where a store has several; `options` are the head's own. Rows with split `test` are never trained on; validation is
    the split `val`, or a fifth of the training slides, parted by patient where the table says who is one.
    Raises UsageError.
    """
    store = BagStore(out)
    about_run = read_run(store.root)
    if not about_run:
        raise UsageError(f"{out} is no output folder of `slidestream run`")
    known = read_labels(labels, store)
    name = name or head.replace(":", "--")
    if not re.fullmatch(r"[\w.@+-]+", name):
        raise UsageError(f"a model's name becomes a folder: letters, digits and . _ - only, not {name!r}")
    try:
        key = store.group(known.slides[0]).encoder_key(encoder)
    except BrokenBag as error:
        raise UsageError(str(error)) from error
    classes = sorted(set(known.labels))
    if len(classes) < 2:
        raise UsageError(
            f"{labels}: all usable slides have the label {classes[0]!r}; one class alone cannot be learned"
        )
    y = np.array([classes.index(label) for label in known.labels])
    parts, split_words = _parts(known, y, seed, labels)
    facts, features, level = _features(store, known.slides, key, head, level)
    model = _new_head(head, features["encoder"]["dim"], len(classes), seed, options)
    sets = {
        part: (StoredBags(store, [known.slides[i] for i in rows], key, level), y[rows]) for part, rows in parts.items()
    }
    history = fit(
        model,
        *sets["train"],
        validation=sets.get("val"),
        epochs=epochs,
        patience=patience,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        on_epoch=on_epoch,
    )
    metrics = {part: measure(predict_bags(model, bags), truth) for part, (bags, truth) in sets.items()}
    recipe = about_run["recipe"] | {
        "encoder": about_run["encoders"][key]["name"],
        "weights": about_run["encoders"][key]["weights_file"],
        "force_scale": about_run["encoders"][key]["force_scale"],
    }
    about = {
        "schema": "slidestream/model",
        "head": head,
        "options": model.options,
        "dim": model.dim,
        "classes": classes,
        "level": level,
        "encoder_key": key,
        "encoder": features["encoder"],
        "weights_sha256": features["weights_sha256"],
        "feature_hash": features["feature_hash"],
        "encoded_mpp": [facts["levels"][k]["mpp"] for k in facts["encoded"]],
        "recipe": recipe,
        "versions": about_run["versions"],
        "metrics": metrics,
        "training": {
            "epochs": epochs,
            "patience": patience,
            "lr": lr,
            "weight_decay": weight_decay,
            "seed": seed,
            "best_epoch": history.best_epoch,
            "train_loss": history.train_loss,
            "validation_loss": history.validation_loss,
            "split": split_words,
            "slides": {part: [known.slides[i] for i in rows] for part, rows in parts.items()},
        },
    }
    folder = store.root / "models" / name
    save_model(folder, model, about)
    return Trained(folder, metrics, history.best_epoch, known.warnings)


def _parts(known: Labels, y: np.ndarray, seed: int, labels: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """Rows for train, val and test."""
    rows = np.arange(len(y))
    given = np.array(known.splits) if known.splits else np.full(len(y), "train")
    if known.patients and known.splits:
        _refuse_shared_patients(known, labels)
    train_rows, test, val = rows[given == "train"], rows[given == "test"], rows[given == "val"]
    words = "by the table"
    if not len(val):
        try:
            groups = [known.patients[i] for i in train_rows] if known.patients else None
            inner, outer = split(y[train_rows], groups, seed=seed)
        except ValueError as error:
            raise UsageError(f"{labels}: no validation set can be parted off: {error}") from error
        train_rows, val = train_rows[inner], train_rows[outer]
        words = "validation: a fifth, parted by patient" if known.patients else "validation: a fifth, parted by slide"
    if len(set(y[train_rows])) < 2:
        raise UsageError(f"{labels}: the training slides have one class only; one class alone cannot be learned")
    parts = {"train": train_rows, "val": val} | ({"test": test} if len(test) else {})
    return parts, words


def _refuse_shared_patients(known: Labels, labels: str | Path) -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for patient, part in zip(known.patients or [], known.splits or [], strict=True):
        seen[patient].add(part)
    shared = sorted(patient for patient, parts in seen.items() if len(parts) > 1)
    if shared:
        raise UsageError(
            f"{labels}: patients on more than one side of the split, which would flatter the result: "
            + ", ".join(shared[:5])
        )


def _features(
    store: BagStore, slides: list[str], key: str, head: str, level: float | None
) -> tuple[dict[str, Any], dict[str, Any], float | None]:
    """The facts of the tiles and of the features, the same for all slides, and the level that is read."""
    hashes: Counter[str] = Counter()
    for slide in slides:
        hashes[read_attrs(store.group(slide).path / "features" / key).get("feature_hash", "none")] += 1
    if len(hashes) > 1:
        raise UsageError(
            f"the slides have different features ({dict(hashes)}); run `slidestream run` with --redo to make them one"
        )
    group = store.group(slides[0])
    facts, features = read_attrs(group.path / "tiles"), read_attrs(group.path / "features" / key)
    there = [facts["levels"][k]["mpp"] for k in facts["encoded"]]
    wanted = there[-1] if level is None else level
    near = [mpp for mpp in there if abs(mpp / wanted - 1) < 0.01]
    if not near:
        raise UsageError(
            f"--level {wanted:g}: no features at that µm/px; there are {', '.join(f'{m:g}' for m in there)}"
        )
    return facts, features, near[0]


def _new_head(name: str, dim: int, classes: int, seed: int, options: dict[str, Any]) -> Any:
    """A head whose first weights are drawn from `seed`, without disturbing anyone else's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return load_head(name, dim, classes, **options)
        except (UnknownName, UnknownOption, TypeError, ValueError) as error:
            raise UsageError(str(error)) from error


def measure(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy; with two classes or more present also balanced accuracy and AUC (one against the rest, mean)."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    guess = probabilities.argmax(axis=1)
    out = {"slides": float(len(truth)), "accuracy": float((guess == truth).mean())}
    if len(set(truth.tolist())) < 2:
        return out
    out["balanced_accuracy"] = float(balanced_accuracy_score(truth, guess))
    if len(set(truth.tolist())) == probabilities.shape[1]:
        scores = probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities
        out["auc"] = float(roc_auc_score(truth, scores, multi_class="ovr"))
    return out
