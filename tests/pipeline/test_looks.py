"""Where a head looked: boxes and scores of its tiles, and what it chose."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from heads import load_head
from heads.hatnet import lay_out
from pipeline.errors import BrokenBag
from pipeline.looks import chosen_boxes, divided, look_at
from pipeline.prediction import Model, predict_slide, store_prediction
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.saving import Saving
from pipeline.store import BagStore
from pipeline.tissue import TissueMask

DIM, PX, SIDE = 6, 8, 128
INVALID = 5  # a row of the finest level


def tree(levels=3) -> QuadTree:
    slide = open_slide(np.zeros((SIDE, SIDE, 3), np.uint8), mpp=0.5)
    image = np.random.default_rng(0).random((SIDE // PX, SIDE // PX)) > 0.3
    return build_quadtree(slide, TissueMask(image, (PX, PX), 4.0, "t"), mpp=0.5, tile_px=PX, levels=levels)


@pytest.fixture
def store(tmp_path):
    made, table = BagStore(tmp_path), tree()
    group = made.group("a.svs")
    group.begin(slide={"path": "a.svs"})
    mask = TissueMask(np.ones((SIDE // PX, SIDE // PX), bool), (PX, PX), 4.0, "t")
    group.write_tissue(mask, np.full((SIDE // PX, SIDE // PX, 3), 255, np.uint8), "h")
    group.write_tiles(table)
    valid = np.ones(len(table), bool)
    valid[table.levels[-1].start + INVALID] = False
    features = group.features("mine")
    features.begin(len(table), DIM, "float32", feature_hash="f", tiles=table.hash)
    x = np.random.default_rng(1).normal(size=(len(table), DIM)).astype(np.float32)
    features.write_chunk(0, x * valid[:, None], valid)
    features.finish()
    group.finish("complete")
    return made


def model(name, level, tmp_path, **options) -> Model:
    torch.manual_seed(0)
    head = load_head(name, DIM, 2, **options).eval()
    about = {"head": name, "classes": ["a", "b"], "level": level, "encoder_key": "mine", "feature_hash": "f",
             "encoded_mpp": [2.0, 1.0, 0.5]}  # fmt: skip
    (tmp_path / "model.json").write_text(name)
    (tmp_path / "model.safetensors").write_bytes(b"")
    return Model("m", head, about, tmp_path)


@pytest.mark.parametrize(("level", "k"), [(0.5, 2), (1.0, 1)])
def test_a_flat_head_looks_at_all_tiles_of_its_level(store, tmp_path, level, k):
    made = model("abmil", level, tmp_path, hidden=5, attention=3)
    look = look_at(store, "a.svs", made)
    wanted = predict_slide(made, store.bag("a.svs")).tiles[0]
    np.testing.assert_array_equal(look.boxes, tree().boxes(k))
    np.testing.assert_array_equal(look.weight, wanted.weight.numpy().astype(float))
    np.testing.assert_array_equal(look.raw, wanted.raw.numpy().astype(float))
    assert np.flatnonzero(np.isnan(look.weight)).tolist() == ([INVALID] if k == 2 else [])
    assert look.choice is None


HAGMIL = {"levels": 2, "k": 0.2, "widths": [8, 8], "dropout": 0.0}


def test_a_head_that_descends_has_chosen_the_tiles_it_looked_at(store, tmp_path):
    look = look_at(store, "a.svs", model("hagmil", None, tmp_path, **HAGMIL))
    finest = tree().boxes(2)
    np.testing.assert_array_equal(look.boxes, finest)
    seen = np.isfinite(look.weight)
    assert 0 < seen.sum() < 0.5 * len(finest)
    np.testing.assert_array_equal(look.choice.chosen, finest[seen])
    np.testing.assert_array_equal(look.choice.among, finest)


def test_what_a_zoom_stored_is_read_where_there_are_no_features(store, tmp_path):
    made = model("hagmil", None, tmp_path, **HAGMIL)
    wanted = look_at(store, "a.svs", made)
    group = store.group("a.svs")
    prediction = predict_slide(made, store.bag("a.svs"))
    group.drop("features")
    group.update(status="writing")
    with pytest.raises(BrokenBag, match="is not finished"):
        look_at(store, "a.svs", made)
    about = {"zoom": asdict(Saving(0.2, 1, 1, 0.0, 0.0)), "model_sha256": made.sha256, "tiles": tree().hash}
    store_prediction(group, made, prediction, tmp_path, **about)
    look = look_at(store, "a.svs", made)
    for name in ("boxes", "weight", "raw"):
        np.testing.assert_array_equal(getattr(look, name), getattr(wanted, name))
    np.testing.assert_array_equal(look.choice.chosen, wanted.choice.chosen)
    other = model("hagmil", None, tmp_path, **HAGMIL)
    (tmp_path / "model.json").write_text("trained again")
    with pytest.raises(BrokenBag, match="is not finished"):
        look_at(store, "a.svs", other)


def test_hatnet_chooses_the_better_half_of_its_bags(store, tmp_path):
    made = model("hatnet", 0.5, tmp_path, side=3, width=8, heads=2)
    look = look_at(store, "a.svs", made)
    energy = predict_slide(made, store.bag("a.svs")).regions[0].raw.numpy()
    bags = divided(look.boxes[np.isfinite(look.weight)], 3)
    there = np.isfinite(energy)
    assert there.all()
    np.testing.assert_array_equal(look.choice.among, bags)
    assert len(look.choice.chosen) == 5
    assert {tuple(box) for box in look.choice.chosen} == {tuple(bags[i]) for i in np.argsort(-energy)[:5]}


def test_bags_without_tissue_are_neither_chosen_nor_could_be():
    boxes = np.array([[0, 0, 10, 10], [30, 50, 10, 10]], float)
    energy = torch.tensor([0.1, torch.nan, torch.nan, 0.2])
    choice = chosen_boxes(boxes, np.array([0.5, 0.5]), 1, {"bag_energy": energy})
    assert choice.among.tolist() == [[0, 0, 20, 30], [20, 30, 20, 30]]
    assert choice.chosen.tolist() == [[20, 30, 20, 30]]


def test_the_boxes_of_bags_hold_the_centres_of_their_tiles():
    """Those of the head's own layout."""
    rng = np.random.default_rng(4)
    grid = np.unique(rng.integers(3, 40, (150, 2)), axis=0)
    boxes = np.concatenate([grid * 16.5, np.full((len(grid), 2), 16.5)], axis=1)
    layout = lay_out(torch.from_numpy(grid), 4)
    bags = divided(boxes, 4)[layout.cell.numpy() // 16]
    centre = (boxes[:, :2] + boxes[:, 2:] / 2)[layout.tile.numpy()]
    assert len(layout.tile) == len(grid)
    assert (centre >= bags[:, :2] - 1e-9).all()
    assert (centre <= bags[:, :2] + bags[:, 2:] + 1e-9).all()
