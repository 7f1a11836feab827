"""One head on one fold: made from its seed, trained by its recipe, asked about every part."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heads import Head, UnknownName, UnknownOption, load_head, reads_pixels
from heads.metrics import Metrics, measure
from heads.recipe import Recipe
from heads.tasks import Task
from heads.train import History, fit, logits_of

from .bags import Chosen, choose_level
from .cohort import Cohort
from .errors import UsageError
from .evaluation import Answers, chosen_on, outputs_of
from .folds import Fold

OnEpoch = Callable[[int, float, float | None], None]


@dataclass(frozen=True)
class Plan:
    """How heads are trained: the same for every fold."""

    head: str
    options: dict[str, Any]
    recipe: str
    changes: dict[str, Any]  # of the recipe
    level: float | None

    @property
    def pixels(self) -> bool:
        """Whether the head reads pixels."""
        try:
            return reads_pixels(self.head, **self.options)
        except UnknownName as error:
            raise UsageError(str(error)) from error

    def new_head(self, cohort: Cohort, task: Task, seed: int) -> Head:
        """Its first weights are drawn from `seed`, without disturbing anyone else's random numbers."""
        dim = cohort.source(self.pixels).dim
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
        return choose_level(cohort.source(self.pixels).levels, self.level) if model.needs.levels == 1 else None


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


def require_sense(plan: Plan, cohort: Cohort, fold: Fold, seed: int) -> None:
    """What is wrong with what was asked is said now, not after hours."""
    task = _task(cohort, fold)
    model = plan.new_head(cohort, task, seed)
    plan.recipe_of(model)
    row = int(fold.train[0])
    bag = cohort.bags(plan.level_of(model, cohort), plan.pixels)[row]
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
        require_classes(cohort, fold.train, fold.name or "training")
    task = _task(cohort, fold)
    model = plan.new_head(cohort, task, seed)
    recipe, level = plan.recipe_of(model), plan.level_of(model, cohort)
    bags = {part: Chosen(cohort.bags(level, plan.pixels), rows.tolist()) for part, rows in fold.parts().items()}
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


def require_classes(cohort: Cohort, rows: np.ndarray, where: str | Path) -> None:
    present = sorted({cohort.targets.names[i] for i in cohort.targets.truth[rows]})
    if len(present) < 2:
        raise UsageError(
            f"{where}: all usable training slides have the label {present[0]!r}; one class alone cannot be learned"
        )
