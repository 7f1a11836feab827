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
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.errors import CorruptTiles, UnreadableSlide
from pipeline.readers import open_slide
from pipeline.readers.levels import levels_fault
from pipeline.readers.tiffcheck import same_shape
from pipeline.scale import ScaleTags
from pipeline.slide import Slide, make_levels

ROOT = Path(__file__).parents[2]
DICOM = ROOT.parent / "shared" / "data" / "slides" / "jpeg.dicom"
SAMPLES_PER_PIXEL, DESCRIPTION, WIDTH, PHOTOMETRIC, UNIT, PREDICTOR = 277, 270, 256, 262, 296, 317
RGB, PALETTE = 2, 3
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
    with pytest.raises(UnreadableSlide, match=r"overlap|same distance"):
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
@pytest.mark.parametrize("tile", [0, 5, 15])
def test_a_raw_tile_that_is_moved_into_the_padding_before_it(kit, raw, path, tile, reader):
    """Nothing overlaps then, and no more bytes are left over than align a tile."""
    pages = pages_of(kit, raw)
    for number, page in enumerate(pages):
        page.counts = {i: len(data) for i, data in enumerate(page.tiles)}
        page.tiles = [bytes(5) * (i == number == 0) + data + bytes(8) for i, data in enumerate(page.tiles)]
    kit.write_tiff(path, pages)
    pages[0].offsets = {0: addresses(path)[0] + 5}
    kit.write_tiff(path, pages)
    np.testing.assert_array_equal(whole(path, reader), whole(raw, reader))
    pages[0].offsets[tile] = addresses(path)[tile] - 1
    kit.write_tiff(path, pages)
    with pytest.raises(UnreadableSlide, match="same distance"):
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


# --- levels of one slide ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("photometric", [0, 1, 6, 8])
def test_a_level_whose_colours_are_coded_otherwise_is_not_shown(raw, path, photometric, reader):
    """The numbers are the same, and mean another picture: refused, or unreadable; or shown as they were."""
    path.write_bytes(raw.read_bytes())
    put(path, entry(path, PHOTOMETRIC, page=1) + 8, "H", photometric)
    try:
        slide = open_slide(path, reader=reader)
    except UnreadableSlide as error:
        assert "show different pictures" in error.reason  # noqa: PT017 - by reader, which of the three
        return
    with slide, open_slide(raw, reader=reader) as undamaged:
        assert slide.levels == undamaged.levels
        try:
            pixels = slide.read(0, 0, 1, 128, 128)
        except CorruptTiles:
            return
        np.testing.assert_array_equal(pixels, undamaged.read(0, 0, 1, 128, 128))


@pytest.fixture
def lzw(kit, path) -> Path:
    pixels = kit.tissue(512)[:SIDE, :SIDE]
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            options = {"compression": "lzw", "predictor": True, "subfiletype": int(step > 1)}
            file.write(pixels[::step, ::step], tile=(64, 64), photometric="rgb", **options, **SCALE)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("page", [0, 1, 2])
def test_a_level_whose_pixels_are_taken_for_differences_or_not(lzw, page, reader):
    put(lzw, entry(lzw, PREDICTOR, page=page) + 8, "H", 1)
    with pytest.raises(UnreadableSlide, match="show different pictures"):
        open_slide(lzw, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_levels_may_be_coded_differently_if_they_show_the_same_picture(kit, path, reader):
    """As tools do that keep the scanner's level 0 and make the others themselves."""
    pixels = kit.tissue(512)
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            options = {"predictor": step == 1, "subfiletype": int(step > 1)}
            file.write(pixels[::step, ::step], tile=(64, 64), compression="lzw", photometric="rgb", **options, **SCALE)
    with open_slide(path, reader=reader) as slide:
        assert len(slide.levels) == 3
    assert warnings(path, reader) == ""


class Flat(Slide):
    """Each level of one colour; `largest`: the longest edge that was read."""

    def __init__(self, sides: list[int], colours: list[int]) -> None:
        super().__init__(Path("flat"), make_levels([(side, side) for side in sides]), ScaleTags(), "")
        self.colours, self.largest = colours, 0

    def read(self, x, y, level, width, height):
        self.largest = max(self.largest, width, height)
        return np.full((height, width, 3), self.colours[level], np.uint8)

    def close(self):
        pass


@pytest.mark.parametrize("sides", [[100_000, 500], [100_000, 25_000, 1], [90, 1], [3, 2, 1]])
def test_levels_are_compared_in_bounded_memory(monkeypatch, sides):
    monkeypatch.setattr("pipeline.readers.levels.READ_PX", 256)
    slide = Flat(sides, [200, 203, 206])
    assert levels_fault(slide) == ""
    assert 0 < slide.largest <= 256 + 2
    slide.colours[1] = 180
    assert "levels 0 and 1 show different pictures" in levels_fault(slide)


def test_unreadable_tiles_of_levels_that_are_coded_differently_are_left_to_who_reads_them(kit, path):
    pixels = kit.tissue(512)
    with tifffile.TiffWriter(path) as file:
        for step, codec in ((1, "zlib"), (2, "lzw")):
            options = {"predictor": step == 1, "subfiletype": int(step > 1), "compression": codec}
            file.write(pixels[::step, ::step], tile=(64, 64), photometric="rgb", **options, **SCALE)
    middle = addresses(path)[4 * 8 + 4]
    put(path, middle, "8B", *[255] * 8)
    with open_slide(path, reader="tiffslide") as slide:
        assert len(slide.levels) == 2
        with pytest.raises(CorruptTiles):
            slide.read(256, 256, 0, 64, 64)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("photometric", "word"), [(7, "unknown"), (60000, "unknown"), (PALETTE, "palette")])
def test_colours_that_no_file_can_have(kit, raw, path, photometric, word, reader):
    for good in (raw, kit.good):
        path.write_bytes(good.read_bytes())
        put(path, entry(path, PHOTOMETRIC) + 8, "H", photometric)
        with pytest.raises(UnreadableSlide, match=word):
            open_slide(path, 0.5, reader)


@pytest.mark.parametrize("reader", ["auto", "tiffslide"])
def test_the_colours_of_level_0_are_those_that_are_damaged(kit, path, reader):
    """The others must not pass for images that are no levels."""
    pixels = kit.tissue(512)
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            options = {"compression": "zstd", "photometric": "rgb", "subfiletype": int(step > 1)}
            file.write(np.ascontiguousarray(pixels[::step, ::step]), tile=(64, 64), **options, **SCALE)
    put(path, entry(path, PHOTOMETRIC) + 8, "H", 0)
    with pytest.raises(UnreadableSlide, match="MINISWHITE with 3 samples"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", ["auto", "tiffslide"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_jpeg_of_colours_that_is_called_grey(kit, path, photometric, reader):
    tifffile.imwrite(path, kit.tissue(512), photometric="rgb", tile=(64, 64), compression="jpeg", **SCALE)
    put(path, entry(path, PHOTOMETRIC) + 8, "H", photometric)
    with pytest.raises(UnreadableSlide, match="with 3 samples"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", ["auto", "tiffslide"])
def test_an_ome_tiff_says_its_size_twice(kit, path, reader):
    path = path.with_name("a.ome.tif")
    size = {f"PhysicalSize{axis}": 500 for axis in "XY"}  # which is no SizeX
    about = {"axes": "YXS"} | size | {f"{name}Unit": "nm" for name in size}
    tifffile.imwrite(path, kit.tissue(512), photometric="rgb", tile=(64, 64), compression="jpeg", metadata=about)
    assert warnings(path, reader) == ""
    put(path, entry(path, WIDTH) + 8, "H", 500)
    assert "first image has 500 x 512 pixels" in warnings(path, reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_palette_without_its_colours(kit, path, reader):
    tifffile.imwrite(path, kit.tissue(512)[..., 0], photometric="minisblack", tile=(64, 64), **SCALE)
    put(path, entry(path, PHOTOMETRIC) + 8, "H", PALETTE)
    with pytest.raises(UnreadableSlide, match="palette"):
        open_slide(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_scale_that_the_levels_say_otherwise_is_told(raw, path, reader):
    """µm per inch for µm per centimetre: each is believable by itself."""
    path.write_bytes(raw.read_bytes())
    pixels = whole(raw, reader)
    for reduced in (1, 2):  # of level 1, the scale of its own pixels, or that of the slide as some tools write it
        with tifffile.TiffWriter(path) as file:
            for step in (1, 2):
                scale = {"resolution": (20000 // step ** (reduced == 1),) * 2, "resolutionunit": "CENTIMETER"}
                options = {"photometric": "rgb", "subfiletype": int(step > 1), "metadata": None}
                file.write(np.ascontiguousarray(pixels[::step, ::step]), tile=(64, 64), **options, **scale)
        with open_slide(path, reader=reader) as slide:
            assert "scale" not in " ".join(slide.warnings)
        put(path, entry(path, UNIT) + 8, "H", 2)
        with open_slide(path, reader=reader) as slide:
            assert slide.mpp == 1.27
            assert "scale of its levels" in " ".join(slide.warnings)


@pytest.mark.parametrize(
    ("order", "big", "reader"),
    [*product("<", [False, True], READERS), *product(">", [False, True], ["auto", "tiffslide"])],
)
def test_a_lost_level_of_a_single_tile_is_told(kit, path, order, big, reader):
    """It is far less than a label that was taken out; but its directory still says where its tile is."""
    pixels = kit.tissue(1024)
    with tifffile.TiffWriter(path, bigtiff=big, byteorder=order) as file:
        for step in (1, 4, 16):
            options = {"photometric": "rgb", "compression": "jpeg", "subfiletype": int(step > 1)}
            file.write(np.ascontiguousarray(pixels[::step, ::step]), tile=(64, 64), **options, **SCALE)
    assert warnings(path, reader) == ""
    with tifffile.TiffFile(path) as file:
        form, page = file.tiff, file.pages[1]
        at = page.offset + form.tagnosize + form.tagsize * len(page.tags)
    put(path, at, "Q" if big else "I", 0)
    assert "to one of its images no link leads" in warnings(path, reader)


@pytest.mark.parametrize("layout", ["directories first", "directories last", "each after its data", "level 0 last"])
def test_a_lost_level_of_a_single_tile_wherever_it_stands(kit, path, tmp_path, layout):
    slide = tmp_path / "b.svs"
    kit.write_slide(slide, kit.tissue(512)[:SIDE, :SIDE], 0.5, downsamples=(2, 4), tile_px=64)
    kit.write_tiff(path, pages_of(kit, slide), layout)
    assert warnings(path, "auto") == ""
    put(path, link(path, 2), "I", 0)
    assert "to one of its images no link leads" in warnings(path, "auto")


@pytest.mark.parametrize("reader", READERS)
def test_a_directory_that_was_written_anew_leaves_the_old_one_behind(raw, path, reader):
    path.write_bytes(raw.read_bytes() + bytes(raw.stat().st_size % 2))
    with tifffile.TiffFile(path) as file:
        old = file.pages[1].offset
        directory = path.read_bytes()[old : old + 2 + 12 * len(file.pages[1].tags) + 4]
    put(path, link(path, 0), "I", path.stat().st_size)
    with open(path, "ab") as file:
        file.write(directory)
    with open_slide(path, reader=reader) as slide:
        assert len(slide.levels) == 2
    assert warnings(path, reader) == ""


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


@pytest.mark.skipif(not DICOM.is_file(), reason="needs jpeg.dicom of ../shared/data")
def test_a_dicom_file_that_says_it_is_endless_takes_no_memory(folder, process):
    """Its scale is coarse, so its thumbnail would be as large as itself. No machine has the memory; no run stops."""
    data = bytearray(DICOM.read_bytes())
    rows = data.index(b"\x48\x00\x07\x00UL\x04\x00") + 8
    assert struct.unpack_from("<I", data, rows) == (715,)
    struct.pack_into("<I", data, rows, 8_389_323)
    (folder / "a.dcm").write_bytes(data)
    row = process(folder / "a.dcm", mpp=17.0)
    assert (row.status, row.stage) == ("failed", "segment")
    assert "too large" in row.message


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
