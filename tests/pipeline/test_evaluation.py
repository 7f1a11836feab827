"""From logits of folds to figures: pooled and by fold, thresholds of their own folds, and what stands in the files."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from heads.metrics import best_temperature, best_threshold, measure
from heads.tasks import Classification, MultiLabel, Ordinal, Regression, Survival
from pipeline.evaluation import (
    Answers,
    Pooled,
    better,
    by_fold,
    chosen_on,
    mean_and_sd,
    outputs_of,
    summary,
    summary_lines,
    write_answers,
    write_json,
)

pytestmark = pytest.mark.usefixtures("_few_draws")
TRUTH = np.arange(20) % 2
NAMES = [f"s{i:02}" for i in range(20)]


def logits_of(p):
    """(n, 2) that softmax to `p` of the second class."""
    return np.log(np.stack([1 - np.asarray(p, float), p], axis=1))


def answers(rows, p, fold="fold0", seed=0, **chosen):
    return Answers(fold, seed, Classification(2), np.asarray(rows), logits_of(p), **chosen)


def some(seed):
    return np.random.default_rng(seed).uniform(0.05, 0.95, 10)


def test_what_is_chosen_on_validation():
    logits, truth = logits_of([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1])
    assert chosen_on(Classification(2), logits, truth) == (
        pytest.approx(best_threshold(np.array([0.1, 0.2, 0.3, 0.4]), truth)),
        pytest.approx(best_temperature(logits, truth)),
    )
    three = chosen_on(Classification(3), np.eye(3), np.arange(3))
    assert three[0] is None
    assert three[1] > 0
    assert chosen_on(Classification(2), logits[:0], truth[:0]) == (None, None)
    assert chosen_on(Regression(), logits[:, :1], truth) == (None, None)


def test_folds_are_pooled_into_one_table():
    p = np.concatenate([some(0), some(1)])
    pooled = Pooled([answers(range(10, 20), p[10:], "fold1"), answers(range(10), p[:10])], TRUTH, NAMES)
    assert pooled.rows.tolist() == list(range(20))
    outputs = np.stack([1 - p, p], axis=1)
    assert pooled.found["auc"] == pytest.approx(measure(Classification(2), outputs, TRUTH)["auc"])
    assert pooled.intervals()["auc"].low <= pooled.found["auc"] <= pooled.intervals()["auc"].high


def test_each_slide_is_judged_by_the_threshold_of_its_own_fold():
    p = np.where(TRUTH == 1, 0.4, 0.1)
    p[10:] = np.where(TRUTH[10:] == 1, 0.9, 0.7)
    folds = [answers(range(10), p[:10], threshold=0.3), answers(range(10, 20), p[10:], "fold1", threshold=0.8)]
    assert Pooled(folds, TRUTH, NAMES).found["accuracy"] == 1
    assert [one["accuracy"] for one in by_fold(folds, TRUTH)] == [1, 1]


def test_metrics_are_the_mean_over_seeds():
    seeds = [answers(range(10), some(seed), seed=seed) for seed in range(3)]
    each = [Pooled([one], TRUTH, NAMES).found for one in seeds]
    found = Pooled(seeds, TRUTH, NAMES).found
    for name in found:
        assert found[name] == pytest.approx(np.mean([one[name] for one in each]))


def test_a_slide_that_two_fold_files_test_counts_once():
    p, q = some(0), some(1)
    pooled = Pooled([answers(range(10), p), answers(range(10), q, "fold1")], TRUTH, NAMES)
    mean = np.stack([1 - (p + q) / 2, (p + q) / 2], axis=1)
    assert pooled.found["auc"] == pytest.approx(measure(Classification(2), mean, TRUTH[:10])["auc"])


def test_the_temperature_changes_the_calibration_alone():
    hot = logits_of(np.where(TRUTH[:10] == 1, 0.99, 0.4))
    hot[:4] = hot[:4, ::-1]
    pooled = Pooled([Answers("fold0", 0, Classification(2), np.arange(10), hot, 0.5, 4.0)], TRUTH, NAMES)
    plain = Pooled([Answers("fold0", 0, Classification(2), np.arange(10), hot, 0.5, None)], TRUTH, NAMES)
    assert pooled.found["ece_with_temperature"] != pytest.approx(pooled.found["ece"])
    assert plain.found["ece_with_temperature"] == plain.found["ece"]
    assert {k: v for k, v in pooled.found.items() if "temp" not in k} == {
        k: v for k, v in plain.found.items() if "temp" not in k
    }


def test_intervals_are_by_patient():
    """All slides of one patient: every draw is the same."""
    pooled = Pooled([answers(range(10), some(0))], TRUTH, ["p"] * 20)
    assert pooled.intervals()["auc"].low == pooled.intervals()["auc"].high == pytest.approx(pooled.found["auc"])


def test_a_head_against_itself_and_against_another_cohort():
    one = Pooled([answers(range(10), some(0))], TRUTH, NAMES)
    assert better(one, one, "auc") == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="not tested on the same slides"):
        better(one, Pooled([answers(range(1, 11), some(0))], TRUTH, NAMES), "auc")


def test_mean_and_deviation_over_the_folds_that_have_a_metric():
    found = mean_and_sd([{"auc": 0.8, "kappa": 0.1}, {"auc": 0.6}, {}])
    assert found["auc"] == {"mean": pytest.approx(0.7), "sd": pytest.approx(0.1 * np.sqrt(2)), "folds": 2}
    assert found["kappa"] == {"mean": 0.1, "sd": 0.0, "folds": 1}


# --- what is written -------------------------------------------------------------------------------------------------


def strictly(path):
    """JSON without NaN, which is none."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def test_nan_never_stands_in_a_file(tmp_path):
    write_json(tmp_path / "r.json", {"a": [np.nan, 1.0, {"b": -np.inf}], "c": (np.float64("nan"), 2), "d": None})
    assert strictly(tmp_path / "r.json") == {"a": [None, 1.0, {"b": None}], "c": [None, 2], "d": None}
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]


def test_a_summary_of_folds_of_one_class(tmp_path):
    """No AUC in either fold, and one of the pool."""
    folds = [answers(range(0, 20, 2), some(0), threshold=0.5), answers(range(1, 20, 2), some(1), "fold1")]
    found = summary(folds, TRUTH, Pooled(folds, TRUTH, NAMES))
    assert [list(fold["metrics"]) for fold in found["folds"]] == [["accuracy"], ["accuracy"]]
    assert {"auc", "balanced_accuracy", "macro_f1", "kappa", "ece"} <= set(found["pooled"])
    assert set(found["over_folds"]) == {"accuracy"}
    write_json(tmp_path / "results.json", found)
    assert strictly(tmp_path / "results.json")["folds"][1]["threshold"] is None
    head, *lines = summary_lines(found)
    assert head.split()[:3] == ["out", "of", "fold"]
    rows = {line.split()[0]: line for line in lines}
    assert "±" in rows["accuracy"]
    assert "±" not in rows["auc"]
    assert "nan" not in "".join(lines)
    assert f"{found['pooled']['auc']['value']:.3f}" in rows["auc"]


def test_an_interval_that_is_not_known_is_a_dash():
    pooled = {"auc": {"value": 0.5, "low": np.nan, "high": np.nan}}
    assert summary_lines({"pooled": pooled, "over_folds": {}})[1].split() == ["auc", "0.500", "-"]


def written(tmp_path, task, logits, truth, names, **chosen):
    one = Answers("fold0", 3, task, np.array([1, 0]), np.asarray(logits, float), **chosen)
    cohort = SimpleNamespace(unit="patient", units=["a.svs", "b,c"], targets=SimpleNamespace(truth=truth, names=names))
    write_answers(tmp_path / "o.csv", [one], cohort)
    with open(tmp_path / "o.csv", newline="") as file:
        return list(csv.reader(file))


def test_answers_of_classes(tmp_path):
    head, first, second = written(
        tmp_path, Classification(2), logits_of([0.25, 0.75]), np.array([1, 0]), ["x", "y"], threshold=0.4
    )
    assert head == ["patient", "seed", "fold", "truth", "p_x", "p_y", "threshold"]
    assert first == ["b,c", "3", "fold0", "x", "0.750000", "0.250000", "0.4"]
    assert second[:4] == ["a.svs", "3", "fold0", "y"]


@pytest.mark.parametrize(
    ("task", "logits", "truth", "names", "row"),
    [
        (MultiLabel(2), [[0, 0], [0, 0]], [[0, 0], [1, 1]], ["x", "y"], ["x;y", "0.500000", "0.500000"]),
        (Ordinal(3), [[1.2], [0]], [0, 2], ["0", "1", "2"], ["2", "1.000000"]),
        (Regression(1.0, 2.0), [[1.5], [0]], [0.0, 12.5], ["ki67"], ["12.5", "4.000000"]),
        (Survival(2), [[-99, -99], [0, 0]], [[1, 1], [12.0, 0]], ["risk"], ["12;0", "-2.000000"]),
    ],
)
def test_answers_of_other_kinds(tmp_path, task, logits, truth, names, row):
    found = written(tmp_path, task, logits, np.array(truth), names)
    assert found[1] == ["b,c", "3", "fold0", *row, ""]
    assert len(found[0]) == len(found[1])


@pytest.mark.parametrize(
    ("task", "logits", "outputs"),
    [(Regression(10, 2), [[1.0], [-1.0]], [12, 8]), (Ordinal(3), [[7.0], [0.6]], [2, 1])],
)
def test_outputs_are_what_the_task_says(task, logits, outputs):
    assert outputs_of(task, np.array(logits)).tolist() == outputs
