"""Labels × stored bags → a trained model folder. The loop itself stands in heads.train."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heads import BadBag, Bag, Head, UnknownName, UnknownOption, load_head
from heads.recipe import Recipe
from heads.train import fit, split
from heads.train import predict as predict_bags

from .errors import BrokenBag, UsageError
from .labels import Labels, read_labels
from .output import read_run
from .prediction import save_model
from .store import BagStore, read_attrs

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
class Trained:
    """A finished training: the model's folder, its metrics by part (train, val, test), and warnings."""

    folder: Path
    metrics: dict[str, dict[str, float]]
    best_epoch: int
    warnings: tuple[str, ...]


def train(
    out: str | Path,
    labels: str | Path,
    *,
    head: str = "abmil",
    name: str | None = None,
    level: float | None = None,
    encoder: str | None = None,
    recipe: str = "default",
    epochs: int | None = None,
    patience: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    seed: int = 0,
    on_epoch: Callable[[int, float, float | None], None] | None = None,
    **options: Any,
) -> Trained:
    """Train a head on the stored features of labelled slides; writes OUT/models/<name>.

    `level`: µm/px of the level that a flat head reads, by default the finest with features; `encoder`: which features,
    where a store has several; `recipe`: how it is trained, "default" (heads.recipe.Recipe) or a name of the head's own
    ("paper"), of which `epochs`, `patience`, `lr` and `weight_decay` replace single fields; `options` are the head's
    own. Rows with split `test` are never trained on; validation is the split `val`, or a fifth of the training slides,
    parted by patient where the table says who is one.
    Raises UsageError.
    """
    name = name or head.replace(":", "--")
    if not re.fullmatch(r"[\w@+-][\w.@+-]*", name):
        raise UsageError(f"a model's name becomes a folder: letters, digits and . _ - only, not first a dot: {name!r}")
    known = read_labels(labels, BagStore(out))
    source = _source(BagStore(out), known, encoder)
    classes = sorted(set(known.labels))
    if len(classes) < 2:
        raise UsageError(
            f"{labels}: all usable slides have the label {classes[0]!r}; one class alone cannot be learned"
        )
    y = np.array([classes.index(label) for label in known.labels])
    parts, split_words = _parts(known, y, seed, labels)
    model = _new_head(head, source.features["encoder"]["dim"], len(classes), seed, options)
    level = source.level(level) if model.needs.levels == 1 else None
    sets = {
        part: (StoredBags(source.store, [known.slides[i] for i in rows], source.key, level), y[rows])
        for part, rows in parts.items()
    }
    wishes = {"epochs": epochs, "patience": patience, "lr": lr, "weight_decay": weight_decay}
    how = _recipe(head, model, recipe, {name: value for name, value in wishes.items() if value is not None})
    try:
        history = fit(model, *sets["train"], recipe=how, validation=sets["val"], seed=seed, on_epoch=on_epoch)
        metrics = {part: measure(predict_bags(model, bags), truth) for part, (bags, truth) in sets.items()}
    except (BrokenBag, BadBag, FloatingPointError) as error:  # a damaged slide, or a loss that left the numbers
        raise UsageError(str(error)) from error
    training = asdict(how) | {
        "recipe": recipe,
        "seed": seed,
        "best_epoch": history.best_epoch,
        "train_loss": history.train_loss,
        "validation_loss": history.validation_loss,
        "split": split_words,
        "slides": {part: [known.slides[i] for i in rows] for part, rows in parts.items()},
    }
    about = {"head": head, "options": model.options, "dim": model.dim, "classes": classes, "level": level}
    folder = source.store.root / "models" / name
    save_model(folder, model, about | source.about() | {"metrics": metrics, "training": training})
    untrained = sorted(set(classes) - {classes[i] for i in y[parts["train"]]})
    warnings = [f"no training slide is of the class {', '.join(untrained)}: it is never predicted"] if untrained else []
    return Trained(folder, metrics, history.best_epoch, (*known.warnings, *warnings))


@dataclass(frozen=True)
class _Source:
    """The features that are trained on: which, of which tiles, by which recipe."""

    store: BagStore
    run: dict[str, Any]
    key: str
    tiles: dict[str, Any]
    features: dict[str, Any]

    @property
    def mpp(self) -> list[float]:
        """µm/px of the levels with features, coarse → fine."""
        return [self.tiles["levels"][k]["mpp"] for k in self.tiles["encoded"]]

    def level(self, wanted: float | None) -> float:
        """The level that a flat head reads: the finest unless told."""
        wanted = self.mpp[-1] if wanted is None else wanted
        for mpp in self.mpp:
            if abs(mpp / wanted - 1) < 0.01:
                return mpp
        there = ", ".join(f"{mpp:g}" for mpp in self.mpp)
        raise UsageError(f"--level {wanted:g}: no features at that µm/px; there are {there}")

    def about(self) -> dict[str, Any]:
        """What a model must know of its features to be used on new slides."""
        encoder = self.run["encoders"][self.key]
        own = {"encoder": encoder["name"], "weights": encoder["weights_file"], "force_scale": encoder["force_scale"]}
        return {
            "schema": "slidestream/model",
            "encoder_key": self.key,
            "encoder": self.features["encoder"],
            "weights_sha256": self.features["weights_sha256"],
            "feature_hash": self.features["feature_hash"],
            "encoded_mpp": self.mpp,
            "recipe": self.run["recipe"] | own,
            "versions": self.run["versions"],
        }


def _source(store: BagStore, known: Labels, encoder: str | None) -> _Source:
    """The one set of features that all labelled slides have. Raises UsageError if they differ."""
    try:
        key = store.group(known.slides[0]).encoder_key(encoder)
    except BrokenBag as error:
        raise UsageError(str(error)) from error
    hashes: dict[str, list[str]] = defaultdict(list)
    for slide in known.slides:
        facts = read_attrs(store.group(slide).path / "features" / key)
        hashes[facts.get("feature_hash", "none")].append(slide)
    if len(hashes) > 1:
        odd = min(hashes.values(), key=len)
        raise UsageError(f"not all slides have the same features ({odd[0]} differs); run `slidestream run` with --redo")
    path = store.group(known.slides[0]).path
    return _Source(store, read_run(store.root), key, read_attrs(path / "tiles"), read_attrs(path / "features" / key))


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


def _new_head(name: str, dim: int, classes: int, seed: int, options: dict[str, Any]) -> Any:
    """A head whose first weights are drawn from `seed`, without disturbing anyone else's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return load_head(name, dim, classes, **options)
        except (UnknownName, UnknownOption, TypeError, ValueError) as error:
            raise UsageError(str(error)) from error


def _recipe(name: str, head: Head, recipe: str, changes: dict[str, Any]) -> Recipe:
    known = {"default": Recipe()} | head.recipes
    if recipe not in known:
        raise UsageError(f"{name} has no recipe {recipe!r}; known are {', '.join(known)}")
    try:
        return replace(known[recipe], **changes)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


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
