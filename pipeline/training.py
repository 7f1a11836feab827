"""Labels × bags → trained model folders, judged on slides that they have not seen. The loop stands in heads.train."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from heads.metrics import Metrics
from heads.tasks import describe, task_of
from heads.train import logits_of

from .bags import Chosen
from .cohort import Cohort, read_cohort
from .config import digest
from .curves import save_curves
from .errors import UsageError
from .evaluation import Answers, Pooled, summary, write_answers, write_json
from .fingerprint import fingerprint
from .folds import Fold
from .judging import Judged
from .learning import Learned, OnEpoch, Plan, learn, require_classes, require_sense
from .prediction import Model, load_model, save_model
from .seen import seen_words


@dataclass(frozen=True)
class Trained:
    """A finished training: the model's folder, its metrics by part (train, val, test), and warnings.

    results: what results.json says of slides outside the folds that were trained on, and `pooled` the answers it is
    made of; None without --cv and the like.
    """

    folder: Path
    metrics: dict[str, Metrics]
    best_epoch: int
    parameters: int
    warnings: tuple[str, ...]
    results: dict[str, Any] | None = None
    pooled: Pooled | None = None


def train(
    out: str | Path,
    labels: str | Path | None = None,
    *,
    head: str = "abmil",
    name: str | None = None,
    level: float | None = None,
    encoder: str | None = None,
    task: str = "classification",
    target: str = "label",
    group: str = "patient",
    site: str | None = None,
    unit: str = "slide",
    cv: int | None = None,
    splits: str | Path | None = None,
    split_by: str | None = None,
    seeds: int = 1,
    recipe: str = "default",
    epochs: int | None = None,
    patience: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    keep: str | None = None,
    augment: bool | None = None,
    mix: str | None = None,
    seed: int = 0,
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> Trained:
    """Train a head on the features of labelled slides; writes OUT/models/<name>.

    out: an output folder of `run`, or a folder of feature files (.h5, .pt, .npy). `level`: µm/px of the level that a
    flat head reads, by default the finest with features; `encoder`: which features, where a store has several. A head
    of pixels (scorenet, hatnet with `cnn`) reads the slides themselves at that level, or the images of a folder, pixel
    by pixel; `labels` may then be None if each class has its folder.

    What is asked: `task` is the kind of the column `target` (see targets.py). `unit="patient"` joins a patient's
    slides into one bag. Slides that share a `group` (a column, the patient), or a `site` where one is named, are never
    parted.

    Who is tested: the split `test` of the table; with `cv` each of so many folds in turn, with `splits` those of fold
    files (CLAM's), with `split_by="tiles"` the third with the most tiles; `seeds` times, with other first weights and
    other folds. Then models/<name>/<fold> holds the model of each fold, results.json what they said of slides they had
    not seen, and the top of the folder a model of all slides that are not the table's `test`. Validation is the split
    `val`, else a fifth of the training slides: it decides the epoch, the threshold and the temperature.

    recipe: "default" (heads.recipe.Recipe) or a name of the head's own ("paper"), of which `epochs`, `patience`, `lr`,
    `weight_decay`, `keep`, `augment` and `mix` replace single fields; `options` are the head's own. Raises UsageError.
    """
    asked: dict[str, Any] = {"task": task, "target": target, "group": group, "site": site, "unit": unit}
    cohort = read_cohort(out, labels, encoder=encoder, **asked)
    wishes: dict[str, Any] = {"epochs": epochs, "patience": patience, "lr": lr, "weight_decay": weight_decay}
    wishes |= {"keep": keep, "augment": augment, "mix": mix}
    changes = {wish: value for wish, value in wishes.items() if value is not None}
    plan = Plan(head, options, recipe, changes, level)
    how = Judged(cv, splits, split_by, seeds, seed)
    folder = cohort.place / "models" / checked_name(name or head.replace(":", "--"))
    return train_on(cohort, plan, how, folder, asked, on_epoch)


def train_on(
    cohort: Cohort, plan: Plan, how: Judged, folder: Path, asked: dict[str, Any], on_epoch: OnEpoch | None = None
) -> Trained:
    """One head on a cohort, into its folder. `asked`: what results.json says of how the cohort was read."""
    if cohort.targets.kind == "classification":
        require_classes(cohort, np.arange(len(cohort)), "the label table")
    whole = how.whole(cohort)
    folds, notes = how.folds(cohort)
    require_sense(plan, cohort, whole, how.seed)
    # those of the first seed are called the same however many seeds there are, so that more of them can be added
    places = [fold.name if seed == how.seed else f"{fold.name}-seed{seed}" for seed, fold in folds]
    judged = [
        _judged(folder / place, cohort, plan, fold, seed, on_epoch)
        for place, (seed, fold) in zip(places, folds, strict=True)
    ]
    last = learn(cohort, plan, whole, how.seed, on_epoch)
    metrics = _save(folder, cohort, plan, last)
    results = pooled = None
    for stale in ("results.json", "out_of_fold.csv"):  # of an earlier call, which trained another model
        (folder / stale).unlink(missing_ok=True)
    if judged:
        pooled = Pooled(judged, cohort.targets.truth, cohort.groups)
        results = _results(plan, asked | {"level": last.level} | how.words(), cohort, judged, pooled)
        for one, place in zip(results["folds"], places, strict=True):
            one["model"] = place
        write_json(folder / "results.json", results)
        write_answers(folder / "out_of_fold.csv", judged, cohort)
    warnings = (*cohort.warnings, *notes, *_untrained(last, cohort), *_flattered(cohort, plan, whole, folds))
    parameters = sum(weight.numel() for weight in last.model.parameters())
    return Trained(folder, metrics, last.history.best_epoch, parameters, warnings, results, pooled)


def _judged(folder: Path, cohort: Cohort, plan: Plan, fold: Fold, seed: int, on_epoch: OnEpoch | None) -> Answers:
    """What the model of a fold says of its test slides; one that an earlier call trained just so is taken as it is."""
    there = _finished(folder, _identity(cohort, plan, fold, seed))
    if there is None:
        learned = learn(cohort, plan, fold, seed, on_epoch)
        _save(folder, cohort, plan, learned)
        return learned.answers()
    logits = logits_of(there.head, Chosen(cohort.bags(there.level, plan.pixels), fold.test.tolist()))
    task, threshold, temperature = (there.about[name] for name in ("task", "threshold", "temperature"))
    return Answers(fold.name, seed, task_of(task), fold.test, logits, threshold, temperature)


def _finished(folder: Path, identity: str) -> Model | None:
    """The model in a folder, if it is whole and was trained just so."""
    try:
        there = load_model(folder)
    except UsageError:
        return None
    return there if there.about.get("identity") == identity else None


def _identity(cohort: Cohort, plan: Plan, fold: Fold, seed: int) -> str:
    """All that a trained model depends on; of files that options name (weights to begin with), what is in them."""
    targets = cohort.targets
    files = [fingerprint(Path(o)).sha256 for o in plan.options.values() if isinstance(o, str) and Path(o).is_file()]
    asked = [targets.kind, targets.names, targets.truth.tolist(), cohort.units, cohort.slides]
    parts = {part: rows.tolist() for part, rows in fold.parts().items()}
    versions = {name: version(name) for name in ("slidestream", "torch")}
    return digest(
        [
            asdict(plan),
            *files,
            asked,
            parts,
            seed,
            cohort.source(plan.pixels).about(),
            cohort.state(plan.pixels),
            versions,
        ]
    )


def _save(folder: Path, cohort: Cohort, plan: Plan, learned: Learned) -> dict[str, Metrics]:
    """A model folder, with the curves of its training."""
    metrics, history, fold = learned.metrics(cohort), learned.history, learned.fold
    training = asdict(learned.recipe) | {
        "recipe": plan.recipe,
        "options": plan.options,  # as they were asked for: weights to begin with are not those of the head
        "seed": learned.seed,
        "best_epoch": history.best_epoch,
        "train_loss": history.train_loss,
        "validation_loss": history.validation_loss,
        "split": fold.words,
        "slides": {
            part: [slide for row in rows for slide in cohort.slides[row]] for part, rows in fold.parts().items()
        },
    }
    about = {
        "schema": "slidestream/model",
        "head": plan.head,
        "options": learned.model.options,
        "dim": learned.model.dim,
        "outputs": learned.model.classes,
        "classes": list(cohort.targets.names),
        "task": describe(learned.task),
        "threshold": learned.threshold,
        "temperature": learned.temperature,
        "level": learned.level,
        "unit": cohort.unit,
        "identity": _identity(cohort, plan, fold, learned.seed),
        "metrics": metrics,
        "training": training,
    }
    save_model(folder, learned.model, about | cohort.source(plan.pixels).about())
    save_curves(folder / "curves.png", history.train_loss, history.validation_loss, history.best_epoch)
    return metrics


def _results(
    plan: Plan, settings: dict[str, Any], cohort: Cohort, answers: Sequence[Answers], pooled: Pooled
) -> dict[str, Any]:
    about = {"head": plan.head, "options": plan.options, "recipe": plan.recipe, "changes": plan.changes}
    described = {"units": len(cohort), "names": list(cohort.targets.names)}
    return about | {"settings": settings} | described | summary(answers, cohort.targets.truth, pooled)


def checked_name(name: str) -> str:
    """Raises UsageError for what would be no folder, or one elsewhere."""
    if not re.fullmatch(r"[\w@+-][\w.@+-]*", name):
        raise UsageError(f"a model's name becomes a folder: letters, digits and . _ - only, not first a dot: {name!r}")
    return name


def _flattered(cohort: Cohort, plan: Plan, whole: Fold, folds: Sequence[tuple[int, Fold]]) -> list[str]:
    """Test slides that the encoder was pre-trained on."""
    tested = {
        fold.name: [slide for row in fold.test for slide in cohort.slides[row]] for _, fold in [(0, whole), *folds]
    }
    return seen_words(cohort.source(plan.pixels).about(), cohort.place, tested)


def _untrained(learned: Learned, cohort: Cohort) -> list[str]:
    if cohort.targets.kind != "classification":
        return []
    names, truth = cohort.targets.names, cohort.targets.truth
    missing = sorted(set(names) - {names[i] for i in truth[learned.fold.train]})
    return [f"no training slide is of the class {', '.join(missing)}: it is never predicted"] if missing else []
