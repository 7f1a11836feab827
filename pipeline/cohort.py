"""Labelled bags: who there is, what is asked of each, and what may not be parted by a split."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from .bags import Bags, Features, Store
from .errors import UsageError
from .featurefiles import FeatureFiles
from .folds import owners
from .labels import Labels, read_labels
from .pictures import ImageFolder, Pictures
from .places import is_remote, placed
from .targets import Targets, columns_of, doubts, read_targets

UNITS = ("slide", "patient")


@dataclass(frozen=True, eq=False)
class Cohort:
    """n units (slides, or patients with all their slides), sorted by name.

    whose: (n,) int, units of one number share a patient or a site. groups: (n,) names by which intervals are drawn.
    splits: what the table says, None where it does not.
    """

    place: Path
    unit: str  # slide or patient
    units: list[str]
    slides: list[tuple[str, ...]]
    targets: Targets
    whose: np.ndarray
    groups: list[str]
    splits: list[str] | None
    features: Features | None  # None: a folder of images
    pictures: Callable[[], Pictures] | None  # None: a folder of feature files
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.units)

    def index(self) -> dict[str, int]:
        """The row of each unit, and of each of its slides."""
        slides = {slide: row for row, slides in enumerate(self.slides) for slide in slides}
        return slides | {unit: row for row, unit in enumerate(self.units)}

    @lru_cache(maxsize=2)  # noqa: B019 - a cohort lives as long as the command
    def source(self, pixels: bool = False) -> Features | Pictures:
        """Where heads of pixels, or of features, read. Raises UsageError where there are none."""
        if pixels:
            if self.pictures is None:
                raise UsageError(f"{self.place} holds feature files: the head reads pixels, so give a folder of images")
            return self.pictures()
        if self.features is None:
            raise UsageError(
                f"{self.place} holds images, but the head reads features: `slidestream run {self.place} -o OUT`"
            )
        return self.features

    @lru_cache(maxsize=2)  # noqa: B019
    def state(self, pixels: bool = False) -> list[list[str]]:
        """Another one when the features, or pixels, of any slide are others."""
        source = self.source(pixels)
        return [[source.state(slide) for slide in slides] for slides in self.slides]

    @lru_cache(maxsize=4)  # noqa: B019
    def bags(self, level: float | None, pixels: bool = False) -> Bags:
        """Read at this level (µm/px), or all levels; or pictures."""
        return Bags(self.source(pixels), self.slides, level)


def read_cohort(
    out: str | Path,
    labels: str | Path | None,
    *,
    task: str = "classification",
    target: str = "label",
    group: str = "patient",
    site: str | None = None,
    unit: str = "slide",
    encoder: str | None = None,
    names: Sequence[str] | None = None,
) -> Cohort:
    """`out`: an output folder of `run`, a folder of feature files, or one of images. `group` and `site` are columns of
    the table, `names` the classes that a model knows. labels: None for images that lie in a folder for each class.

    A table without the column `patient` has a patient for each slide; any other column that is named must be there.
    Raises UsageError.
    """
    if unit not in UNITS:
        raise UsageError(f"--unit must be one of {', '.join(UNITS)}, not {unit!r}")
    target, group, site = target.lower(), group.lower(), site and site.lower()  # as tables are read
    place = place_of(out)
    known = _labels(place, labels, task, target)
    patients = known.column(group) if group == "patient" and unit == "slide" else known.required(group)
    sites = None if site is None else known.required(site)
    features = place.features(known.slides, encoder)
    pictures = None if isinstance(place, FeatureFiles) else partial(place.pictures, known.slides)
    members = _members(known, patients if unit == "patient" else None)
    first = [rows[0] for rows in members.values()]
    rows = [known.rows[i] for i in first]
    _refuse_unequal(known, members, columns_of(task, target))
    targets = read_targets(task, rows, target, known.table, names)
    chosen = [None if column is None else [column[i] for i in first] for column in (patients, sites)]
    splits = known.splits
    units = list(members)
    return Cohort(
        place.root,
        unit,
        units,
        [tuple(known.slides[i] for i in rows) for rows in members.values()],
        targets,
        owners(len(units), *chosen),
        chosen[0] or units,
        None if splits is None else _of_units(known, members, splits),
        features,
        pictures,
        (*known.warnings, *doubts(targets)),
    )


def place_of(out: str | Path) -> Store | FeatureFiles | ImageFolder:
    """Where features or pixels are: a folder that `run` made, feature files of others, or images."""
    if is_remote(placed(out)) or (Path(out) / "run.json").is_file():
        return Store(out)
    if FeatureFiles.are_in(out):
        return FeatureFiles(out)
    return ImageFolder(out) if ImageFolder.is_one(out) else Store(out)


def _labels(place: Store | FeatureFiles | ImageFolder, labels: str | Path | None, task: str, target: str) -> Labels:
    if labels is not None:
        return read_labels(labels, place, columns_of(task, target), may_be_empty=task == "multilabel")
    if not isinstance(place, ImageFolder):
        raise UsageError(f"--labels is needed: {place.root} does not say what its slides are")
    return place.labels(target)


def _members(known: Labels, patients: Sequence[str] | None) -> dict[str, list[int]]:
    """The rows of each unit, sorted."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, slide in enumerate(known.slides):
        found[slide if patients is None else patients[i]].append(i)
    return dict(sorted(found.items()))


def _refuse_unequal(known: Labels, members: dict[str, list[int]], columns: tuple[str, ...]) -> None:
    for unit, rows in members.items():
        for column in columns:
            said = sorted({known.rows[i][column] for i in rows})
            if len(said) > 1:
                raise UsageError(f"{known.table}: the slides of {unit} have different {column}s: {', '.join(said)}")


def _of_units(known: Labels, members: dict[str, list[int]], splits: Sequence[str]) -> list[str]:
    for unit, rows in members.items():
        if len({splits[i] for i in rows}) > 1:
            raise UsageError(
                f"{known.table}: patients on more than one side of the split, which would flatter the result: {unit}"
            )
    return [splits[rows[0]] for rows in members.values()]
