"""What features say by themselves: clusters for neighbours, a line for what a line parts, and vectors of models."""

import json

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.probing import lines, probe
from pipeline.training import train

pytestmark = pytest.mark.usefixtures("_few_draws")


def clusters(labelled, centres):
    """Slides of class i % 3 around their centre."""
    for i in range(24):
        noise = np.random.default_rng(i).normal(size=(5, 4)) * 0.05
        np.save(labelled.root / f"s{i:02}.npy", (noise + centres[i % len(centres)]).astype(np.float32))
    return labelled.table(["abcdef"[i % len(centres)] for i in range(24)])


def test_a_line_parts_what_a_line_can_part(labelled):
    table = clusters(labelled, [[1, 0, 0, 0], [1.4, 0, 0, 0]])
    found = probe(labelled.root, table, knn=False, cv=3)
    assert "knn" not in found
    assert found["linear"]["pooled"]["auc"]["value"] == 1
    assert found["linear"]["pooled"]["accuracy"] == {"value": 1, "low": 1, "high": 1}
    assert found["names"] == ["a", "b"]


def test_neighbours_find_clusters_that_no_line_parts(labelled):
    """Two classes at opposite corners each."""
    table = clusters(labelled, [[1, 0, 1, 0], [0, 1, 1, 0], [-1, 0, 1, 0], [0, -1, 1, 0]])
    labelled.table(["ab"[i % 2] for i in range(24)])
    found = probe(labelled.root, table, cv=3)
    assert found["knn"]["pooled"]["auc"]["value"] == 1
    assert found["linear"]["pooled"]["auc"]["value"] < 0.9


def test_the_largest_in_place_of_the_mean(labelled):
    """One tile of each positive slide stands out; its mean does not move."""
    for i in range(24):
        tiles = np.zeros((10, 4), np.float32)
        tiles[:2, 0] = [3, -3] if i % 2 else [0.1, -0.1]
        tiles[:, 1] = np.random.default_rng(i).normal(size=10)
        np.save(labelled.root / f"s{i:02}.npy", tiles)
    auc = {
        pooling: probe(labelled.root, labelled.labels, pooling=pooling, knn=False, cv=3)["linear"]["pooled"]["auc"]
        for pooling in ("mean", "max")
    }
    assert auc["max"]["value"] == 1 > auc["mean"]["value"]


def test_the_file_and_the_table(labelled):
    found = probe(labelled.root, labelled.labels, cv=2, seeds=2)
    held = json.loads((labelled.root / "models/probe.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert held["settings"] == {
        "pooling": "mean", "model": None, "target": "label", "unit": "slide", "cv": 2, "splits": None,
        "split_by": None, "seeds": 2, "seed": 0,
    }  # fmt: skip
    assert [len(held[kind]["folds"]) for kind in ("knn", "linear")] == [4, 4]
    assert held["knn"]["folds"][0]["threshold"] is None, "nothing is chosen"
    words = lines(found)
    assert [word for word in words if word in ("knn", "linear")] == ["knn", "linear"]
    assert sum(word.startswith("auc ") for word in words) == 2
    assert found["warnings"] == []


def test_a_model_makes_the_vectors(labelled):
    """A mean-pooling head's are the means themselves."""
    trained = train(labelled.root, labelled.labels, head="mean", epochs=1)
    by_model = probe(labelled.root, labelled.labels, model="mean", cv=2)
    plain = probe(labelled.root, labelled.labels, cv=2)
    assert by_model["knn"]["pooled"] == plain["knn"]["pooled"]
    assert by_model["settings"]["model"] == "mean"
    assert by_model["settings"]["pooling"] is None
    assert probe(labelled.root, labelled.labels, model=str(trained.folder), cv=2)["knn"] == by_model["knn"]


def test_neighbours_are_near_in_direction(labelled):
    """Longer and shorter vectors are the same neighbours."""
    before = probe(labelled.root, labelled.labels, linear=False, cv=3)
    for i in range(24):
        path = labelled.root / f"s{i:02}.npy"
        np.save(path, np.load(path) * np.float32(2.0 ** (i % 7 - 3)))
    after = probe(labelled.root, labelled.labels, linear=False, cv=3)
    assert after["knn"] == before["knn"]
    assert before["knn"]["pooled"]["auc"]["value"] > 0.8


def test_a_class_that_no_training_slide_has_is_not_said(labelled):
    """`a` is in the test only; the other two are found all the same."""
    labels = clusters(labelled, [[0, 1, 0, 0], [1, 0, 0, 0]])
    labels = labelled.table(["a" if i > 21 else "bc"[i % 2] for i in range(24)])
    parts = [",train,val,test", *(f"s{i:02},{i < 16},False,{i >= 16}" for i in range(24))]
    (labelled.root / "splits_0.csv").write_text("\n".join(parts) + "\n")
    found = probe(labelled.root, labels, splits=labelled.root / "splits_0.csv")
    for kind in ("knn", "linear"):
        assert found[kind]["pooled"]["accuracy"]["value"] == 6 / 8
        assert np.isfinite(found[kind]["pooled"]["auc"]["value"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pooling": "median"}, "--pooling must be one of mean, max, not 'median'"),
        ({"knn": False, "linear": False}, "neither --knn nor --linear"),
        ({"model": "abmil"}, "no model at"),
        ({"model": "mean", "level": 1.0}, "--level: a model reads the level"),
        ({"level": 1.0}, "--level 1: these features do not say"),
        ({"cv": 3, "split_by": "tiles"}, "only one of them"),
    ],
)
def test_probes_that_cannot_be(labelled, options, words):
    with pytest.raises(UsageError, match=words):
        probe(labelled.root, labelled.labels, **options)
    assert not (labelled.root / "models/probe.json").exists()


def test_a_fold_that_trains_on_one_class_is_refused(labelled):
    parts = [",train,val,test", *(f"s{i:02},{i % 2 == 0},{i == 9},{i in (1, 3)}" for i in range(24))]
    (labelled.root / "splits_0.csv").write_text("\n".join(parts) + "\n")
    labels = labelled.table([("neg", "pos")[i in (3, 5, 7)] for i in range(24)])
    with pytest.raises(UsageError, match="splits_0: all training slides have the same label"):
        probe(labelled.root, labels, splits=labelled.root / "splits_0.csv")


def test_a_damaged_slide_is_named(labelled):
    (labelled.root / "s05.npy").write_bytes(b"")
    with pytest.raises(UsageError, match="s05: train: "):
        probe(labelled.root, labelled.labels)


def test_a_model_of_other_features_is_refused(labelled, tmp_path):
    train(labelled.root, labelled.labels, head="mean", epochs=1)
    for i in range(24):
        np.save(labelled.root / f"s{i:02}.npy", np.ones((3, 5), np.float32))
    with pytest.raises(UsageError, match="--model mean: Mean was made for 4 features per tile, this bag has 5"):
        probe(labelled.root, labelled.labels, model="mean")
