"""Label tables: `slide,label[,patient][,site][,split]`, matched with slides that have features.

Nothing is left out quietly: unknown, missing and unusable slides are listed, and what contradicts itself is refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .errors import UsageError
from .tables import SlideNames, read_table

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Slides(Protocol):
    """Who has features: an output folder of ours, or files that others made."""

    root: Path

    def slides(self) -> list[str]: ...
    def origin(self) -> Path:
        """What the names of slides are relative to."""
        ...

    def has_features(self, slide: str) -> bool: ...


@dataclass(frozen=True)
class Labels:
    """The labelled slides that can be used, sorted; their rows; and what the user should know about the rest."""

    table: Path
    slides: list[str]
    rows: list[dict[str, str]]
    splits: list[str] | None  # train, val or test, None where the table does not say
    warnings: tuple[str, ...] = ()

    def column(self, name: str) -> list[str] | None:
        """The cells of a column, None if there is none. An empty one is a patient, or a site, of its own."""
        if any(name not in row for row in self.rows):
            return None
        return [row[name] or slide for slide, row in zip(self.slides, self.rows, strict=True)]

    def required(self, name: str) -> list[str]:
        cells = self.column(name)
        if cells is None:
            raise UsageError(f"{self.table}: it has no column {name!r}; there are {', '.join(self.rows[0])}")
        return cells


def read_labels(
    path: str | Path, features: Slides, columns: tuple[str, ...] = ("label",), may_be_empty: bool = False
) -> Labels:
    """Match a label table with slides. `columns` must be there; a cell of them is empty only where it may be.

    Raises UsageError if the table contradicts itself or nothing of it can be used.
    """
    path = Path(path)
    names = SlideNames(features.slides(), features.origin())
    rows, unknown = _match(path, _table(path, columns), names, () if may_be_empty else columns)
    usable = {slide: row for slide, row in rows.items() if features.has_features(slide)}
    warnings = [
        listed("rows name no slide of this store", unknown),
        listed("labelled slides have no features (empty or unfinished)", sorted(rows.keys() - usable.keys())),
        listed("slides of the store have no label", sorted(names.names - rows.keys())),
    ]
    if not usable:
        raise UsageError(
            f"{path}: not one row names a slide with features in {features.root}. {' '.join(filter(None, warnings))}"
        )
    slides = sorted(usable)
    splits = _splits(path, usable, slides)
    return Labels(path, slides, [usable[slide] for slide in slides], splits, tuple(filter(None, warnings)))


def _table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows; CLAM's tables call the slide `slide_id`."""
    rows = read_table(path, columns)
    if rows and "slide" not in rows[0] and "slide_id" in rows[0]:
        return [row | {"slide": row["slide_id"]} for row in rows]
    return read_table(path, ("slide", *columns))


def _match(
    path: Path, table: list[dict[str, str]], names: SlideNames, filled: tuple[str, ...]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    rows: dict[str, dict[str, str]] = {}
    unknown = []
    for row in table:
        for column in filled:
            if not row[column]:
                raise UsageError(f"{path}: {row['slide']!r} has an empty {column}; leave the row out if it is unknown")
        slide = names.find(row["slide"], path)
        if slide is None:
            unknown.append(row["slide"])
        elif rows.setdefault(slide, row) | {"slide": ""} != row | {"slide": ""}:  # one slide may go by two names
            raise UsageError(f"{path}: two rows for {slide} that differ: {rows[slide]} and {row}")
    return rows, unknown


def _splits(path: Path, rows: dict[str, dict[str, str]], slides: list[str]) -> list[str] | None:
    if any("split" not in rows[slide] for slide in slides):
        return None
    for slide in slides:
        if rows[slide]["split"].lower() not in SPLITS:
            raise UsageError(f"{path}: split of {slide} is {rows[slide]['split']!r}; known are {', '.join(SPLITS)}")
    return [SPLITS[rows[slide]["split"].lower()] for slide in slides]


def listed(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {what}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}." if names else ""
