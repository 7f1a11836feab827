"""Stored bags × a trained head → a prediction for each slide, and where on the slide the head looked.

A model is a folder: `model.safetensors` (weights) and `model.json` (head, classes, and the whole recipe of the features
it was trained on, so that it can be used on new slides with nothing else at hand).
"""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from heads import BadBag, Bag, Head, Prediction, load_head
from heads.average import Average
from heads.tasks import Task, task_of

from .draw import heatmap, save_png
from .errors import BrokenBag, UsageError
from .places import placed, put, typed
from .quadtree import QuadTree
from .saving import Saving
from .store import BagStore, SlideGroup, read_attrs, short_name
from .verdict import answer, array_name, cells, columns, words


@dataclass(frozen=True)
class Model:
    """A trained head and everything that its features came from."""

    name: str
    head: Head
    about: dict[str, Any]
    folder: Path = Path()

    @cached_property
    def sha256(self) -> str:
        """Of its two files: another training under the same name is another model."""
        total = hashlib.sha256((self.folder / "model.json").read_bytes())
        total.update(hashlib.sha256((self.folder / "model.safetensors").read_bytes()).digest())
        return total.hexdigest()

    @property
    def classes(self) -> list[str]:
        return list(self.about["classes"])

    @cached_property
    def task(self) -> Task:
        """What it was asked."""
        return task_of(self.about["task"]) if "task" in self.about else self.head.task

    @property
    def threshold(self) -> float | None:
        """Of two classes: the probability of the second from which on it is said, chosen on validation slides."""
        return self.about.get("threshold")

    @property
    def level(self) -> float | None:
        """µm/px of the level it reads; None: it reads the whole tree."""
        return self.about["level"]

    def trained_on(self, part: str) -> list[str]:
        """Slides of `train`, `val` or `test`."""
        return list(self.about.get("training", {}).get("slides", {}).get(part, ()))

    def choose(self, bag: Bag) -> Bag:
        return bag if self.level is None else bag.at(self.level)


def save_model(folder: Path, head: Head, about: dict[str, Any]) -> None:
    """Write a model folder; `model.json` comes last, so that a folder with one is whole."""
    (folder / "model.json").unlink(missing_ok=True)
    weights = {name: tensor.contiguous().cpu() for name, tensor in head.state_dict().items()}
    put(folder / "model.safetensors", save(weights))
    put(folder / "model.json", (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())


def find_model(model: str | Path, out: Path | None) -> Path:
    """A model's folder: the path itself, or a name below OUT/models. Raises UsageError."""
    tried = [typed(model)] + ([out / "models" / model] if out is not None else [])
    for folder in tried:
        if (folder / "model.json").is_file():
            return placed(folder)
    there = sorted(p.parent.name for p in (out / "models").glob("*/model.json")) if out is not None else []
    known = f"; models there: {', '.join(there)}" if there else ""
    raise UsageError(f"no model at {' or '.join(str(f) for f in tried)} (a folder with model.json){known}")


def load_model(folder: Path) -> Model:
    """Read a model folder, strictly. Raises UsageError that says what does not fit."""
    try:
        about = json.loads((folder / "model.json").read_bytes())
        head = load_head(about["head"], about["dim"], about.get("outputs", len(about["classes"])), **about["options"])
        head.load_state_dict(load((folder / "model.safetensors").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder}: not a usable model: {' '.join(str(error).split())[:400]}") from error
    return Model(folder.name, head.eval(), about, folder)


def choose_models(model: str | Path | Sequence[str], out: Path, folds: bool = False, vote: bool = False) -> Model:
    """One model, or several as one: names below OUT/models or folders; `folds`: those of a cross-validation. They say
    the mean of what each says, or `vote`. Raises UsageError."""
    wanted = [model] if isinstance(model, str | Path) else list(model)
    named = [find_model(one, out) for one in wanted]
    if not folds:
        found = [load_model(folder) for folder in named]
    elif vote:  # each of all the folds has a vote
        found = [one for folder in named for one in models_of_folds(folder)]
    else:
        found = [average(models_of_folds(folder), f"{folder.name}-folds") for folder in named]
    if len(found) == 1:
        if vote:
            raise UsageError(f"--vote: {found[0].name} is one model; several --model, or --folds, can vote")
        return found[0]
    names = [f"{folder.name}-folds" for folder in named] if folds else [one.name for one in found]
    return average(found, "+".join(names) + ("-vote" if vote else ""), vote)


def models_of_folds(folder: Path) -> list[Model]:
    """Those of its cross-validation."""
    try:
        # not all models below: those of an earlier call with more folds may lie there
        names = [fold["model"] for fold in json.loads((folder / "results.json").read_bytes())["folds"]]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder} holds no models of folds: train with --cv, --splits or --split-by") from error
    return [load_model(folder / name) for name in names]


def average(models: Sequence[Model], name: str, vote: bool = False) -> Model:
    """Several models as one, which votes or says the mean. Raises UsageError if they do not answer the same question
    from the same features."""
    first, *rest = models
    for other in rest:
        for key in ("feature_hash", "classes", "level"):
            if other.about[key] != first.about[key]:
                raise UsageError(
                    f"{first.name} and {other.name} cannot be averaged: their {key.replace('_', ' ')} differ"
                )
    try:
        head = Average([model.head for model in models], [model.task for model in models], vote)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    known = [model.threshold for model in models if model.threshold is not None and not vote]
    threshold = sum(known) / len(known) if known else None
    seen = [slide for model in models for part in ("train", "val") for slide in model.trained_on(part)]
    own = {"head": "average", "threshold": threshold, "temperature": None}
    return Model(name, head.eval(), first.about | own | {"training": {"slides": {"train": seen}}}, first.folder)


@torch.no_grad()
def predict_slide(model: Model, bag: Bag) -> Prediction:
    """One bag through the head."""
    return model.head(model.choose(bag))


def matching_features(group: SlideGroup, model: Model) -> str:
    """The key of the stored features that the model was trained on. Raises BrokenBag if there are none."""
    group.require_complete()
    key = fitting_features(group, model)
    if key is None:
        wanted = f"{model.about['encoder_key']} at {', '.join(f'{m:g}' for m in model.about['encoded_mpp'])} µm/px"
        there = ", ".join(group.encoders()) or "none"
        reason = f"the model was trained on features of {wanted}; stored are {there}"
        raise BrokenBag(group.slide, "predict", reason)
    return key


def fitting_features(group: SlideGroup, model: Model) -> str | None:
    """The key of the complete features of a complete slide that the model was trained on."""
    for key in group.encoders() if group.status == "complete" else ():
        if read_attrs(group.path / "features" / key).get("feature_hash") == model.about["feature_hash"]:
            return key
    return None


def zoomed(group: SlideGroup, model: Model) -> Saving | None:
    """What was saved where this very model has predicted the slide's present tiles by zoom; None if it has not."""
    attrs = read_attrs(group.path / "predictions" / model.name)
    if attrs.get("status") != "complete" or "zoom" not in attrs:
        return None
    current = attrs["model_sha256"] == model.sha256 and attrs["tiles"] == group.attrs.get("hashes", {}).get("tiles")
    return Saving(**attrs["zoom"]) if current else None


def predict_stored(store: BagStore, slide: str, model: Model) -> np.ndarray:
    """Predict one complete slide; attention and heatmap go to where the slide's things are. Returns the answer.

    Raises BrokenBag if its features are missing, damaged or not those that the model was trained on.
    """
    return store_prediction(store.group(slide), model, prediction_of(store, slide, model), store.root)


def prediction_of(store: BagStore, slide: str, model: Model) -> Prediction:
    """The stored features of a slide through the head; nothing is written. Raises BrokenBag as `predict_stored`."""
    key = matching_features(store.group(slide), model)
    try:
        return predict_slide(model, store.bag(slide, key))
    except (BadBag, ValueError) as error:
        raise BrokenBag(slide, "predict", str(error)) from error


def store_prediction(group: SlideGroup, model: Model, prediction: Prediction, out: Path, **attrs: Any) -> np.ndarray:
    """A picture of the finest tiles; then the scores of the level(s) that the head read. Returns the answer."""
    values = answer(model.task, prediction.logits)
    tree = group.tree()
    levels = levels_read(tree, model)
    finest = prediction.tiles[-1].weight.numpy()
    verdict = f"{model.name}: {words(model.task, model.classes, values, model.threshold)}"
    caption = f"{group.slide}   {verdict}   colour: rank of the attention"
    picture = heatmap(group.thumbnail(), group.mask(), tree.boxes(levels[-1]), finest, caption)
    place = Path(group.slide)
    save_png(out / "heatmaps" / model.name / place.parent / short_name(place.name, ".png"), picture)
    raw = np.concatenate([scores.raw.numpy() for scores in prediction.tiles]).astype(np.float32)
    weight = np.concatenate([scores.weight.numpy() for scores in prediction.tiles]).astype(np.float32)
    arrays = {"logits": prediction.logits.numpy(), array_name(model.task): values, "raw": raw, "weight": weight}
    about = {"classes": model.classes, "levels": levels, "feature_hash": model.about["feature_hash"]}
    group.write_prediction(model.name, arrays, **about, **attrs)
    return values


def levels_read(tree: QuadTree, model: Model) -> list[int]:
    """The levels of a slide that have scores, coarse → fine: that of a flat head, or all."""
    return [k for k, part in enumerate(tree.levels) if model.level is None or abs(part.mpp / model.level - 1) < 0.01]


def stored_answer(group: SlideGroup, model: Model) -> np.ndarray:
    """What an earlier prediction of this model said. Raises BrokenBag."""
    return group.prediction(model.name)[array_name(model.task)]


def write_predictions(path: Path, model: Model, table: list[tuple[str, np.ndarray]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["slide", *columns(model.task, model.classes)])
    for slide, values in sorted(table, key=lambda row: row[0]):
        writer.writerow([slide, *cells(model.task, model.classes, values, model.threshold)])
    put(path, text.getvalue().encode("utf-8", "surrogateescape"))
