"""Heads side by side: trained and judged on the same folds, their differences tested in pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heads import UnknownName, load_head, reads_pixels
from heads.metrics import holm, main_metric

from .cohort import read_cohort
from .errors import UsageError
from .evaluation import better, write_json
from .judging import Judged
from .learning import Plan
from .training import Trained, checked_name, train_on

COLUMNS = 4  # metrics beside each other; all of them are in the file


@dataclass(frozen=True)
class Comparison:
    """file: where it stands; rows: one for each head; pairs: one for each two of them."""

    file: Path
    metric: str
    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """A readable table: the metric of the comparison first, and as many others as a terminal is wide."""
        names = sorted(self.rows[0]["pooled"], key=lambda name: name != self.metric)[:COLUMNS]
        width = max(len(row["head"]) for row in self.rows) + 2
        lines = [f"{'head':{width}}{'parameters':>11}  " + "  ".join(f"{name:>22}" for name in names)]
        for row in self.rows:
            cells = [_cell(row["pooled"][name]) if name in row["pooled"] else "-" for name in names]
            lines.append(
                f"{row['head']:{width}}{row['parameters']:>11,}  " + "  ".join(f"{cell:>22}" for cell in cells)
            )
        lines += ["", f"differences of {self.metric}, paired bootstrap by patient, p after Holm:"]
        for pair in self.pairs:
            words = f"{pair['a']} - {pair['b']}"
            known = not np.isnan(pair["p"])
            span = f" ({pair['low']:+.3f} to {pair['high']:+.3f})  p {pair['p_holm']:.3g}" if known else " not tested"
            lines.append(f"{words:{2 * width + 3}}{pair['value']:+.3f}{span}")
        return lines


def _cell(value: dict[str, float]) -> str:
    span = "" if np.isnan(value["low"]) else f" ({value['low']:.3f}-{value['high']:.3f})"
    return f"{value['value']:.3f}{span}"


def compare(
    out: str | Path,
    labels: str | Path | None = None,
    *,
    heads: Sequence[str],
    name: str = "compare",
    task: str = "classification",
    target: str = "label",
    group: str = "patient",
    site: str | None = None,
    unit: str = "slide",
    encoder: str | None = None,
    cv: int | None = None,
    splits: str | Path | None = None,
    split_by: str | None = None,
    seeds: int = 1,
    seed: int = 0,
    recipe: str = "default",
    on_head: Callable[[str, Trained], None] | None = None,
    **changes: Any,
) -> Comparison:
    """Train each head as `train` does with these settings, judge all on the same folds (`cv=5` unless told otherwise).

    heads: names, each with the level it reads where that is not the finest: `abmil@1.0`. Each becomes a model of its
    own, OUT/models/<name>/<head>; folds that an earlier call has trained just so are not trained again. `changes`:
    fields of the recipe (epochs, patience, lr, weight_decay, keep). Writes OUT/models/<name>/comparison.json. Raises
    UsageError.
    """
    name, heads = checked_name(name), list(dict.fromkeys(heads))
    if len(heads) < 2:
        raise UsageError(f"--heads {','.join(heads)}: two different heads at least")
    if cv is None and splits is None and split_by is None:
        cv = 5
    changes = {wish: value for wish, value in changes.items() if value is not None}
    plans = {wish: _plan(wish, recipe, changes) for wish in heads}  # all of them, before the first is trained
    asked: dict[str, Any] = {"task": task, "target": target, "group": group, "site": site, "unit": unit}
    cohort = read_cohort(out, labels, encoder=encoder, **asked)
    how, folder = Judged(cv, splits, split_by, seeds, seed), cohort.place / "models" / name
    trained: dict[str, Trained] = {}
    for wish, plan in plans.items():
        trained[wish] = train_on(cohort, plan, how, folder / wish.replace(":", "--"), asked)
        if on_head is not None:
            on_head(wish, trained[wish])
    first = next(iter(trained.values()))
    assert first.pooled is not None
    metric = main_metric(first.pooled.task)
    rows = [_row(wish, one) for wish, one in trained.items()]
    pairs = _pairs(trained, metric)
    file = folder / "comparison.json"
    write_json(file, {"settings": asked | how.words(), "metric": metric, "heads": rows, "differences": pairs})
    return Comparison(file, metric, rows, pairs, first.warnings)


def _plan(wish: str, recipe: str, changes: dict[str, Any]) -> Plan:
    """head[@level] → how it is trained."""
    head, _, level = wish.partition("@")
    try:
        with torch.random.fork_rng(devices=[]):
            load_head(head, None if reads_pixels(head) else 64, 2)
    except UnknownName as error:
        raise UsageError(f"--heads {wish}: {error}") from error
    try:
        return Plan(head, {}, recipe, changes, float(level) if level else None)
    except ValueError as error:
        raise UsageError(f"--heads {wish}: {level!r} is no number of µm/px") from error


def _row(wish: str, one: Trained) -> dict[str, Any]:
    assert one.results is not None
    return {"head": wish, "parameters": one.parameters, "level": one.results["settings"]["level"]} | {
        key: one.results[key] for key in ("pooled", "over_folds")
    }


def _pairs(trained: dict[str, Trained], metric: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for a, b in combinations(trained, 2):
        x, y = trained[a].pooled, trained[b].pooled
        assert x is not None
        assert y is not None
        found.append({"a": a, "b": b, **better(x, y, metric)._asdict()})
    adjusted = holm([pair["p"] for pair in found])
    return [pair | {"p_holm": p} for pair, p in zip(found, adjusted, strict=True)]
