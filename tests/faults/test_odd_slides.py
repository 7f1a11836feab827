"""Rows 22-37 of the fault matrix: slides that are whole, but whose scale or pixels are not what one expects."""

import cv2
import numpy as np
import pytest
import tifffile

from pipeline.readers import open_slide
from pipeline.stream import stream_tiles

DESCRIPTION = 270
READERS = pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
GLASS = 243


def aperio(kit, path, description: str):
    """A good slide whose level 0 is described so."""
    pages = kit.pages()
    pages[0].text(DESCRIPTION, description)
    for page in pages[2:]:
        page.text(DESCRIPTION, "Aperio Image Library v12.0")
    return kit.write_tiff(path, pages)


def plain_tiff(path, pixels: np.ndarray, um: float | None = 0.5, **options):
    """A tiled TIFF without a vendor; `um`: µm per pixel for its resolution tags, None for none."""
    scale = {} if um is None else {"resolution": (1e4 / um, 1e4 / um), "resolutionunit": "CENTIMETER"}
    defaults = {"photometric": "rgb", "tile": (64, 64), "metadata": None, "software": False}
    tifffile.imwrite(path, pixels, **defaults | scale | options)
    return path


# --- what a pixel measures --------------------------------------------------------------------------------------------


@pytest.mark.fault(22, "no µm/px", "F, with the csv line to add")
@READERS
def test_row_22_no_mpp(reader, folder, kit, process):
    row = process(plain_tiff(folder / "a, b.tif", kit.tissue(512), um=None), reader=reader)
    assert (row.status, row.stage, row.error) == ("failed", "open", "MissingMpp")
    assert '--mpp-csv: "a, b.tif",<µm per pixel>' in " ".join(row.message.split())


@pytest.mark.fault(22)
def test_row_22_aperio_without_mpp(folder, kit, process):
    row = process(aperio(kit, folder / "a.svs", "Aperio Image Library v12.0|AppMag = 20"))
    assert (row.status, row.error) == ("failed", "MissingMpp")
    assert "a.svs,<µm per pixel>" in row.message


@pytest.mark.fault(22)
def test_row_22_the_line_that_is_asked_for_mends_it(folder, kit, process):
    path = plain_tiff(folder / "a.tif", kit.tissue(512), um=None)
    assert process(path).status == "failed"
    row = process(path, given_mpp=0.5)
    assert (row.status, row.mpp, row.mpp_source) == ("done", 0.5, "csv")


@pytest.mark.fault(23, "µm/px of 0, −1, nan, inf, abc, 500", "F")
@READERS
@pytest.mark.parametrize("said", ["0", "-1", "nan", "inf", "abc", "500", "0.001"])
def test_row_23_unbelievable_mpp(said, reader, folder, kit, process):
    row = process(aperio(kit, folder / "a.svs", f"Aperio Image Library v12.0|AppMag = 20|MPP = {said}"), reader=reader)
    assert (row.status, row.stage, row.error) == ("failed", "open", "MissingMpp")
    assert said in row.message
    assert "a.svs,<µm per pixel>" in row.message


@pytest.mark.fault(24, "µm/px of 0,5", "F, the same with both readers")
def test_row_24_decimal_comma(folder, kit, process):
    path = aperio(kit, folder / "a.svs", "Aperio Image Library v12.0|AppMag = 20|MPP = 0,5")
    rows = [process(path, reader=reader) for reader in ("openslide", "tiffslide")]
    assert {(row.status, row.error, row.message) for row in rows} == {("failed", "MissingMpp", rows[0].message)}
    assert "'0,5', which is not a number" in rows[0].message


@pytest.mark.fault(25, "72 or 96 dpi of an image editor", "F")
@READERS
@pytest.mark.parametrize("dpi", [72, 96])
def test_row_25_dots_per_inch_of_an_image_editor(dpi, reader, folder, kit, process):
    path = plain_tiff(folder / "a.tif", kit.tissue(512), um=None, resolution=(dpi, dpi), resolutionunit="INCH")
    row = process(path, reader=reader)
    assert (row.status, row.error) == ("failed", "MissingMpp")
    assert f"{dpi} dpi" in row.message


@pytest.mark.fault(26, "µm/px of x and y differ by more than 5 %", "F, with the csv line to add; W below 5 %")
@READERS
def test_row_26_x_and_y_differ(reader, folder, kit, process):
    scale = {"resolution": (1e4 / 0.5, 1e4 / 0.4), "resolutionunit": "CENTIMETER"}
    row = process(plain_tiff(folder / "a.tif", kit.tissue(512), um=None, **scale), reader=reader)
    assert (row.status, row.error) == ("failed", "MissingMpp")
    assert "0.5 µm/px in x but 0.4 in y" in row.message
    assert "a.tif,<µm per pixel>" in row.message


@pytest.mark.fault(26)
@READERS
def test_row_26_x_and_y_differ_a_little(reader, folder, kit, process):
    scale = {"resolution": (1e4 / 0.5, 1e4 / 0.49), "resolutionunit": "CENTIMETER"}
    row = process(plain_tiff(folder / "a.tif", kit.tissue(512), um=None, **scale), reader=reader)
    assert (row.status, row.mpp) == ("done", pytest.approx(0.495))
    assert "their mean is used" in row.message


@pytest.mark.fault(27, "µm/px and objective disagree", "W")
def test_row_27_disagreement_with_the_objective(folder, kit, process, line):
    row = process(aperio(kit, folder / "a.svs", "Aperio Image Library v12.0|AppMag = 40|MPP = 0.5"))
    assert (row.status, row.mpp) == ("done", 0.5)
    assert "disagrees with the objective tag 40x" in row.message
    assert line.store.group("a.svs").attrs["scale"]["warnings"] == [row.message]


# --- what stands on it ------------------------------------------------------------------------------------------------


@pytest.mark.fault(28, "white, 1 × 1 and 100 × 100 px", "E")
@pytest.mark.parametrize("side", [1, 100])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_row_28_tiny_and_white(side, suffix, folder, process):
    path, pixels = folder / f"a{suffix}", np.full((side, side, 3), 255, np.uint8)
    if suffix == ".png":
        cv2.imwrite(str(path), pixels)
    else:
        plain_tiff(path, pixels)
    assert process(path, given_mpp=0.5).status == "empty"


@pytest.mark.fault(29, "tissue smaller than a tile", "D, the rest is white")
@READERS
def test_row_29_tissue_smaller_than_a_tile(reader, folder, kit, process, line):
    path = plain_tiff(folder / "a.tif", np.ascontiguousarray(kit.tissue(512)[64:164, 64:164]))
    row = process(path, reader=reader, tile_px=224, levels=1)
    assert (row.status, row.tiles) == ("done", 1)
    with open_slide(path, reader=reader) as slide:
        ((_, pixels),) = stream_tiles(slide, line.store.group("a.tif").tree())
        assert pixels.shape == (224, 224, 3)
        assert (pixels[:100, :100] == slide.read(0, 0, 0, 100, 100)).all()
    assert (pixels[100:] == 255).all()
    assert (pixels[:, 100:] == 255).all()


@pytest.mark.fault(30, "all white", "E")
@pytest.mark.parametrize("white", [255, GLASS])
def test_row_30_all_white(white, folder, kit, process):
    kit.write_slide(folder / "a.svs", np.full((512, 512, 3), white, np.uint8), 0.5)
    assert process(folder / "a.svs").status == "empty"


@pytest.mark.fault(30)
def test_row_30_all_glass(folder, kit, process):
    kit.write_slide(folder / "a.svs", kit.glass(1024, 1024), 0.5)
    assert process(folder / "a.svs").status == "empty"


@pytest.mark.fault(31, "all black", "E or F")
@pytest.mark.parametrize("black", [0, 8])
def test_row_31_all_black(black, folder, kit, process):
    kit.write_slide(folder / "a.svs", np.full((1024, 1024, 3), black, np.uint8), 0.5)
    assert process(folder / "a.svs").status in ("empty", "failed")


@pytest.mark.fault(32, "pen marks only", "E")
@pytest.mark.parametrize("ink", [(35, 60, 165), (25, 125, 75), (38, 36, 42)], ids=["blue", "green", "black"])
def test_row_32_pen_marks_only(ink, folder, kit, process, line):
    pixels = kit.glass(1024, 1024).copy()
    cv2.ellipse(pixels, (500, 480), (300, 240), 20, 0, 300, ink, 60, cv2.LINE_AA)
    cv2.line(pixels, (100, 900), (700, 960), ink, 60, cv2.LINE_AA)
    kit.write_slide(folder / "a.svs", pixels, 4.0)
    row = process(folder / "a.svs", mpp=4.0)
    assert row.status == "empty"
    assert "pen marks removed" in row.message


# --- how it is coded --------------------------------------------------------------------------------------------------


def grey(kit) -> np.ndarray:
    return cv2.cvtColor(kit.tissue(512), cv2.COLOR_RGB2GRAY)


@pytest.mark.fault(33, "grey, palette, 1 bit", "D in the right colours, or F")
def test_row_33_grey(folder, kit, process):
    path = plain_tiff(folder / "a.tif", grey(kit), photometric="minisblack")
    assert process(path).status == "done"
    with open_slide(path) as slide:
        assert (slide.read(0, 0, 0, 512, 512) == grey(kit)[..., None]).all()


@pytest.mark.fault(33)
def test_row_33_palette(folder, kit, process):
    ramp = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 7)]).astype(np.uint16) * 257
    path = plain_tiff(folder / "a.tif", grey(kit), photometric="palette", colormap=ramp)
    row = process(path)
    assert row.status in ("done", "failed", "empty")
    if row.status != "failed":
        with open_slide(path) as slide:
            assert (slide.read(0, 0, 0, 512, 512) == (ramp.T[grey(kit)] >> 8)).all()


@pytest.mark.fault(33)
def test_row_33_one_bit(folder, kit, process):
    bits = grey(kit) > 150
    path = plain_tiff(folder / "a.tif", bits, photometric="minisblack", bitspersample=1)
    row = process(path)
    assert row.status in ("done", "failed", "empty")
    if row.status != "failed":
        with open_slide(path) as slide:
            assert (slide.read(0, 0, 0, 512, 512) == bits[..., None] * 255).all()


@pytest.mark.fault(34, "RGBA with alpha 0", "E")
@READERS
def test_row_34_transparent_tiff(reader, folder, kit, process):
    rgba = np.dstack([kit.tissue(512), np.zeros((512, 512), np.uint8)])
    row = process(plain_tiff(folder / "a.tif", rgba, extrasamples=["unassalpha"]), reader=reader)
    assert row.status == "empty"


@pytest.mark.fault(34)
def test_row_34_transparent_png(folder, kit, process):
    cv2.imwrite(str(folder / "a.png"), np.dstack([kit.tissue(512), np.zeros((512, 512), np.uint8)]))
    assert process(folder / "a.png", given_mpp=0.5).status == "empty"


@pytest.mark.fault(35, "16 bits, signed, float", "D in the right colours, or F")
def test_row_35_sixteen_bits(folder, kit, process):
    path = plain_tiff(folder / "a.tif", kit.tissue(512).astype(np.uint16) * 257)
    row = process(path)
    assert row.status in ("done", "failed")
    if row.status == "done":
        with open_slide(path) as slide:
            assert (slide.read(0, 0, 0, 512, 512) == kit.tissue(512)).all()


@pytest.mark.fault(35)
@READERS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_row_35_float(dtype, reader, folder, kit, process):
    row = process(plain_tiff(folder / "a.tif", kit.tissue(512).astype(dtype)), reader=reader)
    assert row.status == "failed"


@pytest.mark.fault(35)
@READERS
def test_row_35_signed(reader, folder, kit, process):
    row = process(plain_tiff(folder / "a.tif", kit.tissue(512).astype(np.int16)), reader=reader)
    assert row.status == "failed"


@pytest.mark.fault(36, "CMYK, miniswhite, planar", "D in the right colours, or F")
def test_row_36_cmyk(folder, kit, process):
    cmyk = np.dstack([255 - kit.tissue(512), np.zeros((512, 512), np.uint8)])
    path = plain_tiff(folder / "a.tif", cmyk, photometric="separated")
    expect_failure_or_colours(process(path), path, kit.tissue(512))


@pytest.mark.fault(36)
def test_row_36_miniswhite(folder, kit, process):
    path = plain_tiff(folder / "a.tif", 255 - grey(kit), photometric="miniswhite")
    expect_failure_or_colours(process(path), path, grey(kit)[..., None])


@pytest.mark.fault(36)
def test_row_36_planar(folder, kit, process):
    planes = np.ascontiguousarray(kit.tissue(512).transpose(2, 0, 1))
    path = plain_tiff(folder / "a.tif", planes, planarconfig="separate")
    expect_failure_or_colours(process(path), path, kit.tissue(512))


def expect_failure_or_colours(row, path, pixels: np.ndarray) -> None:
    assert row.status in ("done", "failed")
    if row.status == "done":
        with open_slide(path) as slide:
            assert (slide.read(0, 0, 0, 512, 512) == pixels).all()


@pytest.mark.fault(37, "Aperio without a thumbnail", "D, all levels")
@READERS
def test_row_37_aperio_without_thumbnail(reader, folder, kit, process, line):
    pages = kit.pages()
    del pages[1]
    path = kit.write_tiff(folder / "a.svs", pages)
    with open_slide(path, reader=reader) as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(1024, 1024), (256, 256), (64, 64)]
    assert process(path, reader=reader).status == "done"
    process(kit.write_tiff(folder / "whole.svs", kit.pages()), reader=reader)
    assert line.x("a.svs") == line.x("whole.svs")
