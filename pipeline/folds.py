"""Who is trained on, who validates, who is tested: stratified, and no patient (or site) on both sides.

Validation decides when training ends and where thresholds lie; a test slide decides nothing.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heads.train import split

from .errors import UsageError
from .tables import SlideNames, read_table

LARGE = 1 / 3  # of the slides, the largest ones, are the test of `--split-by tiles`


@dataclass(frozen=True)
class Fold:
    """Rows of a cohort, each in at most one part; `words` say how the parts were made."""

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    words: str = ""

    def parts(self) -> dict[str, np.ndarray]:
        """Those that are not empty."""
        return {part: rows for part in ("train", "val", "test") if len(rows := getattr(self, part))}


def owners(count: int, *columns: Sequence[str] | None) -> np.ndarray:
    """(count,) int: rows that share a patient, or a site, or are joined by a row that shares either, are one's.

    Sites kept whole keep a head from being judged by the scanners and stains that it was trained on (Howard et al.,
    Nature Communications 2021).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    given = [np.unique(np.asarray(column), return_inverse=True)[1] for column in columns if column is not None]
    if not given:
        return np.arange(count)
    rows, nodes, start = np.arange(count), [], count
    for column in given:
        nodes.append(column + start)
        start += int(column.max()) + 1
    links = np.concatenate([np.stack([rows, to]) for to in nodes], axis=1)
    graph = coo_array((np.ones(links.shape[1], bool), (links[0], links[1])), shape=(start, start))
    return np.asarray(connected_components(graph, directed=False)[1][:count])


def from_table(splits: Sequence[str], strata: np.ndarray, whose: np.ndarray, names: Sequence[str], seed: int) -> Fold:
    """The parts that a label table gives; where it has no `val`, a fifth of the training slides."""
    given, rows = np.asarray(splits), np.arange(len(strata))
    _refuse_shared(given, whose, names)
    train, val, test = (rows[given == part] for part in ("train", "val", "test"))
    fold = Fold("", train, val, test, "by the table")
    return fold if len(fold.val) else _with_validation(fold, strata, whose, seed)


def all_for_training(strata: np.ndarray, whose: np.ndarray, seed: int) -> Fold:
    nobody = np.empty(0, int)
    return _with_validation(Fold("", np.arange(len(strata)), nobody, nobody), strata, whose, seed)


def cross_validation(strata: np.ndarray, whose: np.ndarray, count: int, seed: int) -> list[Fold]:
    """`count` folds, each tested once; a fifth of the rest validates. Raises UsageError where slides are too few."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if count < 2:
        raise UsageError(f"--cv {count}: two folds at least")
    if len(np.unique(whose)) < count:
        raise UsageError(f"--cv {count}: only {len(np.unique(whose))} patients (or sites) that could be parted")
    kind = StratifiedGroupKFold if len(np.unique(whose)) < len(whose) else StratifiedKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer slides than folds: not in all of them
        made = list(kind(count, shuffle=True, random_state=seed).split(strata, _dense(strata, count), whose))
    nobody = np.empty(0, int)
    return [
        _with_validation(Fold(f"fold{i}", rest, nobody, test), strata, whose, seed)
        for i, (rest, test) in enumerate(made)
    ]


def _dense(strata: np.ndarray, count: int) -> np.ndarray:
    """Strata of fewer slides than folds are put together: scikit-learn balances what can be balanced."""
    names, at, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    return np.where(sizes[at] < count, -1, names[at])


def by_tiles(tiles: np.ndarray, strata: np.ndarray, whose: np.ndarray, seed: int) -> Fold:
    """Trained on small bags, tested on the largest third. Patients that have both go with the large ones."""
    order = np.argsort(tiles, kind="stable")
    large = np.isin(whose, whose[order[len(order) - max(1, round(len(order) * LARGE)) :]])
    if large.all():
        raise UsageError("--split-by tiles: patients (or sites) with large slides have all the small ones too")
    rows, nobody = np.arange(len(tiles)), np.empty(0, int)
    fold = _with_validation(Fold("tiles", rows[~large], nobody, rows[large]), strata, whose, seed)
    small = f"{tiles[~large].min()}-{tiles[~large].max()}"
    words = f"trained on slides of {small} tiles, tested on {tiles[large].min()}-{tiles[large].max()}"
    return replace(fold, words=f"{words}; {fold.words}")


def _with_validation(fold: Fold, strata: np.ndarray, whose: np.ndarray, seed: int) -> Fold:
    """A fifth of the training slides is parted off. Raises UsageError where that cannot be done."""
    where, parted = fold.name or "training", len(np.unique(whose)) < len(whose)
    if not len(fold.train):
        raise UsageError(f"{where}: there is no slide to train on")
    both = _on_both_sides(strata[fold.train], whose[fold.train])
    held, kept = fold.train[both], fold.train[~both]
    try:
        inner, outer = split(strata[held], whose[held] if parted else None, seed=seed)
    except ValueError as error:
        raise UsageError(f"{where}: no validation set can be parted off: {error}") from error
    words = f"validation: a fifth of the training slides{', parted by patient or site' if parted else ''}"
    words += f", {len(kept)} rare ones never" if len(kept) else ""
    words = f"{fold.words}; {words}" if fold.words else words
    return replace(fold, train=np.sort(np.concatenate([held[inner], kept])), val=held[outer], words=words)


def _on_both_sides(strata: np.ndarray, whose: np.ndarray) -> np.ndarray:
    """(n,) bool: rows that may validate. A stratum that one owner alone has is rather trained on, with all its owner's.

    All of them where fewer than two strata would be left: then it is for `split` to say what is missing.
    """
    alone = [name for name in np.unique(strata) if len(np.unique(whose[strata == name])) < 2]
    free = ~np.isin(whose, whose[np.isin(strata, alone)])
    return free if len(np.unique(strata[free])) > 1 else np.ones(len(strata), bool)


def _refuse_shared(given: np.ndarray, whose: np.ndarray, names: Sequence[str]) -> None:
    parts: dict[int, set[str]] = defaultdict(set)
    for owner, part in zip(whose.tolist(), given.tolist(), strict=True):
        parts[owner].add(part)
    shared = sorted({name for owner, name in zip(whose.tolist(), names, strict=True) if len(parts[owner]) > 1})
    if shared:
        raise UsageError(
            "patients on more than one side of the split, which would flatter the result: " + ", ".join(shared[:5])
        )


# -- fold files --


def read_folds(
    place: str | Path, index: dict[str, int], strata: np.ndarray, whose: np.ndarray, names: Sequence[str], seed: int
) -> tuple[list[Fold], list[str]]:
    """Fold files as CLAM and HIPT publish them, and the cells that name no slide of ours.

    `index`: the row of each slide, or patient. `place`: one file, or a folder of `splits_0.csv`, `splits_1.csv`, …:
    either the columns train, val and test list slides, or (`_bool`) the first column names a slide and the others say
    True or False. Raises UsageError.
    """
    known = SlideNames(index)
    folds, unknown = [], set()
    for path in _fold_files(Path(place)):
        parts: dict[str, set[int]] = {part: set() for part in ("train", "val", "test")}
        for cell, part in _members(path):
            slide = known.find(cell, path)
            if slide is None:
                unknown.add(cell)
            else:
                parts[part].add(index[slide])
        fold = _checked(path, parts, whose, names)
        folds.append(fold if len(fold.val) else _with_validation(fold, strata, whose, seed))
    return folds, sorted(unknown)


def _fold_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = [path for path in place.glob("splits_*.csv") if path.stem.removeprefix("splits_").isdigit()]
    found = found or list(place.glob("splits_*_bool.csv"))
    if not found:
        raise UsageError(f"{place}: no splits_0.csv, splits_1.csv, … there")
    return sorted(found, key=lambda path: int(path.stem.removeprefix("splits_").removesuffix("_bool")))


def _members(path: Path) -> list[tuple[str, str]]:
    """(slide, part) of every cell that says so."""
    table = read_table(path, ("train", "test"))
    parts = [part for part in ("train", "val", "test") if part in table[0]] if table else []
    cells = {row[part].lower() for row in table for part in parts}
    if cells and cells <= {"true", "false"}:
        first = next(iter(table[0]), "")
        return [(row[first], part) for row in table for part in parts if row[part].lower() == "true"]
    return [(row[part], part) for row in table for part in parts if row[part]]


def _checked(path: Path, parts: dict[str, set[int]], whose: np.ndarray, names: Sequence[str]) -> Fold:
    given = np.full(len(whose), "", dtype="<U5")
    for part, rows in parts.items():
        twice = [row for row in sorted(rows) if given[row]]
        if twice:
            raise UsageError(f"{path}: {names[twice[0]]} is in {given[twice[0]]} and in {part}")
        given[sorted(rows)] = part
    for part, word in (("train", "training"), ("test", "test")):
        if not parts[part]:
            raise UsageError(f"{path}: not one of its {word} slides is here")
    used = given != ""
    try:
        _refuse_shared(given[used], whose[used], [name for name, there in zip(names, used, strict=True) if there])
    except UsageError as error:
        raise UsageError(f"{path}: {error} (`--group slide` would take the file as it is)") from error
    train, val, test = (np.array(sorted(parts[part]), int) for part in ("train", "val", "test"))
    return Fold(path.stem.removesuffix("_bool"), train, val, test, f"by {path.name}")
