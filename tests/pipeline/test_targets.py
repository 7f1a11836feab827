"""What a label table asks of each slide: every kind, every refusal in words that name the slide."""

import numpy as np
import pytest

from heads.tasks import Classification, MultiLabel, Ordinal, Regression, Survival
from pipeline.errors import UsageError
from pipeline.targets import columns_of, doubts, read_targets

ALL = np.arange(6)


def read(kind, *cells, column="label"):
    """Of slides a, b, …; a cell of survival is `time event`."""
    rows = [{"slide": chr(97 + i), column: cell} for i, cell in enumerate(cells)]
    if kind == "survival":
        rows = [row | dict(zip(("time", "event"), row["label"].split(), strict=True)) for row in rows]
    return read_targets(kind, rows, column, "l.csv")


def test_classes_are_names_in_alphabetical_order():
    found = read("classification", "b", "a", "10", "b", "9", "a")
    assert found.names == ("10", "9", "a", "b")
    assert found.truth.tolist() == found.strata.tolist() == [3, 2, 0, 3, 1, 2]
    assert found.task(ALL) == Classification(4)
    assert found.answers(Classification(4), np.array([0, 2])).tolist() == [3, 0]


def test_labels_may_be_many_or_none():
    found = read("multilabel", "a;b", "b ; ", "", "c", "b", ";b;a")
    assert found.names == ("a", "b", "c")
    assert found.truth.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0]]
    assert found.task(ALL) == MultiLabel(3)
    assert found.strata.tolist() == [1, 2, 3, 0, 2, 1], "of the rarest label of each slide, none last"


def test_grades_are_whole_numbers_from_0():
    found = read("ordinal", "0", "3", "1.0", "3", "0", "1")
    assert found.names == ("0", "1", "2", "3"), "a grade that nobody has is one too"
    assert found.truth.tolist() == [0, 3, 1, 3, 0, 1]
    assert found.task(ALL) == Ordinal(4)


def test_numbers_are_parted_into_four_for_the_folds():
    found = read("regression", "1", "2e0", "-3.5", "4", "10", "6", column="ki67")
    assert found.names == ("ki67",)
    assert found.truth.tolist() == [1, 2, -3.5, 4, 10, 6]
    assert np.bincount(found.strata).tolist() in ([2, 1, 1, 2], [2, 1, 2, 1])
    assert (np.diff(found.strata[np.argsort(found.truth)]) >= 0).all()


def test_what_of_a_task_depends_on_data_comes_from_the_training_rows():
    numbers = read("regression", "1", "3", "5", "100", "200", "-7")
    assert numbers.task(np.array([0, 1, 2])) == Regression.of([1, 3, 5])
    times = read("survival", "1 1", "2 1", "3 1", "4 0", "500 1", "90 1")
    assert times.task(np.arange(4)).cuts == (2.0, 3.0)
    assert times.task(np.arange(2, 6)).cuts == (90.0, 500.0)


def test_times_and_events():
    found = read("survival", "1 1", "2.5 0", "3 1", "4 1", "5 1", "0 0")
    assert (found.names, found.strata.tolist()) == (("risk",), [1, 0, 1, 1, 1, 0])
    assert found.truth[:2].tolist() == [[1, 1], [2.5, 0]]
    task = found.task(ALL)
    assert isinstance(task, Survival)
    assert found.answers(task, np.array([0, 1, 4, 5])) == [(0, 1), (task.bin(2.5), 0), (task.bins - 1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("kind", "cells", "words"),
    [
        ("ordinal", ["1", "high"], "l.csv: label of 'b' is 'high', which is not a number"),
        ("ordinal", ["1", "1.5"], "label of 'b' is '1.5'; it must be 0 or a whole number above"),
        ("ordinal", ["-1", "1"], "label of 'a' is '-1'; it must be 0 or a whole number above"),
        ("regression", ["1", "nan"], "label of 'b' is 'nan', which is not a number"),
        ("regression", ["1", "1,5"], "label of 'b' is '1,5', which is not a number"),
        ("regression", ["inf", "1"], "label of 'a' is 'inf', which is not a number"),
        ("survival", ["1 1", "x 1"], "time of 'b' is 'x', which is not a number"),
        ("survival", ["1 1", "-2 1"], "time of 'b' is '-2', .* time must be 0 or more"),
        ("survival", ["1 1", "2 2"], "of 'b' is '2', its event '2'; .* event 1 .seen. or 0"),
        ("survival", ["1 1", "2 0.5"], "event of 'b' is '0.5'; it must be 0 or a whole number"),
        ("survival", ["1 0", "2 0"], "no event was seen"),
        ("multilabel", ["", " ; "], "label is empty everywhere"),
    ],
)
def test_refusals_name_the_slide(kind, cells, words):
    with pytest.raises(UsageError, match=words):
        read(kind, *cells)


def test_columns_that_a_kind_needs():
    assert columns_of("survival", "label") == ("time", "event")
    assert columns_of("ordinal", "grade") == ("grade",)
    with pytest.raises(UsageError, match=r"unknown task 'regresion'\. Did you mean 'regression'"):
        columns_of("regresion", "label")


def test_many_numbers_as_classes_are_said_aloud():
    numbers = read("classification", *map(str, range(20)))
    (words,) = doubts(numbers)
    assert "20 different numbers are taken as the names of classes" in words
    assert "--task regression" in words
    assert doubts(read("classification", *map(str, range(19)))) == []
    assert doubts(read("classification", *map(str, range(20)), "x")) == []
    assert doubts(read("regression", *map(str, range(20)))) == []
