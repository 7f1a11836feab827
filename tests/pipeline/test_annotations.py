"""Annotation files: whose they are, and what is inside of them, whatever their form."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.annotations import find_annotations, read_annotation
from pipeline.errors import UsageError

SIZE, MPP = (800, 600), 0.5
BOX = (120, 80, 360, 440)  # x0, y0, x1, y1: divisible by what masks are smaller
DATA = Path(__file__).parents[2].parent / "shared" / "data"


def ring(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def geojson(*boxes) -> str:
    shapes = [{"type": "Polygon", "coordinates": [[*ring(*box), [*box[:2]]]]} for box in boxes]
    features = [{"type": "Feature", "geometry": shape, "properties": {}} for shape in shapes]
    return json.dumps({"type": "FeatureCollection", "features": features})


def asap(*boxes) -> str:
    rows = "".join(
        '<Annotation Type="Polygon"><Coordinates>'
        + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(ring(*box)))
        + "</Coordinates></Annotation>"
        for box in boxes
    )
    return f"<ASAP_Annotations><Annotations>{rows}</Annotations></ASAP_Annotations>"


def inside(box=BOX, shape=(SIZE[1], SIZE[0]), factor=1.0) -> np.ndarray:
    x0, y0, x1, y1 = (round(v / factor) for v in box)
    image = np.zeros([round(side / factor) for side in shape], bool)
    image[y0:y1, x0:x1] = True
    return image


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


# --- whose ------------------------------------------------------------------------------------------------------------

SLIDES = {name: Path("/slides") / name for name in ("a.svs", "b.ome.tif", "case1/c.svs", "case2/c.svs", "case2/d.svs")}


def found_in(folder, slides=SLIDES):
    found, notes = find_annotations(folder, slides)
    return {slide: path.relative_to(folder).as_posix() for slide, path in found.items()}, notes


@pytest.mark.parametrize(
    "name",
    ["a.geojson", "a.json", "a.xml", "a.png", "a.tif", "a.tiff", "a.bmp", "a.PNG", "a_mask.png", "a_anno.png",
     "a_annotation.xml", "a_annotations.geojson", "a.svs.geojson", "a.svs_mask.png"],
)  # fmt: skip
def test_a_file_named_after_its_slide(tmp_path, name):
    touch(tmp_path, name)
    assert found_in(tmp_path) == ({"a.svs": name}, [])


def test_folders_are_those_of_the_slides(tmp_path):
    touch(tmp_path, "case1/c.xml", "case2/c_mask.png", "d.geojson", "b.xml")
    found, notes = found_in(tmp_path)
    assert (found.pop("b.ome.tif"), found.pop("case2/d.svs")) == ("b.xml", "d.geojson")
    assert found == {"case1/c.svs": "case1/c.xml", "case2/c.svs": "case2/c_mask.png"}
    assert notes == []


def test_what_is_of_no_slide_is_noted(tmp_path):
    touch(tmp_path, "a.xml", "case1/d.xml", "z_mask.png", "readme.txt", ".a.xml", "x.zarr/a.json", "d/a.geojson")
    found, (note,) = found_in(tmp_path)
    assert found == {"a.svs": "a.xml"}, "case1/d.xml is not of case2/d.svs"
    assert note == "3 annotations are of no slide here: z_mask.png, case1/d.xml, d/a.geojson."


def test_pictures_in_an_output_folder_are_no_annotations(tmp_path):
    touch(tmp_path, "a.xml", "out/qc/a.png", "out/a.png", "out/run.json")
    assert found_in(tmp_path) == ({"a.svs": "a.xml"}, [])


def test_a_slide_is_not_its_own_annotation(tmp_path):
    touch(tmp_path, "a.png", "a_anno.png", "b.tif", "b.png")
    slides = {name: tmp_path / name for name in ("a.png", "b.tif")}
    assert found_in(tmp_path, slides) == ({"a.png": "a_anno.png", "b.tif": "b.png"}, [])


def test_all_that_is_not_clear_is_told_at_once(tmp_path):
    touch(tmp_path, "a.xml", "a_mask.png", "c.geojson", "b.xml")
    with pytest.raises(UsageError) as caught:
        find_annotations(tmp_path, SLIDES)
    first, second = str(caught.value).splitlines()
    assert "c.geojson: 'c' could be any of case1/c.svs, case2/c.svs" in first
    assert second == f"{tmp_path}: more than one annotation of a.svs: a.xml, a_mask.png; leave one of them there"


def test_a_folder_without_any(tmp_path):
    with pytest.raises(UsageError, match=r"named after a slide here.*a\.geojson"):
        find_annotations(tmp_path, SLIDES)
    with pytest.raises(UsageError, match="is no folder"):
        find_annotations(tmp_path / "none", SLIDES)


# --- what is inside ---------------------------------------------------------------------------------------------------


def read(path, size=SIZE):
    return read_annotation(path, size, MPP)


def save(path: Path, image: np.ndarray) -> Path:
    if path.suffix == ".tif":
        tifffile.imwrite(path, image)
    else:
        Image.fromarray(image).save(path)
    return path


def test_the_same_rectangle_in_every_form_has_the_same_shares(tmp_path):
    (tmp_path / "a.geojson").write_text(geojson(BOX))
    (tmp_path / "a.xml").write_text(asap(BOX))
    for factor in (1, 4, 8):
        save(tmp_path / f"a{factor}.png", inside(factor=factor))
        save(tmp_path / f"a{factor}.tif", inside(factor=factor).astype(np.uint8))
    corners = np.random.default_rng(0).uniform(-50, 500, (200, 2))
    boxes = np.concatenate([corners, np.random.default_rng(1).uniform(1, 200, (200, 2))], axis=1)
    sides = [np.minimum(boxes[:, i] + boxes[:, i + 2], BOX[i + 2]) - np.maximum(boxes[:, i], BOX[i]) for i in (0, 1)]
    wanted = np.prod(np.maximum(sides, 0), axis=0) / np.prod(boxes[:, 2:], axis=1)
    assert (wanted > 0).sum() > 50
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        mask = read(path)
        np.testing.assert_allclose(mask.fraction(boxes), wanted, atol=1e-5, err_msg=path.name)
        assert mask.area_mm2 == pytest.approx(240 * 360 * MPP**2 / 1e6, rel=1e-5)


def test_a_mask_of_odd_size_lies_over_the_whole_slide(tmp_path):
    mask = read(save(tmp_path / "a.png", np.ones((60, 81), bool)), (803, 597))
    assert mask.downsample == (803 / 81, 597 / 60)
    assert mask.fraction([[0, 0, 803, 597]]) == pytest.approx(1)


LABELS = np.where(inside(factor=10), 37, 0).astype(np.uint8)
CLEAR = np.where(inside(factor=10), 255, 0).astype(np.uint8)


def palette() -> Image.Image:
    image = Image.fromarray(LABELS).convert("P")
    image.putpalette([255 - i // 3 for i in range(768)])  # 0 is drawn white
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(LABELS > 0),
        Image.fromarray(LABELS),
        palette(),
        Image.fromarray(LABELS.astype(np.uint16) * 256),
        Image.fromarray(np.stack([LABELS * 0, LABELS * 0, LABELS], axis=2)),
        Image.fromarray(np.stack([LABELS, LABELS * 0 + 255], axis=2)),
        Image.fromarray(np.stack([LABELS, LABELS, LABELS, CLEAR * 0 + 255], axis=2)),
        Image.fromarray(np.stack([CLEAR * 0 + 200, CLEAR, CLEAR, CLEAR], axis=2)),
    ],
    ids=["1", "L", "P", "I;16", "RGB", "LA", "RGBA opaque", "RGBA clear"],
)
def test_any_pixel_that_is_not_zero_is_annotated(tmp_path, image):
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png").image, inside(factor=10))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float32", "bool"])
@pytest.mark.parametrize("options", [{}, {"compression": "deflate", "tile": (16, 16)}, {"compression": "lzw"}])
def test_tiff_masks(tmp_path, kind, options):
    tifffile.imwrite(tmp_path / "a.tif", LABELS.astype(kind), **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif").image, LABELS > 0)


@pytest.mark.parametrize(("axis", "how"), [(2, "contig"), (0, "separate")])
def test_tiff_masks_in_colours(tmp_path, axis, how):
    colours = np.stack([LABELS * 0, LABELS, LABELS * 0], axis=axis)
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb", planarconfig=how)
    np.testing.assert_array_equal(read(tmp_path / "a.tif").image, LABELS > 0)


def pyramid(path: Path, subifds: bool) -> None:
    with tifffile.TiffWriter(path) as file:
        options = {"tile": (64, 64), "compression": "deflate", "metadata": None}
        file.write(inside().astype(np.uint8), subifds=2 if subifds else 0, **options)
        for factor in (2, 4):
            file.write(inside(factor=factor).astype(np.uint8), subfiletype=1, **options)


@pytest.mark.parametrize("subifds", [True, False])
def test_of_a_pyramid_the_largest_that_is_not_too_large_is_read(tmp_path, monkeypatch, subifds):
    pyramid(tmp_path / "a.tif", subifds)
    assert read(tmp_path / "a.tif").image.shape == (600, 800)
    monkeypatch.setattr("pipeline.annotations.CELLS", 400 * 300)
    mask = read(tmp_path / "a.tif")
    assert mask.image.shape == (300, 400)
    assert mask.area_mm2 == pytest.approx(240 * 360 * MPP**2 / 1e6)


def test_polygons_on_a_large_slide_are_drawn_in_as_many_cells_as_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.annotations.CELLS", 10_000)
    (tmp_path / "a.xml").write_text(asap(BOX))
    mask = read(tmp_path / "a.xml")
    assert 8_000 < mask.image.size < 11_000
    assert mask.area_mm2 == pytest.approx(240 * 360 * MPP**2 / 1e6, rel=0.03)


# --- what is refused --------------------------------------------------------------------------------------------------


def cut(path: Path, share=0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("shape", [(60, 82), (80, 60), (60, 60)])
def test_a_mask_of_another_shape_is_refused_with_both_sizes(tmp_path, shape):
    path = save(tmp_path / "a.png", np.ones(shape, bool))
    with pytest.raises(UsageError) as caught:
        read(path)
    words = str(caught.value)
    assert str(path) in words
    assert f"{shape[1]} x {shape[0]}" in words
    assert "800 x 600" in words


def damaged(name: str, folder: Path) -> Path:
    path, random = folder / name, np.random.default_rng(0)
    noise = random.integers(0, 2, (60, 80)).astype(np.uint8)
    if name.endswith(("png", "tif", "bmp")):
        save(path, noise)
    elif name == "tiles.tiff":
        tifffile.imwrite(path, noise, compression="deflate", tile=(16, 16))
    elif name == "inside.tiff":
        tifffile.imwrite(path, noise, compression="deflate", tile=(16, 16))
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 60] = bytes(60)
        path.write_bytes(data)
        return path
    elif name == "text.png":
        path.write_text("no picture")
        return path
    else:
        path.write_text(geojson(BOX) if name.endswith("json") else asap(BOX))
    cut(path)
    return path


@pytest.mark.parametrize(
    "name", ["a.png", "a.bmp", "a.tif", "tiles.tiff", "inside.tiff", "a.geojson", "a.json", "a.xml", "text.png"]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    path = damaged(name, tmp_path)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_polygons_that_lie_nowhere_on_the_slide_are_refused(tmp_path):
    (tmp_path / "a.geojson").write_text(geojson((900, 700, 950, 800)))
    with pytest.raises(UsageError, match=r"a\.geojson.*800 x 600.*level-0"):
        read(tmp_path / "a.geojson")
    (tmp_path / "b.geojson").write_text(geojson((900, 700, 950, 800), (700, 500, 950, 800)))
    assert read(tmp_path / "b.geojson").area_mm2 == pytest.approx(100 * 100 * MPP**2 / 1e6)


def test_an_empty_mask_says_that_nothing_is_annotated(tmp_path):
    assert not read(save(tmp_path / "a.png", np.zeros((60, 80), bool))).image.any()


def test_a_mask_with_more_pixels_than_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.annotations.MAX_PIXELS", 4000)
    for name in ("a.png", "a.tif"):
        with pytest.raises(UsageError, match=rf"{name}.*80 x 60 pixels are too many"):
            read(save(tmp_path / name, LABELS))


@pytest.mark.parametrize("name", ["train_1", "train_7", "train_12"])
def test_masks_of_glas(name):
    folder = DATA / "tiles/GlaS"
    if not folder.is_dir():
        pytest.skip("the shared images are not here")
    with Image.open(folder / f"{name}.jpg") as picture:
        size = picture.size
    found, notes = find_annotations(folder, {f"{name}.jpg": folder / f"{name}.jpg"})
    assert found == {f"{name}.jpg": folder / f"{name}_anno.png"}
    assert notes[0].startswith("29 annotations are of no slide here")
    mask = read_annotation(found[f"{name}.jpg"], size, 0.62)
    truth = np.asarray(Image.open(folder / f"{name}_anno.png")) > 0
    assert mask.downsample == (1.0, 1.0)
    np.testing.assert_array_equal(mask.image, truth)


@pytest.mark.parametrize(
    ("name", "size"), [("asap-polygon.xml", None), ("123.annotation.geojson", (3000, 3000)), ("qupath05.geojson", None)]
)
def test_real_annotations(name, size):
    path = DATA / "annotations" / name
    if not path.exists():
        pytest.skip("the shared annotations are not here")
    mask = read_annotation(path, size or (40_000, 40_000), 0.5)
    assert mask.image.any()
    if size:
        assert mask.image.sum() == 2 * 821 * 821
