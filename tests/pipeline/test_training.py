"""Labels × stored bags → a model folder: who is trained on, what is refused, and that a seed decides the bytes."""

import csv
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from heads import load_head
from heads.metrics import main_metric
from heads.tasks import describe, task_of
from heads.train import inverse_frequency, logits_of
from pipeline import bags as module
from pipeline.bags import Bags, Store
from pipeline.cohort import read_cohort
from pipeline.errors import UsageError
from pipeline.evaluation import outputs_of
from pipeline.labels import read_labels
from pipeline.prediction import load_model, predict_slide
from pipeline.quadtree import QuadTree, build_quadtree
from pipeline.readers import open_slide
from pipeline.store import BagStore
from pipeline.tissue import TissueMask
from pipeline.training import train

DIM, PX = 4, 8
OPTIONS = {"hidden": 6, "attention": 3}
QUICK = {"epochs": 4, "lr": 1e-2} | OPTIONS


def tree(seed: int, encode_levels="all") -> QuadTree:
    slide = open_slide(np.zeros((64, 64, 3), np.uint8), mpp=0.5)
    image = np.random.default_rng(seed).random((8, 8)) > 0.4
    mask = TissueMask(image, (PX, PX), 4.0, "t")
    return build_quadtree(slide, mask, mpp=0.5, tile_px=PX, levels=2, encode_levels=encode_levels)


def add(
    store, slide, seed, shift=0.0, status="complete", key="mine", encode_levels="all", feature_hash="fh", invalid=()
):
    table = tree(seed, encode_levels)
    group = store.group(slide)
    if group.status == "missing":
        group.begin(slide={"path": slide})
        group.write_tissue(TissueMask(np.ones((8, 8), bool), (PX, PX), 4.0, "t"), np.zeros((8, 8, 3), np.uint8), "h")
        group.write_tiles(table)
    rows = len(table.encoded_rows)
    x = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    x[:, 0] += shift
    valid = np.ones(rows, bool)
    valid[list(invalid)] = False
    features = group.features(key)
    facts = {"dim": DIM, "name": key}
    features.begin(rows, DIM, "float32", feature_hash=feature_hash, encoder=facts, weights_sha256="none", n=seed)
    features.write_chunk(0, x * valid[:, None], valid)
    features.finish()
    group.finish(status)
    return group


def write_run(root, keys=("mine",)):
    encoders = {key: {"name": key, "weights_file": None, "force_scale": False} for key in keys}
    about = {"root": "/slides", "recipe": {"mpp": 0.5, "levels": 2}, "encoders": encoders, "versions": {"zarr": "3"}}
    (root / "run.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    for i in range(16):
        add(BagStore(root), f"s{i:02}.svs", i, shift=1.5 * (i % 2))
    write_run(root)
    return root


@pytest.fixture
def out(made, tmp_path):
    """16 slides, every other one positive; a copy that may be spoilt."""
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def table(out, rows, header="slide,label"):
    (out / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return out / "labels.csv"


def all_rows(extra=lambda i: ""):
    return [f"s{i:02}.svs,{'pos' if i % 2 else 'neg'}{extra(i)}" for i in range(16)]


def model_bytes(trained) -> bytes:
    return (trained.folder / "model.safetensors").read_bytes()


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_model_folder_says_all_that_predicting_needs(out):
    trained = train(out, table(out, all_rows()), **QUICK, seed=3)
    assert trained.folder == out / "models/abmil"
    model = load_model(trained.folder)
    about = model.about
    assert (model.classes, model.level, about["dim"]) == (["neg", "pos"], 0.5, DIM)
    assert (about["encoder_key"], about["feature_hash"], about["encoded_mpp"]) == ("mine", "fh", [1.0, 0.5])
    assert about["recipe"] == {"mpp": 0.5, "levels": 2, "encoder": "mine", "weights": None, "force_scale": False}
    assert about["training"]["seed"] == 3
    assert about["metrics"] == trained.metrics
    assert {"hidden": 6, "attention": 3}.items() <= about["options"].items()
    assert sorted(slide for part in about["training"]["slides"].values() for slide in part) == [
        f"s{i:02}.svs" for i in range(16)
    ]


def test_it_learns_what_can_be_learned(out):
    trained = train(out, table(out, all_rows(lambda i: f",{'test' if i > 11 else 'train'}"), "slide,label,split"),
                    epochs=30, lr=1e-2, **OPTIONS)  # fmt: skip
    right = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "kappa", "auc"), 1.0)
    assert trained.metrics["test"] == {"slides": 4.0} | right


def test_the_recipe_of_a_paper_and_what_replaces_parts_of_it(out):
    trained = train(out, table(out, all_rows()), head="dsmil", recipe="paper", epochs=2)
    about = load_model(trained.folder).about["training"]
    assert {name: about[name] for name in ("recipe", "epochs", "lr", "betas", "weight_decay", "schedule")} == {
        "recipe": "paper",
        "epochs": 2,
        "lr": 1e-4,
        "betas": [0.5, 0.9],
        "weight_decay": 1e-3,
        "schedule": "cosine",
    }


@pytest.mark.parametrize("head", ["attention", "longmil", "hagmil"])
def test_heads_that_need_places_or_levels_train_from_a_store(out, head):
    options = {"levels": 2} if head == "hagmil" else {"width": 16}
    trained = train(out, table(out, all_rows()), head=head, epochs=1, **options)
    model = load_model(trained.folder)
    assert model.level == (None if head == "hagmil" else 0.5)
    assert predict_slide(model, BagStore(out).bag("s00.svs")).logits.isfinite().all()


def test_a_seed_decides_the_bytes(out):
    labels = table(out, all_rows())
    torch.manual_seed(1)
    a = train(out, labels, name="a", **QUICK, dropout=0.3)
    torch.manual_seed(2)
    b = train(out, labels, name="b", **QUICK, dropout=0.3)
    assert model_bytes(a) == model_bytes(b)
    assert a.metrics == b.metrics
    assert (a.folder / "model.json").read_bytes() == (b.folder / "model.json").read_bytes()
    assert model_bytes(train(out, labels, name="c", seed=1, **QUICK, dropout=0.3)) != model_bytes(a)


def test_the_callers_random_numbers_stay_his(out):
    labels = table(out, all_rows())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(out, labels, **QUICK)
    assert torch.equal(torch.rand(3), expected)


def misled(out):
    """Slides 0-3 validate, two of them under the wrong label: the surer the head, the higher the validation loss."""
    truth = [1, 0, 0, 1] + [i % 2 for i in range(4, 16)]
    rows = [f"s{i:02}.svs,{['neg', 'pos'][y]},{'val' if i < 4 else 'train'}" for i, y in enumerate(truth)]
    return table(out, rows, "slide,label,split"), truth


def test_the_best_epoch_is_kept(out):
    losses = []
    labels, truth = misled(out)
    trained = train(out, labels, epochs=12, patience=12, lr=3e-3, **OPTIONS, on_epoch=lambda *a: losses.append(a[2]))
    assert len(losses) == 12
    assert trained.best_epoch == int(np.argmin(losses))
    assert trained.best_epoch < 11, "the last epoch must not be the best, or this shows nothing"
    model = load_model(trained.folder)
    weight = inverse_frequency(torch.tensor(truth[4:]), 2)
    with torch.no_grad():
        logits = [model.head(BagStore(out).bag(f"s{i:02}.svs").at(0.5)).logits for i in range(4)]
    naive = [float(-row.log_softmax(0)[y] * weight[y]) for row, y in zip(logits, truth, strict=False)]
    assert np.mean(naive) == pytest.approx(min(losses), rel=1e-5)


def test_patience_ends_it(out):
    losses = []
    train(out, misled(out)[0], epochs=50, patience=2, lr=1e-2, **OPTIONS, on_epoch=lambda *a: losses.append(a[2]))
    assert len(losses) == int(np.argmin(losses)) + 3 < 50


# --- who is trained on -----------------------------------------------------------------------------------------------


def test_slides_of_the_test_split_change_nothing(out):
    rows = all_rows(lambda i: f",{'test' if i > 11 else 'train'}")
    clean = train(out, table(out, rows, "slide,label,split"), name="clean", **QUICK)
    store = BagStore(out)
    for i in range(12, 16):  # poison: other features, other labels
        group = store.group(f"s{i:02}.svs")
        group.drop("features")
        add(store, f"s{i:02}.svs", i, shift=-1000.0)
    poisoned = [
        row.replace("pos", "x").replace("neg", "pos").replace("x", "neg") if "test" in row else row for row in rows
    ]
    dirty = train(out, table(out, poisoned, "slide,label,split"), name="dirty", **QUICK)
    assert model_bytes(clean) == model_bytes(dirty)
    assert clean.metrics["train"] == dirty.metrics["train"]
    assert clean.metrics["val"] == dirty.metrics["val"]
    store.group("s03.svs").drop("features")
    add(store, "s03.svs", 3, shift=-1000.0)
    other = train(out, table(out, poisoned, "slide,label,split"), name="other", **QUICK)
    assert model_bytes(other) != model_bytes(dirty), "the same poison on a training slide is seen"


def test_slides_of_the_validation_change_no_step(out):
    rows = all_rows(lambda i: f",{'val' if i > 11 else 'train'}")
    losses = {"clean": [], "dirty": []}
    for name in losses:
        train(out, table(out, rows, "slide,label,split"), name=name, **QUICK,
              on_epoch=lambda _, loss, __, name=name: losses[name].append(loss))  # fmt: skip
        for i in range(12, 16):
            BagStore(out).group(f"s{i:02}.svs").drop("features")
            add(BagStore(out), f"s{i:02}.svs", i, shift=-5.0)
    assert losses["clean"] == losses["dirty"]


@pytest.mark.parametrize("seed", range(4))
def test_no_patient_is_on_both_sides(out, seed):
    labels = table(out, all_rows(lambda i: f",p{i // 4}"), "slide,label,patient")
    about = load_model(train(out, labels, seed=seed, **QUICK).folder).about["training"]
    owner = {f"s{i:02}.svs": i // 4 for i in range(16)}
    sides = [{owner[slide] for slide in about["slides"][part]} for part in ("train", "val")]
    assert not sides[0] & sides[1]
    assert all(sides)
    assert "patient" in about["split"]


def test_a_table_that_parts_a_patient_is_refused(out):
    rows = all_rows(lambda i: f",p{i // 2},{'test' if i == 15 else 'train'}")
    with pytest.raises(UsageError, match=r"more than one side of the split.*p7"):
        train(out, table(out, rows, "slide,label,patient,split"), **QUICK)


def test_the_splits_of_the_table_are_taken(out):
    names = {
        **dict.fromkeys(range(8), "Train"),
        **dict.fromkeys(range(8, 12), "validation"),
        **dict.fromkeys(range(12, 16), "TEST"),
    }
    about = load_model(
        train(out, table(out, all_rows(lambda i: f",{names[i]}"), "slide,label,split"), **QUICK).folder
    ).about
    assert [len(about["training"]["slides"][part]) for part in ("train", "val", "test")] == [8, 4, 4]
    assert about["training"]["slides"]["test"] == [f"s{i:02}.svs" for i in range(12, 16)]
    assert about["training"]["split"] == "by the table"


def test_without_a_split_a_fifth_validates(out):
    about = load_model(train(out, table(out, all_rows()), **QUICK).folder).about["training"]
    assert 3 <= len(about["slides"]["val"]) <= 4
    assert "test" not in about["slides"]
    labels = [[int(slide[1:3]) % 2 for slide in slides] for slides in about["slides"].values()]
    assert all(set(side) == {0, 1} for side in labels)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_out_quietly(out):
    store = BagStore(out)
    add(store, "unfinished.svs", 50, status="writing")
    store.group("none.svs").begin(slide={"path": "none.svs"})
    store.group("none.svs").finish("empty")
    known = read_labels(table(out, [*all_rows()[2:], "unfinished.svs,pos", "none.svs,neg", "gone.svs,pos"]), Store(out))
    assert known.slides == [f"s{i:02}.svs" for i in range(2, 16)]
    assert known.column("label") == ["pos" if i % 2 else "neg" for i in range(2, 16)]
    assert known.column("patient") is known.splits is None
    unknown, unusable, unlabelled = known.warnings
    assert "1 rows name no slide of this store: gone.svs" in unknown
    assert "none.svs, unfinished.svs" in unusable
    assert "2 slides of the store have no label: s00.svs, s01.svs" in unlabelled
    assert train(out, out / "labels.csv", **QUICK).warnings == known.warnings


def test_an_empty_patient_is_one_of_its_own(out):
    known = read_labels(table(out, all_rows(lambda i: ",p" if i < 2 else ","), "slide,label,patient"), Store(out))
    assert known.column("patient") == ["p", "p", *(f"s{i:02}.svs" for i in range(2, 16))]


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([*all_rows(), "s00.svs,pos"], "slide,label", "two rows for s00.svs that differ"),
        (["s00.svs,", "s01.svs,pos"], "slide,label", "empty label"),
        (["x.svs,1", "y.svs,2"], "slide,label", "not one row"),
        (["s00.svs,pos", "s01.svs,pos"], "slide,label", "one class alone"),
        (["s00.svs,neg", "s01.svs,pos"], "slide,label", "no validation set"),
        (all_rows(lambda i: ",later"), "slide,label,split", "split of s00.svs is 'later'"),
        (all_rows(lambda i: f",{'train' if i % 2 else 'val'}"), "slide,label,split", "one class alone"),
        ([row.split(",")[0] for row in all_rows()], "slide", "no column 'label'"),
    ],
)
def test_tables_that_cannot_be_trained_on(out, rows, header, words):
    with pytest.raises(UsageError, match=words):
        train(out, table(out, rows, header), **QUICK)
    assert not (out / "models").exists()


def test_the_same_row_twice_is_no_contradiction(out):
    assert len(read_labels(table(out, [*all_rows(), all_rows()[0]]), Store(out)).slides) == 16


def test_labels_are_text(out):
    rows = [row.replace("neg", "01").replace("pos", "1") for row in all_rows()]
    assert load_model(train(out, table(out, rows), **QUICK).folder).classes == ["01", "1"]


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1.0, 0.5])
def test_the_level_that_is_asked_for(out, level):
    labels = table(out, all_rows())
    seen = Bags(Store(out).features(["s00.svs"], "mine"), [["s00.svs"]], level)[0]
    assert len(seen.levels) == 1
    assert seen.levels[0].mpp == level
    model = load_model(train(out, labels, level=level, **QUICK).folder)
    assert model.level == level
    assert model.choose(BagStore(out).bag("s00.svs")).levels[0].mpp == level


def test_a_level_without_features_is_refused(tmp_path):
    for i in range(8):
        add(BagStore(tmp_path), f"s{i:02}.svs", i, encode_levels="finest")
    write_run(tmp_path)
    labels = table(tmp_path, all_rows()[:8])
    with pytest.raises(UsageError, match=r"there are 0\.5"):
        train(tmp_path, labels, level=1.0, **QUICK)
    assert load_model(train(tmp_path, labels, **QUICK).folder).level == 0.5


def test_one_of_several_encoders(out):
    for i in range(16):
        add(BagStore(out), f"s{i:02}.svs", i, key="other", feature_hash="fh2")
    write_run(out, ("mine", "other"))
    labels = table(out, all_rows())
    with pytest.raises(UsageError, match="say which: mine, other"):
        train(out, labels, **QUICK)
    assert load_model(train(out, labels, encoder="other", **QUICK).folder).about["feature_hash"] == "fh2"


def test_slides_of_different_features_are_refused(out):
    BagStore(out).group("s03.svs").drop("features")
    add(BagStore(out), "s03.svs", 3, feature_hash="another")
    with pytest.raises(UsageError, match="not all slides have the same features"):
        train(out, table(out, all_rows()), **QUICK)


@pytest.mark.parametrize("name", ["../m", "a/b", "", "..", ".", ".hidden", "a b", "m\n"])
def test_names_that_are_no_folder(out, name):
    if name == "":
        assert train(out, table(out, all_rows()), name=name, **QUICK).folder.name == "abmil"
        return
    with pytest.raises(UsageError, match="name becomes a folder"):
        train(out, table(out, all_rows()), name=name, **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "abmill"}, "did you mean 'abmil'"),
        ({"hiden": 4}, "did you mean 'hidden'"),
        ({"attention": 0}, "at least 1"),
        ({"head": "nothing:here"}, "cannot load"),
    ],
)
def test_heads_that_cannot_be_made(out, options, words):
    with pytest.raises(UsageError, match=words):
        train(out, table(out, all_rows()), epochs=1, **options)


def test_a_head_of_ones_own(out, monkeypatch):
    own = types.ModuleType("own_head")
    own.build = lambda dim, classes: load_head("mean", dim, classes)
    monkeypatch.setitem(sys.modules, "own_head", own)
    trained = train(out, table(out, all_rows()), head="own_head:build", epochs=2)
    assert trained.folder.name == "own_head--build"
    assert load_model(trained.folder).about["head"] == "own_head:build"


def test_no_output_folder(tmp_path):
    with pytest.raises(UsageError, match="no output folder"):
        train(tmp_path, tmp_path / "labels.csv")


def damaged(out):
    path = BagStore(out).group("s05.svs").path / "features/mine/x/c/0/0"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    return {}, "s05.svs.*damaged"


def invalid_level(out):
    BagStore(out).group("s05.svs").drop("features")
    coarse = tree(5).levels[0]
    add(BagStore(out), "s05.svs", 5, invalid=range(coarse.stop))
    return {"level": 1.0}, "s05.svs"


def exploding(out):
    return {"lr": 1e30}, "a lower lr"


@pytest.mark.parametrize("fault", [damaged, invalid_level, exploding])
def test_what_goes_wrong_on_the_way_is_said_and_leaves_no_model(out, fault):
    options, words = fault(out)
    with pytest.raises(UsageError, match=words):
        train(out, table(out, all_rows()), **QUICK | {"epochs": 30} | options)
    assert not (out / "models").exists()


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_bags_are_kept_only_while_they_fit(out, monkeypatch):
    store = BagStore(out)
    names = [f"s{i:02}.svs" for i in range(6)]
    reads = []
    monkeypatch.setattr(
        BagStore, "bag", lambda self, *a, original=BagStore.bag: reads.append(a[0]) or original(self, *a)
    )
    size = store.bag(names[0], "mine").at(0.5).features.nbytes
    reads.clear()
    monkeypatch.setattr(module, "CACHE_BYTES", int(size * 2.5))
    bags = Bags(Store(out).features(names, "mine"), [[name] for name in names], 0.5)
    for _ in range(3):
        assert [bag.slide for bag in bags[:]] == names
    kept = [name for name in names if reads.count(name) == 1]
    assert 2 <= len(kept) <= 4
    assert all(reads.count(name) == 3 for name in names if name not in kept)
    assert len(bags) == 6


# --- other tasks than classes ----------------------------------------------------------------------------------------

HEAD = {"head": "abmil", "lr": 1e-2, "hidden": 6, "attention": 3}
KINDS = {
    "classification": ("slide,label", lambda i: ("neg", "pos")[i % 2]),
    "multilabel": ("slide,label", lambda i: ("a", "a;b", "", "b")[i % 4]),
    "ordinal": ("slide,label", lambda i: str(i % 3)),
    "regression": ("slide,label", lambda i: str(100 + i)),
    "survival": ("slide,time,event", lambda i: f"{10 + i % 7 * 3.5},{int(i % 3 > 0)}"),
}
OUTPUTS = {"classification": 2, "multilabel": 2, "ordinal": 1, "regression": 1, "survival": 4}


def strictly(path):
    """JSON without NaN, which is none."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def fold_about(folder) -> dict:
    return json.loads((folder / "model.json").read_text())


@pytest.mark.usefixtures("_few_draws")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_from_the_table_to_the_results(kind, labelled):
    header, cell = KINDS[kind]
    table = labelled.table([cell(i) for i in range(24)], header)
    trained = train(labelled.root, table, task=kind, cv=2, epochs=1, **HEAD)
    results = strictly(trained.folder / "results.json")
    metric = main_metric(trained.pooled.task)
    assert results["settings"]["task"] == kind
    assert metric in results["pooled"]
    assert results["pooled"][metric]["low"] <= results["pooled"][metric]["high"]
    assert [fold["tested"] for fold in results["folds"]] == [12, 12]
    assert metric in trained.metrics["train"]
    about = strictly(trained.folder / "model.json")
    assert (about["task"]["kind"], about["outputs"]) == (kind, OUTPUTS[kind])
    assert describe(task_of(about["task"])) == json.loads(json.dumps(about["task"]), object_hook=as_tuples)
    assert (about["temperature"] is None) == (about["threshold"] is None) == (kind != "classification")
    with open(trained.folder / "out_of_fold.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["slide"] for row in rows) == [f"s{i:02}" for i in range(24)]


def as_tuples(found: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


@pytest.mark.usefixtures("_few_draws")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_every_kind_says_the_same_when_it_is_loaded(kind, labelled):
    header, cell = KINDS[kind]
    table = labelled.table([cell(i) for i in range(24)], header)
    folder = train(labelled.root, table, task=kind, cv=2, epochs=1, **HEAD).folder
    bags = read_cohort(labelled.root, table, task=kind).bags(None)
    with open(folder / "out_of_fold.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] == "fold1"]
    model = load_model(folder / "fold1")
    outputs = outputs_of(task_of(model.about["task"]), logits_of(model.head, [bags[int(r["slide"][1:])] for r in rows]))
    said = [[float(v) for name, v in row.items() if name.startswith("p_") or name == "prediction"] for row in rows]
    np.testing.assert_allclose(outputs.reshape(len(rows), -1), said, atol=1e-6)


def test_without_events_in_training_survival_is_refused(labelled):
    rows = [f"{i + 1},{int(i > 15)},{'test' if i > 15 else 'train'}" for i in range(24)]
    table = labelled.table(rows, "slide,time,event,split")
    with pytest.raises(UsageError, match="training: no event was seen"):
        train(labelled.root, table, task="survival", epochs=1, **HEAD)


def test_a_head_that_needs_classes_says_so(labelled):
    table = labelled.table([str(i) for i in range(24)])
    with pytest.raises(UsageError, match=r"clam_sb: the loss on tiles needs one class a slide; .* instance_weight=0"):
        train(labelled.root, table, head="clam_sb", task="regression", epochs=1)
    trained = train(labelled.root, table, head="clam_sb", task="regression", epochs=1, instance_weight=0)
    assert "r2" in trained.metrics["val"]


# --- folds -----------------------------------------------------------------------------------------------------------


def fold_file(place, train, val, test):
    """CLAM's layout; rows of numbers of slides."""
    lines = [",train,val,test"] + [f"s{i:02},{i in train},{i in val},{i in test}" for i in range(24)]
    place.write_text("\n".join(lines) + "\n")
    return place


@pytest.mark.usefixtures("_few_draws")
def test_test_slides_decide_nothing(labelled):
    """Their labels and features altered: the fold's bytes, epoch, threshold and temperature stay."""
    splits = fold_file(labelled.root / "splits_0.csv", range(14), range(14, 18), range(18, 24))
    found = []
    for altered in (False, True):
        if altered:
            labelled.table([("neg", "pos")[(i + (i > 17)) % 2] for i in range(24)])
            for i in range(18, 24):
                labelled.write(i, -5.0, seed=99 - i)
        trained = train(labelled.root, labelled.labels, splits=splits, epochs=3, **HEAD)
        about = fold_about(trained.folder / "splits_0")
        chosen = [about[name] for name in ("threshold", "temperature")] + [about["training"]["best_epoch"]]
        found.append((model_bytes_of(trained.folder / "splits_0"), *chosen))
        auc = trained.results["pooled"]["auc"]["value"]
        assert (auc == 1) != altered
    assert found[0] == found[1]


def model_bytes_of(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("_few_draws")
def test_validation_slides_do_decide(labelled):
    splits = fold_file(labelled.root / "splits_0.csv", range(14), range(14, 18), range(18, 24))
    before = fold_about(train(labelled.root, labelled.labels, splits=splits, epochs=2, **HEAD).folder / "splits_0")
    for i in range(14, 18):
        labelled.write(i, 2.0 * (i % 2 == 0))
    after = fold_about(train(labelled.root, labelled.labels, splits=splits, epochs=2, **HEAD).folder / "splits_0")
    assert before["temperature"] != after["temperature"]


@pytest.mark.usefixtures("_few_draws")
def test_the_tables_test_slides_are_never_trained_on(labelled):
    rows = [f"{('neg', 'pos')[i % 2]},{'test' if i > 17 else 'train'}" for i in range(24)]
    trained = train(labelled.root, labelled.table(rows, "slide,label,split"), cv=2, epochs=1, **HEAD)
    held = {f"s{i:02}" for i in range(18, 24)}
    for folder in (trained.folder / "fold0", trained.folder / "fold1"):
        slides = fold_about(folder)["training"]["slides"]
        assert not held & {slide for part in slides.values() for slide in part}
    whole = fold_about(trained.folder)["training"]["slides"]
    assert set(whole["test"]) == held
    assert sum(fold["tested"] for fold in trained.results["folds"]) == 18


CHANGES = {
    "nothing": lambda labelled: {},
    "a label": lambda labelled: {"labels": labelled.table(["pos"] * 2 + [("neg", "pos")[i % 2] for i in range(2, 24)])},
    "an option of the head": lambda labelled: {"hidden": 5},
    "the recipe": lambda labelled: {"lr": 3e-3},
    "the seed": lambda labelled: {"seed": 1},
    "a feature": lambda labelled: labelled.write(7, 2.5) or {},
}


@pytest.mark.usefixtures("_few_draws")
@pytest.mark.parametrize("change", CHANGES)
def test_folds_are_trained_again_when_something_has_changed(change, labelled):
    def go(**settings):
        settings = {"labels": labelled.labels, "cv": 2, "epochs": 1} | HEAD | settings
        trained = train(labelled.root, settings.pop("labels"), **settings)
        times = [(trained.folder / f"fold{i}/model.json").stat().st_mtime_ns for i in range(2)]
        return times, trained.results["pooled"]

    before, results = go()
    after, again = go(**CHANGES[change](labelled))
    assert [a == b for a, b in zip(before, after, strict=True)] == [change == "nothing"] * 2
    assert (results == again) == (change == "nothing")


@pytest.mark.usefixtures("_few_draws")
def test_stored_features_that_changed_train_folds_again(out):
    labels, settings = table(out, all_rows()), {"cv": 2, "epochs": 1} | OPTIONS
    times = []
    for change in (False, False, True):
        if change:
            BagStore(out).group("s03.svs").drop("features")
            add(BagStore(out), "s03.svs", 3, shift=9.0)
        folder = train(out, labels, **settings).folder
        times.append([(folder / f"fold{i}/model.json").stat().st_mtime_ns for i in range(2)])
    assert times[0] == times[1]
    assert not set(times[1]) & set(times[2])


@pytest.mark.usefixtures("_few_draws")
def test_a_seed_trains_anew_on_the_same_fold_file(labelled):
    splits = fold_file(labelled.root / "splits_0.csv", range(14), range(14, 18), range(18, 24))
    models = [
        model_bytes_of(
            train(labelled.root, labelled.labels, splits=splits, epochs=1, seed=seed, **HEAD).folder / "splits_0"
        )
        for seed in (0, 1, 0)
    ]
    assert models[0] == models[2] != models[1]


@pytest.mark.usefixtures("_few_draws")
def test_a_damaged_fold_is_trained_again(labelled):
    folder = train(labelled.root, labelled.labels, cv=2, epochs=1, **HEAD).folder / "fold1"
    whole = model_bytes_of(folder)
    (folder / "model.safetensors").write_bytes(whole[:100])
    train(labelled.root, labelled.labels, cv=2, epochs=1, **HEAD)
    assert model_bytes_of(folder) == whole


@pytest.mark.usefixtures("_few_draws")
def test_every_seed_draws_and_trains_anew(labelled):
    trained = train(labelled.root, labelled.labels, cv=2, seeds=2, epochs=1, **HEAD)
    folds = trained.results["folds"]
    assert [(fold["fold"], fold["seed"]) for fold in folds] == [("fold0", 0), ("fold1", 0), ("fold0", 1), ("fold1", 1)]
    assert [fold["model"] for fold in folds] == ["fold0", "fold1", "fold0-seed1", "fold1-seed1"]
    tests = [fold_about(trained.folder / name)["training"]["slides"]["test"] for name in ("fold0", "fold0-seed1")]
    assert tests[0] != tests[1]
    alone = train(labelled.root, labelled.labels, cv=2, seed=1, epochs=1, name="alone", **HEAD)
    assert model_bytes_of(alone.folder / "fold1") == model_bytes_of(trained.folder / "fold1-seed1")


@pytest.mark.usefixtures("_few_draws")
def test_more_seeds_leave_the_first_ones_as_they_are(labelled):
    folder = train(labelled.root, labelled.labels, cv=2, epochs=1, **HEAD).folder
    before = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in ("fold0", "fold1")}
    train(labelled.root, labelled.labels, cv=2, seeds=2, epochs=1, **HEAD)
    assert {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in before} == before
    assert (folder / "fold1-seed1" / "model.safetensors").exists()


@pytest.mark.usefixtures("_few_draws")
def test_results_of_an_earlier_call_do_not_stay(labelled):
    folder = train(labelled.root, labelled.labels, cv=2, epochs=1, **HEAD).folder
    assert {"results.json", "out_of_fold.csv", "curves.png"} <= {path.name for path in folder.iterdir()}
    trained = train(labelled.root, labelled.labels, epochs=1, **HEAD)
    assert trained.results is trained.pooled is None
    assert not {"results.json", "out_of_fold.csv"} & {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("_few_draws")
def test_patients_are_trained_on_as_one_bag(labelled):
    rows = [f"{('neg', 'pos')[i // 2 % 2]},p{i // 2:02}" for i in range(24)]
    trained = train(labelled.root, labelled.table(rows, "slide,label,patient"), unit="patient", cv=2, epochs=1, **HEAD)
    assert [fold["tested"] for fold in trained.results["folds"]] == [6, 6]
    assert trained.metrics["train"]["patients"] + trained.metrics["val"]["patients"] == 12
    about = fold_about(trained.folder)
    assert about["unit"] == "patient"
    assert sum(len(part) for part in about["training"]["slides"].values()) == 24
    # fold files may name their slides
    splits = fold_file(labelled.root / "splits_0.csv", range(12), range(12, 16), range(16, 24))
    trained = train(labelled.root, labelled.labels, unit="patient", splits=splits, epochs=1, **HEAD)
    assert [fold["tested"] for fold in trained.results["folds"]] == [4]


@pytest.mark.usefixtures("_few_draws")
def test_what_fold_files_leave_out_is_said(labelled):
    splits = fold_file(labelled.root / "splits_0.csv", range(12), range(12, 16), range(16, 22))
    splits.write_text(splits.read_text() + "gone,True,False,False\n")
    unknown, unused = train(labelled.root, labelled.labels, splits=splits, epochs=1, **HEAD).warnings
    assert unknown == f"1 cells of {splits} name no slide here: gone."
    assert unused == f"2 labelled slides are in no fold of {splits}: s22, s23."


@pytest.mark.usefixtures("_few_draws")
def test_trained_on_small_slides_and_tested_on_large_ones(labelled):
    trained = train(labelled.root, labelled.labels, split_by="tiles", epochs=1, **HEAD)
    about = fold_about(trained.folder / "tiles")["training"]
    assert re.search(r"trained on slides of 6-\d tiles, tested on \d-9", about["split"])
    sizes = {part: [6 + int(s[1:]) % 4 for s in slides] for part, slides in about["slides"].items()}
    assert max(sizes["train"] + sizes["val"]) <= min(sizes["test"])


@pytest.mark.usefixtures("_few_draws")
def test_sites_are_kept_whole(labelled):
    rows = [f"{('neg', 'pos')[i % 2]},{'abcdef'[i // 4]}" for i in range(24)]
    trained = train(
        labelled.root, labelled.table(rows, "slide,label,Hospital"), site="Hospital", cv=3, epochs=1, **HEAD
    )
    for i in range(3):
        slides = fold_about(trained.folder / f"fold{i}")["training"]["slides"]
        sides = [{int(slide[1:]) // 4 for slide in part} for part in slides.values()]
        assert sum(map(len, sides)) == len(set().union(*sides)) == 6


@pytest.mark.parametrize("keep", ["best", "last", "average5"])
def test_the_weights_that_are_kept(keep, labelled):
    settings = {"epochs": 7, "patience": 7} | HEAD
    trained = train(labelled.root, labelled.labels, keep=keep, **settings)
    about = fold_about(trained.folder)["training"]
    assert about["keep"] == keep
    losses = about["validation_loss"]
    assert trained.best_epoch == (6 if keep == "last" else int(np.argmin(losses)))
    other = train(labelled.root, labelled.labels, keep="best", name="other", **settings)
    same = model_bytes_of(trained.folder) == model_bytes_of(other.folder)
    assert same == (keep == "best" or (keep == "last" and np.argmin(losses) == 6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cv": 3, "splits": "x"}, "--cv and --splits: only one of them"),
        ({"cv": 3, "split_by": "tiles"}, "--cv and --split-by: only one of them"),
        ({"split_by": "size"}, "--split-by must be tiles, not 'size'"),
        ({"cv": 1}, "two folds at least"),
        ({"cv": 20, "site": "h"}, "only 3 patients .or sites."),
        ({"seeds": 2}, "--seeds: say with --cv, --splits or --split-by"),
        ({"seeds": 0, "cv": 2}, "--seeds must be at least 1"),
        ({"splits": "nowhere"}, "nowhere: no splits_0.csv"),
        ({"keep": "first"}, "keep must be one of best, last, average5"),
        ({"recipe": "mine"}, "abmil has no recipe 'mine'"),
        ({"task": "survival"}, "no column 'time'"),
    ],
)
def test_trainings_that_cannot_be(labelled, options, words):
    table = labelled.table([f"{('neg', 'pos')[i % 2]},{i % 3}" for i in range(24)], "slide,label,h")
    with pytest.raises(UsageError, match=words):
        train(labelled.root, table, epochs=1, **HEAD | options)
    assert not (labelled.root / "models").exists()
