"""Each metric against a count by hand or a formula of its own; intervals and tests against what is known of chance."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heads.metrics import (
    best_temperature,
    best_threshold,
    bootstrap,
    calibration_error,
    difference,
    holm,
    intervals,
    main_metric,
    measure,
    said,
)
from heads.tasks import Classification, MultiLabel, Ordinal, Regression, Survival

RANDOM = np.random.default_rng(0)


def two(p) -> np.ndarray:
    """(n,) of the second class → (n, 2)."""
    return np.stack([1 - np.asarray(p, float), p], axis=1)


def auc_by_pairs(scores, truth) -> float:
    """How often a positive stands above a negative; half where they are level."""
    above = [(a > b) + (a == b) / 2 for a in scores[truth == 1] for b in scores[truth == 0]]
    return float(np.mean(above))


def kappa_by_table(truth, guess, classes, weight) -> float:
    """1 - seen / expected disagreement."""
    seen, expected = 0.0, 0.0
    for i in range(classes):
        for j in range(classes):
            seen += weight(i, j) * np.mean((truth == i) & (guess == j))
            expected += weight(i, j) * np.mean(truth == i) * np.mean(guess == j)
    return 1 - seen / expected


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_two_classes_by_hand():
    """3 of 4 negatives and 1 of 2 positives are said right."""
    truth = np.array([0, 0, 0, 0, 1, 1])
    found = measure(Classification(2), two([0.1, 0.2, 0.3, 0.7, 0.6, 0.4]), truth)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((2 * 3 / (2 * 3 + 2) + 2 * 1 / (2 * 1 + 2)) / 2)
    assert found["auc"] == pytest.approx(6 / 8)
    assert found["kappa"] == pytest.approx((4 / 6 - (4 * 4 + 2 * 2) / 36) / (1 - (4 * 4 + 2 * 2) / 36))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=4, max_size=20))
def test_auc_is_the_share_of_pairs_in_order_ties_included(pairs):
    scores, truth = np.array(pairs).T
    found = measure(Classification(2), two(scores / 10), truth)
    if len(set(truth)) < 2:
        assert list(found) == ["accuracy"]
    else:
        assert found["auc"] == pytest.approx(auc_by_pairs(scores, truth))


def test_auc_of_several_classes_is_the_mean_of_each_against_the_rest():
    probabilities, truth = RANDOM.dirichlet([1, 1, 1], 30), RANDOM.integers(0, 3, 30)
    each = [auc_by_pairs(probabilities[:, c], (truth == c).astype(int)) for c in range(3)]
    assert measure(Classification(3), probabilities, truth)["auc"] == pytest.approx(np.mean(each))


def test_a_threshold_of_ones_own_and_one_for_each_slide():
    probabilities, truth = two([0.1, 0.3, 0.4, 0.9]), np.array([0, 1, 0, 1])
    assert measure(Classification(2), probabilities, truth)["accuracy"] == 0.75
    assert measure(Classification(2), probabilities, truth, 0.3)["accuracy"] == 0.75
    assert measure(Classification(2), probabilities, truth, np.array([0.5, 0.3, 0.5, 0.5]))["accuracy"] == 1
    assert said(probabilities, 0.3).tolist() == [0, 1, 1, 1], "a slide on the threshold is positive"
    assert said(np.array([[0.2, 0.3, 0.5]]), 0.3).tolist() == [2], "of three classes the likeliest"


def test_classes_that_do_not_occur_do_not_count():
    """Nobody is of class 2, but one is said to be: recall and F1 are those of classes 0 and 1."""
    found = measure(Classification(3), np.eye(3)[[0, 0, 1, 2]], np.array([0, 0, 1, 1]))
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert "auc" not in found


def test_labels_are_averaged_over_those_that_vary():
    probabilities = np.array([[0.9, 0.2, 0.1], [0.4, 0.6, 0.1], [0.7, 0.7, 0.1]])
    truth = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    found = measure(MultiLabel(3), probabilities, truth)
    assert found["auc"] == pytest.approx((1 + 1) / 2)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["accuracy"] == pytest.approx(7 / 9)
    assert list(measure(MultiLabel(3), probabilities, truth * 0)) == ["accuracy"]


def test_kappa_of_grades_has_quadratic_weights():
    truth, guess = RANDOM.integers(0, 5, 40), RANDOM.integers(0, 5, 40)
    found = measure(Ordinal(5), guess.astype(float), truth)
    assert found["kappa"] == pytest.approx(kappa_by_table(truth, guess, 5, lambda i, j: (i - j) ** 2))
    assert found["mean_absolute_error"] == pytest.approx(np.abs(truth - guess).mean())
    plain = measure(Classification(5), np.eye(5)[guess], truth)["kappa"]
    assert plain == pytest.approx(kappa_by_table(truth, guess, 5, lambda i, j: i != j))
    assert "kappa" not in measure(Ordinal(5), np.array([2.0, 2.0]), np.array([2, 2]))


def test_numbers_by_hand():
    found = measure(Regression(), np.array([1.0, 2.0, 6.0]), np.array([1.0, 3.0, 5.0]))
    assert found["mean_absolute_error"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 2 / 8)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 6], [1, 3, 5])[0, 1])
    assert list(measure(Regression(), np.array([1.0, 2.0]), np.array([3.0, 3.0]))) == ["mean_absolute_error"]
    assert "pearson" not in measure(Regression(), np.array([1.0, 1.0]), np.array([2.0, 3.0]))


def test_the_c_index_is_the_share_of_comparable_pairs_in_order():
    times, seen, risks = RANDOM.permutation(12) + 1.0, RANDOM.integers(0, 2, 12), RANDOM.integers(0, 6, 12) * 1.0
    seen[times.argmin()] = 1
    order = []
    for i, j in combinations(range(12), 2):
        early, late = (i, j) if times[i] < times[j] else (j, i)
        if seen[early]:  # else nobody knows whose event came first
            order.append((risks[early] > risks[late]) + (risks[early] == risks[late]) / 2)
    found = measure(Survival(4), risks, np.stack([times, seen], axis=1))
    assert found["c_index"] == pytest.approx(np.mean(order))


def test_without_a_pair_to_compare_there_is_no_c_index():
    assert measure(Survival(4), np.array([1.0, 2.0]), np.array([[1.0, 0], [2, 0]])) == {}
    assert measure(Survival(4), np.array([1.0, 2.0]), np.array([[1.0, 0], [2, 1]])) == {}


@pytest.mark.parametrize(
    ("task", "metric"),
    [(Classification(2), "auc"), (MultiLabel(2), "auc"), (Ordinal(3), "kappa"), (Regression(), "r2"),
     (Survival(), "c_index")],
)  # fmt: skip
def test_heads_are_compared_by_a_metric_that_is_measured(task, metric):
    assert main_metric(task) == metric
    truth = {Survival: np.array([[1.0, 1], [2, 1]]), MultiLabel: np.eye(2, dtype=int)}
    outputs = {Survival: [1.0, 0.0], Classification: np.eye(2), MultiLabel: np.eye(2)}
    assert metric in measure(task, np.array(outputs.get(type(task), [0.0, 1.0])), truth.get(type(task), np.arange(2)))


def test_an_unknown_task_has_no_metrics():
    with pytest.raises(TypeError, match="no metrics are known for object"):
        measure(object(), np.zeros(1), np.zeros(1))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(3, 25), st.integers(0, 999))
def test_classes_and_labels_are_measured_as_scikit_learn_does(classes, n, seed):
    from sklearn.metrics import cohen_kappa_score, f1_score, precision_recall_fscore_support, roc_auc_score

    random = np.random.default_rng(seed)
    truth, p = random.integers(0, classes, n), random.dirichlet(np.ones(classes), n).round(1) + 0.01
    p /= p.sum(axis=1, keepdims=True)
    guess, there = p.argmax(axis=1), np.unique(truth)
    if len(there) > 1:
        found = measure(Classification(classes), p, truth)
        _, recall, f1, _ = precision_recall_fscore_support(truth, guess, labels=there, average="macro", zero_division=0)
        said_by_all = [found[name] for name in ("balanced_accuracy", "macro_f1", "kappa")]
        assert said_by_all == pytest.approx([recall, f1, cohen_kappa_score(truth, guess)])
        if len(there) == classes:
            auc = roc_auc_score(truth, p[:, 1] if classes == 2 else p, multi_class="ovr")
            assert found["auc"] == pytest.approx(auc)
    labels = random.integers(0, 2, (n, classes))
    mixed = [c for c in range(classes) if len(np.unique(labels[:, c])) == 2]
    if mixed:
        found = measure(MultiLabel(classes), p, labels)
        assert found["macro_f1"] == pytest.approx(np.mean([f1_score(labels[:, c], p[:, c] >= 0.5) for c in mixed]))
        assert found["auc"] == pytest.approx(np.mean([roc_auc_score(labels[:, c], p[:, c]) for c in mixed]))


# --- intervals and tests ---------------------------------------------------------------------------------------------


def test_whole_groups_are_drawn():
    groups = ["a", "b", "a", "c", "b", "a"]
    sizes = {0: 3, 1: 2, 2: 3, 3: 1, 4: 2, 5: 3}
    drawn = []
    bootstrap(lambda rows: drawn.append(rows) or {}, groups, draws=50)
    for rows in drawn:
        counts = np.bincount(rows, minlength=6)
        assert counts[0] == counts[2] == counts[5]
        assert counts[1] == counts[4]
        assert sum(1 / sizes[row] for row in rows.tolist()) == pytest.approx(3), "as many groups as there are"
    assert len({tuple(rows) for rows in drawn}) > 10


def test_the_same_seed_draws_the_same_rows():
    def draw(**options):
        return bootstrap(lambda rows: {"sum": float(rows.sum())}, list("abcdefgh"), draws=20, **options)

    assert draw() == draw() != draw(seed=1)


def test_the_interval_of_a_binomial_has_the_width_that_is_known():
    right = np.arange(400) < 320
    drawn = bootstrap(lambda rows: {"accuracy": float(right[rows].mean())}, range(400), draws=2000)
    found = intervals({"accuracy": 0.8}, drawn)["accuracy"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8 - half, 0.8 + half), abs=0.006)


def test_slides_of_one_patient_are_not_independent():
    """100 patients with 4 slides each of one answer: as wide as 100 slides."""
    right, groups = np.repeat(np.arange(100) < 80, 4), np.repeat(np.arange(100), 4)
    drawn = bootstrap(lambda rows: {"accuracy": float(right[rows].mean())}, groups, draws=2000)
    found = intervals({"accuracy": 0.8}, drawn)["accuracy"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 100), rel=0.12)


def test_a_metric_that_half_of_the_draws_have_not_has_no_interval():
    drawn = [{"a": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 3.0}, {"a": 4.0, "b": 1.0}]
    found = intervals({"a": 2.0, "b": 1.0}, drawn)
    assert (found["a"].low, found["a"].high) == pytest.approx((1.075, 3.925))
    assert np.isnan(found["b"].low)
    assert np.isnan(found["b"].high)


@pytest.fixture(scope="module")
def pair():
    """The AUC of a head, and of one with much more signal; each with 99 draws."""
    truth, noise = np.arange(200) % 2, np.random.default_rng(1).normal(size=200)
    scores = [1 / (1 + np.exp(-(noise + gain * truth))) for gain in (0.3, 2.3)]
    metrics = [lambda rows, s=s: measure(Classification(2), two(s[rows]), truth[rows]) for s in scores]
    return [(m(np.arange(200)), bootstrap(m, range(200), draws=99)) for m in metrics]


def test_a_head_is_no_better_than_itself(pair):
    found, drawn = pair[0]
    assert difference(found, drawn, found, drawn, "auc") == (0, 0, 0, 1)


def test_a_much_better_head_is_better(pair):
    (worse, drawn_worse), (better, drawn_better) = pair
    found = difference(better, drawn_better, worse, drawn_worse, "auc")
    assert found.low > 0.1
    assert found.p == pytest.approx(2 / 100), "never 0: so many draws say no more"
    turned = difference(worse, drawn_worse, better, drawn_better, "auc")
    assert turned == pytest.approx((-found.value, -found.high, -found.low, found.p))


def test_a_difference_of_what_is_not_defined_is_not_tested():
    found = difference({"auc": 1.0}, [{"auc": 1.0}] * 4, {}, [{}] * 4, "auc")
    assert all(map(np.isnan, found))


def test_p_is_even_where_nothing_differs():
    """Two heads of equal worth, 60 cohorts: p below 0.2 in about a fifth."""
    random, low = np.random.default_rng(2), 0
    for _ in range(60):
        right = random.random((2, 60)) < 0.7
        metrics = [lambda rows, r=r: {"accuracy": float(r[rows].mean())} for r in right]
        drawn = [bootstrap(m, range(60), draws=100) for m in metrics]
        low += difference(metrics[0](np.arange(60)), drawn[0], metrics[1](np.arange(60)), drawn[1], "accuracy").p < 0.2
    assert 3 <= low <= 22


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([0.01, np.nan]) == pytest.approx([0.02, 1.0]), "what could not be tested is not significant"


# --- thresholds and calibration --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "truth", "threshold"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.5),
        ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 0.25),
        ([0.6, 0.7, 0.8, 0.9], [0, 0, 1, 1], 0.75),
        ([0.1, 0.3, 0.3, 0.9], [0, 0, 1, 1], 0.5),  # level ones fall on one side: 0.2 would be as good
        ([0.1, 0.3, 0.3, 0.35], [0, 0, 1, 1], 0.325),
        ([0.3, 0.3, 0.3, 0.3], [0, 1, 0, 1], 0.5),
        ([0.1, 0.2], [1, 1], 0.5),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 0.5),  # worse than chance
    ],
)
def test_youden_by_hand(scores, truth, threshold):
    assert best_threshold(np.array(scores), np.array(truth)) == pytest.approx(threshold)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1)), min_size=2, max_size=15))
def test_no_other_threshold_has_a_larger_sum(pairs):
    scores, truth = np.array(pairs).T
    if len(set(truth)) < 2:
        return
    scores = scores / 20

    def youden(cut):
        return (scores[truth == 1] >= cut).mean() - (scores[truth == 0] >= cut).mean()

    best = youden(best_threshold(scores, truth))
    every = [youden(cut) for cut in np.arange(0, 1.03, 0.025) if scores.min() < cut <= scores.max()]
    assert best >= max(every, default=0) - 1e-9 or max(every) <= 0


def test_the_calibration_error_by_hand():
    """Two bins: 2 slides at 0.95 of which 1 is right, 2 at 0.65 of which 2 are."""
    probabilities, truth = two([0.95, 0.95, 0.65, 0.35]), np.array([1, 0, 1, 0])
    assert calibration_error(probabilities, truth) == pytest.approx((2 * 0.45 + 2 * 0.35) / 4)
    assert calibration_error(two([1.0, 0.0]), np.array([1, 1])) == 0.5, "a confidence of 1 is in the last bin"
    assert calibration_error(two([0.95, 0.65]), np.array([0, 1]), bins=1) == pytest.approx(abs(0.8 - 0.5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature):
    random = np.random.default_rng(3)
    logits = random.normal(size=(4000, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = (p.cumsum(axis=1) < random.random((4000, 1))).sum(axis=1)
    assert best_temperature(logits * temperature, truth) == pytest.approx(temperature, rel=0.08)


def test_a_temperature_stays_within_bounds_and_changes_no_class():
    logits = np.array([[5.0, 0], [0, 5.0]])
    assert best_temperature(logits, np.array([0, 1])) == 1, "all right: no T would be the best"
    assert best_temperature(logits, np.array([1, 0])) == pytest.approx(20, rel=0.01)
    assert best_temperature(logits + 1e4, np.array([0, 1])) > 0, "no overflow"


def test_what_a_temperature_is_found_for_is_better_calibrated():
    random = np.random.default_rng(4)
    truth = random.integers(0, 2, 1000)
    logits = torch.from_numpy(np.stack([-1, 1] * (truth[:, None] * 2 - 1) + random.normal(size=(1000, 2)), 0) * 6)
    sure = calibration_error(logits.softmax(-1).numpy(), truth)
    cooled = calibration_error((logits / best_temperature(logits.numpy(), truth)).softmax(-1).numpy(), truth)
    assert cooled < sure / 2
