"""Slides to spoil, and the line of `slidestream run` in this process: prepare, encode, one row for each slide."""

import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import tifffile
from skimage.data import immunohistochemistry

from pipeline.cli import main
from pipeline.config import make_config
from pipeline.demo import write_slide
from pipeline.folder import Folder, find_slides
from pipeline.outcome import Outcome, read_outcomes, write_outcomes
from pipeline.output import write_run
from pipeline.stages import SlideFile, encode, is_current, make_recipe, open_encoder, prepare, stored_outcome
from pipeline.store import BagStore

COMMAND = Path(sys.executable).parent / "slidestream"
NATIVE = 64  # px, of the tiles in the files and of ours: one damaged tile of the file is one tile of the tree
SIDE = 1024  # px, of a slide to spoil: 16 x 16 native tiles, tissue in the 12 x 12 in the middle
RECIPE = {"encoder": "lab_lbp", "mpp": 0.5, "levels": 3, "tile_px": NATIVE}
OFFSETS, COUNTS = (324, 273), (325, 279)  # TIFF tags of tiles, of strips
LONG = 4  # a TIFF type
NOBODY = 65534


# --- slides -----------------------------------------------------------------------------------------------------------


@cache
def glass(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(height * width).normal(243, 2, (height, width, 3))
    return np.clip(noise, 0, 255).astype(np.uint8)


@cache
def tissue(side: int = SIDE) -> np.ndarray:
    """(side, side, 3): real tissue in the middle, an eighth of noisy glass on all sides."""
    pixels, margin = glass(side, side).copy(), side // 8
    sheet = np.tile(immunohistochemistry(), (-(-side // 512), -(-side // 512), 1))
    pixels[margin : side - margin, margin : side - margin] = sheet[: side - 2 * margin, : side - 2 * margin]
    pixels.flags.writeable = False
    return pixels


@dataclass
class Page:
    """One directory of a TIFF file: tags as (type, count, bytes), tiles, and the lies it is to tell about them."""

    tags: dict[int, tuple[int, int, bytes]]
    tiles: list[bytes]
    offsets: dict[int, int] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def number(self, code: int, value: int) -> None:
        self.tags[code] = (LONG, 1, struct.pack("<I", value))

    def text(self, code: int, value: str) -> None:
        self.tags[code] = (2, len(value.encode()) + 1, value.encode() + b"\0")


def read_tiff(path: Path) -> list[Page]:
    raw, pages = path.read_bytes(), []
    with tifffile.TiffFile(path) as tif:
        for page in (p.aspage() for p in tif.pages):
            tags = {
                t.code: (int(t.dtype), t.count, raw[t.valueoffset : t.valueoffset + t.valuebytecount])
                for t in page.tags.values()
            }
            spans = zip(page.dataoffsets, page.databytecounts, strict=True)
            pages.append(Page(tags, [raw[at : at + count] for at, count in spans]))
    return pages


def write_tiff(path: Path, pages: list[Page], layout: str = "directories first", circle: bool = False) -> Path:
    """layout: directories first, directories last, each after its data, or level 0 last (its data, that is)."""
    everything = range(len(pages))
    order = {
        "directories first": [*(("dir", i) for i in everything), *(("data", i) for i in everything)],
        "directories last": [*(("data", i) for i in everything), *(("dir", i) for i in everything)],
        "each after its data": [part for i in everything for part in (("data", i), ("dir", i))],
        "level 0 last": [*(("dir", i) for i in everything), *(("data", i) for i in (*everything[1:], 0))],
    }[layout]
    size = {("data", i): sum(map(len, page.tiles)) for i, page in enumerate(pages)}
    size |= {("dir", i): len(_directory(page, 0, 0, 0)) for i, page in enumerate(pages)}
    at, place = 8, {}
    for part in order:
        place[part] = at
        at += size[part] + size[part] % 2
    last = place["dir", 0] if circle else 0
    following = [*(place["dir", i] for i in everything[1:]), last]
    out = bytearray(struct.pack("<2sHI", b"II", 42, place["dir", 0]))
    for part, i in order:
        page = pages[i]
        out += bytes(place[part, i] - len(out))
        out += (
            b"".join(page.tiles)
            if part == "data"
            else _directory(page, place["dir", i], place["data", i], following[i])
        )
    path.write_bytes(out)
    return path


def _directory(page: Page, at: int, data: int, following: int) -> bytes:
    starts = data + np.concatenate([[0], np.cumsum([len(tile) for tile in page.tiles])]).astype(int)
    offsets = [page.offsets.get(i, int(starts[i])) for i in range(len(page.tiles))]
    counts = [page.counts.get(i, len(tile)) for i, tile in enumerate(page.tiles)]
    tags = dict(page.tags)
    for codes, values in ((OFFSETS, offsets), (COUNTS, counts)):
        code = next(code for code in codes if code in tags)
        tags[code] = (LONG, len(values), struct.pack(f"<{len(values)}I", *values))
    entries, values = b"", b""
    beyond = at + 2 + 12 * len(tags) + 4
    for code, (kind, count, value) in sorted(tags.items()):
        if len(value) <= 4:
            inline = value.ljust(4, b"\0")
        else:
            inline = struct.pack("<I", beyond + len(values))
            values += value + bytes(len(value) % 2)
        entries += struct.pack("<HHI", code, kind, count) + inline
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following) + values


def shared_tables(page: Page) -> None:
    """What scanners do: quantisation and Huffman tables once in the directory, not in each JPEG tile."""
    tables, tiles = b"", []
    for tile in page.tiles:
        at, kept, taken = 2, b"\xff\xd8", b""
        while tile[at + 1] != 0xDA:  # start of scan
            end = at + 2 + int.from_bytes(tile[at + 2 : at + 4], "big")
            if tile[at + 1] in (0xDB, 0xC4):
                taken += tile[at:end]
            else:
                kept += tile[at:end]
            at = end
        assert tables in (b"", taken), "the tiles of a page have the same tables"
        tables = taken
        tiles.append(kept + tile[at:])
    page.tiles = tiles
    page.tags[347] = (7, len(tables) + 4, b"\xff\xd8" + tables + b"\xff\xd9")


class Kit:
    """What a test needs to make a spoiled slide."""

    Page = Page
    glass, tissue = staticmethod(glass), staticmethod(tissue)
    write_tiff, shared_tables, write_slide = (staticmethod(f) for f in (write_tiff, shared_tables, write_slide))
    side, native = SIDE, NATIVE
    #  rows of native tiles that hold nothing but tissue, as indices into the tiles of page 0
    inner = tuple(16 * row + column for row in range(4, 8) for column in range(4, 12))

    def __init__(self, good: Path) -> None:
        self.good = good

    def pages(self) -> list[Page]:
        """The directories of a good slide: level 0, thumbnail, level 1, level 2."""
        return read_tiff(self.good)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    path = tmp_path_factory.mktemp("kit") / "good.svs"
    write_slide(path, tissue(), 0.5, tile_px=NATIVE)
    return Kit(path)


# --- the line ---------------------------------------------------------------------------------------------------------


class Line:
    """`run` without Dask, lock and terminal, into one output folder; every call checks what must always hold."""

    def __init__(self, out: Path, root: Path) -> None:
        self.out, self.root, self.store = out, root, BagStore(out)

    def folder(self, folder: Path, **options: object) -> dict[str, Outcome]:
        return self(find_slides(folder, self.out).files, **options)

    def __call__(
        self, files: dict[str, Path], *, given_mpp: float | None = None, redo: bool = False, **settings: object
    ) -> dict[str, Outcome]:
        """Slides by name → their rows. `given_mpp` is what an mpp CSV would say; `settings` are those of the recipe."""
        config = make_config(**RECIPE | settings)
        encoder = open_encoder(config)
        recipe = make_recipe(config, encoder)
        slides = [SlideFile(name, path, given_mpp) for name, path in files.items()]
        (self.out / "slides").mkdir(parents=True, exist_ok=True)
        write_run(self.out, Folder(self.root, files), recipe)
        todo = [file for file in slides if not is_current(file, self.store.group(file.name), recipe, deep=redo)]
        rows = {f.name: stored_outcome(f.name, self.store.group(f.name)) for f in slides if f not in todo}
        encoder.load("cpu")

        def ready():
            for file in todo:
                row = rows[file.name] = prepare(file, recipe, self.out)
                if row.status == "ready":
                    yield file, row

        rows |= {row.slide: row for row, _ in encode(ready(), encoder, self.out, recipe)}
        assert rows.keys() == files.keys()
        self.check(rows, recipe.encoder_key)
        return rows

    def check(self, rows: dict[str, Outcome], encoder: str) -> None:
        """One row each in slides.csv; only what is whole says so; what is whole can be read."""
        table = self.out / "slides.csv"
        write_outcomes(table, rows.values())
        found = {row.slide: (row.status, row.stage, row.error, row.message) for row in read_outcomes(table)}
        assert found == {name: (row.status, row.stage, row.error, row.message) for name, row in rows.items()}
        for name, row in rows.items():
            status = self.store.group(name).status
            if row.status == "failed":
                assert status not in ("complete", "empty")
                assert row.stage
                assert row.error
                assert row.message
                assert "\n" not in row.message
            else:
                assert {"done": "complete", "empty": "empty"}[row.status] == status
            if row.status == "done":
                bag = self.store.bag(name, encoder)
                assert sum(len(level.grid) for level in bag.levels) == row.tiles

    def x(self, name: str) -> tuple[bytes, bytes]:
        """The stored features and their validity, as bytes."""
        group = self.store.group(name)
        values, valid = group.features(group.encoder_key(None)).read()
        return values.tobytes(), valid.tobytes()


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path / "out", tmp_path / "slides")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slides").mkdir()
    return tmp_path / "slides"


@pytest.fixture(scope="session")
def neighbour(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[bytes, bytes]]:
    """A small good slide, and its features where it was alone."""
    folder = tmp_path_factory.mktemp("neighbour")
    write_slide(folder / "neighbour.svs", tissue(512), 0.5, tile_px=NATIVE)
    alone = Line(folder / "out", folder)
    alone({"neighbour.svs": folder / "neighbour.svs"})
    return folder / "neighbour.svs", alone.x("neighbour.svs")


@pytest.fixture
def process(line: Line, neighbour: tuple[Path, tuple[bytes, bytes]]) -> Callable[..., Outcome]:
    """One slide through the line, a good neighbour in the same batches; the neighbour must not notice."""

    def one(path: Path, **options: object) -> Outcome:
        files = {path.name: path, "neighbour.svs": neighbour[0]}
        rows = line(files, **options)
        if not options or options == {"given_mpp": 0.5}:
            assert rows["neighbour.svs"].status == "done"
            assert line.x("neighbour.svs") == neighbour[1]
        return rows[path.name]

    return one


# --- commands ---------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The console command in this process; for what ends before workers are started."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["slidestream", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", sys.path[:])  # main puts the current folder in front
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Result(int(end.value.code or 0), *capfd.readouterr())

    return call


@pytest.fixture
def slidestream() -> Callable[..., Result]:
    """The console command as a user starts it."""

    def call(*arguments: object) -> Result:
        done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, timeout=500, check=False)
        return Result(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

    return call


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """Do something as a user who may not read and write everything; nothing changes if we are no root."""

    @contextmanager
    def change() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        try:
            os.setresuid(NOBODY, NOBODY, 0)
        except OSError as error:
            pytest.skip(f"cannot become another user: {error}")
        try:
            yield
        finally:
            os.setresuid(0, 0, 0)

    return change


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach: pytest's own are closed to all but one."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


# --- real runs, and what is done to them ------------------------------------------------------------------------------

SLOW_ENCODER = """
import dataclasses, os, time
from extractors.lab_lbp import LabLbp, FACTS

class Slow(LabLbp):
    def encode(self, tiles):
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
        if "ENCODER_LOG" in os.environ:
            with open(os.environ["ENCODER_LOG"], "a") as log:
                log.write(f"{os.getpid()}\\n")
        return super().encode(tiles)

def build(weights=None):
    return Slow(dataclasses.replace(FACTS, name="slow"))
"""
SETTINGS = {"encoder": "slow_encoder:build", "mpp": 0.5, "levels": 3, "tile_px": 16}
SLIDES = ("a.svs", "b.svs")
PATIENCE = 120  # seconds after which a wait has failed; nothing is said about how long things take


class Run:
    """`slidestream run` on a folder, in a session of its own as in a terminal of its own.

    limits: of the processes, by their numbers in `resource`; flags: besides those of SETTINGS.
    """

    def __init__(
        self, slides: Path, out: Path, environment: dict[str, str], flags: list[str], limits: dict[int, int]
    ) -> None:
        settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
        self.out = out
        self.process = subprocess.Popen(
            [COMMAND, "run", slides, "-o", out, *settings, *flags],
            env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: [resource.setrlimit(what, (most, most)) for what, most in limits.items()],
        )
        self.family: list[psutil.Process] = []

    def until(self, condition: Callable[[], object], what: str) -> None:
        give_up = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()}"
            assert time.monotonic() < give_up, f"no {what}"
            time.sleep(0.02)
        self.family = self.children()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """The processes that do the work; one that ends while it is asked is none."""
        found = []
        for process in self.children():
            with suppress(psutil.Error):
                if "spawn_main" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def chunks(self) -> int:
        """How many chunks of features are stored."""
        return sum(1 for _ in self.out.glob("slides/*/features/*/x/c/*/0"))

    def ends(self) -> tuple[int, str]:
        """Exit code, stdout and stderr; fails if a worker outlives it."""
        out, err = self.process.communicate(timeout=PATIENCE)
        _, alive = psutil.wait_procs(self.family, timeout=PATIENCE)
        assert alive == [], "workers outlive their run"
        return self.process.returncode, out + err

    def clean_up(self) -> None:
        for process in [*self.family, psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            if process.is_running():
                process.kill()
        self.process.communicate()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of encoders and tilers of our own, which can be imported here and in workers."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/slow_encoder.py").write_text(SLOW_ENCODER)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return tmp_path / "code"


@pytest.fixture
def whole(kit: Kit, folder: Path, code: Path, line: Line) -> dict[str, tuple[bytes, bytes]]:
    """The features of all slides, from a run that nobody disturbed."""
    for name in SLIDES:
        shutil.copyfile(kit.good, folder / name)
    rows = line.folder(folder, **SETTINGS)
    assert {row.status for row in rows.values()} == {"done"}
    assert sum(1 for _ in line.out.glob("slides/*/features/*/x/c/*/0")) == 4, "several chunks a slide"
    return {name: line.x(name) for name in SLIDES}


@pytest.fixture
def start(folder: Path, code: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts the command; whatever is left of it ends with the test."""
    runs: list[Run] = []

    def begin(
        seconds_a_batch: float = 0.0,
        *flags: object,
        slides: Path = folder,
        out: Path = tmp_path / "real",
        limits: dict[int, int] | None = None,
        **environment: str,
    ) -> Run:
        path = os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")])
        environment |= {"PYTHONPATH": path, "SECONDS_A_BATCH": str(seconds_a_batch)}
        own = [] if any(str(flag).startswith("--scheduler") for flag in flags) else ["--workers=1"]
        runs.append(Run(slides, out, environment, [*own, *map(str, flags)], limits or {}))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean_up()


@pytest.fixture
def finish(start: Callable[..., Run], whole: dict[str, tuple[bytes, bytes]], line: Line) -> Callable[..., None]:
    """The same command again brings every slide to the bytes of an undisturbed run, and leaves no scraps."""

    def again(*flags: object, **how: object) -> None:
        run = start(0.0, *flags, **how)
        code, text = run.ends()
        assert (code, "Traceback" in text) == (0, False), text
        real = Line(run.out, line.root)
        assert {name: real.x(name) for name in whole} == whole
        assert list((run.out / "slides").rglob("*.partial")) == []

    return again


# --- a store to train on ----------------------------------------------------------------------------------------------

COHORT = tuple(f"{number:03}.svs" for number in range(1, 9))


@pytest.fixture(scope="session")
def cohort(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Eight small slides with features, 001.svs to 008.svs, and one without tissue, blank.svs."""
    folder = tmp_path_factory.mktemp("cohort")
    for number, name in enumerate(COHORT):
        pixels = np.roll(tissue(512)[64:448, 64:448], 37 * number, axis=0)
        write_slide(folder / "slides" / name, pixels if number % 2 else 255 - (255 - pixels) // 2, 0.5, tile_px=NATIVE)
    write_slide(folder / "slides/blank.svs", glass(384, 384), 0.5, tile_px=NATIVE)
    line = Line(folder / "out", folder / "slides")
    rows = line.folder(folder / "slides")
    assert [row.status for row in rows.values()] == ["done"] * 8 + ["empty"]
    return line


@pytest.fixture
def labels(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a label table."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "labels.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write
