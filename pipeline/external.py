"""What a trained model is worth on labelled slides that had no part in its training."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heads.train import logits_of

from .cohort import read_cohort
from .errors import UsageError
from .evaluation import Answers, Pooled, write_answers, write_json
from .prediction import Model, choose_models


def evaluate_labels(
    out: str | Path,
    labels: str | Path,
    model: str | Path | Sequence[str],
    *,
    folds: bool = False,
    vote: bool = False,
    target: str = "label",
    group: str = "patient",
) -> dict[str, Any]:
    """Metrics with 95 % intervals, the threshold and the temperature as they were chosen in training.

    out: an output folder of `run`, or a folder of feature files. `model`: a folder, or a name below OUT/models; several
    are averaged, with `folds` those of its cross-validation, or `vote`. The table may lack classes of the model, but
    have no others. Writes OUT/predictions/<model>.metrics.json and .labelled.csv. Raises UsageError.
    """
    one = choose_models(model, Path(out), folds, vote)
    about, kind = one.about, one.about.get("task", {"kind": "classification"})["kind"]
    cohort = read_cohort(
        out,
        labels,
        task=kind,
        target=target,
        group=group,
        unit=about.get("unit", "slide"),
        encoder=None if about["encoder_key"] in ("files", "pixels") else about["encoder_key"],
        names=one.classes,
    )
    pixels = one.head.needs.pixels
    if cohort.source(pixels).about()["feature_hash"] != about["feature_hash"]:
        raise UsageError(f"{out}: {one.name} was trained on other features (encoder, tile size or µm/px differ)")
    rows = np.arange(len(cohort))
    logits = logits_of(one.head, cohort.bags(one.level, pixels))
    answers = [Answers("external", 0, one.task, rows, logits, one.threshold, about.get("temperature"))]
    truth = cohort.targets.truth
    found = Pooled(answers, truth, cohort.groups).intervals()
    results: dict[str, Any] = {"model": one.name, "labels": str(labels), f"{cohort.unit}s": len(cohort)}
    results["pooled"] = {name: value._asdict() for name, value in found.items()}
    folder = cohort.place / "predictions"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{one.name}.metrics.json", results)
    write_answers(folder / f"{one.name}.labelled.csv", answers, cohort)
    return results | {"warnings": [*cohort.warnings, *seen(one, (slide for unit in cohort.slides for slide in unit))]}


def seen(model: Model, slides: Iterable[str]) -> list[str]:
    """A word of warning where the model was trained on some of these slides, as far as their names tell."""
    trained_on = {*model.trained_on("train"), *model.trained_on("val")}
    here = [slide for slide in slides if slide in trained_on]
    return [f"{len(here)} of these slides have names that {model.name} was trained on: {here[0]}"] if here else []
