"""Who is tested, and how often: the folds of a cohort."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .bags import choose_level
from .cohort import Cohort
from .errors import UsageError
from .folds import Fold, all_for_training, by_tiles, cross_validation, from_table, read_folds
from .labels import listed


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

    def whole(self, cohort: Cohort) -> Fold:
        """The fold of the model at the top of the folder: all slides but the table's `test`."""
        strata, whose = cohort.targets.strata, cohort.whose
        if cohort.splits is None:
            return all_for_training(strata, whose, self.seed)
        return from_table(cohort.splits, strata, whose, cohort.groups, self.seed)

    def folds(self, cohort: Cohort) -> tuple[list[tuple[int, Fold]], list[str]]:
        """Those that are judged, with their seeds, and notes. The table's `test` slides are in none of them."""
        rows = np.arange(len(cohort)) if cohort.splits is None else np.flatnonzero(np.array(cohort.splits) != "test")
        folds: list[tuple[int, Fold]] = []
        notes: list[str] = []
        for seed in range(self.seed, self.seed + self.seeds):
            found, notes = self._folds(cohort, rows, seed)
            folds += [(seed, fold) for fold in found]
        return folds, notes

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
            bags = cohort.bags(choose_level(cohort.source().levels, None))
            folds = [by_tiles(np.array([len(bags[int(row)]) for row in rows]), strata, whose, seed)]
        elif self.seeds > 1:
            raise UsageError("--seeds: say with --cv, --splits or --split-by who is tested")
        else:
            folds = []
        return [replace(fold, train=rows[fold.train], val=rows[fold.val], test=rows[fold.test]) for fold in folds], []
