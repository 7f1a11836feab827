"""Label tables: `slide,label[,patient][,split]`, matched with the slides of a store.

Nothing is left out quietly: unknown, missing and unusable slides are listed, and what contradicts itself is refused.
"""

from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError
from .output import read_run
from .store import BagStore
from .tables import SlideNames, read_table

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Labels:
    """The labelled slides that can be used: parallel lists, and what the user should know about the rest."""

    slides: list[str]
    labels: list[str]
    patients: list[str] | None
    splits: list[str] | None
    warnings: tuple[str, ...] = ()


def read_labels(path: str | Path, store: BagStore) -> Labels:
    """Match a label table with a store. Raises UsageError if it contradicts itself or nothing of it can be used."""
    root = read_run(store.root).get("root")
    if root is None:
        raise UsageError(f"{store.root} is no output folder of `slidestream run`")
    table = read_table(path, ("slide", "label"))
    names = SlideNames(store.slides(), Path(root))
    rows, unknown = _match(Path(path), table, names)
    usable = {slide: row for slide, row in rows.items() if store.group(slide).status == "complete"}
    warnings = [
        _listed("rows name no slide of this store", unknown),
        _listed("labelled slides have no features (empty or unfinished)", sorted(rows.keys() - usable.keys())),
        _listed("slides of the store have no label", sorted(names.names - rows.keys())),
    ]
    if not usable:
        raise UsageError(
            f"{path}: not one row names a slide with features in {store.root}. {' '.join(filter(None, warnings))}"
        )
    slides = sorted(usable)
    return Labels(
        slides,
        [usable[slide]["label"] for slide in slides],
        _column(usable, slides, "patient"),
        _splits(path, usable, slides),
        tuple(filter(None, warnings)),
    )


def _match(path: Path, table: list[dict[str, str]], names: SlideNames) -> tuple[dict[str, dict[str, str]], list[str]]:
    rows: dict[str, dict[str, str]] = {}
    unknown = []
    for row in table:
        if not row["label"]:
            raise UsageError(f"{path}: {row['slide']!r} has an empty label; leave the row out if it is unknown")
        slide = names.find(row["slide"], path)
        if slide is None:
            unknown.append(row["slide"])
        elif rows.setdefault(slide, row) | {"slide": ""} != row | {"slide": ""}:  # one slide may go by two names
            raise UsageError(f"{path}: two rows for {slide} that differ: {rows[slide]} and {row}")
    return rows, unknown


def _column(rows: dict[str, dict[str, str]], slides: list[str], name: str) -> list[str] | None:
    if any(name not in rows[slide] for slide in slides):
        return None
    return [rows[slide][name] or slide for slide in slides]  # an empty patient cell is a patient of its own


def _splits(path: str | Path, rows: dict[str, dict[str, str]], slides: list[str]) -> list[str] | None:
    if any("split" not in rows[slide] for slide in slides):
        return None
    for slide in slides:
        if rows[slide]["split"].lower() not in SPLITS:
            raise UsageError(f"{path}: split of {slide} is {rows[slide]['split']!r}; known are {', '.join(SPLITS)}")
    return [SPLITS[rows[slide]["split"].lower()] for slide in slides]


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}." if names else ""
