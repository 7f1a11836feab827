"""Is everything in an output folder whole? All of it is opened and read again, and nothing is written.

One slide at a time, so that thousands take no more memory than one. A run may be going on meanwhile: what it is writing
is unfinished, not damaged.
"""

import csv
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .arrays import read_attrs
from .errors import SlideError, UsageError
from .fingerprint import fingerprint, stamp
from .leases import held, living
from .mending import KINDS, Commands, Finding, merged, removed
from .meter import Meter
from .outcome import Outcome, read_outcomes
from .output import read_run
from .places import is_remote, placed
from .store import BagStore, SlideGroup, group_folders, group_path
from .wholeness import Examination, stray

if TYPE_CHECKING:
    from .reencoding import Reencoding

RUN_KEYS = ("root", "recipe", "encoders", "commands")


class Progress(Protocol):
    def start(self, total: int, todo: int) -> None: ...
    def slide(self, outcome: Outcome) -> None: ...
    def tiles(self, count: int, so_far: Meter) -> None: ...


class Silent:
    def start(self, total: int, todo: int) -> None: ...
    def slide(self, outcome: Outcome) -> None: ...
    def tiles(self, count: int, so_far: Meter) -> None: ...


@dataclass(frozen=True)
class Verification:
    """What was found. slides: all that the folder knows of; deep: which tiles were encoded anew, and how they compare,
    a line for each encoder."""

    slides: tuple[str, ...]
    findings: tuple[Finding, ...]
    deep: tuple[str, ...] = ()

    @property
    def states(self) -> dict[str, str]:
        """{slide: "whole", or the worst that was found of it}."""
        worst = dict.fromkeys(self.slides, "whole")
        for kind in reversed(KINDS[:-1]):
            worst |= {finding.slide: kind for finding in self.findings if finding.kind == kind and finding.slide}
        return worst

    @property
    def is_whole(self) -> bool:
        return all(finding.kind == "note" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 all is whole, 3 something is not; as of `run`, where some slides have failed."""
        return 0 if self.is_whole else 3

    @property
    def commands(self) -> list[str]:
        """What mends all of it, in this order."""
        return merged(finding.mend for finding in self.findings if finding.kind != "note")

    def lines(self) -> list[str]:
        """A line for each finding, the sum, and the commands."""
        counts = Counter(self.states.values())
        told = [f"{counts[kind]} {kind}" for kind in ("whole", *KINDS) if counts[kind]]
        own = [finding for finding in self.findings if not finding.slide and finding.kind != "note"]
        told = [f"{len(self.slides)} slides: {', '.join(told) or 'none'}"]
        told += [f"{len(own)} of the folder itself"] if own else []
        notes = sum(finding.kind == "note" for finding in self.findings)
        told += [f"{notes} note{'s' if notes > 1 else ''}"] if notes else []
        mend = [f"  {command}" for command in self.commands]
        return [
            *map(str, self.findings),
            *self.deep,
            "; ".join(told),
            *(["to mend it:", *mend] if mend else []),
        ]


def verify(out: str | Path, deep: bool = False, *, progress: Progress | None = None) -> Verification:
    """Read everything in an output folder again, and say what is wrong and which commands mend it.

    deep: a sample of the tiles of each slide is encoded anew and compared with what is stored; that needs the slides
    and the encoder's weights. Writes nothing. Raises UsageError if there is no output folder, or if nothing at all
    could be encoded anew.
    """
    place, progress = placed(out), progress or Silent()
    folder = _OutFolder(place)
    anew, notes = folder.reencodings() if deep else ([], [])  # told before hours are spent on reading
    slides, findings = folder.slides(), [*notes, *folder.findings()]
    progress.start(len(slides), len(slides))
    whole = []
    for slide in slides:
        started = time.perf_counter()
        found, tiles = folder.look_at(slide, deep)
        findings += found
        state = Verification((slide,), tuple(found)).states[slide]
        if state == "whole" and tiles:
            whole.append(slide)
        row = Outcome(slide, state, "store", message="; ".join(map(str, found)), tiles=tiles)
        progress.slide(row.after(time.perf_counter() - started))
    compared = []
    while anew:  # one encoder in memory at a time
        compared.append(anew.pop(0).compare(whole, progress.tiles))
    findings += [finding for one in compared for finding in one.findings]
    order = {slide: at for at, slide in enumerate(["", *slides])}
    findings.sort(key=lambda finding: order[finding.slide])
    return Verification(tuple(slides), tuple(findings), tuple(one.words() for one in compared))


class _OutFolder:
    """The groups of slides, and what stands beside them."""

    def __init__(self, place: Path) -> None:
        self.place, self._store = place, BagStore(place)
        self.about = read_run(place)
        if not self.about and not (place / "slides").is_dir():
            raise UsageError(f"{place} is no output folder of `slidestream run`")
        self._run_fault = _fault_of_run(place / "run.json", self.about)
        if self._run_fault:
            self.about = {}
        self.commands = Commands(place, self.about)
        self._rows, self._table_fault = _read_table(place / "slides.csv")
        self._has_root = bool(self.about) and placed(self.about["root"]).is_dir()
        self._groups = {self._name(path): path for path in group_folders(place / "slides")}

    def _name(self, path: Path) -> str:
        """The slide of a group; where that cannot be read, the one of the table whose group would lie there."""
        inside = path.relative_to(self.place / "slides")
        told = read_attrs(path).get("slide")
        names = [told["path"]] if isinstance(told, dict) and "path" in told else []
        fit = [name for name in (*names, *self._rows) if group_path(name) == inside]
        return fit[0] if fit else str(inside).removesuffix(".zarr")

    def slides(self) -> list[str]:
        listed = {name for name, row in self._rows.items() if row.status != "skipped"}
        return sorted(listed | self._groups.keys())

    def reencodings(self) -> tuple[list["Reencoding"], list[Finding]]:
        """The encoders of the folder that can be used here; a note for each that cannot. UsageError if none can."""
        from .reencoding import reencodings

        if not self._has_root:
            words = f"there is no folder {self.about['root']}" if self.about else self._run_fault
            raise UsageError(f"--deep encodes tiles of the slides anew, and {words}; without --deep the store is read")
        return reencodings(self.place, self.about, self.commands)

    # -- beside the slides --

    def findings(self) -> list[Finding]:
        found, again = [], self.commands.again()
        if self._run_fault:
            remove = (removed(self.place / "run.json"),) if read_run(self.place) else ()  # `run` would trip over it
            found.append(Finding("", "run.json", "damaged", self._run_fault, (*remove, *again)))
        elif not self._has_root:
            words = f"the slides' folder {self.about['root']} is not there now: whether they changed is not known"
            found.append(Finding("", "", "note", words))
        if self._table_fault and not living(self.place):
            found.append(Finding("", "slides.csv", "damaged", self._table_fault, again))
        found += self._of_models()
        if not living(self.place):
            names = [
                path for part in (".", "models", "predictions") for path in _strays(self.place / part, part != ".")
            ]
            found += [stray("", path, str(path.relative_to(self.place))) for path in names]
        return found

    def _of_models(self) -> Iterator[Finding]:
        folders = sorted(
            {path.parent for path in (self.place / "models").rglob("model.*") if path.suffix != ".partial"}
        )
        for folder in folders:
            part = str(folder.relative_to(self.place))
            train = (f"slidestream train {shlex.quote(str(self.place))} … --name {folder.name}, as it was trained",)
            if not (folder / "model.json").exists():
                yield Finding("", part, "unfinished", "has no model.json: its training did not end", train)
                continue
            from .prediction import load_model  # torch

            try:
                state = load_model(folder).head.state_dict()
            except UsageError as error:
                yield Finding("", part, "damaged", str(error).removeprefix(f"{folder}: "), train)
                continue
            if odd := [name for name, values in state.items() if not bool(values.isfinite().all())]:
                yield Finding("", part, "damaged", f"{', '.join(odd)} hold NaN or inf", train)

    # -- a slide --

    def look_at(self, slide: str, deep: bool) -> tuple[list[Finding], int]:
        """What is wrong with a slide, and how many tiles it has."""
        path = self._groups.get(slide)
        if path is None:
            return self._of_row(slide, "missing", None, False), 0
        group = SlideGroup(path, slide)
        before = _state(group)
        examined = Examination(group, self.commands, self.about.get("recipe"), self._last_encoder(slide))
        found = examined.findings()
        holder = held(self.place).get(slide) if found else None
        if holder and (group.status == "writing" or _state(group) != before):
            return [Finding(slide, "", "unfinished", f"is being worked on: {holder.words()}")], 0
        if holder:
            found = [finding for finding in found if not finding.part.endswith(".partial")]
        if examined.is_committed:
            found += self._of_file(slide, examined, deep)
        if examined.is_understood:
            found += self._of_row(slide, group.status, examined.counted, examined.is_zoomed)
        return found, examined.counted or 0

    def _last_encoder(self, slide: str) -> str | None:
        """Of the last run, if it has done this slide: its features are to be there."""
        row = self._rows.get(slide)
        return self.about["commands"][-1].get("encoder") if self.about and row and row.status == "done" else None

    def _of_file(self, slide: str, examined: Examination, deep: bool) -> Iterator[Finding]:
        """The slide itself: is it still the one whose tiles are stored?"""
        if not self._has_root:
            return
        path, told = placed(self.about["root"]) / slide, examined.attrs["slide"]
        try:
            size, mtime_ns, *_ = stamp(path)
            same = size == told["size_bytes"]
            same = same and (mtime_ns == told["mtime_ns"] or fingerprint(path).sha256 == told["fingerprint"])
        except (OSError, SlideError) as error:
            why = error.strerror if isinstance(error, OSError) else error.reason
            words = f"{path} cannot be read now ({why}): whether it changed is not known"
            yield Finding(slide, "", "failed" if deep else "note", words)
            return
        if not same:
            words = f"{path} is not the file any more whose tiles are stored"
            yield Finding(slide, "", "outdated", words, examined.made_again())

    def _of_row(self, slide: str, status: str, tiles: int | None, zoomed: bool) -> list[Finding]:
        """What slides.csv says of a slide, against what is stored. While a run goes on it lags behind."""
        row, again = self._rows.get(slide), self.commands.again()
        stored = {"complete": "done", "empty": "empty"}.get(status, "done" if zoomed else "failed")
        if row is None:
            if stored == "failed" or self._table_fault or living(self.place):
                return []
            words = "has no row of it: the last run was of other slides, or was killed"
            return [Finding(slide, "slides.csv", "note", words)]
        if row.status == stored == "failed":
            return [Finding(slide, row.stage, "failed", row.message, again)]
        words = ""
        if row.status != stored:
            words = f"says {row.status}, and the store {'has nothing' if status == 'missing' else f'is {status}'}"
        elif row.tiles != tiles:
            words = f"says {row.tiles} tiles, and the store has {tiles}"
        if not words or living(self.place):
            return []
        return [Finding(slide, "slides.csv", "outdated", words, again)]


def _read_table(path: Path) -> tuple[dict[str, Outcome], str]:
    """The rows of slides.csv by slide, and what is wrong with it."""
    if not path.exists():
        return {}, "is missing"
    try:
        rows = {row.slide: row for row in read_outcomes(path)}
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        return {}, f"cannot be read: {error}"
    if not path.read_bytes().endswith(b"\n"):
        return {}, "is cut"
    if odd := [row for row in rows.values() if row.status not in ("done", "empty", "failed", "skipped")]:
        return {}, f"says that {odd[0].slide!r} is {odd[0].status!r}"
    return rows, ""


def _fault_of_run(path: Path, about: dict[str, Any]) -> str:
    if not about:
        return "is missing, cut or empty"
    missing = [name for name in RUN_KEYS if name not in about]
    return f"says nothing of {', '.join(missing)}" if missing else ""


def _strays(folder: Path, below: bool) -> list[Path]:
    if is_remote(folder):
        return []  # what is put whole leaves nothing
    return sorted(folder.rglob("*.partial") if below else folder.glob("*.partial"))


def _state(group: SlideGroup) -> list[Any]:
    """Changes when a writer touches the group."""
    parts = [path for name in ("features", "predictions") for path in (group.path / name).glob("*")]
    return [read_attrs(path) for path in (group.path, *sorted(parts))]
