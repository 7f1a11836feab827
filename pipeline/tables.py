"""Tables that people write: CSV with commas, semicolons or tabs, with or without a byte-order mark, from any editor.

A `slide` cell is an identity of the store, a path relative to the table, or a unique stem. What could mean two slides
is an error before anything runs. All cells are text: `001` stays `001`.
"""

import csv
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UsageError, nearest
from .places import is_remote, typed


def read_table(path: str | Path, required: tuple[str, ...] = ("slide",)) -> list[dict[str, str]]:
    """The rows of a table, cells stripped. Raises UsageError if it cannot be read or a column is missing."""
    text = _text(typed(path))
    try:
        return list(_rows(path, text, required))
    except csv.Error as error:
        raise UsageError(f"{path}: {error}; is there a quote too many?") from error


def _rows(path: str | Path, text: str, required: tuple[str, ...]) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_separator(text), skipinitialspace=True)
    columns = [name.strip().lower() for name in reader.fieldnames or []]
    for name in required:
        if name not in columns:
            wrong = nearest(name, columns, "column").replace("unknown column", "it has no column")
            raise UsageError(f"{path}: {wrong}")
    reader.fieldnames = columns
    for row in reader:
        if None in row or None in row.values():
            raise UsageError(f"{path}: line {reader.line_num} has not as many cells as the header ({len(columns)})")
        cells = {name: value.strip() for name, value in row.items()}
        if any(cells.values()):
            yield cells


def _separator(text: str) -> str:
    try:
        return csv.Sniffer().sniff(text.splitlines()[0] + "\n", delimiters=",;\t").delimiter
    except (csv.Error, IndexError):
        return ","


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


class SlideNames:
    """Finds the slide that a cell means."""

    def __init__(self, names: Iterable[str], root: Path | None = None) -> None:
        self.names = set(names)
        self.root = root  # what the names are relative to
        self.stems: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.names):
            base = os.path.basename(name)
            for stem in {
                base,
                base.split(".")[0] if base.count(".") > 1 else base,
                os.path.splitext(base)[0],
                os.path.splitext(name)[0],
            }:
                self.stems[stem].append(name)

    def find(self, cell: str, table: Path) -> str | None:
        """The slide's name, None if there is none. Raises UsageError if the cell could mean more than one."""
        meant = {cell} & self.names
        if self.root is not None and not is_remote(self.root):
            meant |= {os.path.relpath(os.path.join(os.path.abspath(table.parent), cell), self.root)} & self.names
        found = sorted(meant or set(self.stems.get(cell, self._without_ending(cell))))
        if len(found) > 1:
            raise UsageError(f"{table}: {cell!r} could be any of {', '.join(found)}; write one of these")
        return found[0] if found else None

    def _without_ending(self, cell: str) -> list[str]:
        """Names that have no ending themselves, as those of feature files: `a.svs` of a table is their `a`."""
        bare = os.path.splitext(cell)[0]
        return [name for name in self.stems.get(bare, []) if bare in (name, os.path.basename(name))]


def read_mpp_csv(path: str | Path, slides: SlideNames) -> tuple[dict[str, float], list[str]]:
    """slide,mpp → µm per pixel of the slides that are here, and the cells that name none of them.

    Raises UsageError for a value that is no number or two different values for one slide.
    """
    given: dict[str, float] = {}
    unknown = []
    for row in read_table(path, ("slide", "mpp")):
        name = slides.find(row["slide"], Path(path))
        if name is None:
            unknown.append(row["slide"])
            continue
        try:
            value = float(row["mpp"])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UsageError(f"{path}: mpp of {row['slide']!r} is {row['mpp']!r}, which is not a number")
        if given.setdefault(name, value) != value:
            raise UsageError(f"{path}: two values for {name}: {given[name]:g} and {value:g}")
    return given, unknown
