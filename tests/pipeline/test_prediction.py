"""Model folders, and stored bags through a trained head."""

import csv
import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch

from heads import Bag, load_head
from pipeline.errors import BrokenBag, UsageError
from pipeline.prediction import (
    Model,
    find_model,
    load_model,
    matching_features,
    predict_slide,
    predict_stored,
    save_model,
    store_prediction,
    write_predictions,
    zoomed,
)
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.saving import Saving
from pipeline.store import BagStore, SlideGroup, read_attrs
from pipeline.tissue import TissueMask

DIM, PX, SIDE = 6, 8, 96


def tree(levels=2) -> QuadTree:
    slide = open_slide(np.zeros((SIDE, SIDE, 3), np.uint8), mpp=0.5)
    image = np.random.default_rng(0).random((SIDE // PX, SIDE // PX)) > 0.4
    return build_quadtree(slide, TissueMask(image, (PX, PX), 4.0, "t"), mpp=0.5, tile_px=PX, levels=levels)


def write(store: BagStore, slide="case/a.svs", keys=("mine",), seed=0) -> SlideGroup:
    table = tree()
    group = store.group(slide)
    group.begin(slide={"path": slide})
    mask = TissueMask(np.ones((SIDE // PX, SIDE // PX), bool), (PX, PX), 4.0, "t")
    group.write_tissue(mask, np.full((SIDE // PX, SIDE // PX, 3), 255, np.uint8), "h")
    group.write_tiles(table)
    for key in keys:
        rng = np.random.default_rng(seed)
        valid = rng.random(len(table)) > 0.1
        features = group.features(key)
        features.begin(len(table), DIM, "float32", feature_hash=f"hash of {key}", tiles=table.hash)
        features.write_chunk(0, rng.normal(size=(len(table), DIM)).astype(np.float32) * valid[:, None], valid)
        features.finish()
    group.finish("complete")
    return group


def about(level=0.5, key="mine", **more):
    return {
        "head": "abmil",
        "options": {"hidden": 5, "attention": 3},
        "dim": DIM,
        "classes": ["benign", "malignant", "other"],
        "level": level,
        "encoder_key": key,
        "feature_hash": f"hash of {key}",
        "encoded_mpp": [1.0, 0.5],
    } | more


def head(seed=0):
    torch.manual_seed(seed)
    return load_head("abmil", DIM, 3, hidden=5, attention=3).eval()


@pytest.fixture
def store(tmp_path):
    return BagStore(tmp_path)


# --- model folders ---------------------------------------------------------------------------------------------------


def test_a_model_folder_gives_back_the_same_bits(tmp_path):
    made = head()
    save_model(tmp_path / "models/m", made, about())
    assert sorted(p.name for p in (tmp_path / "models/m").iterdir()) == ["model.json", "model.safetensors"]
    model = load_model(tmp_path / "models/m")
    assert (model.name, model.classes, model.level) == ("m", about()["classes"], 0.5)
    assert model.about == about()
    assert not model.head.training
    assert model.head.options == made.options
    for name, tensor in made.state_dict().items():
        assert torch.equal(model.head.state_dict()[name], tensor)
    bag = Bag.flat(torch.randn(20, DIM), mpp=0.5)
    assert torch.equal(predict_slide(model, bag).logits, made(bag).logits)
    assert not predict_slide(model, bag).logits.requires_grad


def test_saving_twice_gives_the_same_bytes_and_the_later_model(tmp_path):
    for folder in ("a", "b"):
        save_model(tmp_path / folder, head(), about())
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    save_model(tmp_path / "a", head(1), about())
    assert torch.equal(
        load_model(tmp_path / "a").head.state_dict()["classifier.bias"], head(1).state_dict()["classifier.bias"]
    )


def test_a_model_that_was_not_finished_is_none(tmp_path, monkeypatch):
    save_model(tmp_path / "m", head(), about())
    monkeypatch.setattr("pipeline.prediction.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path / "m", head(1), about())
    with pytest.raises(UsageError, match="no model at"):
        find_model(tmp_path / "m", None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.json").write_text("{"),
        lambda f: (f / "model.json").write_text("[]"),
        lambda f: (f / "model.json").write_text(json.dumps({k: v for k, v in about().items() if k != "head"})),
        lambda f: (f / "model.json").write_text(json.dumps(about(head="abmill"))),
        lambda f: (f / "model.json").write_text(json.dumps(about(options={"hiden": 5}))),
        lambda f: (f / "model.json").write_text(json.dumps(about(options={"hidden": 7, "attention": 3}))),
        lambda f: (f / "model.json").write_text(json.dumps(about(classes=["a", "b"]))),
        lambda f: (f / "model.json").write_text(json.dumps(about(dim=7))),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]),
        lambda f: (f / "model.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_model_is_refused_in_words(tmp_path, damage):
    save_model(tmp_path / "m", head(), about())
    damage(tmp_path / "m")
    with pytest.raises(UsageError, match="not a usable model"):
        load_model(tmp_path / "m")


def test_a_model_is_found_by_path_or_name(tmp_path, monkeypatch):
    save_model(tmp_path / "out/models/m", head(), about())
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "out/models/m"
    assert find_model("m", tmp_path / "out") == find_model(place, None) == find_model("out/models/m", None) == place
    with pytest.raises(UsageError, match="models there: m"):
        find_model("n", tmp_path / "out")


# --- which features --------------------------------------------------------------------------------------------------


def model(level=0.5, key="mine", **more) -> Model:
    return Model("m", head(), about(level, key, **more))


def test_the_features_are_found_by_what_they_are_made_of(store):
    group = write(store, keys=("other", "mine", "zeta"))
    assert matching_features(group, model()) == "mine"
    assert matching_features(group, model(key="zeta")) == "zeta"
    assert matching_features(group, model(encoder_key="whatever")) == "mine", "by their hash, not their name"


def test_other_features_are_refused_naming_both(store):
    write(store, keys=("mine",))
    with pytest.raises(BrokenBag, match=r"features of uni at 1, 0.5 µm/px; stored are mine") as error:
        predict_stored(store, "case/a.svs", model(key="uni"))
    assert error.value.stage == "predict"
    assert not (store.root / "heatmaps").exists()


def test_unfinished_and_empty_slides_are_refused(store):
    group = write(store)
    for status, words in (("writing", "not finished"), ("empty", "no tissue")):
        group.finish(status)
        with pytest.raises(BrokenBag, match=words):
            predict_stored(store, "case/a.svs", model())


def test_a_damaged_chunk_is_this_slides_fault(store):
    group = write(store)
    path = group.path / "features/mine/x/c/0/0"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenBag, match="chunk 0 is damaged"):
        predict_stored(store, "case/a.svs", model())


def test_features_of_another_length_are_this_slides_fault(store):
    write(store)
    other = Model("m", load_head("mean", DIM + 1, 3).eval(), about())
    with pytest.raises(BrokenBag, match="was made for 7"):
        predict_stored(store, "case/a.svs", other)


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "index"), [(0.5, 1), (1.0, 0)])
def test_attention_is_stored_for_the_level_that_was_read(store, level, index):
    group = write(store)
    probabilities = predict_stored(store, "case/a.svs", model(level))
    bag, node = store.bag("case/a.svs", "mine").levels[index], tree().levels[index]
    with torch.no_grad():
        direct = head()(Bag.flat(bag.features, valid=bag.valid))
    np.testing.assert_allclose(probabilities, direct.probabilities, rtol=1e-5)
    found = group.prediction("m")
    assert set(found) == {"logits", "probabilities", "raw", "weight"}
    assert len(found["weight"]) == len(found["raw"]) == node.stop - node.start
    np.testing.assert_allclose(found["weight"], direct.tiles[0].weight, rtol=1e-5)
    np.testing.assert_allclose(found["raw"], direct.tiles[0].raw, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(found["weight"]), ~bag.valid.numpy())
    assert np.isnan(found["weight"]).any()
    assert np.nansum(found["weight"]) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found["logits"], direct.logits, rtol=1e-5)
    np.testing.assert_array_equal(found["probabilities"], probabilities)
    attrs = read_attrs(group.path / "predictions/m")
    assert attrs == {
        "classes": about()["classes"],
        "levels": [index],
        "feature_hash": "hash of mine",
        "status": "complete",
    }


def test_the_heatmap_shows_the_tiles_of_that_level(store):
    write(store)
    predict_stored(store, "case/a.svs", model(1.0))
    picture = cv2.imread(str(store.root / "heatmaps/m/case/a.svs.png"))
    picture = picture[-round(picture.shape[1]) :]  # a square slide under its caption
    scale = picture.shape[1] / SIDE
    weight = store.group("case/a.svs").prediction("m")["weight"]
    for (x, y, w, h), share in zip(tree().boxes(0), weight, strict=True):
        middle = picture[int((y + h / 2) * scale), int((x + w / 2) * scale)]
        assert (middle == 255).all() == bool(np.isnan(share))


def test_a_prediction_is_finished_after_its_picture(store, monkeypatch):
    group = write(store)
    monkeypatch.setattr("pipeline.prediction.save_png", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        predict_stored(store, "case/a.svs", model())
    with pytest.raises(BrokenBag, match="no prediction"):
        group.prediction("m")


def test_a_model_is_told_from_another_training_of_its_name(tmp_path):
    save_model(tmp_path / "a/m", head(), about())
    save_model(tmp_path / "b/m", head(1), about())
    save_model(tmp_path / "c/m", head(), about(level=1.0))
    save_model(tmp_path / "d/m", head(), about())
    sums = [load_model(tmp_path / name / "m").sha256 for name in "abcd"]
    assert len(set(sums)) == 3
    assert sums[0] == sums[3]


def test_only_a_zoom_of_this_model_into_these_tiles_is_one(store, tmp_path):
    group = write(store)
    save_model(tmp_path / "m", head(), about())
    one = load_model(tmp_path / "m")
    predict_stored(store, "case/a.svs", one)
    assert zoomed(group, one) is None, "it was predicted from features"
    saving = Saving(0.25, 100, 30, 0.1, 2.0)
    prediction = predict_slide(one, store.bag("case/a.svs", "mine"))
    attrs = {"zoom": asdict(saving), "model_sha256": one.sha256, "tiles": tree().hash}
    store_prediction(group, one, prediction, store.root, **attrs)
    assert zoomed(group, one) == saving
    for wrong in ({"model_sha256": "other"}, {"tiles": "other"}):
        store_prediction(group, one, prediction, store.root, **attrs | wrong)
        assert zoomed(group, one) is None


def test_predicting_again_gives_the_same_bytes(store):
    group = write(store)

    def run():
        predict_stored(store, "case/a.svs", model())
        return {
            p: p.read_bytes()
            for p in [*group.path.rglob("predictions/**/*"), *store.root.rglob("*.png")]
            if p.is_file()
        }

    assert run() == run()
    assert group.status == "complete"


def test_the_table_of_predictions(tmp_path):
    table = [("b, x.svs", np.array([0.25, 0.75])), ("a.svs", np.array([0.9, 0.1]))]
    two = Model("m", load_head("mean", DIM, 2), about() | {"classes": ["neg", "pos"]})
    write_predictions(tmp_path / "predictions/m.csv", two, table)
    with open(tmp_path / "predictions/m.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["slide", "prediction", "p_neg", "p_pos"],
            ["a.svs", "neg", "0.900000", "0.100000"],
            ["b, x.svs", "pos", "0.250000", "0.750000"],
        ]
    assert [p.name for p in (tmp_path / "predictions").iterdir()] == ["m.csv"]
