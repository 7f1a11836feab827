"""prepare and encode on small slides: what is redone, what is kept, and what the store says about it."""

import os
import shutil
from dataclasses import replace
from threading import Event

import cv2
import numpy as np
import pytest
import torch
from skimage.data import immunohistochemistry

from extractors import Encoder, EncoderFacts, load_encoder
from pipeline import stages
from pipeline.config import make_config
from pipeline.demo import write_slide
from pipeline.errors import BrokenBag, UsageError
from pipeline.meter import Meter
from pipeline.outcome import Outcome
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.stages import (
    SlideFile,
    encode,
    is_current,
    load_tiler,
    make_recipe,
    prepare,
    qc_path,
    segment,
    stored_outcome,
    tile,
)
from pipeline.store import BagStore
from pipeline.tissue import TissueMask, find_tissue

MPP, PX = 0.5, 32
GLASS = 243


class Colour(Encoder):
    """Mean and spread of the channels; counts its tiles."""

    def __init__(self, name="colour", sha="none", words="no weights: made by hand", weights=None, **facts) -> None:
        facts = {"dim": 6, "tile_px": PX, "any_tile_px": True, "source": "", "licence": "", "citation": ""} | facts
        super().__init__(EncoderFacts(name=name, **facts), weights)
        self.sha, self.words, self.tiles = sha, words, 0

    @property
    def weights_sha256(self) -> str:
        return self.sha

    @property
    def weights_words(self) -> str:
        return self.words

    def _features(self, tiles):
        self.tiles += len(tiles)
        x = np.asarray(tiles, np.float64)
        return torch.from_numpy(np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=1) / 255).float()


def tissue_pixels(seed: int = 0) -> np.ndarray:
    """640 x 512: a disc of real tissue on glass."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(GLASS, 2, (512, 640, 3)), 0, 255).astype(np.uint8)
    disc = np.zeros((512, 640), np.uint8)
    cv2.circle(disc, (280, 250), 170, 1, -1)
    texture = np.tile(np.roll(immunohistochemistry(), seed * 50, axis=1), (1, 2, 1))[:, :640]
    return np.where(disc[..., None] > 0, texture, pixels)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Written once; a test that changes a file copies it first."""
    root = tmp_path_factory.mktemp("slides")
    write_slide(root / "a.tif", tissue_pixels(0), MPP, downsamples=(4,), lossless=True)
    write_slide(root / "b.tif", tissue_pixels(1), MPP, downsamples=(4,), lossless=True)
    write_slide(root / "empty.tif", np.full((512, 640, 3), GLASS, np.uint8), MPP, downsamples=(4,))
    return root


def config(**settings):
    return make_config(**{"mpp": 1.0, "levels": 2, "tile_px": PX, "encoder": "colour"} | settings)


def recipe_of(encoder=None, tiler=None, **settings):
    return make_recipe(config(**settings), encoder or Colour(), tiler)


def take(file, out, recipe=None, encoder=None) -> tuple[Outcome, int]:
    """A slide through both stages: its row, and how many tiles were encoded for it."""
    encoder = encoder or Colour()
    recipe = recipe or recipe_of(encoder)
    row = prepare(file, recipe, out)
    if row.status != "ready":
        return row, 0
    ((row, result),) = encode([(file, row)], encoder, out, recipe)
    return row, result.meter.tiles


def group_of(out, name="a.tif"):
    return BagStore(out).group(name)


def contents(group) -> dict[str, bytes]:
    return {p.relative_to(group.path).as_posix(): p.read_bytes() for p in group.path.rglob("c/**/*") if p.is_file()}


# --- one slide -------------------------------------------------------------------------------------------------------


def test_a_slide_from_its_file_to_its_features(slides, tmp_path):
    file = SlideFile("a.tif", slides / "a.tif")
    row, tiles = take(file, tmp_path)
    assert (row.status, row.error, row.mpp, row.width, row.height) == ("done", "", MPP, 640, 512)
    assert row.mpp_source == "tag: aperio.MPP"
    with open_slide(file.path) as slide:
        assert row.reader == slide.reader
        mask = find_tissue(slide)
        tree = build_quadtree(slide, mask, mpp=1.0, tile_px=PX, levels=2)
    assert group_of(tmp_path).tree().hash == tree.hash
    assert row.tiles == tiles == len(tree) > 20
    assert row.tissue_mm2 == pytest.approx(np.pi * (170 * MPP / 1000) ** 2, rel=0.1)
    bag = BagStore(tmp_path).bag("a.tif", "colour")
    pixels = tissue_pixels(0)
    for level, node in zip(bag.levels, tree.levels, strict=True):
        for features, (x, y) in zip(level.features.numpy(), node.xy, strict=True):
            side = int(node.span_px)
            box = np.full((side, side, 3), 255.0)
            part = pixels[y : y + side, x : x + side]
            box[: part.shape[0], : part.shape[1]] = part
            np.testing.assert_allclose(features[:3], box.mean(axis=(0, 1)) / 255, atol=2e-3)
    assert qc_path(tmp_path, "a.tif").read_bytes()[:4] == b"\x89PNG"


def test_attributes_say_where_everything_is_from(slides, tmp_path):
    take(SlideFile("a.tif", slides / "a.tif"), tmp_path)
    attrs = group_of(tmp_path).attrs
    assert attrs["status"] == "complete"
    assert attrs["slide"]["path"] == "a.tif"
    assert attrs["slide"]["size_bytes"] == os.path.getsize(slides / "a.tif")
    assert attrs["slide"]["vendor"] == "aperio"
    assert attrs["slide"]["levels"] == [[640, 512, 1.0, 1.0], [160, 128, 4.0, 4.0]]
    assert attrs["scale"] == {"mpp": MPP, "source": "tag: aperio.MPP", "given": None, "objective": "20", "warnings": []}
    with open_slide(slides / "a.tif") as slide:
        reader = {"requested": "auto", "used": slide.reader, "version": slide.reader_version}
        assert attrs["reader"] == reader | {"refusals": list(slide.refusals)}
    assert attrs["recipe"]["tile_px"] == PX
    assert not {"encoder", "weights", "force_scale"} & set(attrs["recipe"])
    assert attrs["versions"]["zarr"]
    assert sum(attrs["counts"]["tiles"]) == len(group_of(tmp_path).tree())
    features = group_of(tmp_path).features("colour").attrs
    assert features["encoder"]["dim"] == 6
    assert features["weights_sha256"] == "none"
    assert features["levels"] == [0, 1]
    assert features["tiles"] == attrs["hashes"]["tiles"]
    assert features["reader"] == attrs["reader"]["used"]


def test_random_weights_are_said_in_words(slides, tmp_path):
    encoder = load_encoder("resnet50", "random")
    recipe = make_recipe(config(encoder="resnet50", weights="random"), encoder)
    assert recipe.encoder_key == "resnet50@random"
    tiny = Colour("resnet50", "random", encoder.weights_words, "random", dim=6)
    recipe = make_recipe(config(encoder="resnet50", weights="random"), tiny)
    take(SlideFile("a.tif", slides / "a.tif"), tmp_path, recipe, tiny)
    attrs = group_of(tmp_path).features("resnet50@random").attrs
    assert attrs["weights"].startswith("RANDOM weights")
    assert attrs["weights_sha256"] == "random"


def test_a_slide_without_tissue_is_empty(slides, tmp_path):
    file, recipe = SlideFile("empty.tif", slides / "empty.tif"), recipe_of()
    row = prepare(file, recipe, tmp_path)
    assert (row.status, row.tiles, row.message) == ("empty", 0, "no tissue found")
    group = group_of(tmp_path, "empty.tif")
    assert group.status == "empty"
    assert is_current(file, group, recipe)
    assert replace(stored_outcome("empty.tif", group), seconds=row.seconds) == row
    assert qc_path(tmp_path, "empty.tif").exists()


def test_tissue_but_not_enough_of_it_is_empty_for_another_reason(slides, tmp_path):
    row = prepare(SlideFile("a.tif", slides / "a.tif"), recipe_of(min_region_tissue=1.0, mpp=8.0), tmp_path)
    assert row.status == "empty"
    assert "min_tissue" in row.message


@pytest.mark.parametrize(
    ("content", "settings", "error"),
    [
        (b"no slide", {}, "UnreadableSlide"),
        (None, {}, "UnreadableSlide"),
        ("a.tif", {"mpp": 0.25}, "TooCoarse"),
        ("png", {}, "MissingMpp"),
    ],
)
def test_a_slide_at_fault_is_a_row(slides, tmp_path, content, settings, error):
    path = tmp_path / "in" / "x.png"
    path.parent.mkdir()
    if content == "png":
        cv2.imwrite(str(path), tissue_pixels())
    elif content == "a.tif":
        shutil.copy(slides / "a.tif", path)
    elif content is not None:
        path.write_bytes(content)
    row = prepare(SlideFile("x.png", path), recipe_of(**settings), tmp_path / "out")
    assert (row.status, row.stage, row.error) == ("failed", "open", error)
    assert str(tmp_path) not in row.message, "told by its name"


def test_stored_outcome_is_the_row_of_the_run(slides, tmp_path):
    file = SlideFile("a.tif", slides / "a.tif")
    row, _ = take(file, tmp_path)
    again = stored_outcome("a.tif", group_of(tmp_path))
    assert again == replace(row, seconds=None, bound_by="", **dict.fromkeys(Meter().rates()))


# --- what is redone --------------------------------------------------------------------------------------------------


@pytest.fixture
def done(slides, tmp_path):
    """A slide of our own, through both stages: (file, out)."""
    path = tmp_path / "in/a.tif"
    path.parent.mkdir()
    shutil.copy2(slides / "a.tif", path)
    file = SlideFile("a.tif", path)
    take(file, tmp_path / "out")
    assert is_current(file, group_of(tmp_path / "out"), recipe_of())
    return file, tmp_path / "out"


def test_nothing_to_do_is_nothing_done(done):
    file, out = done
    before = contents(group_of(out))
    row, tiles = take(file, out)
    assert (row.status, tiles) == ("done", 0)
    assert contents(group_of(out)) == before
    assert is_current(file, group_of(out), recipe_of(), deep=True)


def test_a_copy_with_another_time_is_the_same_slide(done):
    file, out = done
    os.utime(file.path, ns=(1, 1))
    assert is_current(file, group_of(out), recipe_of())
    row, tiles = take(file, out)
    assert (row.status, tiles) == ("done", 0)


def test_a_changed_file_is_redone(done, slides):
    file, out = done
    old = BagStore(out).bag("a.tif").features
    shutil.copy(slides / "b.tif", file.path)
    assert not is_current(file, group_of(out), recipe_of())
    row, tiles = take(file, out)
    assert row.status == "done"
    assert tiles == row.tiles > 0
    assert not torch.equal(BagStore(out).bag("a.tif").features, old)
    assert is_current(file, group_of(out), recipe_of())


def test_one_changed_byte_of_the_same_size_is_a_changed_file(done):
    file, out = done
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1
    file.path.write_bytes(data)
    assert not is_current(file, group_of(out), recipe_of())


@pytest.mark.parametrize("how", ["gone", "no permission"])
def test_a_file_that_cannot_be_read_is_not_current(done, monkeypatch, how):
    file, out = done
    if how == "gone":
        file.path.unlink()
    else:
        os.utime(file.path, ns=(1, 1))

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pipeline.fingerprint.open", denied, raising=False)
    assert not is_current(file, group_of(out), recipe_of())


def test_another_mpp_is_redone(done):
    file, out = done
    given = replace(file, mpp=0.4)
    assert not is_current(given, group_of(out), recipe_of())
    old = group_of(out).tree().hash
    row, tiles = take(given, out)
    assert (row.mpp, row.mpp_source, row.tiles) == (0.4, "csv", tiles)
    assert "the csv says 0.4" in row.message
    assert group_of(out).tree().hash != old
    assert is_current(given, group_of(out), recipe_of())
    assert not is_current(file, group_of(out), recipe_of()), "and back again"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"min_tissue": 0.6}, {"tissue"}),
        ({"levels": 1}, {"tissue"}),
        ({"min_area_um2": 0.0, "min_density": 0.1}, set()),
        ({"dtype": "float32"}, {"tissue", "tiles"}),
        ({"keep_background": True}, {"tissue"}),
    ],
)
def test_a_changed_recipe_redoes_what_depends_on_it(done, change, kept):
    file, out = done
    group, recipe = group_of(out), recipe_of(**change)
    stamps = {part: os.stat(group.path / part / "zarr.json").st_ino for part in ("tissue", "tiles")}
    assert not is_current(file, group, recipe)
    row, tiles = take(file, out, recipe)
    assert row.status == "done"
    assert tiles == row.tiles
    again = {part for part, inode in stamps.items() if os.stat(group.path / part / "zarr.json").st_ino == inode}
    assert kept <= again
    assert is_current(file, group, recipe)


@pytest.mark.parametrize(
    "part", ["tissue/mask/c/0/0", "tissue/thumbnail/c/0/0/0", "tiles/xy/c/0/0", "features/colour/x/c/0/0"]
)
def test_damage_is_found_and_repaired_to_the_same_bytes(done, part):
    file, out = done
    group = group_of(out)
    before = contents(group)
    data = bytearray((group.path / part).read_bytes())
    data[len(data) // 2] ^= 255
    (group.path / part).write_bytes(data)
    assert not is_current(file, group, recipe_of(), deep=True)
    if "features" in part:
        (group.path / part).unlink()  # a chunk that exists counts as finished: see the next test
    row, _ = take(file, out)
    assert row.status == "done"
    assert contents(group_of(out)) == before
    assert is_current(file, group_of(out), recipe_of(), deep=True)


def test_a_damaged_chunk_of_features_is_made_again(done):
    file, out = done
    path = group_of(out).path / "features/colour/x/c/0/0"
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(data)
    take(file, out)
    assert is_current(file, group_of(out), recipe_of(), deep=True)


def test_a_lost_chunk_of_valid_is_made_again(done):
    file, out = done
    before = contents(group_of(out))
    (group_of(out).path / "features/colour/valid/c/0").unlink()
    row, _ = take(file, out)
    assert row.status == "done"
    assert contents(group_of(out)) == before


@pytest.mark.parametrize("part", ["features/colour/x/c/0/0", "features/colour/valid/c/0"])
def test_a_missing_chunk_is_seen_without_reading(done, part):
    file, out = done
    (group_of(out).path / part).unlink()
    assert not is_current(file, group_of(out), recipe_of())


# --- several encoders ------------------------------------------------------------------------------------------------


def test_a_second_encoder_leaves_the_first_ones_features_readable(done):
    file, out = done
    group, second = group_of(out), Colour("second")
    before = BagStore(out).bag("a.tif", "colour").features
    recipe = recipe_of(second)
    assert not is_current(file, group, recipe)
    row = prepare(file, recipe, out)
    assert group.status == "complete"
    seen = []

    def working(change=Colour._features):
        def features(self, tiles):
            seen.append(torch.equal(BagStore(out).bag("a.tif", "colour").features, before))
            return change(self, tiles)

        return features

    second._features = working().__get__(second)
    (row,) = encode([(file, row)], second, out, recipe)
    assert seen
    assert all(seen), "also while the second one works"
    assert group.encoders() == ["colour", "second"]
    assert is_current(file, group, recipe)
    assert is_current(file, group, recipe_of())
    torch.testing.assert_close(BagStore(out).bag("a.tif", "second").features, before)
    with pytest.raises(BrokenBag, match="say which"):
        BagStore(out).bag("a.tif")


def test_slides_are_encoded_as_a_stream(slides, tmp_path):
    files = [SlideFile(name, slides / name) for name in ("a.tif", "b.tif")]
    encoder = Colour()
    recipe = recipe_of(encoder)
    prepared = [(file, prepare(file, recipe, tmp_path)) for file in files]
    results = list(encode(prepared, encoder, tmp_path, recipe))
    rows = [row for row, _ in results]
    assert [(row.slide, row.status) for row in rows] == [("a.tif", "done"), ("b.tif", "done")]
    assert [result.meter.tiles for _, result in results] == [row.tiles for row in rows]
    alone = tmp_path / "alone"
    for file in files:
        take(file, alone)
        assert contents(group_of(alone, file.name)) == contents(group_of(tmp_path, file.name))


@pytest.mark.timeout(30)
def test_a_slide_whose_store_vanished_is_told_of_before_the_next_is_asked_for(slides, tmp_path):
    """Who gives slides may give no other until the row of the last has come back."""
    files = [SlideFile(name, slides / name) for name in ("a.tif", "b.tif")]
    encoder, told = Colour(), Event()
    recipe = recipe_of(encoder)
    prepared = [(file, prepare(file, recipe, tmp_path)) for file in files]
    shutil.rmtree(group_of(tmp_path, "a.tif").path / "tiles")

    def one_by_one():
        yield prepared[0]
        assert told.wait(10), "nobody was told of the first slide"
        yield prepared[1]

    rows = []
    for row, _ in encode(one_by_one(), encoder, tmp_path, recipe):
        rows.append(row)
        told.set()
    assert [(row.slide, row.status) for row in rows] == [("a.tif", "failed"), ("b.tif", "done")]
    assert rows[0].error == "BrokenBag"


def test_a_slide_that_changes_before_it_is_encoded_fails(slides, tmp_path):
    path = tmp_path / "in/a.tif"
    path.parent.mkdir()
    shutil.copy(slides / "a.tif", path)
    file, encoder = SlideFile("a.tif", path), Colour()
    recipe = recipe_of(encoder)
    row = prepare(file, recipe, tmp_path / "out")
    os.utime(path, ns=(7, 7))
    ((row, _),) = encode([(file, row)], encoder, tmp_path / "out", recipe)
    assert (row.status, row.stage, row.error) == ("failed", "encode", "UnreadableSlide")
    assert "changed" in row.message
    assert group_of(tmp_path / "out").status == "writing"


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_the_encoder_makes_the_recipe_definite():
    recipe = make_recipe(make_config(), Colour(tile_px=48))
    assert recipe.config.tile_px == 48
    assert recipe.facts.dim == 6
    assert recipe_of(tile_px=64).config.tile_px == 64


HASH = {"mpp": 1.0, "levels": 2}


def hash_of(recipe):
    """The feature_hash that the tiles of this recipe get on a slide that is all tissue."""
    slide = open_slide(np.full((600, 700, 3), 128, np.uint8), mpp=0.5)
    everything = TissueMask(np.ones((60, 70), bool), (10.0, 10.0), 5.0, "test")
    return recipe.hash_of(tile(slide, everything, recipe.config.tile).facts())


@pytest.mark.parametrize(
    ("encoder", "settings"),
    [
        ({"sha": "00ff"}, {}),
        ({"name": "other"}, {}),
        ({"mean": (0.1, 0.2, 0.3)}, {}),
        ({"std": (0.1, 0.2, 0.3)}, {}),
        ({"crop_px": 24}, {}),
        ({}, {"tile_px": 64}),
        ({}, {"mpp": 0.5}),
        ({}, {"levels": 3}),
        ({}, {"encode_levels": "finest"}),
        ({}, {"encode_levels": (2.0,)}),
    ],
)
def test_the_feature_hash_says_what_fits_a_model(encoder, settings):
    assert hash_of(recipe_of(Colour(**encoder), **HASH | settings)) != hash_of(recipe_of(Colour(), **HASH))


@pytest.mark.parametrize(
    "settings",
    [
        {"min_tissue": 0.5},
        {"keep_background": True},
        {"origin": (3.0, 4.0)},
        {"dtype": "float32"},
        {"reader": "tiffslide"},
        {"tissue_mpp": 4.0},
        {"encode_levels": (2.0, 1.0)},
        {"mpp": 1.0, "levels": 2, "encode_levels": "all"},
    ],
)
def test_the_feature_hash_knows_no_slide_and_no_tiling(settings):
    assert hash_of(recipe_of(**HASH | settings)) == hash_of(recipe_of(**HASH))


def test_finest_of_many_levels_fits_a_model_of_one():
    assert hash_of(recipe_of(levels=3, encode_levels="finest")) == hash_of(recipe_of(levels=1))


@pytest.mark.parametrize(
    ("encoder", "key"),
    [
        ({"name": "timm/vit"}, "timm--vit"),
        ({"name": "mine.encoders:build"}, "mine.encoders--build"),
        ({"sha": "abcdef0123456789"}, "colour"),
        ({"sha": "abcdef0123456789", "weights": "w.pt"}, "colour@abcdef01"),
    ],
)
def test_keys_of_encoders(encoder, key):
    given = Colour(**encoder)
    assert make_recipe(config(weights=given.weights), given).encoder_key == key


def test_what_an_encoder_was_not_made_for_is_refused_unless_forced():
    narrow = {"any_tile_px": False, "mpp": (0.5,)}
    for settings, words in (({"mpp": 0.5, "tile_px": 64}, "64 px"), ({"mpp": 1.0}, "µm/px")):
        with pytest.raises(UsageError, match=words):
            recipe_of(Colour(**narrow), **settings)
        recipe_of(Colour(**narrow), force_scale=True, **settings)
    recipe_of(Colour(**narrow), mpp=0.5, levels=3)  # coarser levels are the user's wish


# --- custom tilers ---------------------------------------------------------------------------------------------------


def shifted(slide, mask, config):
    return build_quadtree(slide, mask, mpp=config.mpp, tile_px=config.tile_px, levels=config.levels, origin=(13.0, 7.5))


def points(slide, mask, config):
    return QuadTree.from_points(slide, [(280, 250), (300.5, 200.25), (200, 260)], config.mpp, config.tile_px, mask)


@pytest.mark.parametrize(("tiler", "levels"), [(shifted, 2), (points, 1)])
def test_a_tiler_of_ones_own_end_to_end(slides, tmp_path, tiler, levels):
    file, encoder = SlideFile("a.tif", slides / "a.tif"), Colour()
    recipe = make_recipe(config(levels=levels, tiler="t:f"), encoder, tiler)
    row, tiles = take(file, tmp_path, recipe, encoder)
    assert row.status == "done"
    with open_slide(file.path) as slide:
        tree = tiler(slide, find_tissue(slide), config(levels=levels))
    assert group_of(tmp_path).tree().hash == tree.hash
    bag = BagStore(tmp_path).bag("a.tif")
    assert len(bag) == len(tree) == tiles
    pixels, side = tissue_pixels(0).astype(float), int(tree.levels[-1].span_px)
    boxes = tree.boxes(len(tree.levels) - 1)
    inside = [i for i, (x, y, w, h) in enumerate(boxes) if x >= 1 and y >= 1 and x + w < 639 and y + h < 511]
    for i in inside[:: max(1, len(inside) // 10)]:
        x, y = boxes[i, :2]
        x0, y0 = int(x), int(y)
        fx, fy = x - x0, y - y0
        wide = pixels[y0 : y0 + side + 1, x0 : x0 + side + 1]
        weights = [np.r_[1 - f, np.ones(side - 1), f] for f in (fy, fx)]
        mean = np.einsum("y,x,yxc->c", *weights, wide) / side**2 / 255
        np.testing.assert_allclose(bag.levels[-1].features[i, :3].numpy(), mean, atol=2e-3)
    assert is_current(file, group_of(tmp_path), recipe)


def test_a_tiler_that_returns_something_else(slides):
    with open_slide(slides / "a.tif") as slide, pytest.raises(UsageError, match="list, not a QuadTree"):
        tile(slide, find_tissue(slide), config().tile, lambda *_: [])


def test_redo_asks_a_changed_tiler_again(slides, tmp_path):
    file = SlideFile("a.tif", slides / "a.tif")
    take(file, tmp_path, make_recipe(config(tiler="t:f"), Colour(), shifted))
    changed = make_recipe(config(tiler="t:f"), Colour(), lambda *given: points(*given))
    assert not is_current(file, group_of(tmp_path), changed, deep=True)


def test_features_of_a_tiler_at_another_scale_do_not_fit_the_model(slides, tmp_path):
    hashes = []
    for mpp in (1.0, 4.0):
        encoder = Colour()
        recipe = make_recipe(
            config(levels=1, tiler="t:f"),
            encoder,
            lambda s, m, c, mpp=mpp: build_quadtree(s, m, mpp=mpp, tile_px=PX, levels=1),
        )
        out = tmp_path / str(mpp)
        take(SlideFile("a.tif", slides / "a.tif"), out, recipe, encoder)
        hashes.append(group_of(out).features("colour").attrs["feature_hash"])
    assert hashes[0] != hashes[1]


def test_load_tiler(tmp_path, monkeypatch):
    (tmp_path / "mytiler.py").write_text("def f(slide, mask, config): ...\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_tiler("mytiler:f").__name__ == "f"
    for name in ("mytiler:g", "mytiler:number", "nothing:f", "mytiler", "", ":f", "mytiler:"):
        with pytest.raises(UsageError, match="tiler"):
            load_tiler(name)


def test_segment_gives_the_mask_and_the_picture_it_was_found_on(slides):
    with open_slide(slides / "a.tif") as slide:
        mask, rgb = segment(slide, config().tissue)
        np.testing.assert_array_equal(mask.image, find_tissue(slide, config().tissue).image)
    assert rgb.shape == (*mask.image.shape, 3)


def test_versions_name_the_libraries_that_decide_the_bytes():
    assert {"python", "slidestream", "torch", "zarr", "openslide-bin", "tiffslide"} <= set(stages.versions())
