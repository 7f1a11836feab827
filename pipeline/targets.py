"""What a label table asks of each slide. Its kind is said by the user; what the values must look like, here.

classification   one name of a class (the default)
multilabel       any number of names, parted by `;`; an empty cell is none of them
ordinal          a grade, 0 or a whole number above
regression       a number
survival         the columns `time` (a number) and `event` (1: seen, 0: lost from sight)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heads.tasks import KINDS, Classification, MultiLabel, Ordinal, Regression, Survival, Task

from .errors import UsageError, nearest

PARTS = 4  # of the range of a number, in each of which folds have as many slides
MANY = 20  # different classes that are all numbers: said aloud


@dataclass(frozen=True)
class Targets:
    """The answers of n slides.

    names: the classes, grades or labels, else one word for the number. truth: (n,) classes, grades or numbers; (n, C)
    of 0 and 1; (n, 2) time and event. strata: (n,) int, of which every fold should have as many.
    """

    kind: str
    names: tuple[str, ...]
    truth: np.ndarray
    strata: np.ndarray

    def task(self, rows: np.ndarray) -> Task:
        """What the head is asked; what of it depends on data (scale, bins of time) is taken from the training rows."""
        if self.kind == "regression":
            return Regression.of(self.truth[rows])
        if self.kind == "survival":
            return Survival.of(self.truth[rows, 0], self.truth[rows, 1])
        kinds = {"classification": Classification, "multilabel": MultiLabel, "ordinal": Ordinal}
        return kinds[self.kind](len(self.names))

    def answers(self, task: Task, rows: np.ndarray) -> Any:
        """What the task's loss takes, one for each row."""
        if isinstance(task, Survival):
            return [(task.bin(time), int(seen)) for time, seen in self.truth[rows].tolist()]
        return self.truth[rows]


def columns_of(kind: str, column: str) -> tuple[str, ...]:
    """The columns that a label table needs. Raises UsageError for an unknown kind."""
    if kind not in KINDS:
        raise UsageError(nearest(kind, list(KINDS), "task"))
    return ("time", "event") if kind == "survival" else (column,)


def read_targets(
    kind: str, rows: Sequence[dict[str, str]], column: str, table: str | Path, known: Sequence[str] | None = None
) -> Targets:
    """`rows`: of the usable slides, each with its `slide`; `known`: the names that a model has, by default those here.

    Raises UsageError for what the kind does not allow, and for names that are not known.
    """
    if kind == "survival":
        return _survival(rows, table)
    cells = [row[column] for row in rows]
    if kind == "multilabel":
        return _labels(cells, column, known, table)
    if kind == "ordinal":
        grades = np.array([_whole(row, column, table) for row in rows])
        names = tuple(map(str, range(int(grades.max()) + 1)))
        return Targets(kind, _names(names, known, table), grades, grades)
    if kind == "regression":
        numbers = np.array([_number(row, column, table) for row in rows])
        return Targets(kind, (column,), numbers, _parts(numbers))
    names = _names(tuple(sorted(set(cells))), known, table)
    classes = np.array([names.index(cell) for cell in cells])
    return Targets(kind, names, classes, classes)


def doubts(targets: Targets) -> list[str]:
    """What makes one think that another kind was meant."""
    if targets.kind != "classification" or len(targets.names) < MANY or not all(map(_is_number, targets.names)):
        return []
    return [
        f"{len(targets.names)} different numbers are taken as the names of classes; "
        "--task regression or --task ordinal would take them as numbers"
    ]


def _names(here: tuple[str, ...], known: Sequence[str] | None, table: str | Path) -> tuple[str, ...]:
    if known is None:
        return here
    for name in here:
        if name not in known:
            raise UsageError(f"{table}: {nearest(name, list(known), 'class')}, as the model was trained")
    return tuple(known)


def _labels(cells: list[str], column: str, known: Sequence[str] | None, table: str | Path) -> Targets:
    sets = [{name.strip() for name in cell.split(";")} - {""} for cell in cells]
    names = _names(tuple(sorted(set().union(*sets))), known, table)
    if not names:
        raise UsageError(f"{table}: {column} is empty everywhere: there is no label to learn")
    there = np.array([[name in one for name in names] for one in sets], int)
    # folds are balanced by the rarest label that a slide has
    rank = np.argsort(np.argsort(there.sum(axis=0)))
    strata = np.array([min((int(rank[c]) for c in np.flatnonzero(row)), default=len(names)) for row in there])
    return Targets("multilabel", names, there, strata)


def _survival(rows: Sequence[dict[str, str]], table: str | Path) -> Targets:
    times = np.array([_number(row, "time", table) for row in rows])
    seen = np.array([_whole(row, "event", table) for row in rows])
    odd = np.flatnonzero((times < 0) | (seen > 1))
    if len(odd):
        row = rows[odd[0]]
        raise UsageError(
            f"{table}: time of {row['slide']!r} is {row['time']!r}, its event {row['event']!r}; "
            "time must be 0 or more, event 1 (seen) or 0 (lost from sight)"
        )
    if not seen.any():
        raise UsageError(f"{table}: no event was seen (event is 0 everywhere): survival cannot be learned")
    return Targets("survival", ("risk",), np.stack([times, seen], axis=1), seen)


def _parts(numbers: np.ndarray) -> np.ndarray:
    cuts = np.unique(np.quantile(numbers, np.arange(1, PARTS) / PARTS))
    return np.searchsorted(cuts, numbers, side="left")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(row: dict[str, str], column: str, table: str | Path) -> float:
    if not _is_number(row[column]):
        raise UsageError(f"{table}: {column} of {row['slide']!r} is {row[column]!r}, which is not a number")
    return float(row[column])


def _whole(row: dict[str, str], column: str, table: str | Path) -> int:
    number = _number(row, column, table)
    if number != int(number) or number < 0:
        raise UsageError(
            f"{table}: {column} of {row['slide']!r} is {row[column]!r}; it must be 0 or a whole number above"
        )
    return int(number)
