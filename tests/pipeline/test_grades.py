"""Grades by a hierarchical ViT, as ISUP's: one number, rounded, judged by quadratic kappa; from slides to the table."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from pipeline.batch import predict
from pipeline.demo import write_slide
from pipeline.prediction import load_model
from pipeline.training import train

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("_few_draws")]

SLIDES, GRADES = 20, 4
SETTINGS = {"preset": "hvit", "encoder": "lab_lbp", "mpp": 0.5, "tile_px": 32, "levels": 2, "remove_pen": False}


@pytest.fixture(scope="module")
def graded(extract, tmp_path_factory):
    """Slides of 256 px with more green the higher their grade."""
    folder = tmp_path_factory.mktemp("graded")
    rows = []
    for i in range(SLIDES):
        grade, random = i % GRADES, np.random.default_rng(i)
        pixels = random.normal((190, 120, 170), 8, (256, 256, 3))
        pixels[:, : 60 * grade] = random.normal((90, 200, 60), 8, (256, 60 * grade, 3))
        write_slide(folder / "slides" / f"s{i:02}.svs", np.clip(pixels, 0, 255).astype(np.uint8), 0.5, downsamples=())
        rows.append([f"s{i:02}", grade, "test" if i >= 16 else "train"])
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["slide", "isup", "split"], *rows])
    extract(folder / "slides", folder / "out", **SETTINGS)
    return folder


def test_from_slides_to_grades(graded):
    out, labels = graded / "out", graded / "labels.csv"
    how = {"task": "ordinal", "target": "isup", "epochs": 15, "patience": 15, "lr": 1e-3}
    trained = train(out, labels, head="hvit", name="isup", side=2, dropout=0.0, **how)
    assert set(trained.metrics["test"]) >= {"kappa", "accuracy", "mean_absolute_error"}
    assert trained.metrics["test"]["kappa"] > 0.7
    model = load_model(trained.folder)
    assert model.head.classes == 1
    assert model.about["task"] == {"kind": "ordinal", "grades": GRADES}
    assert predict(out, "isup").exit_code == 0
    with open(out / "predictions/isup.csv", newline="") as file:
        said = {row["slide"]: row["prediction"] for row in csv.DictReader(file)}
    assert set(said.values()) <= {"0", "1", "2", "3"}, "rounded, and never beyond the grades"
    tested = range(16, SLIDES)
    guess, truth = [int(said[f"s{i:02}.svs"]) for i in tested], [i % GRADES for i in tested]
    kappa = cohen_kappa_score(truth, guess, weights="quadratic")
    assert trained.metrics["test"]["kappa"] == pytest.approx(kappa)
    assert json.loads((trained.folder / "model.json").read_bytes())["classes"] == ["0", "1", "2", "3"]
