"""What a model says of a slide: as an array, a row of a table, and words; for every kind of task."""

import numpy as np
import pytest
import torch

from heads.tasks import Classification, MultiLabel, Ordinal, Regression, Survival
from pipeline.verdict import answer, array_name, cells, columns, words

TWO = ("benign", "malignant")
CASES = [
    (Classification(2), TWO, [0.0, np.log(3)], None, ["malignant", "0.250000", "0.750000"], "malignant (0.750)"),
    (Classification(2), TWO, [0.0, np.log(3)], 0.8, ["benign", "0.250000", "0.750000"], "benign (0.250)"),
    (Classification(3), ("a", "b", "c"), [0.0, 0.0, 99.0], 0.8, ["c", "0.000000", "0.000000", "1.000000"], "c (1.000)"),
    (MultiLabel(2), ("x", "y"), [9.0, 0.0], None, ["x;y", "0.999877", "0.500000"], "x;y"),
    (MultiLabel(2), ("x", "y"), [-9.0, -9.0], None, ["", "0.000123", "0.000123"], "none of x, y"),
    (Ordinal(4), ("0", "1", "2", "3"), [2.4], None, ["2"], "2"),
    (Ordinal(4), ("0", "1", "2", "3"), [9.0], None, ["3"], "3"),
    (Regression(10.0, 2.0), ("age",), [1.25], None, ["12.5"], "age 12.5"),
    (Survival(2), ("risk",), [0.0, 0.0], None, ["-0.75"], "risk -0.75"),  # -(1/2 + 1/4)
]


@pytest.mark.parametrize(("task", "names", "logits", "threshold", "row", "said"), CASES)
def test_a_row_and_words(task, names, logits, threshold, row, said):
    values = answer(task, torch.tensor(logits, dtype=torch.float64))
    assert values.dtype == np.float64
    assert cells(task, names, values, threshold) == row
    assert words(task, names, values, threshold) == said
    assert len(columns(task, names)) == len(row)


def test_numbers_are_not_stored_as_probabilities():
    assert array_name(Classification(2)) == array_name(MultiLabel(2)) == "probabilities"
    assert {array_name(task) for task in (Ordinal(3), Regression(), Survival())} == {"value"}
