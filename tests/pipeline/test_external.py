"""A trained model on labelled slides of others: the threshold is frozen, classes are those of the model."""

import json
import shutil

import numpy as np
import pytest

from heads import Bag
from heads.metrics import measure
from heads.tasks import Classification
from pipeline.batch import predict
from pipeline.errors import UsageError
from pipeline.external import evaluate_labels
from pipeline.prediction import choose_models, load_model, predict_slide
from pipeline.training import train

DIM = 4
QUICK = {"epochs": 3, "lr": 1e-2, "hidden": 6, "attention": 3}


def cohort(folder, count=16, seed=0, shift=1.5):
    """Files of features: every other slide is positive."""
    folder.mkdir(exist_ok=True)
    rows = ["slide,label"]
    for i in range(count):
        x = np.random.default_rng([seed, i]).normal(size=(12, DIM)).astype(np.float32)
        x[:, 0] += shift * (i % 2)
        np.save(folder / f"s{i:02}.npy", x)
        rows.append(f"s{i:02},{'pos' if i % 2 else 'neg'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def there(tmp_path):
    return cohort(tmp_path / "there")


@pytest.fixture
def others(tmp_path):
    return cohort(tmp_path / "others", seed=7)


def test_metrics_with_the_threshold_of_the_training(there, others):
    trained = train(there, there / "labels.csv", **QUICK)
    found = evaluate_labels(others, others / "labels.csv", trained.folder)
    model = load_model(trained.folder)
    files = sorted(others.glob("*.npy"))
    p = np.stack([predict_slide(model, Bag.flat(np.load(f))).logits.double().softmax(-1).numpy() for f in files])
    wanted = measure(Classification(2), p, np.arange(16) % 2, model.threshold)
    got = {name: value["value"] for name, value in found["pooled"].items()}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted)
    assert found["warnings"] == ["16 of these slides have names that abmil was trained on: s00"]
    written = json.loads((others / "predictions/abmil.metrics.json").read_text())
    assert written["pooled"]["auc"]["value"] == pytest.approx(wanted["auc"])
    lines = (others / "predictions/abmil.labelled.csv").read_text().splitlines()
    assert len(lines) == 17


def test_a_table_with_one_class_only_keeps_the_models_order(there, others):
    trained = train(there, there / "labels.csv", **QUICK)
    (others / "some.csv").write_text("slide,label\n" + "".join(f"s{i:02},pos\n" for i in (1, 3, 5)))
    found = evaluate_labels(others, others / "some.csv", trained.folder)
    assert set(found["pooled"]) == {"accuracy", "ece", "ece_with_temperature"}


def test_a_class_that_the_model_does_not_know_is_refused(there, others):
    trained = train(there, there / "labels.csv", **QUICK)
    (others / "some.csv").write_text("slide,label\ns01,poss\n")
    with pytest.raises(UsageError, match=r"unknown class 'poss'\. Did you mean 'pos'"):
        evaluate_labels(others, others / "some.csv", trained.folder)


def test_other_features_are_refused(there, tmp_path):
    trained = train(there, there / "labels.csv", **QUICK)
    wide = tmp_path / "wide"
    wide.mkdir()
    np.save(wide / "a.npy", np.zeros((3, DIM + 1), np.float32))
    (wide / "labels.csv").write_text("slide,label\na,pos\n")
    with pytest.raises(UsageError, match="trained on other features"):
        evaluate_labels(wide, wide / "labels.csv", trained.folder)


def test_the_mean_of_folds_and_of_models(there):
    train(there, there / "labels.csv", **QUICK, cv=2, name="one")
    train(there, there / "labels.csv", head="mean", epochs=2, name="two")
    report = predict(there, "one", folds=True)
    assert (report.counts, report.exit_code) == ({"done": 16}, 0)
    inner = [load_model(folder) for folder in sorted((there / "models/one").glob("fold*"))]
    assert len(inner) == 2
    # folds of an earlier call, with more of them, are not of this model
    shutil.copytree(there / "models/one/fold0", there / "models/one/fold2")
    assert choose_models("one", there, folds=True).about["training"]["slides"]["train"] == [
        slide for one in inner for part in ("train", "val") for slide in one.trained_on(part)
    ]
    bag = Bag.flat(np.load(there / "s03.npy"))
    wanted = np.mean([predict_slide(one, bag).logits.double().softmax(-1).numpy() for one in inner], axis=0)
    row = (there / "predictions/one-folds.csv").read_text().splitlines()[4].split(",")
    assert row[0] == "s03"
    assert [float(p) for p in row[2:]] == pytest.approx(wanted, abs=1e-5)
    both = choose_models(["one", "two"], there)
    assert both.name == "one+two"
    assert both.threshold == pytest.approx(
        np.mean([load_model(there / "models" / n).threshold for n in ("one", "two")])
    )
    assert evaluate_labels(there, there / "labels.csv", ["one", "two"])["warnings"][0].startswith("16 of these slides")


def test_models_vote(there):
    train(there, there / "labels.csv", **QUICK, cv=3, name="one")
    assert predict(there, "one", folds=True, vote=True).exit_code == 0
    inner = [load_model(folder) for folder in sorted((there / "models/one").glob("fold*"))]
    rows = (there / "predictions/one-folds-vote.csv").read_text().splitlines()[1:]
    for row in rows:
        slide, said, *shares = row.split(",")
        votes = [predict_slide(one, Bag.flat(np.load(there / f"{slide}.npy"))).logits.argmax() for one in inner]
        assert said == inner[0].classes[int(np.median(votes))]
        assert float(shares[1]) == pytest.approx(np.mean(votes), abs=2e-3)
    with pytest.raises(UsageError, match=r"--vote: one is one model; several --model, or --folds, can vote"):
        predict(there, "one", vote=True)


def test_models_that_differ_are_not_averaged(there):
    train(there, there / "labels.csv", **QUICK, name="one")
    (there / "other.csv").write_text((there / "labels.csv").read_text().replace("pos", "sick"))
    train(there, there / "other.csv", **QUICK, name="two")
    with pytest.raises(UsageError, match="one and two cannot be averaged: their classes differ"):
        predict(there, ["one", "two"])
    with pytest.raises(UsageError, match="holds no models of folds"):
        predict(there, "one", folds=True)


def test_a_damaged_file_is_a_row_and_the_rest_is_predicted(there):
    train(there, there / "labels.csv", **QUICK)
    (there / "s05.npy").write_bytes(b"nothing")
    report = predict(there, "abmil")
    assert report.counts == {"done": 15, "failed": 1}
    assert report.exit_code == 3
    assert report.failures[0].slide == "s05"
    assert len((there / "predictions/abmil.csv").read_text().splitlines()) == 16
