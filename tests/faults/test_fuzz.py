"""What mutated slide files showed (benchmarks/fuzz.py): damage that no decoder notices, found from the file's own map.

No tile may differ from the undamaged slide's without a word. Beside each kind of damage stands what looks like it and
is none.
"""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.errors import CorruptTiles, UnreadableSlide
from pipeline.readers import open_slide
from pipeline.readers.tiffcheck import same_shape

ROOT = Path(__file__).parents[2]
SAMPLES_PER_PIXEL, SUBFILE, DESCRIPTION, WIDTH = 277, 254, 270, 256
READERS = ("auto", "tiffslide", "openslide")
SCALE = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None}
SIDE = 256


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "a.tif"


@pytest.fixture(scope="module")
def raw(kit, tmp_path_factory) -> Path:
    """Two levels that are not compressed: all tiles have the same number of bytes."""
    path = tmp_path_factory.mktemp("raw") / "a.tif"
    pixels = kit.tissue(512)[:SIDE, :SIDE]
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2):
            file.write(pixels[::step, ::step], tile=(64, 64), photometric="rgb", subfiletype=int(step > 1), **SCALE)
    return path


def pages_of(kit, path: Path) -> list:
    return type(kit)(path).pages()


def addresses(path: Path, page: int = 0) -> list[int]:
    with tifffile.TiffFile(path) as file:
        return list(file.pages[page].dataoffsets)


def entry(path: Path, code: int, page: int = 0) -> int:
    """Where the entry of a tag stands: its number, its type, its count and its value follow."""
    with tifffile.TiffFile(path) as file:
        return file.pages[page].tags[code].offset


def link(path: Path, page: int) -> int:
    """Where it stands which directory comes after this one."""
    with tifffile.TiffFile(path) as file:
        return file.pages[page].offset + 2 + 12 * len(file.pages[page].tags)


def put(path: Path, at: int, form: str, *values: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(struct.pack("<" + form, *values))


def whole(path: Path, reader: str) -> np.ndarray:
    with open_slide(path, 0.5, reader) as slide:
        return slide.read(0, 0, 0, *slide.size)


def warnings(path: Path, reader: str) -> str:
    with open_slide(path, 0.5, reader) as slide:
        return " ".join(words for words in slide.warnings if not words.startswith("openslide:"))


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("by", [-64, 1, 64])
def test_a_tile_whose_address_is_moved_overlaps_another(kit, raw, path, by, reader):
    pages = pages_of(kit, raw)
    kit.write_tiff(path, pages)
    pages[0].offsets = {5: addresses(path)[5] + by}
    kit.write_tiff(path, pages)
    with pytest.raises(UnreadableSlide, match="overlap"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_tile_whose_address_is_that_of_a_directory(raw, path, reader):
    path.write_bytes(raw.read_bytes())
    with tifffile.TiffFile(path) as file:
        at, second = file.pages[0].tags[324].valueoffset, file.pages[1].offset
    last = addresses(path)[-1]
    assert last + 64 * 64 * 3 <= second
    put(path, at + 15 * 4, "I", last + 20)
    with pytest.raises(UnreadableSlide, match="no tile"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_tile_with_the_address_of_another_leaves_its_own_data_to_nobody(kit, raw, path, reader):
    pages = pages_of(kit, raw)
    kit.write_tiff(path, pages)
    pages[0].offsets = {5: addresses(path)[6]}
    kit.write_tiff(path, pages)
    with pytest.raises(UnreadableSlide, match="one address"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_equal_tiles_that_are_stored_once_are_fine(kit, raw, path, reader):
    pages = pages_of(kit, raw)
    pages[0].tiles[6] = pages[0].tiles[5]
    want = whole(kit.write_tiff(path, pages), reader)
    pages[0].counts, pages[0].tiles[6] = {6: len(pages[0].tiles[5])}, b""
    kit.write_tiff(path, pages)
    pages[0].offsets = {6: addresses(path)[5]}
    kit.write_tiff(path, pages)
    np.testing.assert_array_equal(whole(path, reader), want)
    assert warnings(path, reader) == ""


@pytest.mark.parametrize("reader", READERS)
def test_equal_tiles_that_are_stored_once_and_a_label_that_was_taken_out(kit, raw, path, reader):
    """A hole, and tiles of one address: but the hole is not where a tile should be."""
    pages = pages_of(kit, raw)
    pages[0].counts, pages[0].tiles[6] = {6: len(pages[0].tiles[5])}, b""
    kit.write_tiff(path, pages)
    pages[0].offsets = {6: addresses(path)[5]}
    kit.write_tiff(path, pages)
    with open(path, "ab") as file:
        file.write(bytes(50_000))
    assert open_slide(path, reader=reader).levels
    assert "belong to no image" in warnings(path, reader)


@pytest.mark.parametrize("tile", [0, 1, 9, -1])
def test_a_tile_with_the_address_of_another_wherever_it_stands(kit, raw, path, tile):
    pages = pages_of(kit, raw)
    kit.write_tiff(path, pages)
    known = addresses(path)
    pages[0].offsets = {tile % len(known): known[5]}
    kit.write_tiff(path, pages)
    with pytest.raises(UnreadableSlide, match="one address"):
        open_slide(path)


@pytest.mark.parametrize("reader", READERS)
def test_a_count_of_0_where_there_are_data_is_damage(kit, path, reader):
    pages = kit.pages()
    pages[0].counts = {kit.inner[0]: 0}
    kit.write_tiff(path, pages)
    with pytest.raises(UnreadableSlide, match="without bytes"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_count_of_0_where_the_next_tile_begins_is_background(kit, path, reader):
    pages = kit.pages()
    pages[0].tiles[0] = b""
    kit.write_tiff(path, pages)
    assert addresses(path)[0] == addresses(path)[1] > 0
    assert (whole(path, reader)[:64, :64] == 255).all()
    assert warnings(path, reader) == ""


# --- directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("word", "at", "form", "value"),
    [
        ("where another should be", 0, "H", 5000),  # its number
        ("stands there twice", 0, "H", 258),
        ("of no type", 2, "H", 99),
        ("beyond the end", 4, "I", 1 << 30),
        ("beyond the end", 4, "I", 0x8001),  # whose value would stand at byte 3
        ("colours of 1 samples", 8, "I", 1),
    ],
)
def test_a_damaged_entry_is_not_taken_for_the_default(kit, raw, path, word, at, form, value, reader):
    path.write_bytes(raw.read_bytes())
    put(path, entry(path, SAMPLES_PER_PIXEL) + at, form, value)
    with pytest.raises(UnreadableSlide, match=word):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_level_of_one_tile_that_says_it_is_endless(kit, path, reader):
    """The number of tiles is right; OpenSlide showed other pixels."""
    path.write_bytes(kit.good.read_bytes())
    with tifffile.TiffFile(path) as file:
        last = len(file.pages) - 1
        assert file.pages[last].imagelength == 64
    put(path, entry(path, 323, page=last) + 2, "HII", 4, 1, 0xFF000040)
    with pytest.raises(UnreadableSlide, match="tiles of 64 x"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_tag_of_one_number_that_has_two(raw, path, reader):
    path.write_bytes(raw.read_bytes())
    put(path, entry(path, SAMPLES_PER_PIXEL, page=1) + 4, "I", 2)
    with pytest.raises(UnreadableSlide, match="has 2 values"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("tag", "name"), [(258, "Bits"), (259, "Compression"), (262, "Photometric")])
def test_a_tag_whose_number_has_become_that_of_another(kit, raw, path, tag, name, reader):
    for good in (raw, kit.good):
        path.write_bytes(good.read_bytes())
        put(path, entry(path, tag), "H", 515)  # known, and out of its order
        with pytest.raises(UnreadableSlide, match=name):
            open_slide(path, 0.5, reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_strange_tag_that_hides_nothing_is_harmless(kit, path, reader):
    path.write_bytes(kit.good.read_bytes())
    want = whole(path, reader)
    put(path, entry(path, DESCRIPTION), "H", 60003)
    np.testing.assert_array_equal(whole(path, reader), want)


@pytest.mark.parametrize("reader", READERS)
def test_a_lost_first_directory_is_not_a_slide_of_the_second(raw, path, reader):
    path.write_bytes(raw.read_bytes())
    with tifffile.TiffFile(path) as file:
        second = file.pages[1].offset
    put(path, 4, "I", second)
    with pytest.raises(UnreadableSlide, match="directory is lost"):
        open_slide(path, 0.5, reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_lost_level_is_told(kit, path, reader):
    kit.write_tiff(path, kit.pages())
    assert warnings(path, reader) == ""
    put(path, link(path, 1), "I", 0)
    assert "belong to no image" in warnings(path, reader)


@pytest.mark.parametrize("reader", ["auto", "tiffslide"])
def test_a_tiled_image_that_is_no_level_is_told(raw, path, reader):
    path.write_bytes(raw.read_bytes())
    put(path, entry(path, WIDTH, page=1) + 8, "I", 70)
    assert "no level of the slide" in warnings(path, reader)
    with pytest.raises(UnreadableSlide, match="another shape"):  # it would be stretched
        open_slide(path, reader="openslide")


@pytest.mark.parametrize(
    ("size", "small", "same"),
    [
        ((2033, 1525), (63, 47), True),
        ((3000, 90_000), (46, 1406), True),  # 46.9 cut off: by the other side it would be 1380 rows
        ((256, 256), (1, 1), True),
        ((256, 256), (70, 128), False),
        ((46_000, 32_914), (11_500, 8_200), False),
    ],
)
def test_a_level_has_the_shape_of_the_slide_but_for_rounding(size, small, same):
    assert same_shape(size, small) is same


@pytest.mark.parametrize("reader", READERS)
def test_tiles_on_the_pages_of_a_disk_are_no_lost_level(kit, path, reader):
    pages = kit.pages()
    for page in pages:
        page.counts = {i: len(tile) for i, tile in enumerate(page.tiles)}
        page.tiles = [tile + bytes(-len(tile) % 4096) for tile in page.tiles]
    kit.write_tiff(path, pages)
    assert warnings(path, reader) == ""


@pytest.mark.parametrize("reader", READERS)
def test_a_directory_of_countless_entries_takes_no_memory(raw, path, reader):
    pixels = whole(raw, reader)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for step in (1, 2):
            file.write(pixels[::step, ::step], tile=(64, 64), photometric="rgb", subfiletype=int(step > 1), **SCALE)
    with tifffile.TiffFile(path) as file:
        put(path, file.pages[1].offset, "Q", 1 << 50)
    with pytest.raises(UnreadableSlide) as caught:
        open_slide(path, reader=reader)
    assert not isinstance(caught.value.__cause__, MemoryError)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "lzma"])
@pytest.mark.parametrize("width", [6, 250, 255, 260])
def test_strips_of_another_width_are_not_read_askew(kit, path, compression, width):
    pixels = kit.tissue(512)[:SIDE, :SIDE]
    tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, rowsperstrip=32, **SCALE)
    np.testing.assert_array_equal(whole(path, "tiffslide"), pixels)
    put(path, entry(path, WIDTH) + 8, "H", width)
    try:
        with open_slide(path, reader="tiffslide") as slide, pytest.raises(CorruptTiles, match=r"decode|damaged"):
            slide.read(0, 0, 0, *slide.size)
    except UnreadableSlide as error:
        assert "more pixels" in error.reason  # noqa: PT017 - found on opening or on reading, by codec


# --- plain images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [16, 24, 60, 5000, -20])
def test_every_byte_of_a_png_is_under_a_checksum(kit, tmp_path, at):
    path = tmp_path / "a.png"
    Image.fromarray(kit.tissue(512)).save(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableSlide):
        open_slide(path, 0.5)


def test_a_chunk_that_no_reader_needs_is_checked_too(kit, tmp_path):
    """Where a checksum is wrong, the file is not what was written."""
    path = tmp_path / "a.png"
    Image.fromarray(kit.tissue(512)).save(path)
    data, text = path.read_bytes(), b"tEXtkey\0value"
    for crc, fine in ((zlib.crc32(text), True), (1, False)):
        path.write_bytes(data[:33] + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", crc) + data[33:])
        if fine:
            np.testing.assert_array_equal(whole(path, "image"), kit.tissue(512))
        else:
            with pytest.raises(UnreadableSlide):
                open_slide(path, 0.5)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_is_damaged_in_the_middle_is_not_read(kit, tmp_path, mode):
    path = tmp_path / "a.jpg"
    Image.fromarray(kit.tissue(512)).convert(mode).save(path)
    assert whole(path, "image").shape == (512, 512, 3)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(UnreadableSlide):
        open_slide(path, 0.5)


@pytest.mark.parametrize("at", range(0, 9))
def test_a_jpeg_2000_says_of_each_channel_what_it_says_of_all(kit, tmp_path, at):
    path = tmp_path / "a.jp2"
    Image.fromarray(kit.tissue(512)).save(path)
    np.testing.assert_array_equal(whole(path, "image"), kit.tissue(512))
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\x4f\xff\x51") + 42 + at] ^= 9
    path.write_bytes(data)
    with pytest.raises(UnreadableSlide):
        open_slide(path, 0.5)


# --- a sample of them all ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["auto", "tiffslide", "openslide", "image"])
def test_of_mutated_files_none_is_silently_different(reader, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--reader", reader]
    options = ["--count", "200", "--seed", "7", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*map(str, [*command, *options])], check=True, timeout=500, cwd=ROOT, env=environment)
    result = json.loads((tmp_path / f"fuzz-{reader}.json").read_text())
    found = Counter(case["outcome"] for case in result["cases"])
    assert sum(found.values()) == 200
    assert found["failed"] > 50
    assert found["same"] > 10
    assert not [case for case in result["cases"] if case["outcome"] in result["never"]]
    assert not [c for c in result["cases"] if c["outcome"] == "different" and c["kind"] in result["structure"]]
