"""Labelled bags: slides or patients, what may not be parted, and what a table says of neither."""

import numpy as np
import pytest
import torch

from pipeline.cohort import read_cohort
from pipeline.errors import UsageError

ROWS = ["neg" if i % 2 == 0 else "pos" for i in range(24)]


def patients(size=2, label=lambda i: ("neg", "pos")[i % 2]):
    """Patient p00 has the first `size` slides, and so on; one label for each patient."""
    return [f"{label(i // size)},p{i // size:02}" for i in range(24)]


def test_slides_are_units_of_their_own(labelled):
    cohort = read_cohort(labelled.root, labelled.labels)
    assert len(cohort) == 24
    assert cohort.units == cohort.groups == [f"s{i:02}" for i in range(24)]
    assert cohort.slides[3] == ("s03",)
    assert len(set(cohort.whose)) == 24
    assert (cohort.splits, cohort.warnings, cohort.targets.names) == (None, (), ("neg", "pos"))
    assert cohort.index()["s07"] == 7


def test_a_patients_slides_are_one_bag(labelled):
    cohort = read_cohort(labelled.root, labelled.table(patients(3), "slide,label,patient"), unit="patient")
    assert cohort.units == cohort.groups == [f"p{i:02}" for i in range(8)]
    assert cohort.slides[1] == ("s03", "s04", "s05")
    assert cohort.targets.truth.tolist() == [0, 1] * 4
    bag = cohort.bags(None)[1]
    each = [torch.from_numpy(np.load(labelled.root / f"{slide}.npy")) for slide in cohort.slides[1]]
    assert torch.equal(bag.features, torch.cat(each))
    assert cohort.index() == {f"p{i:02}": i for i in range(8)} | {f"s{i:02}": i // 3 for i in range(24)}


def test_slides_of_one_patient_with_different_labels(labelled):
    table = labelled.table([f"{ROWS[i]},p{i // 2}" for i in range(24)], "slide,label,patient")
    with pytest.raises(UsageError, match=r"labels.csv: the slides of p0 have different labels: neg, pos"):
        read_cohort(labelled.root, table, unit="patient")
    assert len(read_cohort(labelled.root, table)) == 24, "as slides they may"


def test_what_shares_a_patient_or_a_site_is_ones(labelled):
    rows = [f"{row},x{i // 12}" for i, row in enumerate(patients(2))]
    table = labelled.table(rows, "slide,label,Case_ID,Hospital")
    by_case = read_cohort(labelled.root, table, group="Case_ID")
    assert len(set(by_case.whose)) == 12
    assert by_case.groups[:3] == ["p00", "p00", "p01"]
    by_site = read_cohort(labelled.root, table, group="case_id", site="hospital")
    assert len(set(by_site.whose)) == 2
    assert by_site.groups == by_case.groups, "intervals are by patient, whatever is kept together"


def test_the_target_is_any_column(labelled):
    table = labelled.table([f"{i},{row}" for i, row in enumerate(ROWS)], "slide,n,HER2")
    assert read_cohort(labelled.root, table, target="HER2").targets.names == ("neg", "pos")
    assert read_cohort(labelled.root, table, target="n", task="regression").targets.truth.tolist() == list(range(24))


def test_numbers_taken_for_classes_are_a_warning(labelled):
    (words,) = read_cohort(labelled.root, labelled.table([str(i) for i in range(24)])).warnings
    assert "24 different numbers are taken as the names of classes" in words


def test_an_empty_cell_is_a_label_set_without_labels(labelled):
    table = labelled.table(["", *["a;b", "b"] * 11, ""])
    cohort = read_cohort(labelled.root, table, task="multilabel")
    assert cohort.targets.truth[:3].tolist() == [[0, 0], [1, 1], [0, 1]]
    with pytest.raises(UsageError, match="'s00' has an empty label"):
        read_cohort(labelled.root, table)


def test_the_split_of_a_patient_is_that_of_all_slides(labelled):
    rows = [f"{row},{'test' if i > 17 else 'train'}" for i, row in enumerate(patients(3))]
    cohort = read_cohort(labelled.root, labelled.table(rows, "slide,label,patient,split"), unit="patient")
    assert cohort.splits == ["train"] * 6 + ["test"] * 2
    rows[0] = rows[0].replace("train", "test")
    with pytest.raises(UsageError, match=r"more than one side of the split.*: p00"):
        read_cohort(labelled.root, labelled.table(rows, "slide,label,patient,split"), unit="patient")


def test_the_state_changes_with_any_slide(labelled):
    before = read_cohort(labelled.root, labelled.labels).state()
    assert before == read_cohort(labelled.root, labelled.labels).state()
    labelled.write(5, 3.0)
    after = read_cohort(labelled.root, labelled.labels).state()
    assert [i for i in range(24) if before[i] != after[i]] == [5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit": "case"}, "--unit must be one of slide, patient, not 'case'"),
        ({"unit": "patient"}, "it has no column 'patient'; there are slide, label"),
        ({"group": "case"}, "it has no column 'case'"),
        ({"site": "hospital"}, "it has no column 'hospital'"),
        ({"target": "lable"}, "Did you mean 'label'"),
        ({"task": "survival"}, "it has no column 'time'"),
        ({"task": "clasification"}, "unknown task 'clasification'. Did you mean 'classification'"),
        ({"task": "regression"}, "label of 's00' is 'neg', which is not a number"),
        ({"encoder": "uni"}, "--encoder uni"),
    ],
)
def test_what_cannot_be_asked(labelled, options, words):
    with pytest.raises(UsageError, match=words):
        read_cohort(labelled.root, labelled.labels, **options)
