"""Heads side by side: the same folds for all, levels of their own, differences in pairs, nothing trained twice."""

import json

import numpy as np
import pytest

from heads.metrics import holm
from pipeline.comparison import Comparison, compare
from pipeline.errors import UsageError
from pipeline.quadtree import build_quadtree
from pipeline.readers import open_slide
from pipeline.store import BagStore
from pipeline.tissue import TissueMask

pytestmark = pytest.mark.usefixtures("_few_draws")
QUICK = {"cv": 2, "epochs": 1, "lr": 1e-2}


def fold_of(folder):
    return json.loads((folder / "model.json").read_text())


def saved(found: Comparison, head: str, fold: str):
    return found.file.parent / head / fold


def test_all_heads_are_judged_on_the_same_folds(labelled):
    told = []
    found = compare(
        labelled.root, labelled.labels, heads=["mean", "max", "abmil"], on_head=lambda *one: told.append(one), **QUICK
    )
    assert [head for head, _ in told] == ["mean", "max", "abmil"]
    assert found.metric == "auc"
    for fold in ("fold0", "fold1"):
        slides = [fold_of(saved(found, head, fold))["training"]["slides"] for head in ("mean", "max", "abmil")]
        assert slides[0] == slides[1] == slides[2]
    assert [(pair["a"], pair["b"]) for pair in found.pairs] == [("mean", "max"), ("mean", "abmil"), ("max", "abmil")]
    values = {row["head"]: row["pooled"]["auc"]["value"] for row in found.rows}
    for pair in found.pairs:
        assert pair["value"] == pytest.approx(values[pair["a"]] - values[pair["b"]])
    assert [row["parameters"] for row in found.rows[:2]] == [4 * 2 + 2] * 2


def test_a_head_that_sees_more_is_better(labelled):
    """The means differ; the largest of each slide is the same for all."""
    for i in range(24):
        tiles = np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32) + 3 * (i % 2)
        tiles[0] = 20
        np.save(labelled.root / f"s{i:02}.npy", tiles)
    found = compare(
        labelled.root, labelled.labels, heads=["mean", "max", "abmil"], **QUICK | {"epochs": 20, "lr": 0.03}
    )
    pair = found.pairs[0]
    assert pair["value"] == 0.5
    assert pair["low"] > 0
    assert pair["p"] < 0.1 < pair["p_holm"]
    assert [pair["p_holm"] for pair in found.pairs] == holm([pair["p"] for pair in found.pairs])


def test_the_file_holds_what_the_table_shows(labelled):
    found = compare(labelled.root, labelled.labels, heads=["mean", "max"], name="mine", **QUICK)
    assert found.file == labelled.root / "models/mine/comparison.json"
    held = json.loads(found.file.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert [row["head"] for row in held["heads"]] == ["mean", "max"]
    assert (held["metric"], held["settings"]["cv"]) == ("auc", 2)
    assert held["differences"][0]["p_holm"] == found.pairs[0]["p_holm"]
    head, mean, largest, blank, title, difference = found.lines()
    assert head.split() == ["head", "parameters", "auc", "accuracy", "balanced_accuracy", "macro_f1"]
    assert set(held["heads"][0]["pooled"]) > set(head.split()[2:])
    assert len(head) < 120
    assert mean.split()[:2] == ["mean", "10"]
    auc = found.rows[1]["pooled"]["auc"]
    assert f"{auc['value']:.3f} ({auc['low']:.3f}-{auc['high']:.3f})" in largest
    assert len({len(line) for line in (head, mean, largest)}) == 1, "columns stand below each other"
    assert blank == ""
    assert title == "differences of auc, paired bootstrap by patient, p after Holm:"
    assert difference.startswith("mean - max ")
    assert f"p {found.pairs[0]['p_holm']:.3g}" in difference


def test_what_is_not_known_is_no_nan_in_the_table():
    value = {"value": 0.5, "low": np.nan, "high": np.nan}
    rows = [{"head": head, "parameters": 1, "pooled": {"auc": value}} for head in ("a", "b")]
    pair = {"a": "a", "b": "b", "value": 0.0, "low": np.nan, "high": np.nan, "p": np.nan, "p_holm": 1.0}
    lines = Comparison(None, "auc", rows, [pair], ()).lines()
    assert "nan" not in "\n".join(lines)
    assert lines[-1].endswith("+0.000 not tested")


def test_what_is_trained_is_not_trained_again(labelled):
    def times(*heads, **settings):
        found = compare(labelled.root, labelled.labels, heads=heads, **QUICK | settings)
        return {
            (head, fold): (saved(found, head, fold) / "model.json").stat().st_mtime_ns
            for head in heads
            for fold in ("fold0", "fold1")
        }

    first = times("mean", "max")
    second = times("mean", "abmil", "max")
    assert first.items() <= second.items(), "a head more trains that one alone"
    assert not first.items() & times("mean", "max", seed=1).items()


def test_five_folds_unless_told_otherwise(labelled):
    found = compare(labelled.root, labelled.labels, heads=["mean", "max"], epochs=1)
    assert len(list((found.file.parent / "mean").glob("fold*"))) == 5


def add(store: BagStore, slide: str, seed: int) -> None:
    """Two levels; the finer one is noise, in the coarser one the slides of odd numbers stand apart."""
    image = open_slide(np.zeros((64, 64, 3), np.uint8), mpp=0.5)
    mask = TissueMask(np.ones((8, 8), bool), (8, 8), 4.0, "t")
    tree = build_quadtree(image, mask, mpp=0.5, tile_px=8, levels=2)
    group = store.group(slide)
    group.begin(slide={"path": slide})
    group.write_tissue(mask, np.zeros((8, 8, 3), np.uint8), "h")
    group.write_tiles(tree)
    rows = len(tree.encoded_rows)
    x = np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)
    x[: tree.levels[0].stop] += 4 * (seed % 2)
    features = group.features("mine")
    facts = {"dim": 4, "name": "mine"}
    features.begin(rows, 4, "float32", feature_hash="fh", encoder=facts, weights_sha256="none")
    features.write_chunk(0, x, np.ones(rows, bool))
    features.finish()
    group.finish("complete")


def test_each_head_reads_the_level_that_it_is_given(tmp_path):
    for i in range(12):
        add(BagStore(tmp_path), f"s{i:02}.svs", i)
    encoders = {"mine": {"name": "mine", "weights_file": None, "force_scale": False}}
    run = {"root": "/slides", "recipe": {"mpp": 0.5}, "encoders": encoders, "versions": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "labels.csv").write_text("slide,label\n" + "".join(f"s{i:02}.svs,{i % 2}\n" for i in range(12)))
    found = compare(tmp_path, tmp_path / "labels.csv", heads=["mean@1.0", "mean"], **QUICK | {"epochs": 20})
    assert [row["level"] for row in found.rows] == [1.0, 0.5]
    assert fold_of(saved(found, "mean@1.0", "fold0"))["level"] == 1.0
    assert fold_of(saved(found, "mean", "fold0"))["level"] == 0.5
    coarse, fine = (row["pooled"]["auc"]["value"] for row in found.rows)
    assert coarse == 1 > fine


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": ["mean"]}, "--heads mean: two different heads at least"),
        ({"heads": ["mean", "mean"]}, "two different heads at least"),
        ({"heads": ["mean@fine", "max"]}, "--heads mean@fine: 'fine' is no number of µm/px"),
        ({"heads": ["mean@0.5", "max"]}, "--level 0.5: these features do not say"),
        ({"heads": ["mean", "maxx"]}, "did you mean 'max'"),
        ({"heads": ["mean", "max"], "name": "../mine"}, "name becomes a folder"),
        ({"heads": ["mean", "max"], "cv": 30}, "only 24 patients"),
    ],
)
def test_comparisons_that_cannot_be(labelled, options, words):
    with pytest.raises(UsageError, match=words):
        compare(labelled.root, labelled.labels, **{"cv": 2, "epochs": 1} | options)
    assert not (labelled.root / "models").exists(), "nothing is trained before all are known"
    assert not (labelled.root / "mine.json").exists()
