"""Rows 1-21 of the fault matrix: files that are cut, overwritten or no slides at all."""

import resource
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.outcome import read_outcomes
from pipeline.readers import open_slide
from pipeline.store import BagStore

SIDES = (256, 257)  # TIFF tags: ImageWidth, ImageLength
JPEG_TABLES, DESCRIPTION = 347, 270


@dataclass(frozen=True)
class Fault:
    """A slide that must fail: how it is made, at which stage it is found, and a word of the reason."""

    row: int
    make: Callable
    stage: str
    word: str
    mpp: float | None = None  # given where the file cannot say it, so that nothing but the damage is in the way
    suffix: str = ".svs"

    def __str__(self) -> str:
        return self.make.__name__


FAULT = {  # row → what is done to a slide; all of them must fail, but for what is said
    1: ("cut at 60 %, directories first", "F"),
    2: ("cut at 60 %, level 0 last", "F"),
    3: ("cut at 97 %, the last directory lost", "F"),
    4: ("cut at 50 %, directories last", "F"),
    5: ("directories in a circle", "F"),
    6: ("20 tiles of tissue zeroed", "F"),
    7: ("20 tiles of tissue zeroed by half", "F"),
    9: ("tiles at offsets of 2³¹", "F"),
    12: ("offset 0, count kept", "F"),
    13: ("no JPEG tables", "F"),
    14: ("JPEG tables cut at 200 bytes", "F"),
    15: ("the header of a tile says 65535²", "F, memory stays flat"),
    16: ("10⁶ × 10⁶ px, one tile", "F"),
    17: ("0 × 0 px", "F"),
    18: ("0 bytes, a text, a header only", "F"),
    19: ("PNG named .svs", "F without a µm/px, else W"),
    20: ("PNG of 60000² px in 1 kB", "F"),
    21: ("JPEG or PNG that is cut", "F"),
}
FAULTS: list[Fault] = []


def fails(row: int, stage: str, word: str, **options) -> Callable:
    def register(make: Callable) -> Callable:
        FAULTS.append(Fault(row, make, stage, word, **options))
        return make

    return register


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@fails(1, "open", "truncated")
def row_01_cut_directories_first(path, kit):
    cut(kit.write_tiff(path, kit.pages()), 0.6)


@fails(2, "open", "truncated")
def row_02_cut_level_0_last(path, kit):
    cut(kit.write_tiff(path, kit.pages(), "level 0 last"), 0.6)


@fails(3, "open", "truncated")
def row_03_cut_last_directory_lost(path, kit):
    cut(kit.write_tiff(path, kit.pages(), "each after its data"), 0.97)


@fails(4, "open", "truncated")
def row_04_cut_half_directories_last(path, kit):
    cut(kit.write_tiff(path, kit.pages(), "directories last"), 0.5)


@fails(5, "open", "circle")
def row_05_directories_in_a_circle(path, kit):
    kit.write_tiff(path, kit.pages(), circle=True)


@fails(6, "encode", "cannot be decoded")
def row_06_zeroed_tiles(path, kit):
    pages = kit.pages()
    for i in kit.inner[:20]:
        pages[0].tiles[i] = bytes(len(pages[0].tiles[i]))
    kit.write_tiff(path, pages)


@fails(7, "encode", "cannot be decoded")
def row_07_half_zeroed_tiles(path, kit):
    pages = kit.pages()
    for i in kit.inner[:20]:
        tile = pages[0].tiles[i]
        pages[0].tiles[i] = tile[: len(tile) // 2] + bytes(len(tile) - len(tile) // 2)
    kit.write_tiff(path, pages)


@fails(9, "open", "beyond the end")
def row_09_offsets_of_two_to_the_31(path, kit):
    pages = kit.pages()
    pages[0].offsets = dict.fromkeys(range(len(pages[0].tiles)), 1 << 31)
    kit.write_tiff(path, pages)


@fails(12, "open", "without an address")
def row_12_offset_0_count_kept(path, kit):
    pages = kit.pages()
    pages[0].offsets = dict.fromkeys(kit.inner[:20], 0)
    kit.write_tiff(path, pages)


@fails(13, "encode", "cannot be decoded")
def row_13_no_jpeg_tables(path, kit):
    pages = kit.pages()
    kit.shared_tables(pages[0])
    del pages[0].tags[JPEG_TABLES]
    kit.write_tiff(path, pages)


@fails(14, "open", "JPEG tables")
def row_14_jpeg_tables_cut(path, kit):
    pages = kit.pages()
    kit.shared_tables(pages[0])
    kind, _, tables = pages[0].tags[JPEG_TABLES]
    assert len(tables) > 200
    pages[0].tags[JPEG_TABLES] = (kind, 200, tables[:200])
    kit.write_tiff(path, pages)


@fails(15, "encode", "cannot be decoded")
def row_15_tile_header_says_65535(path, kit):
    pages = kit.pages()
    for i in kit.inner[:20]:
        tile = pages[0].tiles[i]
        at = tile.index(b"\xff\xc0") + 5
        pages[0].tiles[i] = tile[:at] + b"\xff" * 4 + tile[at + 4 :]
    kit.write_tiff(path, pages)


@fails(16, "open", "corrupt")
def row_16_a_million_pixels_one_tile(path, kit):
    page = kit.pages()[0]
    page.tiles = page.tiles[:1]
    for code in SIDES:
        page.number(code, 10**6)
    kit.write_tiff(path, [page])


@fails(17, "open", "corrupt")
def row_17_zero_by_zero(path, kit):
    pages = kit.pages()
    for code in SIDES:
        pages[0].number(code, 0)
    kit.write_tiff(path, pages)


@fails(18, "open", "empty")
def row_18_no_bytes(path, kit):
    path.write_bytes(b"")


@fails(18, "open", "text file")
def row_18_text(path, kit):
    path.write_text("this is where the slide was\n")


@fails(18, "open", "")
def row_18_header_only(path, kit):
    path.write_bytes(kit.good.read_bytes()[:8])


@fails(19, "open", "mpp-csv")
def row_19_png_named_svs(path, kit):
    path.write_bytes(cv2.imencode(".png", kit.tissue(512)[..., ::-1])[1])


@fails(20, "open", "pixels", mpp=0.5, suffix=".png")
def row_20_huge_png_in_a_kilobyte(path, kit):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100_000), 9)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert path.stat().st_size < 1000


@fails(21, "open", "", mpp=0.5, suffix=".png")
def row_21_cut_png(path, kit):
    path.write_bytes(cv2.imencode(".png", kit.tissue(512)[..., ::-1])[1])
    cut(path, 0.5)


@fails(21, "open", "", mpp=0.5, suffix=".jpg")
def row_21_cut_jpeg(path, kit):
    path.write_bytes(cv2.imencode(".jpg", kit.tissue(512)[..., ::-1])[1])
    cut(path, 0.5)


def marked(faults: list[Fault]) -> list:
    return [pytest.param(f, id=str(f), marks=pytest.mark.fault(f.row, *FAULT[f.row])) for f in faults]


@pytest.fixture(params=marked(FAULTS))
def fault(request) -> Fault:
    return request.param


def test_damaged_slide_fails_alone(fault, folder, kit, process):
    path = folder / f"{fault}{fault.suffix}"
    fault.make(path, kit)
    row = process(path, given_mpp=fault.mpp) if fault.mpp else process(path)
    assert (row.status, row.stage) == ("failed", fault.stage)
    assert fault.word in row.message


TIFF_FAULTS = [fault for fault in FAULTS if fault.suffix == ".svs" and not str(fault).startswith(("row_18", "row_19"))]


@pytest.mark.parametrize("fault", marked(TIFF_FAULTS))
def test_damaged_slide_fails_with_the_reader_that_is_not_strict(fault, folder, kit, process):
    path = folder / "a.svs"
    fault.make(path, kit)
    assert process(path, reader="tiffslide").status == "failed"


@pytest.mark.fault(8, "1 tile of tissue zeroed, of 144", "W, the tile is invalid and counted")
def test_row_08_one_tile_of_144_zeroed(folder, kit, process, line):
    pages, spoiled = kit.pages(), kit.inner[0]
    pages[0].tiles[spoiled] = bytes(len(pages[0].tiles[spoiled]))
    row = process(kit.write_tiff(folder / "a.svs", pages))
    assert row.status == "done"
    assert "cannot be decoded" in row.message
    bag = line.store.bag("a.svs")
    lost = [level.grid[~level.valid].tolist() for level in bag.levels]
    column, line_ = spoiled % 16, spoiled // 16
    assert lost == [[[column >> k, line_ >> k]] for k in (2, 1, 0)], "the tile and those it is part of"
    assert line.store.group("a.svs").attrs["counts"]["invalid"] == 3


@pytest.mark.fault(10, "background tiles left out (count 0)", "D, they are white")
@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_row_10_background_tiles_that_are_left_out_are_white(reader, folder, kit, process):
    pages = kit.pages()
    for i in range(16):  # the top row, glass
        pages[0].counts[i] = pages[0].offsets[i] = 0
    path = kit.write_tiff(folder / "a.svs", pages)
    row = process(path, reader=reader)
    assert row.status == "done"
    assert row.tiles == process(kit.write_tiff(folder / "b.svs", kit.pages()), reader=reader).tiles
    with open_slide(path, reader=reader) as slide:
        assert (slide.read(0, 0, 0, 1024, 64) == 255).all()
        assert slide.read(0, 64, 0, 1024, 64).min() < 250


@pytest.mark.fault(11, "all tiles left out", "E")
@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_row_11_all_tiles_left_out(reader, folder, kit, process):
    pages = kit.pages()
    for page in pages:
        page.counts = page.offsets = dict.fromkeys(range(len(page.tiles)), 0)
    row = process(kit.write_tiff(folder / "a.svs", pages), reader=reader)
    assert row.status == "empty"


@pytest.mark.fault(15)
@pytest.mark.parametrize("reader", ["auto", "tiffslide"])
def test_row_15_memory_stays_flat(reader, folder, kit, process):
    path = folder / "a.svs"
    process(kit.write_tiff(path, kit.pages()), reader=reader)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row_15_tile_header_says_65535(path, kit)
    assert process(path, reader=reader).status == "failed"
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 200, "one tile of that size would take 12 GB"


@pytest.mark.fault(19)
def test_row_19_png_named_svs_is_read_where_its_scale_is_given(folder, kit, process):
    path = folder / "a.svs"
    row_19_png_named_svs(path, kit)
    row = process(path, given_mpp=0.5)
    assert (row.status, row.reader) == ("done", "image")
    assert "its content is PNG" in row.message


def test_shared_tables_and_every_layout_are_fine_where_nothing_is_cut(folder, kit, process, line):
    """The makers of the rows above write good files, so that it is the damage that is found."""
    layouts = ("directories first", "directories last", "each after its data", "level 0 last")
    for i, layout in enumerate(layouts):
        pages = kit.pages()
        kit.shared_tables(pages[0])
        assert process(kit.write_tiff(folder / f"{i}.svs", pages, layout)).status == "done"
    assert len({line.x(f"{i}.svs") for i in range(len(layouts))}) == 1


@pytest.mark.slow
def test_one_run_over_all_damaged_slides(folder, kit, neighbour, slidestream, tmp_path):
    """The real command: exit 3, a row with the reason for each, good neighbours whole, no traceback."""
    out, mpp_csv = tmp_path / "out", tmp_path / "mpp.csv"
    for fault in FAULTS:
        fault.make(folder / f"{fault}{fault.suffix}", kit)
    for place in (folder / "a", folder / "b"):
        place.mkdir()
        (place / "neighbour.svs").write_bytes(neighbour[0].read_bytes())
    given = {f"{fault}{fault.suffix}": fault.mpp for fault in FAULTS if fault.mpp}
    mpp_csv.write_text("slide,mpp\n" + "".join(f"{name},{mpp}\n" for name, mpp in given.items()))
    result = slidestream("run", folder, "-o", out, "-e", "lab_lbp", "--tile-px", 64, "--mpp-csv", mpp_csv)
    assert result.code == 3, result
    assert "Traceback" not in result.out + result.err
    rows = {row.slide: row for row in read_outcomes(out / "slides.csv")}
    assert len(rows) == len(FAULTS) + 2
    store = BagStore(out)
    for fault in FAULTS:
        name = f"{fault}{fault.suffix}"
        assert (rows[name].status, rows[name].stage) == ("failed", fault.stage), name
        assert fault.word in rows[name].message
        assert f"failed  {name}" in result.out
        assert store.group(name).status not in ("complete", "empty")
    for name in ("a/neighbour.svs", "b/neighbour.svs"):
        assert rows[name].status == "done"
        x, valid = store.group(name).features("lab_lbp").read()
        assert (x.tobytes(), valid.tobytes()) == neighbour[1]
    assert np.isfinite(x).all()
