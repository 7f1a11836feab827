"""How good predictions are, by the kind of task; intervals and tests by bootstrap; what probabilities are worth.

    found = measure(task, outputs, truth)                        # {"auc": 0.91, …}
    drawn = bootstrap(lambda rows: measure(task, outputs[rows], truth[rows]), groups=patients)
    intervals(found, drawn)

`outputs` are what `task.predict` says of the logits, one row for each slide; `truth` is (n,) classes, grades or
numbers, (n, C) of 0 and 1 for MultiLabel, (n, 2) time and event for Survival.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .tasks import Classification, MultiLabel, Ordinal, Regression, Survival, Task

Metrics = dict[str, float]
DRAWS = 5000  # p is at least 2 / draws, and among ten heads that counts 45 times
BINS = 10  # of the confidence


Threshold = float | np.ndarray | None


def measure(task: Task, outputs: np.ndarray, truth: np.ndarray, threshold: Threshold = None) -> Metrics:
    """Every metric of the task that is defined for these slides; what is not (an AUC of one class) is left out.

    threshold: with two classes, the probability of the second from which on it is said, one for all or (n,); None: the
    likelier one.
    """
    if isinstance(task, Classification):
        return _of_classes(outputs, truth, threshold)
    if isinstance(task, MultiLabel):
        return _of_labels(outputs, truth)
    if isinstance(task, Ordinal):
        return _of_grades(outputs, truth)
    if isinstance(task, Regression):
        return _of_numbers(outputs, truth)
    if isinstance(task, Survival):
        return _of_times(outputs, truth)
    raise TypeError(f"no metrics are known for {type(task).__name__}")


def main_metric(task: Task) -> str:
    """The one by which heads are compared."""
    if isinstance(task, Classification | MultiLabel):
        return "auc"
    return "kappa" if isinstance(task, Ordinal) else "r2" if isinstance(task, Regression) else "c_index"


def said(probabilities: np.ndarray, threshold: Threshold) -> np.ndarray:
    """(n, C) → (n,) classes."""
    if threshold is None or probabilities.shape[1] != 2:
        return probabilities.argmax(axis=1)
    return (probabilities[:, 1] >= threshold).astype(int)


def _of_classes(probabilities: np.ndarray, truth: np.ndarray, threshold: Threshold) -> Metrics:
    """AUC: of three classes or more the mean of one against the rest, where all of them occur.

    By hand: scikit-learn takes twenty times as long, most of it to look at what it is given, and a bootstrap asks
    thousands of times.
    """
    guess, classes = said(probabilities, threshold), probabilities.shape[1]
    table = np.bincount(truth * classes + guess, minlength=classes**2).reshape(classes, classes)
    right, true, told, n = table.diagonal(), table.sum(axis=1), table.sum(axis=0), len(truth)
    there = true > 0
    out = {"accuracy": float(right.sum() / n)}
    if there.sum() < 2:
        return out
    out["balanced_accuracy"] = float((right / true.clip(1))[there].mean())  # of the classes that occur
    out["macro_f1"] = float((2 * right / (true + told).clip(1))[there].mean())
    chance = float(true @ told) / n**2
    out["kappa"] = (out["accuracy"] - chance) / (1 - chance)
    if there.all():
        each = range(classes) if classes > 2 else (1,)
        out["auc"] = float(np.mean([auc(probabilities[:, c], truth == c) for c in each]))
    return out


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs in order, half of those that are level: from the sum of the ranks of the positive."""
    from scipy.stats import rankdata

    count, rest = int(positive.sum()), int((~positive).sum())
    return float((rankdata(scores)[positive].sum() - count * (count + 1) / 2) / (count * rest))


def _of_labels(probabilities: np.ndarray, truth: np.ndarray) -> Metrics:
    """Means over the labels that some slides have and some have not."""
    guess = probabilities >= 0.5
    out = {"accuracy": float((guess == truth).mean())}
    mixed = [c for c in range(truth.shape[1]) if len(np.unique(truth[:, c])) == 2]
    if mixed:
        both, either = (guess & (truth > 0)).sum(axis=0), guess.sum(axis=0) + truth.sum(axis=0)
        out["macro_f1"] = float(np.mean(2 * both[mixed] / either[mixed]))
        out["auc"] = float(np.mean([auc(probabilities[:, c], truth[:, c] > 0) for c in mixed]))
    return out


def _of_grades(grades: np.ndarray, truth: np.ndarray) -> Metrics:
    """Kappa with quadratic weights."""
    from sklearn.metrics import cohen_kappa_score

    guess = grades.round().astype(int)
    out = {"accuracy": float((guess == truth).mean()), "mean_absolute_error": float(np.abs(grades - truth).mean())}
    if len(np.unique(np.concatenate([guess, truth]))) > 1:
        out["kappa"] = float(cohen_kappa_score(truth, guess, weights="quadratic"))
    return out


def _of_numbers(numbers: np.ndarray, truth: np.ndarray) -> Metrics:
    from sklearn.metrics import r2_score

    out = {"mean_absolute_error": float(np.abs(numbers - truth).mean())}
    if len(truth) > 1 and np.ptp(truth) > 0:
        out["r2"] = float(r2_score(truth, numbers))
        if np.ptp(numbers) > 0:
            out["pearson"] = float(np.corrcoef(numbers, truth)[0, 1])
    return out


def _of_times(risks: np.ndarray, truth: np.ndarray) -> Metrics:
    """Harrell's concordance index."""
    from sksurv.exceptions import NoComparablePairException
    from sksurv.metrics import concordance_index_censored

    try:
        return {"c_index": float(concordance_index_censored(truth[:, 1].astype(bool), truth[:, 0], risks)[0])}
    except (NoComparablePairException, ValueError):  # ValueError: nobody's event was seen
        return {}


# -- bootstrap --


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Difference(NamedTuple):
    value: float
    low: float
    high: float
    p: float  # two-sided


def bootstrap(
    metrics: Callable[[np.ndarray], Metrics], groups: Sequence[object], draws: int = DRAWS, seed: int = 0
) -> list[Metrics]:
    """The metrics of rows drawn with replacement, by whole groups: slides of one patient are not independent.

    `metrics` takes rows, `groups` says whose each row is. The same groups and seed draw the same rows.
    """
    random = np.random.default_rng(seed)
    names = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(names == name) for name in range(names.max() + 1)]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of draws without one of the classes
        for _ in range(draws):
            drawn = random.integers(len(members), size=len(members))
            found.append(metrics(np.concatenate([members[i] for i in drawn])))
    return found


def intervals(values: Metrics, drawn: Sequence[Metrics]) -> dict[str, Interval]:
    """Each metric with its 95 % percentile interval.

    Draws in which a metric is not defined do not count; where that is half of them or more, its interval is NaN.
    """
    return {
        name: Interval(value, *_span([one[name] for one in drawn if name in one], len(drawn)))
        for name, value in values.items()
    }


def difference(
    a: Metrics, drawn_a: Sequence[Metrics], b: Metrics, drawn_b: Sequence[Metrics], metric: str
) -> Difference:
    """How much better a is than b, where both were drawn from the same rows: a paired bootstrap.

    p: twice the share of draws on the smaller side of zero, of which one is added so that it is never 0.
    """
    value = a.get(metric, np.nan) - b.get(metric, np.nan)
    known = [x[metric] - y[metric] for x, y in zip(drawn_a, drawn_b, strict=True) if metric in x and metric in y]
    low, high = _span(known, len(drawn_a))
    if np.isnan(low):
        return Difference(value, low, high, np.nan)
    side = min(sum(one <= 0 for one in known), sum(one >= 0 for one in known))
    return Difference(value, low, high, min(1.0, 2 * (side + 1) / (len(known) + 1)))


def _span(known: Sequence[float], draws: int) -> tuple[float, float]:
    if len(known) <= draws / 2:
        return np.nan, np.nan
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, so that the chance of one false alarm among them stays at the level (Holm 1979)."""
    order, adjusted, highest = np.argsort(p), np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted.tolist()


# -- thresholds and calibration --


def best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """(n,) of the second class → where sensitivity + specificity is largest (Youden), half-way between two slides.

    Of equals the one nearest to 0.5; 0.5 where only one class occurs, or nothing parts them better than chance.
    """
    if len(np.unique(truth)) < 2:
        return 0.5
    levels = np.unique(probabilities)
    cuts = np.concatenate([(levels[1:] + levels[:-1]) / 2, [0.5]])
    guess = probabilities >= cuts[:, None]
    sums = guess[:, truth == 1].mean(axis=1) - guess[:, truth == 0].mean(axis=1)
    if sums.max() <= 0:
        return 0.5
    best = cuts[sums >= sums.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al., ICML 2017): the mean gap between confidence and accuracy, by bins."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[at == b].sum() - right[at == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(truth))


def best_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """T > 0 with the lowest cross-entropy of softmax(logits / T) (Guo et al., ICML 2017), between 0.05 and 20.

    1 where all are right: the surer the better then, and no finite T would be the best.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    if (logits.argmax(axis=1) == truth).all():
        return 1.0

    def loss(log_t: float) -> float:
        return float(-log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(truth)), truth].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))
