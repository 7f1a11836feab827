"""Slides with one bright patch, and a head that looks at it: the maps show it where it is, in level-0 pixels."""

import json
import shutil
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch

from extractors import load_encoder
from extractors.attention import attending
from heads import load_head
from heads.hvit import HEADS, WIDTH, HViT
from pipeline import mapping
from pipeline.demo import write_slide
from pipeline.draw import MARGIN
from pipeline.errors import UsageError
from pipeline.mapping import stitch
from pipeline.prediction import load_model, predict_stored, save_model
from pipeline.readers import open_slide
from pipeline.regrid import Regrid
from pipeline.store import BagStore, read_attrs
from pipeline.stream import stream_tiles

pytestmark = pytest.mark.timeout(300)

REAL = Path(__file__).parents[3] / "shared/data/slides/CMU-1-Small-Region.svs"
SIDE, PX, MPP = 4, 32, 0.5
WIDE, HIGH, PATCH = 640, 512, 48
PATCHES = {"a.svs": (130, 100), "b/c.svs": (410, 330), "d.svs": (300, 110)}  # x, y of the middle
SETTINGS = {"preset": "hvit", "encoder": "lab_lbp", "mpp": MPP, "tile_px": PX, "levels": 3, "remove_pen": False}


def picture(patch: tuple[int, int] | None) -> np.ndarray:
    """Tissue with a border of glass, and a green patch in it."""
    random = np.random.default_rng(0)
    pixels = np.full((HIGH, WIDE, 3), 243, np.float32)
    pixels[40:-60, 50:-70] = (190, 120, 170)
    pixels += random.normal(0, 6, pixels.shape)
    if patch is not None:
        x, y = (middle - PATCH // 2 for middle in patch)
        pixels[y : y + PATCH, x : x + PATCH] = (90, 200, 60)
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for name, patch in PATCHES.items():
        write_slide(folder / name, picture(patch), MPP, downsamples=(2,), lossless=True)
    return folder


@pytest.fixture(scope="module")
def stored(extract, slides, tmp_path_factory) -> Path:
    return extract(slides, tmp_path_factory.mktemp("out"), **SETTINGS)


@pytest.fixture(scope="module")
def moved(extract, slides, tmp_path_factory) -> Path:
    """Of a tree that begins elsewhere."""
    return extract(slides, tmp_path_factory.mktemp("moved"), **SETTINGS, origin=(-37.5, 21.25))


@pytest.fixture
def out(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "out"))


def following(channel: int, height: float, dim: int, **options) -> HViT:
    """A head whose weights are set by hand: all it looks at is how much of a feature a tile has."""
    head = load_head("hvit", dim, 2, side=SIDE, **options).eval()
    for name, parameter in head.named_parameters():
        parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    regions = head.regions
    regions.projection[0].weight.data[0, channel] = 1 / height
    regions.places.data[1:, 1] = 1.0
    regions.token.data[..., 1] = 1.0
    last = regions.blocks[-1]
    last.qkv.bias.data[:WIDTH] = 1.0  # CLS asks
    last.qkv.weight.data[WIDTH : 2 * WIDTH : WIDTH // HEADS, 0] = 2.0  # the feature answers
    return head


@cache
def green() -> tuple[int, float]:
    """The feature that a tile of the patch has more of than tissue and glass have, and how much more."""
    tiles = [picture(PATCHES["a.svs"])[y : y + PX, x : x + PX] for x, y in ((114, 84), (400, 300), (60, 4), (40, 40))]
    patch, *others = load_encoder("lab_lbp").encode(np.stack(tiles))
    rises = patch - torch.stack(others).amax(0)
    return int(rises.argmax()), float(rises.max())


def model_of(out: Path, name: str = "follow", slide: str = "a.svs", level: float = MPP, **options) -> str:
    group = BagStore(out).group(slide)
    key = group.encoders()[0]
    facts, bag = read_attrs(group.path / "features" / key), BagStore(out).bag(slide, key).finest
    about = {
        "head": "hvit",
        "options": {"side": SIDE} | options,
        "dim": bag.dim,
        "classes": ["no", "yes"],
        "level": level,
        "encoder_key": key,
        "feature_hash": facts["feature_hash"],
        "weights_sha256": facts["weights_sha256"],
        "encoded_mpp": [level],
        "recipe": json.loads((out / "run.json").read_bytes())["recipe"]
        | {"encoder": facts["encoder"]["name"], "weights": None, "force_scale": False},
    }
    save_model(out / "models" / name, following(*green(), bag.dim, **options), about)
    return name


class Told:
    def __init__(self) -> None:
        self.notes, self.encoded = [], 0

    def start(self, total, todo):
        self.todo = todo

    def slide(self, outcome):
        pass

    def tiles(self, count, so_far):
        self.encoded += count

    def note(self, text):
        self.notes.append(text)


def maps(out: Path, slide: str, model: str = "follow") -> tuple[dict[str, np.ndarray], dict]:
    group = BagStore(out).group(slide)
    return group.prediction(f"{model}.stitched"), read_attrs(group.path / "predictions" / f"{model}.stitched")


def brightest(found: dict[str, np.ndarray], attrs: dict) -> tuple[float, float]:
    """The middle of the cells of the largest value, in level-0 px."""
    rows, columns = np.nonzero(found["map"] >= np.nanmax(found["map"]) * 0.999)
    x, y = attrs["origin_px"]
    return x + (columns.mean() + 0.5) * attrs["cell_px"], y + (rows.mean() + 0.5) * attrs["cell_px"]


@pytest.mark.parametrize("stride", [4, 2, 1, 0.5])
@pytest.mark.parametrize("where", ["stored", "moved"])
def test_a_bright_patch_is_found_within_one_tile(request, tmp_path, where, stride):
    out = Path(shutil.copytree(request.getfixturevalue(where), tmp_path / "out"))
    slides = list(PATCHES) if stride > 1 else ["a.svs", "b/c.svs"][int(stride < 1) :]
    report = stitch(out, model_of(out), stride=stride, slides=slides)
    assert report.counts == {"done": len(slides)}
    for slide, patch in ((slide, PATCHES[slide]) for slide in slides):
        found, attrs = maps(out, slide)
        at = brightest(found, attrs)
        assert abs(np.subtract(at, patch)).max() <= PX, (slide, at, patch)
        assert attrs["cell_px"] == PX * min(stride, 1)
        assert np.nanmedian(found["map"]) < 0.5 * np.nanmax(found["map"])


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_on_a_real_slide(extract, tmp_path):
    """H&E at 0.499 µm/px, tiles of 64.1 level-0 px, and the patch put into it at two places."""
    with open_slide(REAL) as slide:
        (width, height), mpp = slide.size, slide.mpp
        pixels = slide.read(0, 0, 0, width, height)
    patches = {"low.svs": (700, 2500), "high.svs": (1350, 700)}
    for name, (x, y) in patches.items():
        changed = pixels.copy()
        changed[y - 64 : y + 64, x - 64 : x + 64] = (90, 200, 60)
        write_slide(tmp_path / "slides" / name, changed, mpp, downsamples=(2, 4))
    out = extract(tmp_path / "slides", tmp_path / "out", **SETTINGS | {"mpp": 1.0, "origin": (-200.0, 11.0)})
    stitch(out, model_of(out, slide="low.svs", level=1.0), stride=2)
    for name, patch in patches.items():
        found, attrs = maps(out, name)
        assert attrs["cell_px"] == pytest.approx(32 / mpp)
        assert abs(np.subtract(brightest(found, attrs), patch)).max() <= attrs["cell_px"]


def test_the_picture_shows_it_where_it_is(out):
    stitch(out, model_of(out), stride=2)
    for slide, (x, y) in PATCHES.items():
        image = cv2.imread(str(out / "heatmaps/follow" / f"{slide}.stitched.png"))[MARGIN:].astype(int)
        scale = image.shape[1] / WIDE
        yellow = np.minimum(image[..., 1], image[..., 2]) - image[..., 0]  # of viridis, the end
        row, column = np.unravel_index(cv2.blur(yellow.astype(np.float32), (25, 25)).argmax(), yellow.shape)
        assert abs(column / scale - x) <= PX
        assert abs(row / scale - y) <= PX


def test_what_is_stored(out):
    stitch(out, model_of(out), stride=2, gamma=0.3)
    found, attrs = maps(out, "b/c.svs")
    tree = BagStore(out).group("b/c.svs").tree()
    assert set(found) == {"map", "per_head", "region", "slide"}
    assert found["per_head"].shape == found["region"].shape == (HEADS, *found["map"].shape)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(found["map"], found["per_head"].mean(0), rtol=1e-6)
    assert {name: attrs[name] for name in ("shifts_tiles", "gamma", "scales", "region_tiles", "times_foreground")} == {
        "shifts_tiles": [0, 2],
        "gamma": 0.3,
        "scales": ["slide", "region"],
        "region_tiles": SIDE,
        "times_foreground": True,
    }
    assert attrs["model_sha256"] == load_model(out / "models/follow").sha256
    # cell by cell: what has tissue was looked at, and stands where its tile does
    boxes, seen = tree.boxes(2), tree.levels[2].tissue > 0
    cells = np.rint((boxes[:, :2] - attrs["origin_px"]) / attrs["cell_px"]).astype(int)
    inside = ((cells >= 0) & (cells < found["map"].shape[::-1])).all(1)
    assert inside[seen].all()
    columns, rows = cells[inside].T
    np.testing.assert_array_equal(np.isfinite(found["map"][rows, columns]), seen[inside])
    assert np.isfinite(found["map"]).sum() == seen.sum()


def test_a_shift_by_a_whole_tile_is_the_grid_that_is_stored(out):
    """Encoded anew on a grid that begins one tile later: the same features, one column further left."""
    model = load_model(out / "models" / model_of(out))
    group = BagStore(out).group("a.svs")
    tree, regrid = group.tree(), Regrid(out, model, within_tiles=False)
    level, bag = tree.levels[2], BagStore(out).bag("a.svs").finest
    stored = {tuple(at): x for at, x in zip(level.grid.tolist(), bag.features.numpy(), strict=True)}
    part = regrid.tree(group, tree, (level.span_px, 0.0))
    made = regrid.encode(group, part, part.levels[2], part.levels[2].tissue > 0)
    assert made.valid.sum() == (level.tissue > 0).sum()
    for (column, row), x, valid in zip(part.levels[2].grid.tolist(), made.features, made.valid, strict=True):
        if valid:
            np.testing.assert_array_equal(x, stored[column + 1, row])
    assert not made.features[~made.valid].any()
    assert made.attention is None


def test_with_and_without_a_mask_by_the_same_weights(out):
    masked, plain = model_of(out), model_of(out, "plain", masked=False)
    for name in (masked, plain):
        stitch(out, name, stride=2, slides=["a"])
    (one, _), (other, attrs) = maps(out, "a.svs", masked), maps(out, "a.svs", plain)
    assert np.isfinite(other["map"]).sum() > np.isfinite(one["map"]).sum()
    assert abs(np.subtract(brightest(other, attrs), PATCHES["a.svs"])).max() <= PX
    assert np.isfinite(other["map"]).sum() == len(BagStore(out).group("a.svs").tree().levels[2].grid)


def test_nothing_is_done_twice(out, monkeypatch):
    name, told = model_of(out), Told()
    stitch(out, name, stride=2)
    files = [*(out / "slides").rglob("*.stitched/**/*"), *out.rglob("*.stitched.png")]
    before = {path: path.read_bytes() for path in files if path.is_file()}
    assert len(before) > 20
    monkeypatch.setattr(mapping, "look", None)  # would fail
    report = stitch(out, name, stride=2, progress=told)
    assert report.counts == {"done": 3}
    assert told.todo == 0
    monkeypatch.undo()
    (out / "heatmaps/follow/d.svs.stitched.png").unlink()
    stitch(out, name, stride=2, progress=told)
    assert told.todo == 1
    assert {path: path.read_bytes() for path in before} == before, "the same bytes again"
    for wish in ({"gamma": 0.1}, {"stride": 1}, {"unweighted": True}):
        stitch(out, name, **{"stride": 2, "slides": ["d.svs"]} | wish, progress=told)
        assert told.todo == 1, wish
    stitch(out, name, stride=2)
    model_of(out, name, threshold=0.5)  # another one of that name
    stitch(out, name, stride=2, progress=told)
    assert told.todo == 3


def test_maps_go_with_their_features_and_not_with_predictions(out):
    name, group = model_of(out), BagStore(out).group("a.svs")
    stitch(out, name, slides=["a"])
    predict_stored(BagStore(out), "a.svs", load_model(out / "models" / name))
    assert set(group.prediction(name)) == {"logits", "probabilities", "raw", "weight"}
    assert np.isfinite(maps(out, "a.svs")[0]["map"]).any()
    features = group.features("lab_lbp")
    features.begin(5, 2, "float32", feature_hash="another")
    assert not list((group.path / "predictions").glob("*.stitched"))


def test_a_map_that_was_not_finished_is_made_again(out, monkeypatch):
    name = model_of(out)
    monkeypatch.setattr("pipeline.store.write_group", lambda path, attrs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stitch(out, name, slides=["a"])
    monkeypatch.undo()
    told = Told()
    stitch(out, name, slides=["a"], progress=told)
    assert told.todo == 1
    assert np.isfinite(maps(out, "a.svs")[0]["map"]).any()


def test_the_cost_is_said_before(out):
    told, name = Told(), model_of(out)
    stitch(out, name, progress=told)
    assert told.notes == ["4 shifts of the regions, by 2 tiles; stored features are used again, no tile is encoded"]
    assert told.encoded == 0
    told, seen = Told(), (BagStore(out).group("d.svs").tree().levels[2].tissue > 0).sum()
    stitch(out, name, stride=0.5, slides=["d"], progress=told)
    cost = f"about {3 * seen} tiles to encode with lab_lbp, on 3 grids"
    assert told.notes == [f"64 shifts of the regions, by 0.5 tiles; {cost}"]
    assert told.encoded == pytest.approx(3 * seen, rel=0.1)


def test_other_heads_are_refused(out):
    name = model_of(out)
    about = json.loads((out / "models" / name / "model.json").read_bytes()) | {"head": "abmil", "options": {}}
    save_model(out / "models/plain", load_head("abmil", about["dim"], 2), about)
    with pytest.raises(UsageError, match="plain is abmil, which has no regions"):
        stitch(out, "plain")
    with pytest.raises(UsageError, match="lab_lbp is no ViT of timm with a class token"):
        stitch(out, name, within_tiles=True)
    with pytest.raises(UsageError, match=r"gamma lies in 0\.\.1"):
        stitch(out, name, gamma=2)
    with pytest.raises(UsageError, match="holds no slide 'e'"):
        stitch(out, name, slides=["e"])
    with pytest.raises(UsageError, match="no output folder"):
        stitch(out / "slides", out / "models" / name)
    assert not list(out.rglob("*.stitched*"))


def test_a_slide_that_is_gone_fails_alone_and_only_where_it_is_read(slides, out, tmp_path):
    name, there = model_of(out), Path(shutil.copytree(slides, tmp_path / "slides"))
    run = json.loads((out / "run.json").read_bytes())
    (out / "run.json").write_text(json.dumps(run | {"root": str(there)}))
    (there / "d.svs").unlink()
    assert stitch(out, name, stride=2).counts == {"done": 3}
    report = stitch(out, name, stride=0.5, slides=["d", "a"])
    assert report.counts == {"done": 1, "failed": 1}
    assert [(row.slide, row.stage) for row in report.failures] == [("d.svs", "open")]
    assert "d.svs is not there" in report.failures[0].message
    assert report.exit_code == 3
    assert maps(out, "d.svs")[1]["shifts_tiles"] == [0, 2], "what was there stays"


def test_tiles_of_a_tiler_cannot_be_moved_by_parts(out):
    name = model_of(out)
    run = json.loads((out / "run.json").read_bytes())
    run["recipe"]["tiler"] = "some:tiler"
    (out / "run.json").write_text(json.dumps(run))
    for slide in PATCHES:
        group = BagStore(out).group(slide)
        group.update(recipe=group.attrs["recipe"] | {"tiler": "some:tiler"})
    assert stitch(out, name).counts == {"done": 3}
    report = stitch(out, name, stride=0.5)
    assert report.counts == {"failed": 3}
    assert "chosen by some:tiler, whose grid cannot be moved" in report.failures[0].message


def test_attention_within_tiles(extract, tmp_path):
    """A ViT of random weights: its map of a tile stands in the cells of this tile."""
    px = 224
    random = np.random.default_rng(0)
    pixels = np.clip(random.normal((190, 120, 170), 25, (2 * px, 3 * px, 3)), 0, 255).astype(np.uint8)
    write_slide(tmp_path / "slides/a.svs", pixels, MPP, downsamples=(2,), lossless=True)
    torch.manual_seed(0)
    weights = tmp_path / "vit.pt"
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), weights)
    wish = {"encoder": "timm/vit_tiny_patch16_224", "weights": str(weights), "tile_px": px, "precision": "fp32"}
    out = extract(tmp_path / "slides", tmp_path / "out", **SETTINGS | wish, dtype="float32")
    name = model_of(out)
    about = json.loads((out / "models" / name / "model.json").read_bytes())
    about["recipe"]["weights"] = str(weights)
    (out / "models" / name / "model.json").write_text(json.dumps(about))
    told = Told()
    report = stitch(out, name, stride=2, within_tiles=True, gamma=0.0, progress=told)
    assert report.counts == {"done": 1}
    assert "about 6 tiles to encode" in told.notes[0]
    assert told.encoded == 6
    found, attrs = maps(out, "a.svs")
    assert attrs["scales"] == ["slide", "region", "tile"]
    assert attrs["cell_px"] == 16
    encoder = attending(load_encoder(wish["encoder"], weights), px).load(precision="fp32")
    tree = BagStore(out).group("a.svs").tree()
    with open_slide(tmp_path / "slides/a.svs") as slide:
        for row, tile in stream_tiles(slide, tree):
            if tree.levels[2].tissue[row] == 0:
                continue
            column, line = np.rint((tree.boxes(2)[row, :2] - attrs["origin_px"]) / 16).astype(int)
            expected = encoder.encode(tile[None])[0, -196:].reshape(14, 14)
            np.testing.assert_allclose(found["tile"][line : line + 14, column : column + 14], expected, atol=1e-5)
    assert np.isfinite(found["tile"]).sum() == 6 * 196
    low, high = np.nanmin(found["tile"]), np.nanmax(found["tile"])
    np.testing.assert_allclose(found["map"], (found["tile"] - low) / (high - low), atol=1e-5)  # gamma 0: it alone
