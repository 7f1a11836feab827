"""Stored bags × a trained head → a prediction for each slide, and where on the slide the head looked.

A model is a folder: `model.safetensors` (weights) and `model.json` (head, classes, and the whole recipe of the features
it was trained on, so that it can be used on new slides with nothing else at hand).
"""

import csv
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from heads import BadBag, Bag, Head, Prediction, load_head

from .draw import heatmap, save_png
from .errors import BrokenBag, UsageError
from .saving import Saving
from .store import BagStore, SlideGroup, read_attrs, short_name


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
        with open(self.folder / "model.safetensors", "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    @property
    def classes(self) -> list[str]:
        return list(self.about["classes"])

    @property
    def level(self) -> float | None:
        """µm/px of the level it reads; None: it reads the whole tree."""
        return self.about["level"]

    def choose(self, bag: Bag) -> Bag:
        return bag if self.level is None else bag.at(self.level)


def save_model(folder: Path, head: Head, about: dict[str, Any]) -> None:
    """Write a model folder; `model.json` comes last, so that a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)
    part = folder / "model.safetensors.partial"
    save_file({name: tensor.contiguous().cpu() for name, tensor in head.state_dict().items()}, part)
    os.replace(part, folder / "model.safetensors")
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    part = folder / "model.json.partial"
    part.write_text(text)
    os.replace(part, folder / "model.json")


def find_model(model: str | Path, out: Path | None) -> Path:
    """A model's folder: the path itself, or a name below OUT/models. Raises UsageError."""
    tried = [Path(model)] + ([out / "models" / model] if out is not None else [])
    for folder in tried:
        if (folder / "model.json").is_file():
            return Path(os.path.abspath(folder))
    there = sorted(p.parent.name for p in (out / "models").glob("*/model.json")) if out is not None else []
    known = f"; models there: {', '.join(there)}" if there else ""
    raise UsageError(f"no model at {' or '.join(str(f) for f in tried)} (a folder with model.json){known}")


def load_model(folder: Path) -> Model:
    """Read a model folder, strictly. Raises UsageError that says what does not fit."""
    try:
        about = json.loads((folder / "model.json").read_bytes())
        head = load_head(about["head"], about["dim"], len(about["classes"]), **about["options"])
        head.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{folder}: not a usable model: {' '.join(str(error).split())[:400]}") from error
    return Model(folder.name, head.eval(), about, folder)


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
    """Predict one complete slide: its probabilities (C,); attention and heatmap go to where the slide's things are.

    Raises BrokenBag if its features are missing, damaged or not those that the model was trained on.
    """
    group = store.group(slide)
    key = matching_features(group, model)
    try:
        bag = store.bag(slide, key)
        prediction = predict_slide(model, bag)
    except (BadBag, ValueError) as error:
        raise BrokenBag(slide, "predict", str(error)) from error
    return store_prediction(group, model, prediction, store.root)


def store_prediction(group: SlideGroup, model: Model, prediction: Prediction, out: Path, **attrs: Any) -> np.ndarray:
    """A picture of the finest tiles; then the scores of the level(s) that the head read. Returns probabilities (C,)."""
    probabilities = prediction.probabilities.double().numpy()
    tree = group.tree()
    levels = [k for k, part in enumerate(tree.levels) if model.level is None or abs(part.mpp / model.level - 1) < 0.01]
    finest = prediction.tiles[-1].weight.numpy()
    likely = int(probabilities.argmax())
    verdict = f"{model.name}: {model.classes[likely]} ({probabilities[likely]:.3f})"
    words = f"{group.slide}   {verdict}   colour: rank of the attention"
    picture = heatmap(group.thumbnail(), group.mask(), tree.boxes(levels[-1]), finest, words)
    place = Path(group.slide)
    save_png(out / "heatmaps" / model.name / place.parent / short_name(place.name, ".png"), picture)
    raw = np.concatenate([scores.raw.numpy() for scores in prediction.tiles]).astype(np.float32)
    weight = np.concatenate([scores.weight.numpy() for scores in prediction.tiles]).astype(np.float32)
    arrays = {"logits": prediction.logits.numpy(), "probabilities": probabilities, "raw": raw, "weight": weight}
    about = {"classes": model.classes, "levels": levels, "feature_hash": model.about["feature_hash"]}
    group.write_prediction(model.name, arrays, **about, **attrs)
    return probabilities


def write_predictions(path: Path, classes: list[str], table: list[tuple[str, np.ndarray]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.partial")
    with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "prediction", *(f"p_{name}" for name in classes)])
        for slide, probabilities in sorted(table, key=lambda row: row[0]):
            writer.writerow([slide, classes[int(probabilities.argmax())], *(f"{p:.6f}" for p in probabilities)])
    os.replace(part, path)
