"""From what the user names (folder, glob, one file, CSV) to the slides that are meant, each with its identity.

The identity is the path relative to what was given: two `a.svs` in two folders never meet.
"""

import errno
import glob as globbing
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from .errors import UsageError
from .objects import ObjectPath
from .outcome import Outcome
from .places import is_remote, opened, placed, walk
from .readers import sniff
from .tables import read_table

EXTENSIONS = frozenset(
    [
        ".svs",
        ".tif",
        ".tiff",
        ".ndpi",
        ".mrxs",
        ".scn",
        ".svslide",
        ".bif",
        ".vms",
        ".vmu",
        ".dcm",
        ".dicom",
        ".czi",
        ".vsi",
        ".ets",
        ".qptiff",
        ".btf",
        ".isyntax",
        ".jp2",
        ".png",
        ".jpg",
        ".jpeg",
    ]
)
ARCHIVES = frozenset([".gz", ".bz2", ".xz", ".zst", ".zip"])  # a packed slide is told, not passed over


@dataclass(frozen=True)
class Folder:
    """What was found: `root` is what names are relative to; `skipped` are rows for files that are parts of a slide."""

    root: Path
    files: dict[str, Path]
    skipped: tuple[Outcome, ...] = ()


def find_slides(source: str | Path, out: Path | None = None) -> Folder:
    """The slides of a folder, a glob, a CSV with a column `slide`, or one file. Raises UsageError if there are none."""
    text, closed = str(source), list[str]()
    if text.startswith("s3://"):
        root, files = _of_objects(text, out)
    elif os.path.isdir(text):
        root = Path(os.path.abspath(text))
        files = dict(sorted(_walk(root, out, closed)))
    elif os.path.lexists(text) and not text.lower().endswith(".csv"):
        root, path = Path(os.path.abspath(text)).parent, Path(os.path.abspath(text))
        files = {path.name: path}
    elif text.lower().endswith(".csv"):
        root, files = _from_csv(Path(text))
    elif globbing.has_magic(text):
        root, files = _from_glob(text)
    else:
        raise UsageError(f"{text}: there is no such file or folder")
    if not files:
        raise UsageError(f"{text}: no slide in it. Known are the extensions {' '.join(sorted(EXTENSIONS))}")
    series = {} if is_remote(root) else _series(files)  # of DICOM files, which are not read from there
    skipped = [Outcome(name, "skipped", "open", message=f"part of {first}") for name, first in series.items()]
    skipped += [Outcome(name, "skipped", "open", message="no permission to list this folder") for name in closed]
    return Folder(root, {name: path for name, path in files.items() if name not in series}, tuple(skipped))


def _of_objects(text: str, out: Path | None) -> tuple[Path, dict[str, Path]]:
    """The same of s3://bucket/…: a folder, a glob, a CSV, one object."""
    path = placed(text)
    if path.is_file():
        return _from_csv(path) if text.lower().endswith(".csv") else (path.parent, {path.name: path})
    fixed = len(re.split(r"[*?\[]", text, maxsplit=1)[0].rpartition("/")[0])
    if not path.is_dir() and globbing.has_magic(text):
        root = placed(text[:fixed])
        found = cast(ObjectPath, root).matching(text[fixed + 1 :])
        return root, {str(p.relative_to(root)): cast(Path, p) for p in found if is_candidate(cast(Path, p))}
    if not path.is_dir():
        raise UsageError(f"{text}: there is no such object or folder")
    return path, dict(sorted(_walk_objects(path, out)))


def _walk_objects(root: Path, out: Path | None) -> Iterator[tuple[str, Path]]:
    for folder, names, files in walk(root):
        stems = {os.path.splitext(name)[0] for name in files if name.lower().endswith(".mrxs")}
        ours = {name for name in names if name.endswith(".zarr") or folder / name == out}
        names[:] = sorted(name for name in names if name not in ours | stems and not name.startswith("."))
        yield from ((str((folder / n).relative_to(root)), folder / n) for n in files if is_candidate(folder / n))


def _walk(root: Path, out: Path | None, closed: list[str]) -> Iterator[tuple[str, Path]]:
    """Every candidate below root; `closed` gets the folders that may not be listed."""
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"{root}: no permission to list this folder")
    for folder, names, files in _folders(root, closed):
        parts = _parts(Path(folder), files)
        stems = {os.path.splitext(name)[0] for name in files if name.lower().endswith(".mrxs")}
        names[:] = sorted(
            n for n in names if not _is_ours(Path(folder, n), out) and n not in stems and not n.startswith(".")
        )
        for name in sorted(files):
            path = Path(folder, name)
            if name not in parts and is_candidate(path):
                yield os.path.relpath(path, root), path


def _folders(root: str | Path, closed: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, its folders, its files) of root and all below, as os.walk, each folder once.

    Links are followed last: they may run in circles, and a folder keeps its own path where one leads to it as well.
    """

    def refused(error: OSError) -> None:
        if error.errno != errno.EACCES:
            raise UsageError(f"{error.filename}: {error.strerror}") from error
        closed.append(os.path.relpath(error.filename, root))

    seen, waiting = set(), [os.fspath(root)]
    for start in waiting:
        for folder, names, files in os.walk(start, onerror=refused):
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in seen:
                names[:] = []
                continue
            seen.add((here.st_dev, here.st_ino))
            yield folder, names, files
            waiting += [path for name in names if os.path.islink(path := os.path.join(folder, name))]


def _is_ours(folder: Path, out: Path | None) -> bool:
    return folder.suffix == ".zarr" or (out is not None and Path(os.path.abspath(folder)) == out)


def _parts(folder: Path, files: list[str]) -> set[str]:
    """The files that a Hamamatsu VMS or VMU index names: its pixels, not slides of their own."""
    parts: set[str] = set()
    for name in files:
        if name.lower().endswith((".vms", ".vmu")):
            text = Path(folder, name).read_text(encoding="latin-1")
            parts |= {value.strip() for value in re.findall(r"=(.+\.(?:jpg|ngr|opt))\s*$", text, re.MULTILINE)}
    return parts


def is_candidate(path: Path) -> bool:
    """A file of known extension, or a regular file of known first bytes. Folders never are; no FIFO is opened."""
    if path.name.startswith("."):
        return False
    try:
        mode = stat.S_IFREG if is_remote(path) else os.stat(path).st_mode
    except OSError:
        return path.suffix.lower() in EXTENSIONS  # a dangling or looping link: said, not passed over
    if not stat.S_ISREG(mode):
        return False
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and (suffixes[-1] in EXTENSIONS or (suffixes[-1] in ARCHIVES and suffixes[0] in EXTENSIONS)):
        return True
    return not path.suffix and bool(sniff(_head(path)))


def _head(path: Path) -> bytes:
    try:
        with opened(path) as file:
            return file.read(132)
    except OSError:
        return b""


def _from_glob(pattern: str) -> tuple[Path, dict[str, Path]]:
    fixed = Path(os.path.abspath(re.split(r"[*?\[]", pattern, maxsplit=1)[0] + "x")).parent
    found = {Path(os.path.abspath(name)) for name in _expand(pattern)}
    return fixed, {os.path.relpath(p, fixed): p for p in sorted(found) if is_candidate(p)}


def _expand(pattern: str) -> Iterator[str]:
    """glob.glob, but a `**` takes each folder once: glob's own follows links that run in circles for hours."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from globbing.glob(pattern)
        return
    at = parts.index("**")
    for start in globbing.glob(os.sep.join([*parts[:at], ""]) or os.curdir):
        for folder, names, _ in _folders(start, []):
            names[:] = sorted(name for name in names if not name.startswith("."))
            yield from _expand(os.path.join(globbing.escape(folder), *(parts[at + 1 :] or ["*"])))


def _from_csv(table: Path) -> tuple[Path, dict[str, Path]]:
    root = placed(table).parent
    files: dict[str, Path] = {}
    for row in read_table(table):
        name, path = _beside(root, row["slide"])
        if name.startswith(".."):
            raise UsageError(
                f"{table}: {row['slide']!r} lies outside the table's folder; put the table above its slides"
            )
        if name in files:
            raise UsageError(f"{table}: {row['slide']!r} stands in it twice")
        files[name] = path
    return root, files


def _beside(root: Path, cell: str) -> tuple[str, Path]:
    """(name relative to root, path) of what a cell of a table in this folder means; the name leads out if it does."""
    if not is_remote(root):
        path = Path(os.path.abspath(root / cell))
        return os.path.relpath(path, root), path
    cell = cell.removeprefix(f"{root}/")
    name = ".." if cell.startswith(("/", "s3://")) else os.path.normpath(cell)
    return name, root / name


def _series(files: dict[str, Path]) -> dict[str, str]:
    """DICOM files that belong to the series of an earlier one → the name of that one: a series is one slide."""
    dicom = [name for name, path in files.items() if _is_dicom(path)]
    if len(dicom) < 2:
        return {}
    from .readers.openslide import series

    first: dict[str, tuple[str, str]] = {}
    members: dict[str, str] = {}
    for name in dicom:
        ids = series(files[name])
        if ids is None:
            continue
        head, instance = first.setdefault(ids[0], (name, ids[1]))
        if head != name and instance != ids[1]:
            members[name] = head
    return members


def _is_dicom(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode) and _head(path)[128:132] == b"DICM"
    except OSError:
        return False
