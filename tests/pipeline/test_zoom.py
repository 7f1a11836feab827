"""Zooming into the demo's slides: the answer of the whole store, from the tiles below the chosen ones alone."""

import errno
import itertools
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from extractors.lab_lbp import FACTS, LabLbp
from heads import load_head
from pipeline import batch, feed, stages, zoom
from pipeline.batch import predict, run
from pipeline.config import make_config
from pipeline.demo import make_slides
from pipeline.errors import BrokenBag, CorruptTiles, RunStopped, UsageError
from pipeline.outcome import read_outcomes
from pipeline.output import status_lines
from pipeline.prediction import Model, predict_slide, predict_stored, save_model, zoomed
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.rows import Held, SlideRows
from pipeline.stages import SlideFile, encode, is_current, make_recipe, prepare
from pipeline.store import BagStore, read_attrs
from pipeline.stream import TileReader
from pipeline.zoom import is_zoomed

pytestmark = pytest.mark.timeout(300)

NAMES = ("case01.svs", "case02.svs", "case03.svs")  # the third is twice as fine as the others
CONFIG = {"encoder": "lab_lbp", "mpp": 0.5, "levels": 3, "tile_px": 64}
KS = [0.1, 0.25, 1, 5, 10_000]


class Counting(LabLbp):
    """lab_lbp that keeps every tile it was given; blank ones only fill a batch."""

    def __init__(self, fails_after: int | None = None) -> None:
        super().__init__(FACTS)
        self.tiles, self._fails_after, self._lock = 0, fails_after, threading.Lock()

    def _features(self, tiles):
        with self._lock:
            self.tiles += int(np.asarray(tiles).any(axis=(1, 2, 3)).sum())
            if self._fails_after is not None and self.tiles > self._fails_after:
                raise KeyboardInterrupt
        return super()._features(tiles)


def recipe_of(**settings):
    return make_recipe(make_config(**CONFIG | settings), LabLbp(FACTS))


def set_k(model: Model, k) -> Model:
    model.head.options["k"] = k
    return model


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_slides(folder, 3, 0)
    return folder / "slides"


@pytest.fixture(scope="module")
def files(slides) -> list[SlideFile]:
    return [SlideFile(name, slides / name) for name in NAMES]


@pytest.fixture(scope="module")
def prepared(files, tmp_path_factory):
    """An output folder with tissue and tiles alone, and the rows of its slides."""
    out = tmp_path_factory.mktemp("prepared")
    return out, {file.name: prepare(file, recipe_of(), out) for file in files}


@pytest.fixture(scope="module")
def whole(files, prepared, tmp_path_factory) -> Path:
    """The same with all features."""
    out = tmp_path_factory.mktemp("whole")
    shutil.copytree(prepared[0], out, dirs_exist_ok=True)
    rows = encode([(file, prepared[1][file.name]) for file in files], LabLbp(FACTS), out, recipe_of())
    assert [row.status for row, _ in rows] == ["done"] * 3
    return out


@pytest.fixture(scope="module")
def about(whole):
    group = BagStore(whole).group(NAMES[0])
    facts = read_attrs(group.path / "features/lab_lbp")
    return {
        "head": "hagmil",
        "options": {},
        "dim": FACTS.dim,
        "classes": ["negative", "positive"],
        "level": None,
        "encoder_key": "lab_lbp",
        "feature_hash": facts["feature_hash"],
        "weights_sha256": "none",
        "encoded_mpp": [2.0, 1.0, 0.5],
        "recipe": make_config(**CONFIG).model_dump(mode="json"),
    }


@pytest.fixture(scope="module")
def _model(about, tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("models") / "closer"
    folder.mkdir()
    for name in ("model.json", "model.safetensors"):
        (folder / name).write_bytes(b"only its digest is asked for")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heads.hagmil.WIDTHS", (64, 96, 32, 64))  # a sixteenth of the printed ones
        head = load_head("hagmil", FACTS.dim, 2, levels=3).eval()
    return Model("closer", head, about, folder)


@pytest.fixture
def model(_model) -> Model:
    return set_k(_model, 0.25)


@pytest.fixture
def out(prepared, tmp_path) -> Path:
    shutil.copytree(prepared[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads of torch that wait for each other are slow where others work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    for _ in range(200):
        alive = [t.name for t in threading.enumerate() if t.name.startswith(("reader", "feeder", "writer", "encoder"))]
        if not alive:
            return
        time.sleep(0.01)
    raise AssertionError(f"still alive: {alive}")


def zoom_into(files, prepared, out, model, encoder=None, recipe=None, **options):
    """The rows of the slides that are zoomed into, by name."""
    items = [(file, prepared[1][file.name]) for file in files]
    found = zoom.zoom(model, items, encoder or Counting(), out, recipe or recipe_of(), **options)
    return {row.slide: row for row, _ in found}


def logits_of_the_whole(whole: Path, name: str, model: Model):
    return predict_slide(model, BagStore(whole).bag(name))


def arrays(out: Path) -> dict[str, bytes]:
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in sorted((out / "slides").rglob("predictions/**/*"))
        if p.is_file() and p.name != "zarr.json"
    }


def spoil(monkeypatch, name: str, boxes) -> None:
    """From now on what overlaps one of these boxes (x0, y0, x1, y1), level-0 px, of a slide cannot be decoded."""
    real = stages.open_slide

    def opened(path, *given, **options):
        slide = real(path, *given, **options)
        if Path(path).name == name:
            read = slide.read

            def damaged(x, y, level, width, height):
                scale = slide.levels[level].downsample[0]
                right, bottom = x + width * scale, y + height * scale
                if any(x < x1 and right > x0 and y < y1 and bottom > y0 for x0, y0, x1, y1 in boxes):
                    raise CorruptTiles(name, "encode", "made up")
                return read(x, y, level, width, height)

            slide.read = damaged
        return slide

    monkeypatch.setattr(stages, "open_slide", opened)


def boxes_in(tree: QuadTree, rows) -> list[tuple[float, float, float, float]]:
    """The middle of tiles of the finest level."""
    return [(x + w / 3, y + h / 3, x + w / 2, y + h / 2) for x, y, w, h in tree.boxes(2)[rows].tolist()]


# --- slides that fail ------------------------------------------------------------------------------------------------


def test_a_slide_that_cannot_be_read_fails_alone(files, prepared, out, model, tmp_path):
    (tmp_path / "cut.svs").write_bytes(files[0].path.read_bytes()[:5000])
    bad = SlideFile(NAMES[0], tmp_path / "cut.svs")
    rows = zoom_into([bad, *files[1:]], prepared, out, model)
    assert [rows[name].status for name in NAMES] == ["failed", "done", "done"]
    assert rows[NAMES[0]].error == "UnreadableSlide"
    assert zoomed(BagStore(out).group(NAMES[0]), model) is None
    assert not (out / "heatmaps/closer" / f"{NAMES[0]}.png").exists()


@pytest.mark.parametrize("part", ["tiles/xy/c/0/0", "tiles", "."])
def test_a_store_that_is_damaged_meanwhile_fails_one_slide(files, prepared, out, model, part):
    path = BagStore(out).group(NAMES[1]).path / part
    shutil.rmtree(path) if path.is_dir() else path.write_bytes(b"cut")
    rows = zoom_into(files, prepared, out, model)
    assert [rows[name].status for name in NAMES] == ["done", "failed", "done"]
    assert rows[NAMES[1]].error == "BrokenBag"


def test_a_slide_that_loses_too_much_fails_alone(files, prepared, out, model, monkeypatch):
    tree = BagStore(out).group(NAMES[0]).tree()
    spoil(monkeypatch, NAMES[0], boxes_in(tree, np.arange(0, len(tree.levels[2].grid), 3)))
    rows = zoom_into(files[:2], prepared, out, set_k(model, 1.0))
    assert [rows[name].status for name in NAMES[:2]] == ["failed", "done"]
    assert rows[NAMES[0]].error == "CorruptTiles", "though a few coarse tiles can be read, and would do for an answer"


def test_a_file_that_changes_meanwhile_fails(files, prepared, out, model, tmp_path):
    shutil.copyfile(files[0].path, tmp_path / "later.svs")  # of another time than the store says
    rows = zoom_into([SlideFile(NAMES[0], tmp_path / "later.svs")], prepared, out, model)
    assert "the file changed" in rows[NAMES[0]].message


def test_a_tree_with_too_few_levels_fails(files, tmp_path, model):
    recipe = recipe_of(levels=2)
    row = prepare(files[0], recipe, tmp_path / "flat")
    ((row, _),) = zoom.zoom(model, [(files[0], row)], Counting(), tmp_path / "flat", recipe)
    assert (row.status, row.stage) == ("failed", "predict")
    assert "looks at 3 levels" in row.message


def test_no_valid_tile_below_the_chosen_ones_fails_as_in_the_whole_store(files, prepared, out, model, monkeypatch):
    for module in ("rows", "zoom"):
        monkeypatch.setattr(f"pipeline.{module}.MAX_INVALID", 1.0)
    width, height = prepared[1][NAMES[0]].width, prepared[1][NAMES[0]].height
    spoil(monkeypatch, NAMES[0], [(0, 0, width, height)])
    row = zoom_into(files[:1], prepared, out, model)[NAMES[0]]
    assert (row.status, row.error, row.stage) == ("failed", "BrokenBag", "predict")


def test_numbers_that_are_none_stop_the_run(files, prepared, out, model):
    encoder = Counting()
    encoder._features = lambda tiles: torch.full((len(tiles), FACTS.dim), torch.nan)
    with pytest.raises(RunStopped, match="inf or NaN"):
        zoom_into(files, prepared, out, model, encoder)


def test_a_full_disk_is_raised_and_nothing_hangs(files, prepared, out, model, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.store.SlideGroup.write_prediction", full)
    with pytest.raises(OSError, match="No space"):
        zoom_into(files, prepared, out, model)


# --- killed, and taken up again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 150, 450])
def test_a_killed_zoom_leaves_nothing_that_looks_whole_and_ends_with_the_same_bytes(
    files, prepared, out, model, tmp_path, after
):
    reference = tmp_path / "reference"
    shutil.copytree(prepared[0], reference)
    zoom_into(files, prepared, reference, model)
    with pytest.raises(KeyboardInterrupt):
        zoom_into(files, prepared, out, model, Counting(fails_after=after))
    store = BagStore(out)
    for file in files:
        assert store.group(file.name).status == "writing"
        with pytest.raises(BrokenBag, match="not finished"):
            store.bag(file.name)
    left = [file for file in files if not is_zoomed(file, store.group(file.name), recipe_of(), model)]
    assert left
    zoom_into(left, prepared, out, model)
    assert arrays(out) == arrays(reference)


def test_a_prediction_that_was_not_finished_is_none(files, prepared, out, model, monkeypatch):
    monkeypatch.setattr("pipeline.store.write_group", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        zoom_into(files[:1], prepared, out, model)
    monkeypatch.undo()
    group = BagStore(out).group(NAMES[0])
    assert not is_zoomed(files[0], group, recipe_of(), model)
    zoom_into(files[:1], prepared, out, model)
    assert is_zoomed(files[0], group, recipe_of(), model)


def test_what_is_not_of_this_slide_recipe_and_model_is_made_again(files, prepared, out, model, tmp_path):
    zoom_into(files[:1], prepared, out, model)
    group = BagStore(out).group(NAMES[0])
    assert is_zoomed(files[0], group, recipe_of(), model)
    assert not is_zoomed(files[0], group, recipe_of(min_tissue=0.4), model)
    assert not is_zoomed(SlideFile(NAMES[0], files[1].path), group, recipe_of(), model)
    assert not is_zoomed(SlideFile(NAMES[0], files[0].path, 0.4), group, recipe_of(), model)
    (tmp_path / "again").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "again" / name).write_bytes(b"trained again")
    assert not is_zoomed(files[0], group, recipe_of(), Model("closer", model.head, model.about, tmp_path / "again"))
    group.update(hashes=group.attrs["hashes"] | {"tiles": "others"})
    assert not is_zoomed(files[0], group, recipe_of(), model)


def test_a_later_run_encodes_what_is_missing(files, prepared, out, model, whole):
    zoom_into(files, prepared, out, model)
    store, logits = BagStore(out), {name: BagStore(out).group(name).prediction("closer")["logits"] for name in NAMES}
    assert not any(is_current(file, store.group(file.name), recipe_of()) for file in files)
    encoder = Counting()
    rows = list(encode([(file, prepared[1][file.name]) for file in files], encoder, out, recipe_of()))
    assert [row.status for row, _ in rows] == ["done"] * 3
    assert encoder.tiles == sum(row.tiles for row in prepared[1].values())
    for file in files:
        assert is_current(file, store.group(file.name), recipe_of())
        assert torch.equal(store.bag(file.name).features, BagStore(whole).bag(file.name).features)
        predict_stored(store, file.name, model)
        after = store.group(file.name).prediction("closer")["logits"]
        np.testing.assert_allclose(after, logits[file.name], atol=1e-5)


# --- the same answer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", KS)
def test_logits_are_those_of_the_whole_store(files, prepared, out, whole, model, k):
    set_k(model, k)
    rows = zoom_into(files, prepared, out, model)
    assert {row.status for row in rows.values()} == {"done"}
    for name in NAMES:
        expected, found = logits_of_the_whole(whole, name, model), BagStore(out).group(name).prediction("closer")
        np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5, rtol=0)
        np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-6)
        for part in ("raw", "weight"):
            naive = torch.cat([getattr(scores, part) for scores in expected.tiles])
            np.testing.assert_allclose(found[part], naive, atol=1e-5, rtol=1e-5)  # NaN in the same places
        assert (out / "heatmaps/closer" / f"{name}.png").is_file()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_rounded_as_in_the_store(files, out, prepared, model, tmp_path, dtype):
    recipe, seen = recipe_of(dtype=dtype), []
    full = tmp_path / "full"
    rows = {file.name: prepare(file, recipe, full) for file in files[:1]}
    encoder = Counting()
    list(encode([(files[0], rows[NAMES[0]])], encoder, full, recipe))
    bag = BagStore(full).bag(NAMES[0])
    list(zoom.zoom(set_k(model, 1.0), [(files[0], rows[NAMES[0]])], Counting(), full, recipe))
    expected = predict_slide(model, bag).logits
    seen = BagStore(full).group(NAMES[0]).prediction("closer")["logits"]
    np.testing.assert_allclose(seen, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [0.25, 3])
def test_only_children_of_chosen_tiles_are_read_and_encoded(files, prepared, out, whole, model, monkeypatch, k):
    set_k(model, k)
    asked: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    came: dict[str, list[int]] = {name: [] for name in NAMES}

    class Spy(TileReader):
        def __init__(self, slide, tree, wanted=None):
            super().__init__(slide, tree, wanted)
            asked[slide.path.name].append(wanted.copy())

    put = SlideRows.put
    monkeypatch.setattr(feed, "TileReader", Spy)
    monkeypatch.setattr(SlideRows, "put", lambda self, row, x: came[self.slide].append(row) or put(self, row, x))
    encoder = Counting()
    zoom_into(files, prepared, out, model, encoder)
    total = 0
    for name in NAMES:
        tree, looked = BagStore(whole).group(name).tree(), logits_of_the_whole(whole, name, model).tiles
        rows = [level.start + np.flatnonzero(~s.raw.isnan()) for level, s in zip(tree.levels, looked, strict=True)]
        assert [np.flatnonzero(wanted).tolist() for wanted in asked[name]] == [part.tolist() for part in rows]
        for above, wanted, level in zip(looked, rows[1:], tree.levels[1:], strict=False):
            seen = above.raw.nan_to_num(-torch.inf)
            best = seen.argsort(descending=True)[
                : k if isinstance(k, int) else int(np.ceil(k * (~above.raw.isnan()).sum()))
            ]
            assert set(level.parent[wanted - level.start].tolist()) == set(best.tolist())
        assert sorted(came[name]) == np.concatenate(rows).tolist()
        saving = zoomed(BagStore(out).group(name), model)
        assert (saving.k, saving.tiles, saving.encoded) == (k, len(tree), sum(map(len, rows)))
        assert 0 < saving.share < 0.6
        assert saving.seconds > 0
        total += saving.encoded
    assert encoder.tiles == total


def test_invalid_tiles_count_for_nothing_as_in_the_whole_store(files, prepared, out, model, monkeypatch, tmp_path):
    tree = BagStore(out).group(NAMES[0]).tree()
    finest = tree.levels[2]
    lost = np.arange(0, finest.stop - finest.start, 150)
    spoil(monkeypatch, NAMES[0], boxes_in(tree, lost))
    full = tmp_path / "full"
    shutil.copytree(prepared[0], full)
    ((row, result),) = encode([(files[0], prepared[1][NAMES[0]])], Counting(), full, recipe_of())
    assert row.status == "done"
    assert result.invalid >= 2 * len(lost), "also coarser ones above"
    set_k(model, 0.5)
    rows = zoom_into(files, prepared, out, model)
    expected = logits_of_the_whole(full, NAMES[0], model)
    found = BagStore(out).group(NAMES[0]).prediction("closer")
    np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5, rtol=0)
    assert np.isnan(found["raw"][finest.start + lost]).all()
    assert "cannot be decoded" in rows[NAMES[0]].message


def test_a_tree_that_is_deeper_than_the_head_is_read_from_where_the_head_begins(files, tmp_path, model):
    recipe, out = recipe_of(levels=4), tmp_path / "deep"
    row, encoder = prepare(files[0], recipe, out), Counting()
    list(zoom.zoom(model, [(files[0], row)], encoder, out, recipe))
    found = BagStore(out).group(NAMES[0]).prediction("closer")
    list(encode([(files[0], row)], Counting(), out, recipe))
    expected = predict_slide(model, BagStore(out).bag(NAMES[0]))
    np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5, rtol=0)
    assert np.isnan(found["raw"][: len(expected.tiles[0].raw)]).all()
    assert encoder.tiles == np.count_nonzero(~np.isnan(found["raw"]))


# --- many at a time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1::2])
def test_any_order_and_any_number_in_flight_give_the_same_bytes(files, prepared, out, model, tmp_path, order):
    alone = tmp_path / "alone"
    shutil.copytree(prepared[0], alone)
    for file in files:
        zoom_into([file], prepared, alone, model)
    zoom_into([files[i] for i in order], prepared, out, model)
    assert arrays(out) == arrays(alone)
    assert len(arrays(out)) >= 12


def test_slides_that_come_late_find_the_first_ones_finished(files, prepared, out, model):
    """Whoever gives slides waits for a row before there is another one, and says meanwhile that there is none."""
    finished, ticks = [], 0

    def arriving():
        nonlocal ticks
        for number, file in enumerate(files):
            while len(finished) < number:
                ticks += 1
                time.sleep(0.01)
                yield None
            yield file, prepared[1][file.name]

    for row, _ in zoom.zoom(model, arriving(), Counting(), out, recipe_of()):
        finished.append(row.slide)
    assert finished == list(NAMES)
    assert ticks > 3


def test_while_one_slide_is_looked_at_others_are_encoded(files, prepared, out, model, monkeypatch):
    """The head waits in the thread of the feed until tiles of another slide have come."""
    at_work, waited = threading.Event(), []
    real = zoom._Visit._look

    def look(self, descent):
        if not waited:
            waited.append((self._file.name, at_work.wait(30)))
        return real(self, descent)

    monkeypatch.setattr(zoom._Visit, "_look", look)
    first, told = len(BagStore(out).group(NAMES[0]).tree().levels[0].grid), []
    assert first % 16, "the last tiles of the first slide wait for some of the second"

    def on_tiles(count, so_far):
        told.append(count)
        if sum(told) >= first + 16:  # a whole batch of others
            at_work.set()

    rows = zoom_into(files, prepared, out, model, on_tiles=on_tiles)
    assert waited == [(NAMES[0], True)]
    assert len(rows) == 3


def test_no_slides_are_no_rows(model, tmp_path):
    assert list(zoom.zoom(model, [], Counting(), tmp_path, recipe_of())) == []


def test_whoever_stops_early_leaves_nothing_open(files, prepared, out, model):
    items = [(file, prepared[1][file.name]) for file in files]
    found = zoom.zoom(model, items, Counting(), out, recipe_of())
    next(found)
    found.close()


def test_features_are_those_of_one_level_at_a_time(files, prepared, out, model, monkeypatch):
    held = []
    real = Held.read

    def read(self):
        x, valid = real(self)
        held.append((self.dtype, x.dtype, len(x), int(self.missing_rows().sum())))
        return x, valid

    monkeypatch.setattr(Held, "read", read)
    monkeypatch.setattr("pipeline.rows.CHUNK_ROWS", 50)
    zoom_into(files[:1], prepared, out, model)
    saving = zoomed(BagStore(out).group(NAMES[0]), model)
    assert [n for _, _, n, _ in held] == [n for _, _, _, n in held]
    assert sum(n for _, _, n, _ in held) == saving.encoded
    assert {(str(a), str(b)) for a, b, _, _ in held} == {("float16", "float16")}


# --- the whole command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(slides, tmp_path_factory) -> Path:
    """Two good slides and a broken one."""
    root = tmp_path_factory.mktemp("folder")
    for name in NAMES[:2]:
        shutil.copy2(slides / name, root / name)
    (root / "broken.svs").write_text("not a slide\n" * 50)
    return root


@pytest.fixture(scope="module")
def saved(about, tmp_path_factory) -> Path:
    """A model folder with all that is needed, of two levels."""
    torch.manual_seed(1)
    head = load_head("hagmil", FACTS.dim, 2, levels=2)
    path = tmp_path_factory.mktemp("saved") / "closer"
    save_model(path, head, about | {"options": head.options})
    return path


def test_predict_with_zoom_from_slides_to_the_table(folder, saved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    report = predict(folder, saved, out, zoom=True, workers=1)
    assert report.counts == {"done": 2, "failed": 1}
    assert report.exit_code == 3
    saving = report.saving
    assert report.tiles_encoded == saving.encoded < saving.tiles
    table = json.loads((out / "predictions/closer.zoom.json").read_text())
    assert (table["k"], table["tiles"], table["encoded"]) == (0.25, saving.tiles, saving.encoded)
    assert set(table["slides"]) == set(NAMES[:2])
    assert f"{saving.encoded} of {saving.tiles} tiles" in table["sentence"]
    rows = (out / "predictions/closer.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rows] == ["slide", *NAMES[:2]]
    assert sorted(p.name for p in (out / "heatmaps/closer").iterdir()) == [f"{name}.png" for name in NAMES[:2]]
    states = {row.slide: (row.status, row.message) for row in read_outcomes(out / "slides.csv")}
    assert states[NAMES[0]] == ("done", "predicted by zoom, its features are not kept")
    assert states["broken.svs"][0] == "failed"
    lines, code = status_lines(out)
    assert "2 predicted by zoom, without features, 1 failed" in "\n".join(lines)
    assert code == 3
    with pytest.raises(BrokenBag, match="not finished"):
        BagStore(out).bag(NAMES[0])

    (tmp_path / "good").mkdir()
    before, csv = arrays(out), (out / "predictions/closer.csv").read_bytes()
    again = predict(folder, saved, out, zoom=True, workers=1)
    assert again.counts == report.counts
    assert again.tiles_encoded == 0
    assert again.saving == saving
    assert (arrays(out), (out / "predictions/closer.csv").read_bytes()) == (before, csv)
    stored = predict(out, saved)
    assert stored.counts == {"done": 2}, "what was predicted by zoom stays in the table"
    assert (out / "predictions/closer.csv").read_bytes() == csv

    (folder / "broken.svs").rename(tmp_path / "broken.svs")
    with monkeypatch.context() as patch:
        patch.setattr(batch, "reached", lambda *_: pytest.fail("a cluster was started"))
        assert predict(folder, saved, out, zoom=True).counts == {"done": 2}
    assert run(folder, out, **CONFIG, workers=1).counts == {"done": 2}
    with pytest.raises(UsageError, match=r"has the features of all 2 slides.*leave --zoom out"):
        predict(folder, saved, out, zoom=True)
    assert predict(out, saved).saving is None
    assert (out / "predictions/closer.csv").read_bytes() == csv
    assert not (out / "predictions/closer.zoom.json").exists()
    (tmp_path / "broken.svs").rename(folder / "broken.svs")


def test_a_head_that_reads_all_tiles_is_refused(folder, about, tmp_path):
    head = load_head("abmil", FACTS.dim, 2)
    save_model(tmp_path / "flat", head, about | {"head": "abmil", "options": head.options, "level": 0.5})
    with pytest.raises(UsageError, match=r"needs a head that chooses.*flat is abmil, which reads all tiles"):
        predict(folder, tmp_path / "flat", tmp_path / "out", zoom=True)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_is_refused(saved, whole, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is an output folder.*leave --zoom out"):
        predict(tmp_path, saved, zoom=True)


def test_slides_with_features_are_predicted_from_them(files, prepared, whole, saved, folder, tmp_path):
    """A run that was interrupted: what is whole is not zoomed into."""
    out = tmp_path / "out"
    only = tmp_path / "one.csv"
    only.write_text(f"slide\n{folder / NAMES[0]}\n")
    run(folder / NAMES[0], out, **CONFIG, workers=1)
    made = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(made | {"root": str(folder)}))
    report = predict(folder, saved, out, zoom=True, workers=1)
    assert report.counts == {"done": 2, "failed": 1}
    assert set(json.loads((out / "predictions/closer.zoom.json").read_text())["slides"]) == {NAMES[1]}
    assert len((out / "predictions/closer.csv").read_text().splitlines()) == 3


def test_trees_of_a_tiler_may_have_tiles_without_children(files, tmp_path, model):
    def bare(slide, mask, config):
        tree = build_quadtree(slide, mask, mpp=0.5, tile_px=64, levels=3)
        a, b, c = tree.scales
        cut = (c[0], c[1], c[2], c[2] + 1)  # one tile is left on the finest level
        columns = (column[: cut[3]] for column in (tree.grid, tree.xy, tree.tissue, tree.parent))
        return QuadTree(*columns, (a, b, cut), 64)

    recipe = make_recipe(make_config(**CONFIG), LabLbp(FACTS), bare)
    row = prepare(files[0], recipe, tmp_path)
    ((row, _),) = zoom.zoom(set_k(model, 1), [(files[0], row)], Counting(), tmp_path, recipe)
    assert row.status == "done" or "to be looked at on level 2" in row.message
