"""Slides × a trained head of pixels → predictions, and where on the slide it looked. Only what it asks for is read."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from heads import BadBag, Prediction

from .draw import heatmap, save_png
from .errors import BrokenBag, SlideError, slide_door
from .outcome import Outcome, Report, failed
from .pictures import Pictures, Region
from .prediction import Model, write_predictions
from .slide import Thumbnail
from .store import BagStore, short_name
from .tissue import TissueMask
from .verdict import answer, array_name, words

THUMBNAIL_PX = 1600


class Progress(Protocol):
    def start(self, total: int, todo: int) -> None: ...
    def slide(self, outcome: Outcome) -> None: ...


def predict_pictures(
    pictures: Pictures, slides: Sequence[str], model: Model, out: Path, progress: Progress, stored: bool
) -> Report:
    """Writes OUT/predictions/<model>.csv and heatmaps; where the slides have a store, scores of the places into it.

    A slide that cannot be read is a failed row, and the others go on.
    """
    started = time.time()
    table: list[tuple[str, Any]] = []
    outcomes = []
    progress.start(len(slides), len(slides))
    for slide in slides:
        begun = time.time()
        try:
            with slide_door(slide, "predict", BrokenBag), pictures.region(slide, model.level) as region:
                values, places = _predict(region, model, out, stored)
            table.append((slide, values))
            outcome = Outcome(slide, "done", "predict", tiles=places)
        except SlideError as error:
            outcome = failed(slide, error)
        outcomes.append(outcome.after(time.time() - begun))
        progress.slide(outcomes[-1])
    write_predictions(out / "predictions" / f"{model.name}.csv", model, table)
    return Report(tuple(outcomes), seconds=time.time() - started)


def _predict(region: Region, model: Model, out: Path, stored: bool) -> tuple[np.ndarray, int]:
    """The answer, and of how many places."""
    try:
        with torch.no_grad():
            prediction = model.head(region)
    except BadBag as error:
        raise BrokenBag(region.slide, "predict", str(error)) from error
    values = answer(model.task, prediction.logits)
    scores, places = prediction.tiles[0], boxes_of(region, prediction)
    whole = region.overview(THUMBNAIL_PX)
    caption = f"{region.slide}   {model.name}: {words(model.task, model.classes, values, model.threshold)}"
    caption += "   colour: rank of the attention"
    picture = heatmap(whole.rgb, _everywhere(whole), places, scores.weight.numpy(), caption)
    place = Path(region.slide)
    save_png(out / "heatmaps" / model.name / place.parent / short_name(place.name, ".png"), picture)
    if stored:
        arrays = {"logits": prediction.logits.numpy(), array_name(model.task): values, "boxes": places}
        arrays |= {"raw": scores.raw.numpy(), "weight": scores.weight.numpy()}
        about = {"classes": model.classes, "levels": [], "feature_hash": model.about["feature_hash"]}
        BagStore(out).group(region.slide).write_prediction(model.name, arrays, **about, pixels_read=region.cost.pixels)
    return values, len(places)


def boxes_of(region: Region, prediction: Prediction) -> np.ndarray:
    """(n, 4) x, y, width, height in level-0 px of the places that have a score, row by row."""
    down, across, height, width = prediction.parts["places"].tolist()
    w, h = width * region.scale / across, height * region.scale / down
    row, column = np.divmod(np.arange(down * across), across)
    x, y = region.box.x + column * w, region.box.y + row * h
    return np.stack([x, y, np.full(len(x), w), np.full(len(x), h)], axis=1)


def _everywhere(whole: Thumbnail) -> TissueMask:
    return TissueMask(np.ones(whole.rgb.shape[:2], bool), whole.downsample, whole.mpp, "brightfield")
