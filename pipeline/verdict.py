"""What a model says of a slide: as an array, as a row of a table, in words."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heads.metrics import said
from heads.tasks import Classification, MultiLabel, Ordinal, Task

CHANCE = 0.5  # from here on a label is said to be there


def answer(task: Task, logits: Tensor) -> np.ndarray:
    """(C,) probabilities of classes or labels, else (1,): a grade, a number, a risk; float64."""
    with torch.no_grad():
        values: np.ndarray = np.atleast_1d(task.predict(logits.double().cpu()).numpy())
    return values


def array_name(task: Task) -> str:
    """By which name an answer is stored."""
    return "probabilities" if isinstance(task, Classification | MultiLabel) else "value"


def columns(task: Task, names: Sequence[str]) -> list[str]:
    """Of a table of answers, after the slide's."""
    return ["prediction", *(f"p_{name}" for name in names)] if array_name(task) == "probabilities" else ["prediction"]


def cells(task: Task, names: Sequence[str], values: np.ndarray, threshold: float | None) -> list[str]:
    """`threshold`: of the second of two classes, as in heads.metrics."""
    if isinstance(task, Classification):
        return [names[said(values[None], threshold)[0]], *(f"{p:.6f}" for p in values)]
    if isinstance(task, MultiLabel):
        there = [name for name, p in zip(names, values, strict=True) if p >= CHANCE]
        return [";".join(there), *(f"{p:.6f}" for p in values)]
    return [names[round(values[0])]] if isinstance(task, Ordinal) else [f"{values[0]:.6g}"]


def words(task: Task, names: Sequence[str], values: np.ndarray, threshold: float | None) -> str:
    """`positive (0.912)`, for a picture."""
    first, *_ = cells(task, names, values, threshold)
    if isinstance(task, Classification):
        return f"{first} ({values[list(names).index(first)]:.3f})"
    if isinstance(task, MultiLabel):
        return first or "none of " + ", ".join(names)
    return first if isinstance(task, Ordinal) else f"{', '.join(names)} {first}"
