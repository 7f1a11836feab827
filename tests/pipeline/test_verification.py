"""Parts of `verify`: what is read, what a table of tiles promises, which rows are encoded anew, which commands mend."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import verify
from pipeline.arrays import StoredArray, write_group
from pipeline.demo import write_slide
from pipeline.mending import Commands, Finding, merged
from pipeline.outcome import write_outcomes
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.reencoding import least_cosine, sample
from pipeline.rereading import Reading, chunk_words
from pipeline.stages import stored_outcome
from pipeline.store import CHUNK_ROWS, BagStore
from pipeline.tissue import TissueMask
from pipeline.treecheck import faults_of_tree
from pipeline.verification import Verification

# --- arrays ----------------------------------------------------------------------------------------------------------


def test_reading_names_every_chunk_that_is_not_whole(tmp_path):
    """Each chunk that is whole is handed out once; the others are told, by what is wrong with them."""
    values = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
    array = StoredArray.create(tmp_path / "x", values.shape, "float32", 4)
    for chunk in array.chunks:
        array.write_chunk(chunk, values[array.rows(chunk)])
    (tmp_path / "x/c/1/0").unlink()
    (tmp_path / "x/c/3/0").write_bytes(b"")
    for chunk in (2, 5):
        data = bytearray((tmp_path / f"x/c/{chunk}/0").read_bytes())
        data[0] ^= 1
        (tmp_path / f"x/c/{chunk}/0").write_bytes(data)
    reading = Reading(StoredArray.open(tmp_path / "x"))
    found = {(rows.start, rows.stop): part for rows, part in reading}
    assert sorted(found) == [(0, 4), (16, 20)]
    assert all((part == values[a:b]).all() for (a, b), part in found.items())
    assert reading.faults == {Reading.MISSING: [1, 3], Reading.WRONG: [2, 5]}
    assert chunk_words([1, 3], Reading.MISSING) == "chunks 1, 3 are missing or cut"
    assert chunk_words([0], Reading.MISSING) == "chunk 0 is missing or cut"


# --- tables of tiles -------------------------------------------------------------------------------------------------


class Plain:
    """As much of a slide as a tree needs."""

    path, size, mpp = Path("a.svs"), (3000, 2100), 0.4991


def tree(origin: tuple[float, float] = (0.0, 0.0), **settings: object) -> QuadTree:
    blobs = np.random.default_rng(5).random((42, 60)) > 0.3
    mask = TissueMask(np.repeat(np.repeat(blobs, 5, 0), 5, 1), (10.0, 10.0), 4.991, "brightfield", ())
    return build_quadtree(Plain(), mask, **{"mpp": 0.5, "tile_px": 64, "levels": 3, "origin": origin} | settings)


@pytest.mark.parametrize(
    ("origin", "settings"),
    [
        ((0.0, 0.0), {}),
        ((-31.5, -700.25), {}),
        ((411.0, 90.0), {"levels": 4}),
        ((5.0, 5.0), {"levels": 1, "overlap": 0.25}),
        ((0.0, 0.0), {"encode_levels": "finest", "keep_background": True}),
        ((0.0, 0.0), {"min_tissue": 1.0, "min_region_tissue": 1.0}),
    ],
)
def test_trees_as_they_are_built_have_no_fault(origin, settings):
    assert list(faults_of_tree(tree(origin, **settings), in_order=True)) == []


def test_trees_of_points_stand_on_no_grid():
    points = QuadTree.from_points(Plain(), [(900, 900), (50, 60), (51, 60)], mpp=0.5, tile_px=64)
    assert list(faults_of_tree(points, in_order=True)) == []


def change(name: str, row: int, value: object) -> QuadTree:
    good = tree()
    column = getattr(good, name).copy()
    column[row] = value
    return replace(good, **{name: column})


FINE = tree().scales[2][2] + 7  # a row of the finest level


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (change("parent", FINE, 0), "/parent"),
        (change("parent", FINE, -1), "/parent"),
        (change("parent", FINE, 10_000), "/parent"),
        (change("parent", 0, 0), "/parent"),
        (change("tissue", FINE, 1.5), "/tissue"),
        (change("tissue", FINE, np.nan), "/tissue"),
        (change("xy", FINE, (0, 0)), "/xy"),
    ],
)
def test_each_promise_of_a_tree_can_be_broken(bad, part):
    assert [found for found, _ in faults_of_tree(bad, in_order=True)] == [part]


def test_rows_out_of_order_and_rows_twice():
    good = tree(levels=1)
    swapped = np.arange(len(good))
    swapped[[3, 4]] = [4, 3]
    twice = np.arange(len(good))
    twice[4] = 3
    for rows in (swapped, twice):
        columns = {name: getattr(good, name)[rows] for name in ("grid", "xy", "tissue", "parent")}
        bad = replace(good, **columns)
        assert [part for part, _ in faults_of_tree(bad, in_order=True)] == ["/grid"]
        assert list(faults_of_tree(bad, in_order=False)) == [], "a tiler of one's own promises nothing"


def test_levels_that_do_not_follow_each_other():
    good = tree()
    scales = [list(scale) for scale in good.scales]
    scales[1][2] += 1
    bad = replace(good, scales=tuple(tuple(scale) for scale in scales))
    assert "do not follow each other" in next(faults_of_tree(bad, in_order=True))[1]


# --- samples ---------------------------------------------------------------------------------------------------------


def flat(*counts: int) -> QuadTree:
    """Levels of so many tiles, of which nothing but their number matters."""
    n, stops = sum(counts), np.cumsum(counts).tolist()
    scales = tuple((1.0, 1.0, a, b) for a, b in zip([0, *stops], stops, strict=False))
    return QuadTree(
        np.zeros((n, 2), np.int32), np.zeros((n, 2), np.int32), np.zeros(n), np.zeros(n), scales, 64, regular=False
    )


@pytest.mark.parametrize("counts", [(1,), (5,), (40,), (2, 7, 30), (100, 400, 1600), (3 * CHUNK_ROWS, 60 * CHUNK_ROWS)])
def test_a_sample_has_rows_of_every_chunk_and_level(counts):
    rows = sample(flat(*counts), "a.svs")
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 0
    assert rows.max() < sum(counts)
    edges = np.cumsum(counts)
    assert set(np.searchsorted(edges, rows, side="right")) == set(range(len(counts)))
    assert set(rows // CHUNK_ROWS) == set(range(-(-sum(counts) // CHUNK_ROWS)))
    assert min(sum(counts), 8) <= len(rows) <= max(16, 64)
    assert (rows == sample(flat(*counts), "a.svs")).all(), "the same every time"


def test_samples_of_slides_differ():
    assert not np.array_equal(sample(flat(2000), "a.svs"), sample(flat(2000), "b.svs"))


def test_the_cosine_that_is_asked_follows_from_the_precision():
    """Two vectors at an angle a from a third, on opposite sides of it, are as far apart as two machines may be."""
    assert least_cosine(None) == least_cosine(1.0) == 0.999
    a = np.arccos(0.9985)
    assert least_cosine(0.9985) == pytest.approx(np.cos(2 * a))


# --- commands --------------------------------------------------------------------------------------------------------


def commands(*made: tuple[str, str]) -> Commands:
    return Commands(Path("/o ut"), {"commands": [{"command": line, "encoder": encoder} for encoder, line in made]})


def test_the_command_of_the_encoder_is_told():
    both = commands(("uni", "/bin/slidestream run s -o 'o ut' -e uni --redo"), ("lbp", "slidestream run s -o 'o ut'"))
    assert both.again("uni") == ("slidestream run s -o 'o ut' -e uni --redo",)
    assert both.redo(Path("g"), "uni") == ("slidestream run s -o 'o ut' -e uni --redo",)
    assert both.again() == both.again("lbp") == both.again("of no command") == ("slidestream run s -o 'o ut'",)
    assert both.redo(Path("g")) == ("slidestream run s -o 'o ut' --redo",)
    assert both.anew(Path("a b")) == ("rm -r 'a b'", "slidestream run s -o 'o ut'")


def test_commands_that_know_no_redo():
    """What they would not look at is deleted; of a call from Python it is said what to add."""
    predict = commands(("uni", "slidestream predict s -o out -m m"))
    assert predict.redo(Path("g")) == ("rm -r g", "slidestream predict s -o out -m m")
    python = commands(("uni", "/home/me/my.py --fast"))
    assert python.again() == ("call run() as /home/me/my.py did, here: '/o ut'",)
    assert python.redo(Path("g")) == ("call run() as /home/me/my.py did, here: '/o ut' with redo=True",)
    assert "run.json" in commands().again()[0]


def test_a_zoom_makes_no_features_but_its_own_predictions():
    made = commands(("e", "slidestream run s -o o"), ("e", "slidestream predict s -o o -m out/models/h --zoom"))
    assert made.again("e") == ("slidestream run s -o o",)
    assert made.zoom(Path("p/h"), "h") == ("rm -r p/h", "slidestream predict s -o o -m out/models/h --zoom")


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("a", "--model a"),
        ("a-folds", "--model a --folds"),
        ("a+b", "--model a --model b"),
        ("a-folds+b-folds-vote", "--model a --model b --folds --vote"),
    ],
)
def test_an_average_is_predicted_by_all_its_models(model, flags):
    assert commands().predict(model) == (f"slidestream predict '/o ut' {flags}",)


def test_maps_are_stitched_as_they_were():
    attrs = {"shifts_tiles": [0.0, 0.5, 1.0], "region_tiles": 8, "gamma": 0.25, "times_foreground": False}
    attrs |= {"scales": ["slide", "region", "tile"]}
    flags = "--model h --slide 'a b' --stride 0.5 --gamma 0.25 --within-tiles --unweighted"
    assert commands().stitch(Path("p"), "h", "a b", attrs) == ("rm -r p", f"slidestream stitch '/o ut' {flags}")
    assert commands().stitch(Path("p"), "h", "a", {})[1] == "slidestream stitch '/o ut' --model h --slide a"


def test_commands_of_many_findings_once_and_in_order():
    run, other = "slidestream run s -o o", "slidestream run s -o o -e uni"
    mends = [("slidestream predict o --model m",), (run,), ("rm -r b", run + " --redo"), (other,), ("rm -r a", run)]
    assert merged(mends) == ["rm -r b", "rm -r a", run + " --redo", other, "slidestream predict o --model m"]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_states_and_words():
    findings = (
        Finding("", "run.json", "damaged", "is cut", ("run",)),
        Finding("a", "slides.csv", "outdated", "lags", ("run",)),
        Finding("a", "x", "note", "is odd", ("rm it",)),
        Finding("b", "x", "outdated", "old", ("run",)),
        Finding("b", "y", "damaged", "broken", ("run --redo",)),
        Finding("c", "z", "note", "left", ()),
    )
    found = Verification(("a", "b", "c"), findings)
    assert found.states == {"a": "outdated", "b": "damaged", "c": "whole"}
    assert found.lines()[6:] == [
        "3 slides: 1 whole, 1 damaged, 1 outdated; 1 of the folder itself; 2 notes",
        "to mend it:",
        "  run --redo",
    ]
    assert (found.exit_code, Verification(("a",), findings[2:3]).exit_code) == (3, 0)


@pytest.fixture(scope="module")
def networks(extract, tmp_path_factory):
    """Two slides with features of a network with random weights, in 16 bits where the machine has them."""
    place = tmp_path_factory.mktemp("networks")
    for number, name in enumerate(("a.svs", "b.svs")):
        pixels = np.random.default_rng(number).normal((170, 110, 160), 40, (512, 512, 3)).clip(0, 255)
        blurred = np.repeat(np.repeat(pixels[::8, ::8], 8, 0), 8, 1).astype(np.uint8)
        write_slide(place / "slides" / name, blurred, 0.5, tile_px=64)
    settings = {"encoder": "timm/resnet18", "weights": "random", "tile_px": 64, "force_scale": True}
    out = extract(place / "slides", place / "out", mpp=0.5, levels=2, **settings)
    store = BagStore(out)
    write_outcomes(out / "slides.csv", [stored_outcome(name, store.group(name)) for name in store.slides()])
    return out


def test_deep_with_a_network(networks):
    """Where it is not known which device made the features the cosine is looked at; where it is, the bits."""
    run = networks / "run.json"
    found = verify(networks, deep=True)
    assert found.findings == ()
    about = json.loads(run.read_bytes())
    run.write_text(json.dumps(about | {"batch_sizes": {"timm--resnet18@random": {"cpu": 16}}}))
    assert verify(networks, deep=True).findings == ()
    x = StoredArray.open(networks / "slides/a.svs.zarr/features/timm--resnet18@random/x")
    values = x.read().copy()
    values[:, 0] = np.nextafter(values[:, 0], np.float16(100))  # one last bit
    x.write_chunk(0, values)
    (finding,) = verify(networks, deep=True).findings
    assert (finding.slide, finding.part) == ("a.svs", "features/timm--resnet18@random/x")
    assert "the same bits are asked" in finding.message
    run.write_text(json.dumps(about))
    found = verify(networks, deep=True)
    assert found.findings == (), "one last bit may be another machine's"
    assert "the cosine is at least" in found.deep[0]


def test_progress_is_told(networks):
    class Told:
        def __init__(self):
            self.slides, self.count = [], 0

        def start(self, total, todo):
            assert (total, todo) == (2, 2)

        def slide(self, outcome):
            self.slides.append((outcome.slide, outcome.status, outcome.tiles))

        def tiles(self, count, so_far):
            self.count += count

    told = Told()
    found = verify(networks, deep=True, progress=told)
    assert [name for name, *_ in told.slides] == ["a.svs", "b.svs"]
    assert f"{told.count} tiles of 2 slides" in found.deep[0]


def test_a_group_of_another_slide_and_an_unknown_one(networks, tmp_path):
    out = shutil.copytree(networks, tmp_path / "out")
    write_group(out / "slides/sub/x.svs.zarr", {"schema": "slidestream/bag", "schema_version": 7})
    found = verify(out)
    assert [(f.slide, f.kind) for f in found.findings] == [("sub/x.svs", "damaged")]
    assert shlex.split(found.commands[0]) == ["rm", "-r", str(out / "slides/sub/x.svs.zarr")]
