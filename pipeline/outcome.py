"""What became of each slide: one row, one table, `slides.csv`."""

import csv
import io
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import SlideError
from .meter import Meter
from .places import put
from .saving import Saving


@dataclass(frozen=True, slots=True)
class Outcome:
    """One slide's row. status: done, empty, failed or skipped; `message` is the cause, or a done one's warnings."""

    slide: str
    status: str
    stage: str = ""
    error: str = ""
    message: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    reader: str = ""
    width: int | None = None
    height: int | None = None
    tissue_mm2: float | None = None
    tiles: int | None = None
    seconds: float | None = None
    bound_by: str = ""
    tiles_per_s: float | None = None  # these and the shares of time below: see Meter.rates
    mpx_per_s: float | None = None
    encoder_busy: float | None = None
    waited_for_tiles: float | None = None
    waited_for_slides: float | None = None
    waited_for_writer: float | None = None
    readers_busy: float | None = None
    disk: float | None = None
    writer_busy: float | None = None
    unneeded: float | None = None

    @property
    def ok(self) -> bool:
        return self.status in ("done", "empty")

    def after(self, seconds: float) -> "Outcome":
        return replace(self, seconds=round((self.seconds or 0) + seconds, 3))

    def at_speed(self, meter: Meter) -> "Outcome":
        rates: dict[str, Any] = meter.rates()
        return replace(self, bound_by=meter.bound_by, **rates) if meter.tiles else self


COLUMNS = tuple(field.name for field in fields(Outcome))
KINDS = {f.name: int if "int" in str(f.type) else float for f in fields(Outcome) if f.default is None}


def failed(slide: str, error: SlideError) -> Outcome:
    """The row of a slide that is at fault; its path on this machine is told as the slide's name in the table."""
    message = " ".join(error.reason.replace(error.path, slide).split())
    return Outcome(slide, "failed", error.stage, type(error).__name__, message)


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """The table, sorted by slide, in one step: whoever reads it sees the old or the new one, never half of it."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    for outcome in sorted(outcomes, key=lambda o: o.slide):
        writer.writerow({name: _cell(getattr(outcome, name)) for name in COLUMNS})
    put(path, table.getvalue().encode("utf-8", "surrogateescape"))


def _cell(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def read_outcomes(path: Path, but: Container[str] = ()) -> list[Outcome]:
    """The rows of a slides.csv, without those of the slides `but`; none if there is no such file."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    rows = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if row.get("slide") in but:
            continue
        cells = {
            name: (KINDS[name](row[name]) if row.get(name) else None) if name in KINDS else row.get(name) or ""
            for name in COLUMNS
        }
        rows.append(Outcome(**cells))  # type: ignore[arg-type]
    return rows


@dataclass(frozen=True)
class Report:
    """What a run did: a row per slide, where the time of its encoders went, seconds; what zooming saved."""

    outcomes: tuple[Outcome, ...]
    meter: Meter = field(default_factory=Meter)
    seconds: float = 0.0
    interrupted: bool = False
    saving: Saving | None = None

    @property
    def tiles_encoded(self) -> int:
        return self.meter.tiles

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(outcome.status for outcome in self.outcomes))

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @property
    def exit_code(self) -> int:
        """0 all done (`empty` is a success), 2 nothing succeeded, 3 some failed, 130 interrupted."""
        if self.interrupted:
            return 130
        if not self.failures:
            return 0
        return 3 if any(outcome.ok for outcome in self.outcomes) else 2
