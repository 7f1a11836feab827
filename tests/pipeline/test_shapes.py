"""Annotations: what is inside, in which file formats, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.quadtree import QuadTree
from pipeline.readers import open_slide
from pipeline.shapes import read_shapes, shapes_mask

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "annotations"
SQUARE = [[100, 200], [500, 200], [500, 600], [100, 600], [100, 200]]
HOLE = [[200, 300], [300, 300], [300, 400], [200, 400], [200, 300]]


def area(ring: np.ndarray) -> float:
    x, y = np.asarray(ring, float).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def drawn_area(shapes, size=(997, 1009), cell=4.0):
    mask = shapes_mask(shapes, size, 0.5, cell)
    return mask.image.sum() * mask.downsample[0] * mask.downsample[1]


def write(path: Path, what: object) -> Path:
    path.write_text(what if isinstance(what, str) else json.dumps(what), encoding="utf-8")
    return path


def feature(geometry):
    return {"type": "Feature", "geometry": geometry, "properties": {}}


def asap(*polygons, kind="Polygon", head='<?xml version="1.0"?>\n'):
    rows = "".join(
        f'<Annotation Name="a" Type="{kind}"><Coordinates>'
        + "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(points))
        + "</Coordinates></Annotation>"
        for points in polygons
    )
    return f"{head}<ASAP_Annotations><Annotations>{rows}</Annotations></ASAP_Annotations>"


polygon = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}
FORMS = {
    "polygon": polygon,
    "feature": feature(polygon),
    "collection": {"type": "FeatureCollection", "features": [feature(polygon), feature(None)]},
    "list": [feature(polygon)],  # QuPath before 0.3
    "multipolygon": {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE]]},
    "geometries": {"type": "GeometryCollection", "geometries": [polygon, {"type": "Point", "coordinates": [1, 2]}]},
    "third coordinate": {"type": "Polygon", "coordinates": [[[*p, 0] for p in SQUARE], HOLE]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_geojson_holds_the_same_shape(tmp_path, form):
    ((outline, holes),) = read_shapes(write(tmp_path / "a.geojson", FORMS[form]))
    assert outline.tolist() == SQUARE
    assert [hole.tolist() for hole in holes] == [HOLE]


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(polygon), encoding="utf-8-sig")
    assert len(read_shapes(str(path))) == 1


@pytest.mark.parametrize("kind", ["Polygon", "Rectangle", "Spline"])
def test_asap_shapes(tmp_path, kind):
    path = write(tmp_path / "a.xml", asap(SQUARE[:4], [(1.5, 2.5), (9, 2.5), (9, 8)], kind=kind))
    first, second = read_shapes(path)
    assert first[0].tolist() == SQUARE[:4]
    assert second[0].tolist() == [[1.5, 2.5], [9, 2.5], [9, 8]]


def test_asap_points_stand_in_their_order_and_may_have_decimal_commas(tmp_path):
    rows = [(10, 3, 4), (2, 1, 2), (11, 5, 6)]
    coordinates = "".join(f'<Coordinate Order="{o}" X="{x},5" Y="{y},25"/>' for o, x, y in rows)
    text = f'<A><Annotation Type="Polygon"><Coordinates>{coordinates}</Coordinates></Annotation></A>'
    ((outline, _),) = read_shapes(write(tmp_path / "a.xml", text))
    assert outline.tolist() == [[1.5, 2.25], [3.5, 4.25], [5.5, 6.25]]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (asap(SQUARE, head=BOMB), "refused"),
        (asap(SQUARE, head="<!DOCTYPE ASAP_Annotations>"), "refused"),
        (asap(SQUARE, kind="PointSet"), "no polygon"),
        (asap(SQUARE[:2]), "no polygon"),
        (asap(SQUARE)[:-30], "not an ASAP XML"),
        (asap([("x", 1), (2, 3), (4, 5)]), "not an ASAP XML"),
        ("<html><body>404</body></html>", "no polygon"),
        ("", "not a GeoJSON"),
        ("x,y\n1,2\n", "not a GeoJSON"),
        ("[]", "no polygon"),
        ("{}", "not a GeoJSON"),
        ("[1, 2]", "not a GeoJSON"),
        ('{"type": "Feature"}', "not a GeoJSON"),
        ({"type": "Point", "coordinates": [1, 2]}, "no polygon"),
        ({"type": "Polygon", "coordinates": []}, "not a GeoJSON"),
        ({"type": "Polygon", "coordinates": [[1, 2, 3]]}, "not a GeoJSON"),
        ({"type": "Polygon", "coordinates": [[["a", "b"]]]}, "not a GeoJSON"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [float("nan"), 9]]]}, "not a GeoJSON"),
    ],
)
def test_what_is_no_annotation_is_refused_with_its_name(tmp_path, text, words):
    path = write(tmp_path / "odd.file", text)
    with pytest.raises(UsageError, match=words) as caught:
        read_shapes(path)
    assert "odd.file" in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_shapes(tmp_path / "none.geojson")
    (tmp_path / "b.geojson").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="cannot be read"):
        read_shapes(tmp_path / "b.geojson")


def test_an_area_is_drawn_without_growing():
    square, hole = np.array(SQUARE, float), np.array(HOLE, float)
    small = np.array([[10.3, 11.1], [61.7, 9.9], [55.5, 70.2]])
    shifts = np.random.default_rng(3).uniform(0, 300, (200, 2))
    assert np.mean([drawn_area([(small + shift, [])]) for shift in shifts]) == pytest.approx(area(small), rel=0.01)
    for ring in (square, hole):
        assert drawn_area([(ring, [])]) == pytest.approx(area(ring), rel=0.02)
        assert drawn_area([(ring[::-1], [])]) == drawn_area([(ring, [])])  # either sense of rotation
    assert drawn_area([(square, [hole])]) == pytest.approx(area(square) - area(hole), rel=0.01)
    assert drawn_area([(square, []), (hole, [])]) == drawn_area([(square, [])])  # a union, not an exclusive or
    assert drawn_area([(square, [hole]), (hole, [])]) == drawn_area([(square, [])])  # an island fills the hole


def test_parts_outside_the_slide_do_not_count():
    far = np.array([[-1e7, -1e7], [1e12, -1e7], [1e12, 1e12], [-1e7, 1e12]])
    assert drawn_area([(far, [])]) == pytest.approx(997 * 1009)
    half = np.array([[-500, -500], [498.5, -500], [498.5, 2000], [-500, 2000]])
    assert drawn_area([(half, [])]) == pytest.approx(498.5 * 1009, rel=0.005)
    away = np.array([[2000, 0], [3000, 0], [3000, 500.0]])
    assert drawn_area([(away, [])]) == drawn_area([(-away, [])]) == 0


def within(point: tuple[float, float], ring: np.ndarray) -> bool:
    """Winding by summed angles: true inside, whatever its sense of rotation."""
    a = ring - point
    b = np.roll(a, -1, axis=0)
    turn = np.arctan2(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], (a * b).sum(axis=1)).sum()
    return abs(turn) > np.pi


@settings(max_examples=60, deadline=None)
@given(
    angles=st.lists(st.floats(0, 6.28), min_size=3, max_size=9, unique=True),
    centre=st.tuples(st.floats(-5, 90), st.floats(-5, 90)),
    radius=st.lists(st.floats(3, 60), min_size=9, max_size=9),
)
def test_a_cell_is_in_where_its_centre_is(angles, centre, radius):
    angles = sorted(angles)
    ring = np.array(
        [[centre[0] + r * np.cos(a), centre[1] + r * np.sin(a)] for a, r in zip(angles, radius, strict=False)]
    )
    mask = shapes_mask([(ring, [])], (83, 71), 0.5, 5.0)
    fx, fy = mask.downsample
    start, along = ring, np.roll(ring, -1, axis=0) - ring
    for r in range(mask.image.shape[0]):
        for c in range(mask.image.shape[1]):
            point = np.array([(c + 0.5) * fx, (r + 0.5) * fy])
            t = np.clip(((point - start) * along).sum(axis=1) / np.maximum((along**2).sum(axis=1), 1e-12), 0, 1)
            near = np.hypot(*(start + t[:, None] * along - point).T).min()
            if near > 1e-6:  # a ring of rising angles does not cross itself
                assert mask.image[r, c] == within(tuple(point), ring), (r, c)


def test_tiles_are_those_that_lie_inside_by_the_share_asked(tmp_path):
    slide = open_slide(np.full((1009, 997, 3), 200, np.uint8), mpp=0.5)
    path = write(tmp_path / "a.geojson", polygon)
    tree = QuadTree.from_shapes(slide, path, 0.5, 50, min_inside=0.5)
    found = {tuple(g): t for g, t in zip(tree.grid.tolist(), tree.tissue.tolist(), strict=True)}
    want = {(c, r) for c in range(2, 10) for r in range(4, 12)} - {(c, r) for c in (4, 5) for r in (6, 7)}
    assert set(found) == want
    assert min(found.values()) > 0.95
    as_list = QuadTree.from_shapes(slide, [np.array(SQUARE)], 0.5, 50)
    assert {tuple(g) for g in as_list.grid.tolist()} == want | {(c, r) for c in (4, 5) for r in (6, 7)}
    # A grid of 80 px cuts the border: shares of 3/4 and 1/2 stay, those of 1/4 and less go.
    coarse = QuadTree.from_shapes(slide, [np.array(SQUARE)], 0.8, 50, min_inside=0.4)
    for (c, r), share in zip(coarse.grid.tolist(), coarse.tissue.tolist(), strict=True):
        w = min((c + 1) * 80, 500) - max(c * 80, 100)
        h = min((r + 1) * 80, 600) - max(r * 80, 200)
        assert share == pytest.approx(w * h / 6400, abs=0.07)
    nested = QuadTree.from_shapes(slide, path, 0.5, 50, levels=3)
    assert len(nested.levels) == 3
    assert {tuple(g) for g in nested.levels[2].grid.tolist()} == want


@pytest.mark.parametrize(
    ("name", "count", "holes"),
    [
        ("123.annotation.geojson", 2, 0),
        ("qupath05.geojson", 3, 0),
        ("CMU-1_classification.xml", 4, 0),
        ("asap-polygon.xml", 1, 0),
    ],
)
def test_real_annotation_files(name, count, holes):
    if not (DATA / name).exists():
        pytest.skip(f"the shared annotation {name} is not here")
    shapes = read_shapes(DATA / name)
    assert len(shapes) == count
    assert sum(len(h) for _, h in shapes) == holes
    high = np.max([outline.max(axis=0) for outline, _ in shapes], axis=0)
    size = (int(high[0]) + 100, int(high[1]) + 100)
    total = sum(area(outline) for outline, _ in shapes)
    assert drawn_area(shapes, size, 16.0) == pytest.approx(total, rel=0.03)


def test_a_real_point_set_holds_no_polygon():
    if not (DATA / "asap-pointset.xml").exists():
        pytest.skip("the shared annotations are not here")
    with pytest.raises(UsageError, match="no polygon"):
        read_shapes(DATA / "asap-pointset.xml")
