"""The contract of a reader, for all of them: sizes, pixels, colours, names; and damage, which is no pixels."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.demo import write_slide
from pipeline.errors import CorruptTiles, SlideError, UnreadableSlide, UsageError
from pipeline.readers import open_slide, sniff
from pipeline.readers.tiffcheck import structure
from pipeline.slide import Slide

W, H = 211, 149
X, Y = np.meshgrid(np.arange(W), np.arange(H))
ALPHA = (X * 5 % 256).astype(np.uint8)
TIFFS = ("openslide", "tiffslide")
SCALE = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER", "metadata": None}


@pytest.fixture(scope="module")
def pixels(address) -> np.ndarray:
    return address(W, H)


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    """What JPEG keeps to a few grey values."""
    return np.stack([X, Y, (X + Y) // 2], axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def opened(tmp_path_factory, pixels) -> Callable[[str], Slide]:
    """The same pixels through every reader."""
    folder = tmp_path_factory.mktemp("same")
    write_slide(folder / "slide.svs", pixels, 0.5, downsamples=(2, 4), tile_px=64, lossless=True)
    Image.fromarray(pixels).save(folder / "slide.png")

    def open_with(name: str) -> Slide:
        if name == "array":
            return open_slide(pixels, mpp=0.5)
        path = folder / ("slide.png" if name == "image" else "slide.svs")
        return open_slide(path, mpp=0.5, reader=name)

    return open_with


def on_white(pixels: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    out = np.full((height, width, 3), 255, np.uint8)
    for y in range(height):
        for x in range(width):
            if 0 <= left + x < pixels.shape[1] and 0 <= top + y < pixels.shape[0]:
                out[y, x] = pixels[top + y, left + x]
    return out


def blend(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


@pytest.mark.parametrize("name", [*TIFFS, "image", "array"])
def test_sizes_and_names(opened, name):
    with opened(name) as slide:
        assert slide.size == (W, H)
        assert slide.reader == ("image" if name == "array" else name)
        assert slide.reader_version
        assert slide.levels[0].downsample == (1, 1)
        if name in TIFFS:
            assert [(level.width, level.height) for level in slide.levels] == [(211, 149), (105, 74), (52, 37)]
            assert [level.downsample for level in slide.levels] == [(1, 1), (2, 2), (4, 4)]


WINDOWS = [
    (0, 0, W, H), (3, 5, 20, 17), (60, 60, 9, 9), (-7, -5, 20, 20), (200, 140, 30, 30), (-5, -5, W + 11, H + 9),
    (210, 148, 1, 1),
    (-50, 3, 20, 9), (3, -50, 9, 20), (W, 0, 7, 7), (0, H, 7, 7), (10**6, 10**6, 5, 4), (-(10**6), 0, 5, 4),
    (-9, 30, 9, 1),
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", [*TIFFS, "image", "array"])
def test_a_window_inside_outside_and_across(opened, pixels, name, window):
    with opened(name) as slide:
        got = slide.read(window[0], window[1], 0, window[2], window[3])
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, on_white(pixels, *window))


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    "window", [(0, 0, 105, 74), (-3, -4, 30, 20), (40, 30, 30, 30), (51, 36, 9, 9), (17, 23, 11, 7)]
)
def test_a_window_of_a_coarser_level(opened, level, window):
    factor = 2**level
    with opened("tiffslide") as slide:
        with tifffile.TiffFile(slide.path) as file:
            stored = file.pages[1 + level].asarray()
        got = slide.read(window[0] * factor, window[1] * factor, level, window[2], window[3])
        np.testing.assert_array_equal(got, on_white(stored, *window))
    with opened("openslide") as slide:  # it interpolates: less than half a level-0 pixel away
        near = slide.read(window[0] * factor, window[1] * factor, level, window[2], window[3]).astype(int)
        if window[:2] == (0, 0) or min(window[:2]) < 0:
            np.testing.assert_array_equal(near, got)
        assert "interpolates" in slide.doubt or "deflate" in slide.doubt


@pytest.mark.parametrize("name", [*TIFFS, "image", "array"])
def test_positions_are_rounded_to_whole_pixels(opened, pixels, name):
    with opened(name) as slide:
        np.testing.assert_array_equal(slide.read(6.7, 9.2, 0, 5, 5), on_white(pixels, 7, 9, 5, 5))
        np.testing.assert_array_equal(slide.read(-6.7, -0.3, 0, 9, 5), on_white(pixels, -7, 0, 9, 5))


@pytest.mark.parametrize("name", [*TIFFS, "image"])
def test_what_was_handed_out_belongs_to_the_caller(opened, pixels, name):
    with opened(name) as slide:
        slide.read(0, 0, 0, 64, 64)[:] = 0
        np.testing.assert_array_equal(slide.read(0, 0, 0, 64, 64), pixels[:64, :64])


@pytest.mark.parametrize("name", [*TIFFS, "image", "array"])
def test_closing(opened, name):
    slide = opened(name)
    slide.read(0, 0, 0, 5, 5)
    slide.close()
    slide.close()


# ---- colours --------------------------------------------------------------------------------------------------------


def tiff(path: Path, data: np.ndarray, **options) -> Path:
    tifffile.imwrite(path, data, tile=(64, 64), **(SCALE | options))
    return path


def wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint16) * 257


COLOURMAP = wide(np.random.default_rng(0).integers(0, 256, (3, 256)))


def grey(rgb):
    return np.repeat(rgb[..., :1], 3, axis=2)


# name: (pixels written, what they look like, options of the writer, readers that must read it)
COLOURS: dict[str, tuple[Callable, Callable, dict, tuple[str, ...]]] = {
    "raw": (lambda p: p, lambda p: p, {}, TIFFS),
    "deflate": (lambda p: p, lambda p: p, {"compression": "deflate"}, TIFFS),
    "lzw": (lambda p: p, lambda p: p, {"compression": "lzw"}, TIFFS),
    "lzw, predictor": (lambda p: p, lambda p: p, {"compression": "lzw", "predictor": True}, TIFFS),
    "zstd": (lambda p: p, lambda p: p, {"compression": "zstd"}, TIFFS),
    "jpeg 2000": (lambda p: p, lambda p: p, {"compression": "jpeg2000"}, ("tiffslide",)),
    "webp": (lambda p: p, lambda p: p, {"compression": "webp", "compressionargs": {"lossless": True}}, ("tiffslide",)),
    "16 bits": (wide, lambda p: p, {}, TIFFS),
    "16 bits, alpha": (
        lambda p: wide(np.dstack([p, ALPHA])), lambda p: blend(p, ALPHA), {"extrasamples": ["unassalpha"]}, TIFFS
    ),
    "alpha": (lambda p: np.dstack([p, ALPHA]), lambda p: blend(p, ALPHA), {"extrasamples": ["unassalpha"]}, TIFFS),
    "alpha, multiplied": (
        lambda p: np.dstack([np.rint(p * (ALPHA[..., None] / 255)), ALPHA]).astype(np.uint8),
        lambda p: blend(p, ALPHA), {"extrasamples": ["assocalpha"]}, TIFFS,
    ),
    "clear and black": (
        lambda p: np.dstack([p * (X < 100)[..., None], 255 * (X < 100)]).astype(np.uint8),
        lambda p: np.where((X < 100)[..., None], p, 255), {"extrasamples": ["unassalpha"]}, TIFFS,
    ),
    "fourth sample unknown": (lambda p: np.dstack([p, ALPHA]), lambda p: p, {"extrasamples": ["unspecified"]}, ()),
    "grey": (lambda p: p[..., 0], grey, {"photometric": "minisblack"}, TIFFS),
    "grey, white is 0": (lambda p: p[..., 0], lambda p: 255 - grey(p), {"photometric": "miniswhite"}, TIFFS),
    "grey, 16 bits": (lambda p: wide(p[..., 0]), grey, {"photometric": "minisblack"}, ("tiffslide",)),
    "grey, 16 bits, white is 0": (
        lambda p: wide(p[..., 0]), lambda p: 255 - grey(p), {"photometric": "miniswhite"}, ("tiffslide",)
    ),
    "grey, alpha": (
        lambda p: np.dstack([p[..., 0], ALPHA]), lambda p: blend(grey(p), ALPHA),
        {"photometric": "minisblack", "extrasamples": ["unassalpha"], "planarconfig": "contig"}, ("tiffslide",),
    ),
    "grey, alpha, white is 0": (
        lambda p: np.dstack([p[..., 0], ALPHA]), lambda p: blend(255 - grey(p), ALPHA),
        {"photometric": "miniswhite", "extrasamples": ["unassalpha"], "planarconfig": "contig"}, ("tiffslide",),
    ),
    "palette": (
        lambda p: p[..., 0], lambda p: COLOURMAP.T[p[..., 0]] >> 8,
        {"photometric": "palette", "colormap": COLOURMAP}, TIFFS,
    ),
    "1 bit": (lambda p: p[..., 0] > 99, lambda p: grey(p > 99) * 255, {"photometric": "minisblack"}, ()),
    "CMYK": (
        lambda p: np.dstack([p, ALPHA]),
        lambda p: (255.0 - p) * (255 - ALPHA.astype(float)[..., None]) / 255, {"photometric": "separated"}, (),
    ),
    "stack": (lambda p: np.stack([p[..., 0]] * 3), grey, {"photometric": "minisblack"}, ()),
    "planes": (lambda p: np.moveaxis(p, 2, 0), lambda p: p, {"planarconfig": "separate"}, ()),
    "float": (lambda p: (p / 255).astype(np.float32), lambda p: p, {}, ()),
    "half": (lambda p: (p / 255).astype(np.float16), lambda p: p, {}, ()),
    "32 bits": (lambda p: p.astype(np.uint32), lambda p: p, {}, ()),
    "12 bits": (lambda p: p.astype(np.uint16) * 16, lambda p: p, {"bitspersample": 12}, ()),
    "signed": (lambda p: p.astype(np.int16), lambda p: p, {}, ()),
    "signed bytes": (lambda p: (p.astype(int) - 128).astype(np.int8), lambda p: p, {}, ()),
    "five samples": (lambda p: np.dstack([p, ALPHA, ALPHA]), lambda p: p, {"extrasamples": [0, 0]}, ()),
    "YCbCr without JPEG": (
        lambda p: p,
        lambda p: np.clip(p[..., :1] + np.dstack([
            1.402 * (p[..., 2] - 128.0), -0.344136 * (p[..., 1] - 128.0) - 0.714136 * (p[..., 2] - 128.0),
            1.772 * (p[..., 1] - 128.0)]), 0, 255),
        {"photometric": "ycbcr", "compression": "lzw"}, (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", [*TIFFS, "auto"])
@pytest.mark.parametrize("kind", COLOURS)
def test_colours_are_right_or_refused(tmp_path, pixels, kind, reader):
    stored, shown, options, able = COLOURS[kind]
    path = tiff(tmp_path / "a.tif", stored(pixels), **({"photometric": "rgb"} | options))
    must = reader in able or (reader == "auto" and able)
    try:
        slide = open_slide(path, reader=reader)
    except UnreadableSlide:
        if must:
            raise
        return
    with slide:
        assert slide.mpp == pytest.approx(0.5)
        for x, y, width, height in ((0, 0, W, H), (63, 40, 70, 90), (W - 9, H - 9, 9, 9)):
            got = slide.read(x, y, 0, width, height).astype(float)
            # OpenSlide multiplies by alpha and divides again.
            assert abs(got - shown(pixels)[y : y + height, x : x + width]).max() <= (2 if "alpha" in kind else 1.01)


@pytest.mark.parametrize("reader", TIFFS)
@pytest.mark.parametrize(("colours", "mean"), [({"outcolorspace": "rgb"}, 0.5), ({}, 2.0)])
def test_jpeg_colours(tmp_path, smooth, reader, colours, mean):
    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 98, **colours}}
    with open_slide(tiff(tmp_path / "a.tif", smooth, **options), reader=reader) as slide:
        assert abs(slide.read(0, 0, 0, W, H).astype(int) - smooth).mean() < mean


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_of_plain_images(tmp_path, pixels, mode):
    image = Image.fromarray(np.dstack([pixels, ALPHA])).convert(mode)
    image.save(tmp_path / "a.png")
    want = np.asarray(image.convert("RGBA")).astype(int)
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        assert abs(slide.read(0, 0, 0, W, H) - blend(want[..., :3], want[..., 3])).max() <= 1.01


@pytest.mark.parametrize("suffix", ["png", "jpg", "jp2"])
def test_formats_of_plain_images(tmp_path, smooth, suffix):
    Image.fromarray(smooth).save(tmp_path / f"a.{suffix}")
    with open_slide(tmp_path / f"a.{suffix}", mpp=0.5) as slide:
        assert slide.reader == "image"
        assert slide.size == (W, H)
        assert abs(slide.read(0, 0, 0, W, H).astype(int) - smooth).mean() < 3


def test_plain_images_of_other_pixels_are_refused_or_right(tmp_path, pixels):
    Image.fromarray(wide(pixels[..., 0])).save(tmp_path / "16.png")
    with pytest.raises(UnreadableSlide, match="not supported"):
        open_slide(tmp_path / "16.png", mpp=0.5)
    Image.fromarray(255 - np.dstack([pixels, pixels[..., 0] * 0 + 255])).convert("CMYK").save(tmp_path / "cmyk.jpg")
    try:
        slide = open_slide(tmp_path / "cmyk.jpg", mpp=0.5)
    except UnreadableSlide:
        return
    with Image.open(tmp_path / "cmyk.jpg") as image:
        want = np.asarray(image.convert("RGB")).astype(int)
    assert abs(slide.read(0, 0, 0, W, H) - want).max() <= 1


def test_a_plain_image_is_not_turned_by_its_exif(tmp_path, smooth):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(tmp_path / "a.jpg", exif=exif)
    with open_slide(tmp_path / "a.jpg", mpp=0.5) as slide:
        assert slide.size == (W, H)


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_a_turned_tiff_is_not_scrambled(tmp_path, pixels, orientation):
    """OpenSlide mirrors every tile in its place."""
    path = tiff(tmp_path / "a.tif", pixels, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    with pytest.raises(UnreadableSlide, match="orientation"):
        open_slide(path, reader="openslide")
    with open_slide(path) as slide:
        assert slide.reader == "tiffslide"
        np.testing.assert_array_equal(slide.read(0, 0, 0, W, H), pixels)


def test_arrays_of_other_kinds_are_refused(pixels):
    for odd in (pixels[..., 0], pixels[..., :2], pixels.astype(float), np.zeros((0, 5, 3), np.uint8), wide(pixels)):
        with pytest.raises(UnreadableSlide, match="uint8 is needed"):
            open_slide(odd, mpp=0.5)


# ---- layouts and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compression", "reader"),
    [("jpeg", "tiffslide"), ("lzw", "tiffslide"), ("deflate", "tiffslide"), ("zstd", "tiffslide"), (None, "tiffslide"),
     ("aperio_jp2000_rgb", "openslide")],
)  # fmt: skip
def test_the_reader_is_a_fixed_function_of_the_codec(tmp_path, address, compression, reader):
    """The table of docs/performance.md."""
    path = tmp_path / "a.svs"
    options = {"photometric": "rgb", "compression": compression, "description": "Aperio Image\n|MPP = 0.5"}
    tifffile.imwrite(path, address(256, 192), tile=(64, 64), metadata=None, **options)
    for _ in range(2):
        with open_slide(path) as slide:
            assert slide.reader == reader


@pytest.mark.parametrize(
    ("size", "lossless", "word"),
    [((W, H), False, "interpolates"), ((256, 192), True, "deflate"), ((256, 192), False, "damage within JPEG")],
)
def test_auto_takes_tiffslide_where_openslide_is_in_doubt(tmp_path, address, size, lossless, word):
    write_slide(tmp_path / "a.svs", address(*size), 0.5, downsamples=(2, 4), tile_px=64, lossless=lossless)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.reader == "tiffslide"
        assert word in slide.refusals[0]
        assert slide.warnings == ()
    with open_slide(tmp_path / "a.svs", reader="openslide") as slide:
        assert slide.reader == "openslide"
        assert word in slide.warnings[0]


def test_a_doubted_reader_serves_where_no_other_does(tmp_path, address, monkeypatch):
    write_slide(tmp_path / "a.svs", address(W, H), 0.5, downsamples=(2, 4), tile_px=64)

    def fail(path):
        raise ValueError("not today")

    monkeypatch.setattr("pipeline.readers.tiffslide.open", fail)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.reader == "openslide"
        assert "interpolates" in slide.warnings[0]
        assert slide.read(0, 0, 0, W, H).shape == (H, W, 3)


@pytest.mark.parametrize("reader", TIFFS)
def test_sparse_tiles_are_white(tmp_path, pixels, reader):
    path = tiff(tmp_path / "a.tif", pixels, photometric="rgb", compression="lzw")
    across, want = -(-W // 64), pixels.copy()
    for number in (1, 6):
        set_table(path, number, 0, 0)
    for number in (1, 6):
        want[number // across * 64 : number // across * 64 + 64, number % across * 64 : number % across * 64 + 64] = 255
    with open_slide(path, reader=reader) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, W, H), want)
        np.testing.assert_array_equal(slide.read(70, 5, 0, 9, 9), np.full((9, 9, 3), 255))


XML = """<?xml version="1.0"?><PerkinElmer-QPI-ImageDescription><ImageType>FullResolution</ImageType>
<Color>{}</Color></PerkinElmer-QPI-ImageDescription>"""


def test_fluorescence_channels_are_mixed_and_outside_is_white(tmp_path, pixels):
    colours = ((0, 0, 255), (255, 128, 0))
    with tifffile.TiffWriter(tmp_path / "a.qptiff") as file:
        for number, colour in enumerate(colours):
            text = XML.format(",".join(map(str, colour)))
            options = {"photometric": "minisblack", "tile": (64, 64), "compression": "lzw", **SCALE}
            file.write(pixels[..., number], description=text, software="PerkinElmer-QPI", **options)
    with pytest.raises(UnreadableSlide, match="stack of 2 images"):  # it would show the first channel alone
        open_slide(tmp_path / "a.qptiff", reader="openslide")
    with open_slide(tmp_path / "a.qptiff") as slide:
        assert slide.reader == "tiffslide"
        got = slide.read(-9, -7, 0, W + 20, H + 30)
    want = sum(pixels[..., n, None] * (np.array(c) / 255) for n, c in enumerate(colours))
    np.testing.assert_array_equal(got[:7], 255)
    np.testing.assert_array_equal(got[:, :9], 255)
    np.testing.assert_array_equal(got[7 + H :], 255)
    np.testing.assert_array_equal(got[:, 9 + W :], 255)
    assert abs(got[7 : 7 + H, 9 : 9 + W] - np.clip(want, 0, 255)).max() <= 0.51


@pytest.mark.parametrize("reader", TIFFS)
def test_an_aperio_file_without_a_thumbnail_keeps_its_levels(tmp_path, address, reader):
    image = address(256, 192)
    head = "Aperio Image Library v12.0\n256x192 [0,0 256x192] (64x64) JPEG/RGB|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for step in (1, 2, 4):
            text = head if step == 1 else head.replace(" (64", f" -> {256 // step}x{192 // step} (64")
            options = {"photometric": "rgb", "compression": "lzw", "metadata": None, "subfiletype": int(step > 1)}
            file.write(image[::step, ::step], tile=(64, 64), description=text, software=False, **options)
    with open_slide(tmp_path / "a.svs", reader=reader) as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(256, 192), (128, 96), (64, 48)]
        np.testing.assert_array_equal(slide.read(0, 0, 1, 128, 96), image[::2, ::2])


@pytest.mark.parametrize("reader", [*TIFFS, "auto"])
@pytest.mark.parametrize(
    "name",
    ["a::b.svs", "with space.svs", "Prøve 切片 №1.svs", 'it\'s "q" #1 [x]*?.svs', "new\nline.svs", "%41.svs", "noext"],
)
def test_names(tmp_path, smooth, name, reader):
    write_slide(tmp_path / "plain.svs", smooth, 0.5, downsamples=(), tile_px=64)
    (tmp_path / name).write_bytes((tmp_path / "plain.svs").read_bytes())
    with open_slide(tmp_path / name, reader=reader) as slide, open_slide(tmp_path / "plain.svs") as plain:
        assert slide.path == tmp_path / name
        np.testing.assert_array_equal(slide.read(5, 5, 0, 50, 50), plain.read(5, 5, 0, 50, 50))


def test_a_name_that_contradicts_the_content_is_told(tmp_path, smooth):
    write_slide(tmp_path / "a.png", smooth, 0.5, downsamples=(), tile_px=64)
    Image.fromarray(smooth).save(tmp_path / "b", "PNG")
    (tmp_path / "b").rename(tmp_path / "b.svs")
    for name, kind in (("a.png", "TIFF"), ("b.svs", "PNG")):
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert f"its content is {kind}" in slide.warnings[0]


def test_an_unknown_reader_is_a_usage_error(tmp_path, smooth):
    write_slide(tmp_path / "a.svs", smooth, 0.5)
    with pytest.raises(UsageError, match="Did you mean 'openslide'"):
        open_slide(tmp_path / "a.svs", reader="openslid")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"II", "no reader"),
        (b"II*\0", "TIFF|bytes"),
        (b"II*\0\x08\0\0\0", "truncated"),
        (b"II*\0\0\0\0\0", "TIFF|directory"),
        (b"just text, nothing else", "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git-lfs"),
        (b"\n <!doctype html><html></html>", "HTML"),
        (b"PK\x03\x04" + bytes(200), "ZIP"),
        (b"\x1f\x8b" + bytes(200), "gzip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(200), "JPEG"),
        (bytes(128) + b"DICM" + bytes(100), "DICOM"),
        (bytes(500), "unknown format"),
    ],
)
@pytest.mark.parametrize("reader", ["auto", "openslide", "tiffslide", "image"])
def test_what_is_no_slide(tmp_path, content, words, reader):
    path = tmp_path / "a.svs"
    path.write_bytes(content)
    with pytest.raises(UnreadableSlide) as caught:
        open_slide(path, mpp=0.5, reader=reader)
    assert caught.value.path == str(path)
    if reader == "auto":
        assert any(word in caught.value.reason for word in words.split("|")), caught.value.reason


def test_what_is_no_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "fifo.svs")
    (tmp_path / "loop.svs").symlink_to(tmp_path / "loop.svs")
    (tmp_path / "dangling.svs").symlink_to(tmp_path / "nothing")
    for name, words in (
        ("fifo.svs", "not a regular file"),
        ("loop.svs", "loop"),
        ("dangling.svs", "no such file"),
        ("none.svs", "no such file"),
        (".", "directory"),
    ):
        with pytest.raises(UnreadableSlide, match=words):
            open_slide(tmp_path / name)


def test_sniffing_by_content():
    assert sniff(b"II+\0") == sniff(b"MM\0*") == "TIFF"
    assert sniff(bytes(128) + b"DICM") == "DICOM"
    assert sniff(b"ZISRAWFILE") == "Zeiss CZI"
    assert sniff(b"") == sniff(b"RIFF") == ""


# ---- damage: tiles --------------------------------------------------------------------------------------------------

TILE = 5  # the one that is damaged, of 4 x 3


def set_table(path: Path, number: int, offset: int | None = None, count: int | None = None) -> None:
    """Change the entry of one tile of the first image in place."""
    with tifffile.TiffFile(path) as file:
        tags = [file.pages[0].tags[code] for code in (324, 325)]
        places = [(tag.valueoffset, {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)]) for tag in tags]
    data = bytearray(path.read_bytes())
    for (at, form), value in zip(places, (offset, count), strict=True):
        if value is not None:
            struct.pack_into("<" + form, data, at + number * struct.calcsize(form), value)
    path.write_bytes(data)


def tile_place(path: Path, number: int = TILE) -> tuple[int, int]:
    with tifffile.TiffFile(path) as file:
        return file.pages[0].dataoffsets[number], file.pages[0].databytecounts[number]


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def zeroed(path):
    at, count = tile_place(path)
    overwrite(path, at, bytes(count))


def noise(path):
    at, count = tile_place(path)
    overwrite(path, at, np.random.default_rng(1).integers(0, 256, count, np.uint8).tobytes())


def half_zeroed(path):
    at, count = tile_place(path)
    overwrite(path, at + count // 2, bytes(count - count // 2))


def cut(path):
    set_table(path, TILE, count=tile_place(path)[1] // 2)


def cut_in_header(path):
    set_table(path, TILE, count=20)


def sof(height: int, width: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        at, count = tile_place(path)
        data = path.read_bytes()
        frame = data.index(b"\xff\xc0", at, at + count)
        overwrite(path, frame + 5, struct.pack(">HH", height, width))

    return change


def tables(path: Path) -> tuple[int, int, int]:
    """Where the JPEG tables' tag stands, its data, and their length."""
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags[347]
        return tag.offset, tag.valueoffset, tag.count


def no_tables(path):
    overwrite(path, tables(path)[0], struct.pack("<H", 60000))


def cut_tables(path):
    tag, _, count = tables(path)
    overwrite(path, tag + 4, struct.pack("<I", count // 2))


def zeroed_tables(path):
    _, at, count = tables(path)
    overwrite(path, at + count // 2, bytes(count - count // 2))


def no_address(path):
    set_table(path, TILE, offset=0)


def beyond(path):
    set_table(path, TILE, offset=path.stat().st_size + 1000)


def inside_out(path):
    set_table(path, TILE, offset=path.stat().st_size - 10)


JPEG_TILE = {f.__name__: f for f in (zeroed, noise, half_zeroed, cut, cut_in_header)} | {
    "sof of 20000": sof(20000, 20000), "sof of 65535": sof(65535, 65535), "sof of 0": sof(0, 64),
    "sof too small": sof(64, 32),
}  # fmt: skip
JPEG_FILE = {f.__name__: f for f in (no_tables, cut_tables, zeroed_tables, no_address, beyond, inside_out)}


def jpeg_slide(path: Path, smooth: np.ndarray, with_tables: bool = False) -> Path:
    """One level of JPEG tiles; with the tables they share in a tag of their own, as scanners write them."""
    write_slide(path, smooth, 0.5, downsamples=(), tile_px=64)
    if with_tables:
        share_tables(path)
    return path


def share_tables(path: Path) -> None:
    """Rewrite the first image's tiles as abbreviated streams: DQT and DHT go to JPEGTables."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        data = path.read_bytes()
        streams = [data[o : o + c] for o, c in zip(page.dataoffsets, page.databytecounts, strict=True)]
        shape, text, sampling = page.shape, page.description, page.tags[530].value if 530 in page.tags else (1, 1)
    common, short = b"", []
    for stream in streams:
        kept, taken, at = stream[:2], b"", 2
        while stream[at + 1] != 0xDA:
            end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
            if stream[at + 1] in (0xDB, 0xC4):
                taken += stream[at:end]
            else:
                kept += stream[at:end]
            at = end
        short.append(kept + stream[at:])
        common = common or taken
        assert taken == common  # the tables are the same in every tile
    options = {"photometric": "ycbcr", "compression": "jpeg", "metadata": None, "tile": (64, 64), "software": False}
    options |= {"subsampling": sampling} if sampling != (1, 1) else {}
    table = b"\xff\xd8" + common + b"\xff\xd9"
    tifffile.imwrite(path, iter(short), shape=shape, dtype=np.uint8, description=text, jpegtables=table, **options)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].jpegtables == table


def read_all(path: Path, reader: str) -> np.ndarray:
    with open_slide(path, mpp=0.5, reader=reader) as slide:
        return slide.read(0, 0, 0, *slide.size)


def tile_pixels(image: np.ndarray, number: int) -> np.ndarray:
    y, x = number // 4 * 64, number % 4 * 64
    return image[y : y + 64, x : x + 64]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reader", [*TIFFS, "auto"])
@pytest.mark.parametrize("damage", JPEG_TILE)
def test_a_damaged_jpeg_tile_is_an_error_and_not_pixels(tmp_path, smooth, damage, reader, shared):
    path = jpeg_slide(tmp_path / "a.svs", smooth, shared)
    want = read_all(path, reader)
    JPEG_TILE[damage](path)
    with open_slide(path, reader=reader) as slide:
        for _ in range(2):  # the second time it must not come from a cache
            with pytest.raises(CorruptTiles) as caught:
                slide.read(100, 100, 0, 5, 5)
            assert caught.value.path == str(path)
            with pytest.raises(CorruptTiles):
                slide.read(0, 0, 0, W, H)
        for number in set(range(12)) - {TILE}:  # the others are read as if nothing had happened
            y, x = number // 4 * 64, number % 4 * 64
            part = tile_pixels(want, number)
            np.testing.assert_array_equal(slide.read(x, y, 0, part.shape[1], part.shape[0]), part)


@pytest.mark.parametrize("reader", [*TIFFS, "auto"])
@pytest.mark.parametrize("damage", JPEG_FILE)
def test_damage_of_tables_is_found_on_opening_or_reading(tmp_path, smooth, damage, reader):
    path = jpeg_slide(tmp_path / "a.svs", smooth, with_tables=True)
    read_all(path, reader)
    JPEG_FILE[damage](path)
    with pytest.raises((UnreadableSlide, CorruptTiles)):
        read_all(path, reader)


@pytest.mark.parametrize("damage", [zeroed, noise, half_zeroed, cut, cut_in_header])
@pytest.mark.parametrize("compression", ["deflate", "lzw", "zstd"])
def test_damage_of_lossless_tiles(tmp_path, pixels, compression, damage):
    """By the reader that auto takes: OpenSlide does not notice damaged deflate, nor damaged LZW in every case."""
    path = tiff(tmp_path / "a.tif", pixels, photometric="rgb", compression=compression)
    damage(path)
    for reader in ("tiffslide", "auto"):
        with open_slide(path, reader=reader) as slide:
            with pytest.raises(CorruptTiles):
                slide.read(100, 100, 0, 5, 5)
            np.testing.assert_array_equal(slide.read(0, 0, 0, 64, 64), pixels[:64, :64])


@pytest.mark.parametrize("damage", [half_zeroed, cut, zeroed])
@pytest.mark.parametrize("compression", ["jpeg2000", "webp"])
def test_damage_of_modern_tiles(tmp_path, pixels, compression, damage):
    options = {"compressionargs": {"lossless": True}} if compression == "webp" else {}
    path = tiff(tmp_path / "a.tif", pixels, photometric="rgb", compression=compression, **options)
    damage(path)
    with open_slide(path) as slide, pytest.raises(CorruptTiles):
        slide.read(100, 100, 0, 5, 5)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", ["png", "jpg", "jp2"])
def test_a_cut_plain_image(tmp_path, pixels, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    try:
        slide = open_slide(path, mpp=0.5)
    except SlideError:
        return
    assert (suffix, keep) == ("png", 0.99)  # only its closing mark is gone
    np.testing.assert_array_equal(slide.read(0, 0, 0, W, H), pixels)


def test_a_small_file_that_declares_a_huge_image(tmp_path):
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )
    with pytest.raises(UnreadableSlide, match="60000 x 60000"):
        open_slide(tmp_path / "a.png", mpp=0.5)


CHILD = """
import resource, sys
from pipeline.errors import CorruptTiles
from pipeline.readers import open_slide
slide = open_slide(sys.argv[1], reader=sys.argv[2])
slide.read(0, 0, 0, 60, 60)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    slide.read(100, 100, 0, 5, 5)
except CorruptTiles:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("reader", TIFFS)
def test_a_tile_that_declares_65535_squared_costs_no_memory(tmp_path, smooth, reader):
    path = jpeg_slide(tmp_path / "a.svs", smooth)
    sof(65535, 65535)(path)
    run = subprocess.run([sys.executable, "-c", CHILD, str(path), reader], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 20_000  # kB; the declared image has 12 GB


@pytest.mark.parametrize("reader", TIFFS)
def test_a_slide_that_vanishes_or_is_replaced_while_open(tmp_path, smooth, reader):
    """OpenSlide opens the file anew for every read; what it finds then is not passed on as an error of its own."""
    for change in (Path.unlink, zeroed, lambda path: path.write_bytes(b"no slide any more" * 99)):
        path = jpeg_slide(tmp_path / "a.svs", smooth)
        with open_slide(path, reader=reader) as slide:
            change(path)
            for _ in range(2):
                try:
                    slide.read(100, 100, 0, 5, 5)
                except SlideError:
                    pass
                else:
                    assert change == Path.unlink  # an open file outlives its name
                    assert reader == "tiffslide"


# ---- damage: structure ----------------------------------------------------------------------------------------------


def fault_of(path: Path) -> str:
    with open(path, "rb") as file:
        return structure(file).fault


def layout_data_first(path, image):
    """Data, directory, data, directory …, as tifffile writes when streaming to a closed page."""
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            file.write(
                image[::step, ::step],
                tile=(64, 64),
                subfiletype=int(step > 1),
                photometric="rgb",
                compression="lzw",
                **SCALE,
            )


def layout_directories_first(path, image):
    """All directories, then all data: the sub-directories of OME-like files, written at once."""
    layout_data_first(path, image)
    with tifffile.TiffFile(path) as file:
        pages = [(page, list(zip(page.dataoffsets, page.databytecounts, strict=True))) for page in file.pages]
        data = path.read_bytes()
        tables, blobs = [], []
        for page, places in pages:
            tables.append((page.offset, len(page.tags), {c: page.tags[c].valueoffset for c in (324, 325)}, len(places)))
            blobs.append([data[o : o + c] for o, c in places])
    start = min(o for _, places in pages for o, _ in places)
    tail = max(o + c for _, places in pages for o, c in places)
    # The directories stay where they are; the data move behind the end, and what was theirs becomes padding.
    out, at = bytearray(data), len(data)
    for (_, _, where, _), parts in zip(tables, blobs, strict=True):
        for n, blob in enumerate(parts):
            struct.pack_into("<I", out, where[324] + 4 * n, at)
            at += len(blob)
    path.write_bytes(bytes(out) + b"".join(b for parts in blobs for b in parts))
    assert start < tail


def layout_level_0_last(path, image):
    """The finest level's data stand behind everything else."""
    layout_data_first(path, image)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places, where = list(zip(page.dataoffsets, page.databytecounts, strict=True)), page.tags[324].valueoffset
    out = bytearray(path.read_bytes())
    for n, (o, c) in enumerate(places):
        struct.pack_into("<I", out, where + 4 * n, len(out))
        out += out[o : o + c]
        out[o : o + c] = bytes(c)
    path.write_bytes(out)


def layout_aperio(path, image):
    write_slide(path, image, 0.5, downsamples=(2, 4), tile_px=64)


LAYOUTS = {f.__name__[7:]: f for f in (layout_data_first, layout_directories_first, layout_level_0_last, layout_aperio)}


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cut_file_is_found_out_before_it_is_read(tmp_path, address, layout, keep):
    path = tmp_path / "a.tif"
    LAYOUTS[layout](path, address(256, 192))
    assert fault_of(path) == ""
    for reader in (*TIFFS, "auto"):
        with open_slide(path, reader=reader) as slide:
            assert len(slide.levels) == 3
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    for reader in (*TIFFS, "auto"):
        with pytest.raises(UnreadableSlide, match=r"truncated|corrupt"):
            open_slide(path, mpp=0.5, reader=reader)


def test_every_cut_of_the_last_kilobyte(tmp_path, address):
    path = tmp_path / "a.tif"
    layout_aperio(path, address(256, 192))
    data = path.read_bytes()
    for length in range(len(data) - 1000, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(UnreadableSlide):
            open_slide(path, mpp=0.5)


def set_tag(path: Path, code: int, value: int, page: int = 0) -> None:
    with tifffile.TiffFile(path) as file:
        tag = file.pages[page].tags[code]
        form = {3: "H", 4: "I"}[int(tag.dtype)]
        at = tag.valueoffset
    overwrite(path, at, struct.pack("<" + form, value))


def loop(path):
    with tifffile.TiffFile(path) as file:
        first, last = file.pages[0].offset, file.pages[-1].offset
        entries = len(file.pages[-1].tags)
    overwrite(path, last + 2 + 12 * entries, struct.pack("<I", first))


def chain_beyond(path):
    with tifffile.TiffFile(path) as file:
        page = file.pages[-1]
        at = page.offset + 2 + 12 * len(page.tags)
    overwrite(path, at, struct.pack("<I", path.stat().st_size + 4))


def first_beyond(path):
    overwrite(path, 4, struct.pack("<I", 0x7FFFFF00))


def no_directory(path):
    overwrite(path, 4, struct.pack("<I", 0))


def zero_size(path):
    set_tag(path, 256, 0)


def huge(path):
    set_tag(path, 256, 60000)
    set_tag(path, 257, 60000)


def no_offsets(path):
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].tags[324].offset
    overwrite(path, at, struct.pack("<H", 60000))


def no_tile_width(path):
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].tags[322].offset
    overwrite(path, at, struct.pack("<H", 60000))


def coarse_level_beyond(path):
    with tifffile.TiffFile(path) as file:
        at = file.pages[1].tags[324].valueoffset
    overwrite(path, at, struct.pack("<I", path.stat().st_size))


STRUCTURE = {
    f.__name__: f
    for f in (
        loop,
        chain_beyond,
        first_beyond,
        no_directory,
        zero_size,
        huge,
        no_offsets,
        no_tile_width,
        beyond,
        coarse_level_beyond,
    )
}


@pytest.mark.parametrize("reader", [*TIFFS, "auto"])
@pytest.mark.parametrize("damage", STRUCTURE)
def test_a_damaged_structure_is_refused(tmp_path, address, damage, reader):
    path = tmp_path / "a.tif"
    layout_data_first(path, address(256, 192))
    STRUCTURE[damage](path)
    with pytest.raises(UnreadableSlide):
        open_slide(path, mpp=0.5, reader=reader)


@pytest.mark.parametrize("size", [(10**6, 10**6), (0, 0)])
@pytest.mark.parametrize("reader", [*TIFFS, "auto"])
def test_a_million_squared_in_one_tile_and_nothing_at_all(tmp_path, size, reader):
    path = tmp_path / "a.tif"
    tiles = iter([bytes(64 * 64 * 3)])
    tifffile.imwrite(path, tiles, shape=(64, 64, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb", **SCALE)
    with tifffile.TiffFile(path) as file:
        places = {code: (file.pages[0].tags[code].offset, int(file.pages[0].tags[code].dtype)) for code in (256, 257)}
    for (at, _), side in zip(places.values(), size, strict=True):
        overwrite(path, at + 2, struct.pack("<HII", 4, 1, side))
    with pytest.raises(UnreadableSlide, match="corrupt"):
        open_slide(path, mpp=0.5, reader=reader)


@pytest.mark.parametrize("reader", TIFFS)
def test_random_bytes_in_the_header_raise_only_our_errors(tmp_path, smooth, reader):
    """Whatever a reader makes of it, what leaves is a slide or a SlideError; pixels are tried as well."""
    source = jpeg_slide(tmp_path / "a.svs", smooth).read_bytes()
    with tifffile.TiffFile(tmp_path / "a.svs") as file:
        first = file.pages[0].offset
    random, path, refused = np.random.default_rng(4), tmp_path / "b.svs", 0
    for _ in range(150):
        data = bytearray(source)
        for at in random.integers(first, first + 240, 2):
            data[at] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            with open_slide(path, mpp=0.5, reader=reader) as slide:
                slide.read(0, 0, 0, min(slide.size[0], 300), min(slide.size[1], 300))
        except SlideError:
            refused += 1
    assert 20 < refused < 150


def write_ome(path: Path, pixels: np.ndarray, unit: str = "µm") -> None:
    """An OME-TIFF whose pyramid stands in SubIFDs, as Bio-Formats and QuPath write it."""
    options = {"tile": (128, 128), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}}
    size = {"µm": 0.25, "nm": 250.0}[unit]
    about = {"PhysicalSizeX": size, "PhysicalSizeXUnit": unit, "PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pixels, subifds=2, metadata={"axes": "YXS", **about}, **options)
        for factor in (2, 4):
            file.write(pixels[::factor, ::factor], subfiletype=1, metadata=None, **options)


@pytest.mark.parametrize("unit", ["µm", "nm"])
def test_ome_tiff_has_its_pyramid_and_its_scale(tmp_path, unit):
    pixels = np.repeat(np.repeat(np.arange(48, dtype=np.uint8).reshape(6, 8, 1) * 5, 100, 0), 100, 1).repeat(3, 2)
    write_ome(tmp_path / "a.ome.tif", pixels, unit)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert [level[:2] for level in slide.levels] == [(800, 600), (400, 300), (200, 150)]
        assert (slide.mpp, slide.mpp_source) == (0.25, "tag: OME-XML PhysicalSize")
        np.testing.assert_allclose(slide.read(0, 0, 1, 400, 300), pixels[::2, ::2], atol=3)


def test_ome_tiff_with_a_cut_pyramid_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    write_ome(tmp_path / "a.ome.tif", pixels)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tif:
        last = tif.pages[0].pages[-1].aspage()
        tag = last.tags["TileOffsets"]
    data = bytearray((tmp_path / "a.ome.tif").read_bytes())
    size = {"I": 4, "Q": 8}[tag.dtype.name[0]] if hasattr(tag.dtype, "name") and tag.dtype.name[0] in "IQ" else 4
    data[tag.valueoffset : tag.valueoffset + size] = (2**31 - 5).to_bytes(size, "little")
    (tmp_path / "b.ome.tif").write_bytes(data)
    with pytest.raises(UnreadableSlide, match="beyond the end"):
        open_slide(tmp_path / "b.ome.tif")
