"""Where a trained model looked against what people annotated: a row of figures for each slide, means, pictures."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heads.metrics import Interval, Metrics, bootstrap, intervals

from .annotations import find_annotations, read_annotation
from .draw import annotated, save_png
from .errors import SlideError, UsageError
from .evaluation import span, write_json
from .external import seen
from .labels import listed
from .looks import look_at
from .outcome import Outcome, Report, failed
from .output import read_run
from .overlap import SHARES, Ground, region_figures, tile_figures
from .places import placed
from .prediction import Model, choose_models
from .stages import versions
from .store import BagStore, SlideGroup, short_name
from .tables import SlideNames, read_table

SCORES = ("weight", "raw")
TILES, REGIONS = ("tiles", "looked_at", "positive"), ("regions", "chosen")
COUNTS = TILES + REGIONS  # of a row: told, but no figures to be averaged
RATES = ("hit_rate", "hit_rate_of_all", "positive_rate", "positive_rate_of_all")
OF_TILES = ("annotated_share", "annotated_in_tiles", *(f"auc_{score}" for score in SCORES))
OF_TILES += (*(f"dice_{k}" for k in SHARES), *(f"dice_inside_{k}" for k in SHARES))
MEANS = OF_TILES + RATES
COLUMNS = ("slide", "status", "annotation", *TILES, *OF_TILES, *REGIONS, *RATES, "message")


@dataclass(frozen=True)
class Row:
    """One slide of the store: what became of it, its annotation's file, its figures where there are any."""

    outcome: Outcome
    annotation: str = ""
    figures: Metrics | None = None

    def cells(self) -> list[str]:
        known: dict[str, Any] = {"annotation": self.annotation} | (self.figures or {})
        known |= {name: getattr(self.outcome, name) for name in ("slide", "status", "message")}
        return [_cell(known.get(name, "")) for name in COLUMNS]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return str(value)


@dataclass(frozen=True)
class Evaluated:
    """folder: of annotations.csv, annotations.json and the pictures. slides: over how many each mean is."""

    folder: Path
    rows: tuple[Row, ...]
    means: dict[str, Interval]
    slides: dict[str, int]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return Report(tuple(row.outcome for row in self.rows)).exit_code

    def lines(self) -> list[str]:
        """A readable table: each mean with its interval; Dice with a column for each share of tiles."""
        counts = Report(tuple(row.outcome for row in self.rows)).counts
        known = [row.figures for row in self.rows if row.figures is not None]
        tiles, looked, positive = (int(sum(figures[name] for figures in known)) for name in TILES)
        lines = [f"failed  {o.slide}\n        {o.stage}: {o.message}" for o in self._failures()]
        lines += [
            f"{counts['done']} slides with annotations, {counts.get('skipped', 0)} without; {positive} of {tiles} "
            f"tiles are positive, {looked} were looked at",
            "",
            f"{'':22} {'mean':>7}  {'95 % interval':16}  slides",
        ]
        for name, value in self.means.items():
            if not name.startswith(("dice", "annotated")):
                lines.append(f"{name:22} {value.value:7.3f}  {span(value._asdict()):16}  {self.slides[name]:>6}")
        lines += ["", f"{'top % of the tiles':22} " + "  ".join(f"{k:>5}" for k in SHARES) + "  slides"]
        for name in ("dice", "dice_inside"):
            each = [self.means.get(f"{name}_{k}") for k in SHARES]
            cells = "  ".join("    -" if one is None else f"{one.value:5.3f}" for one in each)
            lines.append(f"{name:22} {cells}  {self.slides.get(f'{name}_{SHARES[0]}', 0):>6}")
        return lines

    def _failures(self) -> list[Outcome]:
        return [row.outcome for row in self.rows if row.outcome.status == "failed"]


def evaluate(
    out: str | Path,
    model: str | Path | Sequence[str],
    annotations: str | Path,
    *,
    folds: bool = False,
    threshold: float = 0.5,
    score: str = "weight",
    patients: str | Path | None = None,
) -> Evaluated:
    """Figures of the slides of an output folder of `run` that are annotated.

    model: as for `predict`; slides are predicted anew from their features, unless they were only zoomed into.
    annotations: a folder, see annotations.py. threshold: the annotated share of a tile from which on it is positive.
    score: by which tiles are ranked, weight or raw. patients: a table slide,patient; intervals are drawn by patient,
    else by slide. Writes OUT/evaluations/<model>/annotations.csv, annotations.json and a picture of each slide. Raises
    UsageError before anything is written if an annotation cannot be used.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"--threshold is a share in 0..1, above 0, not {threshold:g}")
    if score not in SCORES:
        raise UsageError(f"--score must be one of {', '.join(SCORES)}, not {score!r}")
    store = BagStore(out)
    root = read_run(store.root).get("root")
    if root is None:
        raise UsageError(f"{store.root} is no output folder of `slidestream run`")
    trained = choose_models(model, store.root, folds)
    slides = store.slides()
    files, notes = find_annotations(annotations, {slide: placed(root) / slide for slide in slides})
    groups, more = _patients(patients, slides, files)
    _require_readable(store, files)
    folder = store.root / "evaluations" / trained.name
    rows = tuple(_rows(store, trained, files, folder, threshold, score))
    done = [row for row in rows if row.figures is not None]
    if not done:
        first = next(row.outcome for row in rows if row.annotation)
        raise UsageError(f"{store.root}: no annotated slide can be evaluated; {first.slide}: {first.message}")
    means, counts = _means(done, groups)
    notes = [*notes, *more, *seen(trained, (row.outcome.slide for row in done))]
    found = Evaluated(folder, rows, means, counts, tuple(notes))
    settings = {"threshold": threshold, "score": score, "patients": None if patients is None else str(patients)}
    _write(found, trained.name, {"annotations": str(annotations), "settings": settings})
    return found


def _patients(
    table: str | Path | None, slides: Sequence[str], annotated: Mapping[str, Path]
) -> tuple[dict[str, str], list[str]]:
    """{slide: patient}, and a note on annotated slides of whom the table says nothing: each is one of its own."""
    if table is None:
        return {}, []
    names, known = SlideNames(slides), dict[str, str]()
    for row in read_table(table, ("slide", "patient")):
        slide = names.find(row["slide"], Path(table))
        if slide is not None and row["patient"] and known.setdefault(slide, row["patient"]) != row["patient"]:
            raise UsageError(f"{table}: two patients of {slide}: {known[slide]} and {row['patient']}")
    unknown = [slide for slide in annotated if slide not in known]
    return known, [f"{table}: {listed('annotated slides have no patient', unknown)}"] if unknown else []


def _require_readable(store: BagStore, files: Mapping[str, Path]) -> None:
    """Every annotation is read once before the first slide is predicted, so that all faults are told at once."""
    faults = []
    for slide, path in files.items():
        try:
            _ground(store.group(slide), path)
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("\n".join(faults))


def _ground(group: SlideGroup, path: Path) -> Ground:
    attrs = group.attrs
    size = attrs["slide"]["width"], attrs["slide"]["height"]
    return Ground(read_annotation(path, size, attrs["scale"]["mpp"]), size)


def _rows(
    store: BagStore, model: Model, files: Mapping[str, Path], folder: Path, threshold: float, score: str
) -> Iterator[Row]:
    for slide in store.slides():
        group, path = store.group(slide), files.get(slide)
        if path is None:
            yield Row(Outcome(slide, "skipped", "evaluate", message="no annotation"))
        elif group.status == "empty":
            yield Row(Outcome(slide, "empty", "evaluate", message="no tissue, so no tiles"), str(path))
        else:
            try:
                figures = _figures(store, slide, model, _ground(group, path), folder, threshold, score)
                yield Row(Outcome(slide, "done", "evaluate"), str(path), figures)
            except SlideError as error:
                yield Row(failed(slide, error), str(path))


def _figures(
    store: BagStore, slide: str, model: Model, ground: Ground, folder: Path, threshold: float, score: str
) -> Metrics:
    look, group = look_at(store, slide, model), store.group(slide)
    found = tile_figures(ground, look.boxes, look.weight, look.raw, threshold, score)
    ranked = look.weight if score == "weight" else look.raw
    auc = found[f"auc_{score}"]
    words = "no AUC: tiles of one kind" if np.isnan(auc) else f"AUC {auc:.3f}"
    caption = f"{slide}   {model.name}   colour: rank of the {score}   red: annotated   {words}"
    picture = annotated(group.thumbnail(), group.mask(), look.boxes, ranked, ground.mask, caption)
    place = Path(slide)
    save_png(folder / place.parent / short_name(place.name, ".png"), picture)
    return found | region_figures(ground, look.choice, threshold)


def _means(rows: Sequence[Row], patients: Mapping[str, str]) -> tuple[dict[str, Interval], dict[str, int]]:
    """Over the slides for which a figure is defined, with an interval where these are of two patients or more."""
    names = [row.outcome.slide for row in rows]
    groups = [patients.get(name, name) for name in names]
    table = np.array([[row.figures[name] for name in MEANS] for row in rows if row.figures is not None])
    known = np.isfinite(table)

    def means(drawn: np.ndarray) -> Metrics:
        counts, sums = known[drawn].sum(axis=0), np.where(known[drawn], table[drawn], 0.0).sum(axis=0)
        return {name: float(sums[i] / counts[i]) for i, name in enumerate(MEANS) if counts[i]}

    found = intervals(means(np.arange(len(rows))), bootstrap(means, groups))
    for i, name in enumerate(MEANS):
        if len({group for group, there in zip(groups, known[:, i], strict=True) if there}) == 1:
            found[name] = Interval(found[name].value, np.nan, np.nan)
    return found, {name: int(known[:, i].sum()) for i, name in enumerate(MEANS)}


def _write(found: Evaluated, model: str, about: dict[str, Any]) -> None:
    counts = Report(tuple(row.outcome for row in found.rows)).counts
    known = [row.figures for row in found.rows if row.figures is not None]
    content = (
        {"model": model}
        | about
        | {
            "slides": counts,
            "counts": {name: int(sum(figures[name] for figures in known)) for name in COUNTS},
            "means": {name: value._asdict() | {"slides": found.slides[name]} for name, value in found.means.items()},
            "notes": list(found.notes),
            "versions": versions(),
        }
    )
    write_json(found.folder / "annotations.json", content)
    path = found.folder / "annotations.csv"
    part = path.with_name(f"{path.name}.partial")
    with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([COLUMNS, *(row.cells() for row in found.rows)])
    os.replace(part, path)
