"""Where a trained head looked on one slide: the scores of its finest tiles, and the boxes that it chose, if it did.

A slide is predicted from its stored features, as `slidestream predict` does, so that what is told is of this model and
these features. Where only a zoom has predicted it, and its features are not kept, what that stored is read. A head of
pixels looks at the slide itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import BrokenBag, slide_door
from .overlap import Choice
from .pictures import Pictures
from .prediction import Model, fitting_features, levels_read, prediction_of, zoomed
from .sight import boxes_of
from .store import BagStore

TOP_BAGS = 0.5  # HATNet, fig. 6: the better half of the bags is shown with the ducts


@dataclass(frozen=True, eq=False)
class Look:
    """Tiles of the finest level that the head read, or places of a picture: boxes (n, 4), level-0 px, scores (n,), NaN
    where it did not look."""

    boxes: np.ndarray
    weight: np.ndarray
    raw: np.ndarray
    choice: Choice | None


def look_at(store: BagStore, slide: str, model: Model) -> Look:
    """Raises BrokenBag if there are neither features that the model was trained on, nor a zoom of this very model."""
    if model.head.needs.pixels:
        return _look_at_pixels(store, slide, model)
    group, parts = store.group(slide), dict[str, Tensor]()
    if fitting_features(group, model) is None and zoomed(group, model):
        kept = group.prediction(model.name)  # of all levels, coarse → fine
        weight, raw = kept["weight"], kept["raw"]
    else:
        prediction = prediction_of(store, slide, model)
        weight, raw = prediction.tiles[-1].weight.numpy(), prediction.tiles[-1].raw.numpy()
        parts |= prediction.parts
    tree = group.tree()
    levels = levels_read(tree, model)
    boxes = tree.boxes(levels[-1])
    weight, raw = (scores[-len(boxes) :].astype(np.float64) for scores in (weight, raw))
    return Look(boxes, weight, raw, chosen_boxes(boxes, weight, len(levels), parts))


def _look_at_pixels(store: BagStore, slide: str, model: Model) -> Look:
    pictures = Pictures.of_store(store, [slide])
    with slide_door(slide, "predict", BrokenBag), pictures.region(slide, model.level) as region, torch.no_grad():
        prediction = model.head(region)
        boxes = boxes_of(region, prediction)
    weight, raw = (
        scores.numpy().astype(np.float64) for scores in (prediction.tiles[0].weight, prediction.tiles[0].raw)
    )
    return Look(boxes, weight, raw, chosen_boxes(boxes, weight, 1, prediction.parts))


def chosen_boxes(boxes: np.ndarray, weight: np.ndarray, levels: int, parts: Mapping[str, Tensor]) -> Choice | None:
    """Of a head that chooses, by what its prediction holds; None for one that looks at all tiles alike.

    bag_energy (HATNet): the better half of its bags with tissue. chosen (ScoreNet): the places that it read in full.
    Several levels (HAG-MIL): the tiles of the finest that it looked at, among all.
    """
    if "chosen" in parts:
        return Choice(boxes[parts["chosen"].numpy()], boxes)
    seen = np.isfinite(weight)
    if "bag_energy" in parts:
        energy = parts["bag_energy"].numpy()
        there = np.flatnonzero(np.isfinite(energy))
        best = there[np.argsort(-energy[there], kind="stable")][: math.ceil(TOP_BAGS * len(there))]
        bags = divided(boxes[seen], math.isqrt(len(energy)))
        return Choice(bags[best], bags[there])
    return Choice(boxes[seen], boxes) if levels > 1 else None


def divided(boxes: np.ndarray, side: int) -> np.ndarray:
    """The box around boxes as side × side equal ones, row by row: (side², 4)."""
    low, high = boxes[:, :2].min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)
    step = (high - low) / side
    rows, columns = np.divmod(np.arange(side**2), side)
    corner = low + np.stack([columns, rows], axis=1) * step
    return np.concatenate([corner, np.tile(step, (side**2, 1))], axis=1)
