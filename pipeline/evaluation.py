"""What heads said of slides that they had not seen: metrics by fold and pooled, intervals, calibration, tables.

Everything that is chosen (the epoch, the threshold, the temperature) was chosen on validation slides.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from heads.metrics import (
    Difference,
    Interval,
    Metrics,
    best_temperature,
    best_threshold,
    bootstrap,
    calibration_error,
    difference,
    intervals,
    measure,
)
from heads.tasks import Classification, Task

from .cohort import Cohort
from .places import put


@dataclass(frozen=True, eq=False)
class Answers:
    """Of one trained head on one part of a cohort. rows: of the cohort; logits (n, outputs)."""

    fold: str
    seed: int
    task: Task
    rows: np.ndarray
    logits: np.ndarray
    threshold: float | None = None
    temperature: float | None = None

    @property
    def outputs(self) -> np.ndarray:
        return outputs_of(self.task, self.logits)


def outputs_of(task: Task, logits: np.ndarray) -> np.ndarray:
    import torch

    outputs: np.ndarray = task.predict(torch.from_numpy(np.ascontiguousarray(logits, np.float64))).numpy()
    return outputs


def chosen_on(task: Task, logits: np.ndarray, truth: np.ndarray) -> tuple[float | None, float | None]:
    """(threshold, temperature) from validation slides; None where the task has none."""
    if not isinstance(task, Classification) or not len(truth):
        return None, None
    threshold = best_threshold(outputs_of(task, logits)[:, 1], truth) if task.classes == 2 else None
    return threshold, best_temperature(logits, truth)


class Pooled:
    """The answers of all folds as one table, once for each seed; rows are those of the tested units, sorted."""

    def __init__(self, answers: Sequence[Answers], truth: np.ndarray, groups: Sequence[str]) -> None:
        self.task = answers[0].task
        self.rows = np.unique(np.concatenate([one.rows for one in answers]))
        self.truth, self.groups = truth[self.rows], [groups[row] for row in self.rows]
        self._seeds = [self._of_seed([one for one in answers if one.seed == seed]) for seed in _seeds(answers)]

    def _of_seed(self, answers: Sequence[Answers]) -> dict[str, np.ndarray]:
        """Of each tested unit, the mean over the folds that tested it (one, unless fold files overlap)."""
        shape = answers[0].outputs.shape[1:]
        sums, cooled = np.zeros((2, len(self.rows), *shape))
        limit, count = np.zeros((2, len(self.rows)))
        for one in answers:
            at = np.searchsorted(self.rows, one.rows)
            sums[at] += one.outputs
            cooled[at] += outputs_of(one.task, one.logits / (one.temperature or 1.0))
            limit[at] += np.nan if one.threshold is None else one.threshold
            count[at] += 1
        tall = count.reshape(-1, *[1] * len(shape))
        with np.errstate(invalid="ignore"):
            return {"outputs": sums / tall, "cooled": cooled / tall, "threshold": limit / count, "there": count > 0}

    @cached_property
    def found(self) -> Metrics:
        return self.metrics(np.arange(len(self.rows)))

    @cached_property
    def drawn(self) -> list[Metrics]:
        return bootstrap(self.metrics, self.groups)

    def metrics(self, rows: np.ndarray) -> Metrics:
        """The mean over seeds. rows: of this table."""
        found = [self._measured(seed, rows) for seed in self._seeds]
        return {
            name: float(np.mean([one[name] for one in found])) for name in found[0] if all(name in f for f in found)
        }

    def _measured(self, seed: dict[str, np.ndarray], rows: np.ndarray) -> Metrics:
        rows = rows[seed["there"][rows]]
        limit = seed["threshold"][rows]
        found = measure(self.task, seed["outputs"][rows], self.truth[rows], None if np.isnan(limit).any() else limit)
        if isinstance(self.task, Classification):
            found["ece"] = calibration_error(seed["outputs"][rows], self.truth[rows])
            found["ece_with_temperature"] = calibration_error(seed["cooled"][rows], self.truth[rows])
        return found

    def intervals(self) -> dict[str, Interval]:
        return intervals(self.found, self.drawn)


def _seeds(answers: Sequence[Answers]) -> list[int]:
    return sorted({one.seed for one in answers})


def better(a: Pooled, b: Pooled, metric: str) -> Difference:
    """How much better `a` is than `b` on the units that both were tested on; a paired bootstrap by patient."""
    if not np.array_equal(a.rows, b.rows):
        raise ValueError("these were not tested on the same slides")
    return difference(a.found, a.drawn, b.found, b.drawn, metric)


def by_fold(answers: Sequence[Answers], truth: np.ndarray) -> list[Metrics]:
    return [measure(one.task, one.outputs, truth[one.rows], one.threshold) for one in answers]


def mean_and_sd(metrics: Sequence[Metrics]) -> dict[str, dict[str, float]]:
    """Over folds in which the metric is defined."""
    names = dict.fromkeys(name for one in metrics for name in one)
    found = {}
    for name in names:
        values = [one[name] for one in metrics if name in one]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        found[name] = {"mean": float(np.mean(values)), "sd": sd, "folds": len(values)}
    return found


# -- what is written --


def summary(answers: Sequence[Answers], truth: np.ndarray, pooled: Pooled) -> dict[str, Any]:
    """The figures of results.json."""
    folds = by_fold(answers, truth)
    return {
        "folds": [
            {
                "fold": one.fold,
                "seed": one.seed,
                "tested": len(one.rows),
                "threshold": one.threshold,
                "temperature": one.temperature,
                "metrics": metrics,
            }
            for one, metrics in zip(answers, folds, strict=True)
        ],
        "over_folds": mean_and_sd(folds),
        "pooled": {name: value._asdict() for name, value in pooled.intervals().items()},
    }


def summary_lines(found: dict[str, Any]) -> list[str]:
    """A readable table: pooled with its interval, and mean and deviation of the folds."""
    over_folds = found.get("over_folds", {})
    title = f"{'out of fold':22} {'pooled':>7}" if over_folds else f"{'these slides':22} {'value':>7}"
    lines = [f"{title}  {'95 % interval':16}  {'mean of folds ± sd' if over_folds else ''}".rstrip()]
    for name, value in found["pooled"].items():
        folds = over_folds.get(name)
        beside = f"{folds['mean']:.3f} ± {folds['sd']:.3f}" if folds else ""
        lines.append(f"{name:22} {value['value']:7.3f}  {span(value):16}  {beside}".rstrip())
    return lines


def span(value: Mapping[str, float]) -> str:
    """Of an interval, in words."""
    return "-" if np.isnan(value["low"]) else f"{value['low']:.3f} to {value['high']:.3f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """NaN, which JSON has not, becomes null."""
    put(path, (json.dumps(_plain(content), indent=1, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_answers(path: Path, answers: Sequence[Answers], cohort: Cohort) -> None:
    """One row for each unit, fold and seed."""
    units, truth, names = cohort.units, cohort.targets.truth, cohort.targets.names
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    columns = [f"p_{name}" for name in names] if answers[0].outputs.ndim == 2 else ["prediction"]
    writer.writerow([cohort.unit, "seed", "fold", "truth", *columns, "threshold"])
    for one in answers:
        for row, outputs in zip(one.rows, np.atleast_2d(one.outputs.T).T, strict=True):
            said = [f"{value:.6f}" for value in np.ravel(outputs)]
            writer.writerow([units[row], one.seed, one.fold, _answer(truth[row], names), *said, one.threshold])
    put(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _answer(truth: Any, names: Sequence[str]) -> str:
    """The label as it stood in the table."""
    if np.ndim(truth) == 0:
        return names[int(truth)] if len(names) > 1 else f"{truth:g}"
    values = np.asarray(truth)
    if len(names) == len(values) and len(names) > 1:
        return ";".join(name for name, there in zip(names, values, strict=True) if there)
    return ";".join(f"{value:g}" for value in values)
