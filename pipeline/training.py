"""Labels × bags → trained model folders, judged on slides that they have not seen. The loop stands in heads.train."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heads import Head, UnknownName, UnknownOption, load_head
from heads.metrics import Metrics, measure
from heads.recipe import Recipe
from heads.tasks import Task, describe, task_of
from heads.train import History, fit, logits_of

from .bags import Chosen, choose_level
from .cohort import Cohort, read_cohort
from .config import digest
from .curves import save_curves
from .errors import UsageError
from .evaluation import Answers, Pooled, chosen_on, outputs_of, summary, write_answers, write_json
from .folds import Fold, all_for_training, by_tiles, cross_validation, from_table, read_folds
from .labels import listed
from .prediction import Model, load_model, save_model

OnEpoch = Callable[[int, float, float | None], None]


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


@dataclass(frozen=True)
class Plan:
    """How heads are trained: the same for every fold."""

    head: str
    options: dict[str, Any]
    recipe: str
    changes: dict[str, Any]  # of the recipe
    level: float | None

    def new_head(self, dim: int, task: Task, seed: int) -> Head:
        """Its first weights are drawn from `seed`, without disturbing anyone else's random numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return load_head(self.head, dim, task.outputs, **self.options)
            except (UnknownName, UnknownOption, TypeError, ValueError) as error:
                raise UsageError(str(error)) from error

    def recipe_of(self, model: Head) -> Recipe:
        known = {"default": Recipe()} | model.recipes
        if self.recipe not in known:
            raise UsageError(f"{self.head} has no recipe {self.recipe!r}; known are {', '.join(known)}")
        try:
            return replace(known[self.recipe], **self.changes)
        except ValueError as error:
            raise UsageError(f"{self.head}: {error}") from error

    def level_of(self, model: Head, cohort: Cohort) -> float | None:
        """What it reads of each bag: one level, or (None) all."""
        return choose_level(cohort.features.levels, self.level) if model.needs.levels == 1 else None


@dataclass(frozen=True, eq=False)
class Learned:
    """A head that was trained on one fold, and what it says of each part of it."""

    fold: Fold
    seed: int
    model: Head
    level: float | None
    task: Task
    recipe: Recipe
    history: History
    logits: dict[str, np.ndarray]
    threshold: float | None
    temperature: float | None

    def metrics(self, cohort: Cohort) -> dict[str, Metrics]:
        """Of each part."""
        found, truth = {}, cohort.targets.truth
        for part, rows in self.fold.parts().items():
            counted = {f"{cohort.unit}s": float(len(rows))}
            found[part] = counted | measure(
                self.task, outputs_of(self.task, self.logits[part]), truth[rows], self.threshold
            )
        return found

    def answers(self) -> Answers:
        """Of the slides it was not trained on."""
        rows, logits = self.fold.test, self.logits["test"]
        return Answers(self.fold.name, self.seed, self.task, rows, logits, self.threshold, self.temperature)


def train(
    out: str | Path,
    labels: str | Path,
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
    seed: int = 0,
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> Trained:
    """Train a head on the features of labelled slides; writes OUT/models/<name>.

    out: an output folder of `run`, or a folder of feature files (.h5, .pt, .npy). `level`: µm/px of the level that a
    flat head reads, by default the finest with features; `encoder`: which features, where a store has several.

    What is asked: `task` is the kind of the column `target` (see targets.py). `unit="patient"` joins a patient's
    slides into one bag. Slides that share a `group` (a column, the patient), or a `site` where one is named, are never
    parted.

    Who is tested: the split `test` of the table; with `cv` each of so many folds in turn, with `splits` those of fold
    files (CLAM's), with `split_by="tiles"` the third with the most tiles; `seeds` times, with other first weights and
    other folds. Then models/<name>/<fold> holds the model of each fold, results.json what they said of slides they had
    not seen, and the top of the folder a model of all slides that are not the table's `test`. Validation is the split
    `val`, else a fifth of the training slides: it decides the epoch, the threshold and the temperature.

    recipe: "default" (heads.recipe.Recipe) or a name of the head's own ("paper"), of which `epochs`, `patience`, `lr`,
    `weight_decay` and `keep` replace single fields; `options` are the head's own. Raises UsageError.
    """
    name = checked_name(name or head.replace(":", "--"))
    cohort = read_cohort(out, labels, task=task, target=target, group=group, site=site, unit=unit, encoder=encoder)
    if cohort.targets.kind == "classification":
        _require_classes(cohort, np.arange(len(cohort)), labels)
    wishes = {"epochs": epochs, "patience": patience, "lr": lr, "weight_decay": weight_decay, "keep": keep}
    changes = {wish: value for wish, value in wishes.items() if value is not None}
    plan = Plan(head, options, recipe, changes, level)
    how = Judged(cv, splits, split_by, seeds, seed)
    whole, folds, notes = how.parts(cohort)
    _try(plan, cohort, whole, seed)
    folder = cohort.place / "models" / name
    judged = []
    for fold_seed, fold in folds:
        judged.append(_judged(folder / _fold_folder(fold, fold_seed, seeds), cohort, plan, fold, fold_seed, on_epoch))
    last = learn(cohort, plan, whole, seed, on_epoch)
    metrics = _save(folder, cohort, plan, last)
    results = pooled = None
    for stale in ("results.json", "out_of_fold.csv"):  # of an earlier call, which trained another model
        (folder / stale).unlink(missing_ok=True)
    if judged:
        settings = {"task": task, "target": target, "group": group, "site": site, "unit": unit, "level": last.level}
        pooled = Pooled(judged, cohort.targets.truth, cohort.groups)
        results = _results(plan, settings | how.words(), cohort, judged, pooled)
        write_json(folder / "results.json", results)
        write_answers(folder / "out_of_fold.csv", judged, cohort.units, cohort.targets.truth, cohort.targets.names)
    warnings = (*cohort.warnings, *notes, *_untrained(last, cohort))
    parameters = sum(weight.numel() for weight in last.model.parameters())
    return Trained(folder, metrics, last.history.best_epoch, parameters, warnings, results, pooled)


@dataclass(frozen=True)
class Judged:
    """Who is tested, and how often."""

    cv: int | None = None
    splits: str | Path | None = None
    split_by: str | None = None
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        given = [
            f"--{name}" for name in ("cv", "splits", "split-by") if getattr(self, name.replace("-", "_")) is not None
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: only one of them can say who is tested")
        if self.split_by not in (None, "tiles"):
            raise UsageError(f"--split-by must be tiles, not {self.split_by!r}")
        if self.seeds < 1:
            raise UsageError(f"--seeds must be at least 1, not {self.seeds}")

    def words(self) -> dict[str, Any]:
        return {
            name: None if value is None else str(value) if name == "splits" else value
            for name, value in asdict(self).items()
        }

    def parts(self, cohort: Cohort) -> tuple[Fold, list[tuple[int, Fold]], list[str]]:
        """The fold of the model at the top of the folder; those that are judged, with their seeds; notes."""
        strata, whose = cohort.targets.strata, cohort.whose
        if cohort.splits is None:
            whole = all_for_training(strata, whose, self.seed)
        else:
            whole = from_table(cohort.splits, strata, whose, cohort.groups, self.seed)
        rows = np.sort(np.concatenate([whole.train, whole.val]))  # the table's test slides are never trained on
        folds, notes = [], []
        for seed in range(self.seed, self.seed + self.seeds):
            found, unknown = self._folds(cohort, rows, seed)
            folds += [(seed, fold) for fold in found]
            notes = unknown
        return whole, folds, notes

    def _folds(self, cohort: Cohort, rows: np.ndarray, seed: int) -> tuple[list[Fold], list[str]]:
        strata, whose = cohort.targets.strata[rows], cohort.whose[rows]
        if self.splits is not None:
            if cohort.splits is not None:
                raise UsageError("--splits: the label table has a column `split` of its own; leave one of them out")
            folds, unknown = read_folds(self.splits, cohort.index(), strata, whose, cohort.groups, seed)
            used = {row for fold in folds for part in fold.parts().values() for row in part.tolist()}
            unused = [unit for row, unit in enumerate(cohort.units) if row not in used]
            notes = [
                listed(f"cells of {self.splits} name no slide here", unknown),
                listed(f"labelled {cohort.unit}s are in no fold of {self.splits}", unused),
            ]
            return folds, [note for note in notes if note]
        if self.cv is not None:
            folds = cross_validation(strata, whose, self.cv, seed)
        elif self.split_by is not None:
            bags = cohort.bags(choose_level(cohort.features.levels, None))
            folds = [by_tiles(np.array([len(bags[int(row)]) for row in rows]), strata, whose, seed)]
        elif self.seeds > 1:
            raise UsageError("--seeds: say with --cv, --splits or --split-by who is tested")
        else:
            folds = []
        return [replace(fold, train=rows[fold.train], val=rows[fold.val], test=rows[fold.test]) for fold in folds], []


def _try(plan: Plan, cohort: Cohort, fold: Fold, seed: int) -> None:
    """What is wrong with what was asked is said now, not after hours."""
    task = _task(cohort, fold)
    model = plan.new_head(cohort.features.dim, task, seed)
    plan.recipe_of(model)
    row = int(fold.train[0])
    bag = cohort.bags(plan.level_of(model, cohort))[row]
    answer = cohort.targets.answers(task, np.array([row]))[0]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.loss(model.train()(bag), answer, task)
    except ValueError as error:
        raise UsageError(f"{plan.head}: {error}") from error


def _task(cohort: Cohort, fold: Fold) -> Task:
    try:
        return cohort.targets.task(fold.train)
    except ValueError as error:
        raise UsageError(f"{fold.name or 'training'}: {error}") from error


def learn(cohort: Cohort, plan: Plan, fold: Fold, seed: int, on_epoch: OnEpoch | None = None) -> Learned:
    """One head on one fold. Raises UsageError for a damaged slide, or a loss that left the numbers."""
    targets = cohort.targets
    if targets.kind == "classification":
        _require_classes(cohort, fold.train, fold.name or "training")
    task = _task(cohort, fold)
    model = plan.new_head(cohort.features.dim, task, seed)
    recipe, level = plan.recipe_of(model), plan.level_of(model, cohort)
    bags = {part: Chosen(cohort.bags(level), rows.tolist()) for part, rows in fold.parts().items()}
    answers = {part: targets.answers(task, rows) for part, rows in fold.parts().items()}
    try:
        history = fit(
            model,
            bags["train"],
            answers["train"],
            task=task,
            recipe=recipe,
            validation=(bags["val"], answers["val"]),
            seed=seed,
            on_epoch=on_epoch,
        )
        logits = {part: logits_of(model, chosen) for part, chosen in bags.items()}
    except (ValueError, FloatingPointError) as error:  # ValueError: a bag that the head was not made for
        raise UsageError(str(error)) from error
    threshold, temperature = chosen_on(task, logits["val"], targets.truth[fold.val])
    return Learned(fold, seed, model, level, task, recipe, history, logits, threshold, temperature)


def _judged(folder: Path, cohort: Cohort, plan: Plan, fold: Fold, seed: int, on_epoch: OnEpoch | None) -> Answers:
    """What the model of a fold says of its test slides; one that an earlier call trained just so is taken as it is."""
    there = _finished(folder, _identity(cohort, plan, fold, seed))
    if there is None:
        learned = learn(cohort, plan, fold, seed, on_epoch)
        _save(folder, cohort, plan, learned)
        return learned.answers()
    logits = logits_of(there.head, Chosen(cohort.bags(there.level), fold.test.tolist()))
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
    """All that a trained model depends on."""
    targets = cohort.targets
    asked = [targets.kind, targets.names, targets.truth.tolist(), cohort.units, cohort.slides]
    parts = {part: rows.tolist() for part, rows in fold.parts().items()}
    versions = {name: version(name) for name in ("slidestream", "torch")}
    return digest([asdict(plan), asked, parts, seed, cohort.features.about(), cohort.state, versions])


def _save(folder: Path, cohort: Cohort, plan: Plan, learned: Learned) -> dict[str, Metrics]:
    """A model folder, with the curves of its training."""
    metrics, history, fold = learned.metrics(cohort), learned.history, learned.fold
    training = asdict(learned.recipe) | {
        "recipe": plan.recipe,
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
    save_model(folder, learned.model, about | cohort.features.about())
    save_curves(folder / "curves.png", history.train_loss, history.validation_loss, history.best_epoch)
    return metrics


def _results(
    plan: Plan, settings: dict[str, Any], cohort: Cohort, answers: Sequence[Answers], pooled: Pooled
) -> dict[str, Any]:
    about = {"head": plan.head, "options": plan.options, "recipe": plan.recipe, "changes": plan.changes}
    described = {"units": len(cohort), "names": list(cohort.targets.names)}
    return about | {"settings": settings} | described | summary(answers, cohort.targets.truth, pooled)


def _fold_folder(fold: Fold, seed: int, seeds: int) -> str:
    name = fold.name or "fold"
    return name if seeds == 1 else f"{name}-seed{seed}"


def checked_name(name: str) -> str:
    """Raises UsageError for what would be no folder, or one elsewhere."""
    if not re.fullmatch(r"[\w@+-][\w.@+-]*", name):
        raise UsageError(f"a model's name becomes a folder: letters, digits and . _ - only, not first a dot: {name!r}")
    return name


def _require_classes(cohort: Cohort, rows: np.ndarray, where: str | Path) -> None:
    present = sorted({cohort.targets.names[i] for i in cohort.targets.truth[rows]})
    if len(present) < 2:
        raise UsageError(
            f"{where}: all usable training slides have the label {present[0]!r}; one class alone cannot be learned"
        )


def _untrained(learned: Learned, cohort: Cohort) -> list[str]:
    if cohort.targets.kind != "classification":
        return []
    names, truth = cohort.targets.names, cohort.targets.truth
    missing = sorted(set(names) - {names[i] for i in truth[learned.fold.train]})
    return [f"no training slide is of the class {', '.join(missing)}: it is never predicted"] if missing else []
