"""How much the features say by themselves: a slide is one vector, judged by its neighbours and by a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heads.tasks import Classification

from .bags import choose_level
from .cohort import Cohort, read_cohort
from .errors import UsageError
from .evaluation import Answers, Pooled, summary, summary_lines, write_json
from .folds import Fold
from .judging import Judged
from .prediction import find_model, load_model

NEIGHBOURS = 20
POOLINGS = ("mean", "max")
LEAST = 1e-12  # of a probability: its logarithm is written


def probe(
    out: str | Path,
    labels: str | Path,
    *,
    knn: bool = True,
    linear: bool = True,
    pooling: str = "mean",
    model: str | None = None,
    level: float | None = None,
    encoder: str | None = None,
    target: str = "label",
    group: str = "patient",
    site: str | None = None,
    unit: str = "slide",
    cv: int | None = None,
    splits: str | Path | None = None,
    split_by: str | None = None,
    seeds: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Classify slides by one vector each: the mean or the largest of their tiles' features, or what a model makes.

    knn: the votes of the 20 nearest training slides by cosine, weighted by nearness; linear: logistic regression on
    standardised vectors. Folds as those of `train` (`cv=5` unless told otherwise); the slides that would validate are
    trained on too, as nothing is chosen. Writes OUT/models/probe.json. Raises UsageError.
    """
    if pooling not in POOLINGS:
        raise UsageError(f"--pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
    if not (knn or linear):
        raise UsageError("neither --knn nor --linear: nothing to do")
    if cv is None and splits is None and split_by is None:
        cv = 5
    cohort = read_cohort(out, labels, target=target, group=group, site=site, unit=unit, encoder=encoder)
    how = Judged(cv, splits, split_by, seeds, seed)
    folds, notes = how.folds(cohort)
    vectors = _embeddings(cohort, pooling, model, level)
    kinds = {"knn": _knn} if knn else {}
    kinds |= {"linear": _linear} if linear else {}
    truth, found = cohort.targets.truth, {}
    for kind, classify in kinds.items():
        answers = [_answers(classify, vectors, cohort, fold, fold_seed) for fold_seed, fold in folds]
        found[kind] = summary(answers, truth, Pooled(answers, truth, cohort.groups))
    settings = {"pooling": pooling if model is None else None, "model": model, "target": target, "unit": unit}
    results = {"settings": settings | how.words(), "names": list(cohort.targets.names)} | found
    (cohort.place / "models").mkdir(exist_ok=True)
    write_json(cohort.place / "models" / "probe.json", results)
    return results | {"warnings": [*cohort.warnings, *notes]}


def _embeddings(cohort: Cohort, pooling: str, model: str | None, level: float | None) -> np.ndarray:
    """(n, E)."""
    if model is not None:
        if level is not None:
            raise UsageError("--level: a model reads the level that it was trained on")
        trained = load_model(find_model(model, cohort.place))
        bags = cohort.bags(trained.level, trained.head.needs.pixels)
        try:
            with torch.no_grad():
                return np.stack([trained.head(bags[i]).embedding.numpy() for i in range(len(cohort))])
        except ValueError as error:
            raise UsageError(f"--model {model}: {error}") from error
    bags = cohort.bags(choose_level(cohort.source().levels, level))
    pooled = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[pooling]
    return np.stack([pooled(bags[i].valid_features).numpy() for i in range(len(cohort))])


def _answers(classify: Any, vectors: np.ndarray, cohort: Cohort, fold: Fold, seed: int) -> Answers:
    truth, rows = cohort.targets.truth, np.concatenate([fold.train, fold.val])
    if len(np.unique(truth[rows])) < 2:
        raise UsageError(f"{fold.name}: all training slides have the same label; one class alone cannot be learned")
    machine = classify(len(rows)).fit(vectors[rows], truth[rows])
    found = np.full((len(fold.test), len(cohort.targets.names)), LEAST)  # a class nobody was trained on is not said
    found[:, machine.classes_] = machine.predict_proba(vectors[fold.test])
    logits = np.log(np.maximum(found, LEAST))
    return Answers(fold.name, seed, Classification(len(cohort.targets.names)), fold.test, logits)


def _knn(count: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(NEIGHBOURS, count), weights="distance", metric="cosine")


def _linear(count: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))


def lines(results: dict[str, Any]) -> Sequence[str]:
    """A readable table."""
    out: list[str] = []
    for kind in ("knn", "linear"):
        if kind in results:
            out += [kind, *summary_lines(results[kind])]
    return out
